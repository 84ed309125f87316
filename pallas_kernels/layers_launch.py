"""Writes the launch of `layers`: the loop over layers of the producer warp and of the consumer warps."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from pallas_kernels import liveness
from pallas_kernels.exchange import Exchange
from pallas_kernels.layers_parts import HeadPart, Part
from pallas_kernels.ptx import Ptx
from pallas_kernels.registers import Register, at
from pallas_kernels.ring_launch import Launch
from pallas_kernels.ring_plan import LaunchPlan
from pallas_kernels.ring_slots import Position

POINTER = 8  # bytes of an address
QKV, OUT, GATE_UP, DOWN = range(4)  # the indices of the products


class Records:
    """The table in shared memory that has the addresses of every layer's arrays: a record a layer.

    Attributes:
        current: register with the address of this warp's current layer's record.
        following: with that of the next one's, of the last layer its own.
    """

    current: Register
    following: Register

    def __init__(self, ptx: Ptx, names: Sequence[str], layers: int, offset: int) -> None:
        self.ptx, self.layers, self.offset = ptx, layers, offset
        self.offsets = {name: POINTER * i for i, name in enumerate(names)}
        self.size = POINTER * len(names)

    def load(self, name: str) -> Register:
        """The address of one of the current layer's arrays."""
        return self.ptx.op("ld.shared.b64", at(self.current, self.offsets[name]))

    @contextlib.contextmanager
    def of_following(self) -> Iterator[None]:
        """What is loaded inside the context is the next layer's."""
        current, self.current = self.current, self.following
        yield
        self.current = current

    def begin(self, shared: Register) -> None:
        """Starts at the first layer."""
        self.current = shared + self.offset

    def advance(self) -> None:
        """Goes on to the next layer."""
        self.ptx.do("add.u32", self.current, self.current, self.size)


class Operands(dict[str, Register]):
    """The operands of a part of the launch: of the whole launch, or of the current layer.

    A layer's address is loaded where it is asked for, so that no register holds it all the time.

    Args:
        fixed: those of the whole launch.
        records: of the layers.
        own: {name here: name in the records}.
    """

    def __init__(
        self, fixed: Mapping[str, Register], records: Records, own: Mapping[str, str]
    ) -> None:
        super().__init__(fixed)
        self._records, self._own = records, own

    def __getitem__(self, name: str) -> Register:
        if name in self._own:
            return self._records.load(self._own[name])
        return super().__getitem__(name)


class LayersLaunch(Launch):
    """Writes the launch.

    Args:
        plan: what is planned, with a signal for each product.
        products: queries, keys and values; output; gate and up; down.
        head: attention, with the number of its warps.
        exchange: through which they give rows to each other.
        records: the layers' addresses.
        addresses: the operands that the records are made of, a layer after another.
        stream: the address of the residual stream that it begins with.
    """

    parts: Sequence[Part]

    def __init__(
        self,
        plan: LaunchPlan,
        products: Sequence[Part],
        head: HeadPart,
        exchange: Exchange,
        records: Records,
        addresses: Sequence[Register],
        stream: Register,
    ) -> None:
        super().__init__(plan, products)
        self.parts, self.head, self.exchange = products, head, exchange
        self.records, self.addresses, self.stream = records, addresses, stream
        head.offset, head.exchange = plan.offsets["partial"], exchange

    def write(self) -> str:
        """The kernel's PTX."""
        ptx, ring = self.ptx, self.ring
        ptx.share(self.plan.shared_bytes)
        ptx.comment("locate: this lane; the addresses of all layers' arrays")
        self._locate_lane()
        ring.is_first_lane = self.lane.eq(0)
        is_producer = self.warp.eq(self.consumers)
        copies = self.thread.eq(32 * self.consumers)
        self._fill_table()
        ptx.do("bra", "fdk_no_ring", when=~copies)
        ring.make(self.shared)
        ptx.label("fdk_no_ring")
        ptx.do("barrier.sync", 0)
        ptx.do("bra", "fdk_consumers", when=~is_producer)
        ptx.do("bra", "fdk_end", when=~copies)
        ptx.comment("copy: the producer, all weights of all layers")
        self._copy_layers(ring.locate(self.shared, 1))
        ptx.do("bra", "fdk_end")
        ptx.label("fdk_consumers")
        self._compute_layers(ring.locate(self.shared, 0))
        ptx.label("fdk_end")
        return liveness.define(ptx.text(), "fdk_layer")

    def _fill_table(self) -> None:
        """The first lanes of the warps store the addresses, each a part of them."""
        ptx, warps = self.ptx, self.consumers + 1
        each = -(-len(self.addresses) // warps)
        for warp in range(warps):
            entries = range(warp * each, min((warp + 1) * each, len(self.addresses)))
            if not entries:
                break
            ptx.do("bra", f"fdk_entries_{warp}", when=~self.warp.eq(warp))
            for entry in entries:
                target = at(self.shared, self.records.offset + POINTER * entry)
                ptx.do("st.shared.b64", target, self.addresses[entry], when=self.ring.is_first_lane)
            ptx.label(f"fdk_entries_{warp}")

    # The producer warp

    def _copy_layers(self, position: Position) -> None:
        """Copies the weights of all layers: a product's first slots before the last one's outputs are there."""
        ptx = self.ptx
        self.records.begin(self.shared)
        layer = ptx.op("mov.u32", 0)
        ptx.label("fdk_copy_layer")
        parity = layer & 1
        for number, product in enumerate(self.products):
            product.locate(self)
            for run in range(product.plan.runs):
                weight_range = product.weight_range(run)
                if not run:
                    self._copy(
                        product, weight_range, position, f"{number}_ahead", product.plan.ahead
                    )
                    # Where nothing is left to copy, the consumers could be through the next layer before this
                    # looks, and the barrier in the phase that it waits for again.
                    ptx.do("bra", f"fdk_all_ahead_{number}", when=weight_range[2].eq(0))
                    self._wait_for_outputs(number, layer, parity)
                    ptx.label(f"fdk_all_ahead_{number}")
                self._copy(product, weight_range, position, f"{number}_{run}")
        self.records.advance()
        ptx.do("add.u32", layer, layer, 1)
        again = layer < self.records.layers
        ptx.do("bra", "fdk_copy_layer", when=again)

    def _wait_for_outputs(self, number: int, layer: Register, parity: Register) -> None:
        """Waits until this program's outputs of the product before this one are in memory."""
        if number:
            self.ring.wait(self._signalled(number - 1), parity, f"signalled_{number}")
            return
        first = layer.eq(0)
        self.ptx.do("bra", "fdk_copy_first", when=first)
        before = parity ^ 1
        self.ring.wait(self._signalled(len(self.products) - 1), before, "signalled_0")
        self.ptx.label("fdk_copy_first")

    # The consumer warps

    def _mark(self) -> None:
        """A stage begins, where all consumer threads come by; see `liveness`."""
        self.ptx.comment(liveness.MARK.removeprefix("// "))

    def _compute_layers(self, position: Position) -> None:
        ptx, records, parts = self.ptx, self.records, self.parts
        records.begin(self.shared)
        layer = ptx.op("mov.u32", 0)
        self.program = ptx.op("mov.u32", "%ctaid.x")
        parts[OUT].locate(self)
        parts[OUT].load_stream(self.stream)
        parts[QKV].locate(self)
        parts[QKV].load_codebooks()()
        self._sync_consumers()
        ptx.label("fdk_layer")
        self._mark()
        goes_on = layer.ne(records.layers - 1)
        records.following = records.current + ptx.op("selp.b32", records.size, 0, goes_on)
        self.exchange.begin_layer(layer)
        for number, part in enumerate(parts):
            if number == OUT:
                ptx.prefix = "attention_"
                self._attend()
            ptx.prefix = f"p{number}_"
            self._mark()
            part.locate(self)
            part.constants()
            part.prepare_x(part.beside_x)
            self._sync_consumers()
            self._mark()
            part.add_squares()
            store_codebooks = self._load_next_codebooks(number)
            part.loop(self.ring, position)
            store_codebooks()
            self._sync_consumers()
            self._mark()
            part.reduce_and_store()
            # All have stored theirs, and the next part's constants may take the memory of the sums.
            self._sync_consumers()
            signal = self._signalled(number)
            ptx.do("mbarrier.arrive.shared::cta.b64", "_", signal, when=self._first_thread())
        ptx.prefix = ""
        records.advance()
        ptx.do("add.u32", layer, layer, 1)
        again = layer < records.layers
        ptx.do("bra", "fdk_layer", when=again)

    def _load_next_codebooks(self, number: int) -> Callable[[], None]:
        """Starts loading the codebooks of the product after this one, and returns what stores them."""
        following = self.parts[(number + 1) % len(self.parts)]
        following.locate(self)
        if number < len(self.parts) - 1:
            return following.load_codebooks()
        with self.records.of_following():
            return following.load_codebooks()

    def _attend(self) -> None:
        """Attention: a program a query head, others wait for its outputs."""
        ptx, head = self.ptx, self.head
        for name in ("shared", "thread", "lane", "warp"):
            setattr(head, name, getattr(self, name))
        none = self.program >= head.case.heads
        ptx.do("bra", "fdk_no_head", when=none)
        self._mark()
        head.locate(self.program, ptx.op("mov.u32", 0))
        idle = self.warp >= head.warps
        ptx.do("bra", "fdk_summed", when=idle)
        ptx.comment("load: the first keys and values, before the token's")
        head.load_cache()
        beside = head.load_beside()
        ptx.comment("token: norms, RoPE, its key and value into the cache")
        head.mix(head.start(head.load_token(), beside))
        head.store_sums()
        ptx.label("fdk_summed")
        self._sync_consumers()
        self._mark()
        ptx.comment("reduce and store: the warps' sums through shared memory")
        head.join_sums()
        # The next product's sums take the memory of these.
        self._sync_consumers()
        ptx.label("fdk_no_head")

"""The parts of a layer in the launch of `layers`: products and attention that give rows to each other."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels import integer_one
from pallas_kernels.exchange import Exchange
from pallas_kernels.layout import TILE_ROWS
from pallas_kernels.outputs import Load
from pallas_kernels.ptx import load_float, over_lanes, store_float
from pallas_kernels.registers import Register, at
from pallas_kernels.short_attention import Head


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where a product's inputs come from and its outputs go to.

    Attributes:
        exchange: through which.
        names: {"x", "squares", "y", "scaled", "squares_out": its name there}.
        reads_before: whether the inputs are the last layer's outputs.
        leaves_stream: whether its sum is the residual stream after the layer, which is stored as "total".
    """

    exchange: Exchange
    names: dict[str, str]
    reads_before: bool
    leaves_stream: bool


class Part(integer_one.Product):
    """A product whose ends are in an exchange; the residual stream of its rows stays in shared memory."""

    ends: Ends

    def add_squares(self) -> None:
        """Adds the squares that all programs have left: the last warp does, while the others multiply.

        Whatever the program stores after the barrier that follows comes after what it has seen here.
        """
        if not self.case.squares:
            return
        self._add_squares(self.consumers - 1, self.offsets["squares"])
        self.ptx.do("fence.acq_rel.gpu", when=self.warp.eq(self.consumers - 1))

    def constants(self) -> None:
        """What can be done before x is there; `_total` leaves out what no warp has stored."""
        self.prepare_constants()

    def beside_x(self) -> None:
        """What else its outputs need."""
        self._load_residuals()

    def _total(self, index: Register, run: int, token: int) -> Register:
        """See `Product._total`; of the warps that have a block of the row's tile, if not all have one."""
        ptx, blocks, consumers = self.ptx, self.case.blocks, self.consumers
        if blocks >= consumers:
            return super()._total(index, run, token)
        tile, row, lower = index >> 4, index & 7, (index >> 3) & 1
        warp = (tile * blocks).low() % consumers + self.odd
        if run:
            tile = tile + self.tiles * run
        address = self.shared + tile * self.plan.tile_bytes + row * 8 + lower * 4
        parts = []
        for i in range(-(-blocks // 2)):
            wraps = warp >= consumers
            ptx.do("sub.u32", warp, warp, consumers, when=wraps)
            part = ptx.zero()
            source = at(address + warp * (4 * TILE_ROWS), self.offsets["partial"])
            in_bounds = self.odd.eq(0) if 2 * i + 1 == blocks else None
            ptx.do("ld.shared.f32", part, source, when=in_bounds)
            parts.append(part)
            warp = warp + 2
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return over_lanes(ptx, "add.f32", total, (1,))

    def load_stream(self, total: Register) -> None:
        """Begins with the residual stream of its rows."""
        ptx, rows = self.ptx, self.plan.max_tiles * TILE_ROWS
        for start in self._row_starts:
            index = (self.thread >> 1) + start
            row = ptx.op("min.u32", index + self.first_tile * TILE_ROWS, self.case.n - 1)
            value = load_float(ptx, total, row, self.case.x_dtype)
            target = at(self.shared + index * 4, self.offsets["stream"])
            ptx.do("st.shared.f32", target, value, when=index < rows)

    def _row(self, name: str) -> Register:
        return self.ends.exchange.address(self.ends.names[name], before=self.ends.reads_before)

    def _load(self, load: Load) -> None:
        self.ends.exchange.load(load)

    def _settle(self, loads: Sequence[Load]) -> None:
        self.ends.exchange.settle(loads)

    def _store(
        self, value: Register, row: Register, name: str, token: Register | None = None
    ) -> None:
        assert token is None, "layers have one token"
        self.ends.exchange.put(self.ends.names[name], row, value)

    def _stream_address(self, row: Register) -> Register:
        """Where in shared memory the residual stream of a row of the program is; the nearest one there is."""
        index = row - self.first_tile * TILE_ROWS
        index = self.ptx.op("min.u32", index, self.plan.max_tiles * TILE_ROWS - 1)
        return self.shared + index * 4

    def _load_residual(self, row: Register) -> list[Register]:
        ptx, case = self.ptx, self.case
        value = ptx.op("ld.shared.f32", at(self._stream_address(row), self.offsets["stream"]))
        row = ptx.op("min.u32", row, case.n - 1)
        return [value, load_float(ptx, self.operands["norm_scale"], row, case.x_dtype)]

    def _keep_sum(self, total: Register, row: Register) -> None:
        target = at(self._stream_address(row), self.offsets["stream"])
        self.ptx.do("st.shared.f32", target, total)
        if self.ends.leaves_stream:
            address = self.operands["total"] + row * self.case.out_bytes
            store_float(self.ptx, address, total, self.case.out_dtype)

    def _store_part(self, part: Register, total: Register, warps: int) -> None:
        name = self.ends.names["squares_out"]
        self.ends.exchange.put_sum(name, part, total, self._stores_part(warps))


class HeadPart(Head):
    """Attention whose token and output are in an exchange."""

    exchange: Exchange

    def load_token(self):
        """See `Head.load_token`; waits for it."""
        self._loads: list[Load] = []
        token = super().load_token()
        self.exchange.settle(self._loads)
        return token

    def _token_row(self) -> Register:
        return self.exchange.address("qkv")

    def _load_part(self, address: Register, offset: int = 0) -> list[Register]:
        words = self.ptx.registers("b32", self.case.each // 2)
        self._loads.append(Load(words, at(address, offset)))
        self.exchange.load(self._loads[-1])
        return words

    def _store_output(self, value: Register) -> None:
        index = self.head * self.case.dim + self.thread
        self.exchange.put("mixed", index, value)

"""The sum of what several GPUs of one process hold, with the residual sum and the norm after it, in one launch.

    sum = residual + (sum of the devices' rows);  y = scale * sum / sqrt(mean(sum**2) + eps)

A collective of XLA's is a launch of its own, outside of the graph of all other launches of a decoding step, and
takes longer than a layer's products. Here each device stores its rows into all `mailbox`es, and adds what has
arrived in its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import decoding, mailbox, xla_call
from pallas_kernels.mailbox import HEAD, MAX_ROWS, WORD
from pallas_kernels.ptx import Ptx, Writer, over_lanes
from pallas_kernels.registers import Register, at, wide
from pallas_kernels.target import Target

_PIECE = 2  # words that a thread reads or writes at once
_MAX_FEATURES = 16384


@dataclasses.dataclass(frozen=True)
class PeerSum:
    """A sum of rows over devices.

    Attributes:
        devices: how many, from 2 to 8.
        rows: from 1 to `MAX_ROWS`.
        features: of a row.
        dtype: of the devices' rows: bfloat16, float16 or float32.
        out_dtype: of the residual and the results.
        normed: whether a residual is added, and a norm follows; otherwise the sum is all.
        eps: added to the mean square.
    """

    devices: int
    rows: int
    features: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    normed: bool
    eps: float = 0.0

    @property
    def piece(self) -> int:
        """Values that a thread reads or writes at once."""
        return 4 * _PIECE // self.dtype.itemsize

    @property
    def pieces(self) -> int:
        """Of a row."""
        return self.features // self.piece

    @property
    def threads(self) -> int:
        """Of a program: one of a row."""
        wanted = -(-self.pieces // 32) * 32
        return min(1024 if wanted <= 1024 else 512, wanted)


def unsupported_reason(case: PeerSum, target: Target) -> str | None:
    """Why there is no kernel for a sum, or None."""
    if target.capability is None or target.capability < (8, 0):
        return f"{target.architecture} is not known"
    if not 2 <= case.devices <= 8:
        return f"{case.devices} devices are not 2 to 8"
    if not 1 <= case.rows <= (max_rows := min(MAX_ROWS, target.multiprocessors)):
        # Each waits for the same one on the other devices, so that all have to run at once.
        return f"{case.rows} rows are not 1 to {max_rows}"
    if case.features % case.piece or not 0 < case.features <= _MAX_FEATURES:
        return f"{case.features} features are not a multiple of {case.piece} up to {_MAX_FEATURES}"
    if case.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{case.dtype} is not bfloat16, float16 or float32"
    if case.out_dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{case.out_dtype} is not bfloat16, float16 or float32"
    return None


def peer_sum(
    case: PeerSum,
    x: Array,
    box: Array,
    addresses: Array,
    target: Target,
    residual: Array | None = None,
    scale: Array | None = None,
) -> tuple[Array, ...]:
    """Adds rows of all devices.

    Every device has to call it as often, in the same order, each call depending on the one before.

    Args:
        case: what is added.
        x: [rows, features] of this device.
        box: uint32 [mailbox.words], zero before the first call: never copied or given up in between.
        addresses: uint32 [2 + 2 * devices], the number of this device and zero, then the address of each
            device's mailbox, lower half first.
        target: the GPU.
        residual: [rows, features] with a norm.
        scale: [features] with a norm.

    Returns:
        (sum,), or (sum, y) with a norm, of `out_dtype`; all devices have the same bits.

    Raises:
        ValueError: a mailbox of other devices or features.
    """
    mailbox.check(box, case.devices, case.features)
    row = jax.ShapeDtypeStruct((case.rows, case.features), case.out_dtype)
    operands = [x, box, addresses]
    if case.normed:
        assert residual is not None and scale is not None, "a norm has a residual and a scale"
        operands += [residual, scale]
    return xla_call.ptx_call(
        source(case, target),
        tuple(operands),
        (row, row) if case.normed else (row,),
        target,
        grid=(case.rows,),
        num_warps=case.threads // 32,
        name="fdk_peer_sum",
    )


def source(case: PeerSum, target: Target) -> str:
    """The kernel's PTX."""
    return _Kernel(case, target).write()


class _Kernel(Writer):
    def __init__(self, case: PeerSum, target: Target) -> None:
        self.case, self.ptx = case, Ptx(target)
        names = ["x", "mailbox", "addresses"]
        names += ["residual", "scale", "sum", "y"] if case.normed else ["sum"]
        self.operands = self.ptx.operands(*names)

    def write(self) -> str:
        ptx, case = self.ptx, self.case
        ptx.share(4 * 33)
        self._locate_lane()
        self.row_index = ptx.op("mov.u32", "%ctaid.x")
        row = (self.row_index * case.features).low()
        pieces = [self.thread + i * case.threads for i in range(-(-case.pieces // case.threads))]
        in_bounds = [piece < case.pieces for piece in pieces]
        elements = [row + piece * case.piece for piece in pieces]
        ptx.comment("send: this device's row to every mailbox")
        words = [
            self._load("x", element, case.dtype, when)
            for element, when in zip(elements, in_bounds, strict=True)
        ]
        boxes, self.number = self._boxes()
        for piece, when, pair in zip(pieces, in_bounds, words, strict=True):
            for box in boxes:
                address = box + piece * (_PIECE * WORD)
                mailbox.send(ptx, address, pair, self.number, when=when)
        beside = []
        if case.normed:
            for piece, element, when in zip(pieces, elements, in_bounds, strict=True):
                column = (piece * case.piece).low()
                beside.append(
                    (
                        self._floats("residual", element, when),
                        self._floats("scale", column, when),
                    )
                )
        ptx.comment("receive: all devices' rows, in the order of their numbers")
        totals = [
            self._receive(i, piece, when)
            for i, (piece, when) in enumerate(zip(pieces, in_bounds, strict=True))
        ]
        self._count()
        if not case.normed:
            for element, when, total in zip(elements, in_bounds, totals, strict=True):
                self._store("sum", element, total, when)
            return ptx.text()
        self._finish(elements, in_bounds, totals, beside)
        return ptx.text()

    def _boxes(self) -> tuple[list[Register], Register]:
        """Where this device's row goes in each mailbox, and this launch's number."""
        ptx, case = self.ptx, self.case
        count, stride = case.devices, case.features * WORD
        rank, addresses = mailbox.open_all(
            ptx, self.operands["mailbox"], self.operands["addresses"], count
        )
        start = (self.row_index * mailbox.row_bytes(count, case.features)).wide()
        self.head = self.operands["mailbox"] + start
        before = ptx.op("ld.global.b32", at(self.head))
        number = before + 1
        part = (number & 1) * (count * stride)
        self.part = part + (self.head + HEAD)
        offset = rank * stride + (part + start)
        return [address + offset + HEAD for address in addresses], number

    def _receive(self, number: int, piece: Register, when: Register) -> list[Register]:
        """Waits for the rows of all devices, and adds them."""
        ptx, case = self.ptx, self.case
        start = self.part + piece * (_PIECE * WORD)
        totals = [ptx.zero() for _ in range(case.piece)]
        ptx.do("bra", f"fdk_no_piece_{number}", when=~when)
        stride = case.features * WORD
        rows = [(start, i * stride) for i in range(case.devices)]
        for words in mailbox.receive(ptx, rows, _PIECE, self.number, str(number)):
            for total, value in zip(totals, self._unpack(words, case.dtype), strict=True):
                ptx.do("add.f32", total, total, value)
        ptx.label(f"fdk_no_piece_{number}")
        return totals

    def _count(self) -> None:
        """Leaves this launch's number to the next one, once all threads have read the one before."""
        ptx = self.ptx
        ptx.do("barrier.sync", 0)
        first = self.thread.eq(0)
        ptx.do("st.global.b32", at(self.head), self.number, when=first)

    def _finish(self, elements, in_bounds, totals, beside) -> None:
        """Adds the residual and normalises."""
        ptx, case = self.ptx, self.case
        squares, rounded = ptx.zero(), []
        for element, when, total, (residual, _) in zip(
            elements, in_bounds, totals, beside, strict=True
        ):
            sums = [value + addend for value, addend in zip(total, residual, strict=True)]
            words = self._store("sum", element, sums, when)
            # What the norm is of is the sum as it is stored.
            values = self._unpack(words, case.out_dtype)
            rounded.append(values)
            for value in values:
                ptx.do("fma.rn.f32", squares, value, value, squares)
        squares = self._over_threads(squares)
        mean = ptx.op("fma.rn.f32", squares, 1 / case.features, float(case.eps))
        inverse = ptx.op("rsqrt.approx.f32", mean)
        for element, when, values, (_, scales) in zip(
            elements, in_bounds, rounded, beside, strict=True
        ):
            normed = [value * inverse for value in values]
            if case.out_dtype != jnp.float32:
                normed = self._unpack(self._pack(normed, case.out_dtype), case.out_dtype)
            scaled = [value * scale for value, scale in zip(normed, scales, strict=True)]
            self._store("y", element, scaled, when)

    def _over_threads(self, value: Register) -> Register:
        """The sum of a value over all threads, in all threads."""
        ptx, warps = self.ptx, self.case.threads // 32
        value = over_lanes(ptx, "add.f32", value)
        first = self.lane.eq(0)
        ptx.do("st.shared.f32", at(self.shared + self.warp * 4), value, when=first)
        ptx.do("barrier.sync", 0)
        found = ptx.zero()
        some = self.lane < warps
        ptx.do("ld.shared.f32", found, at(self.shared + self.lane * 4), when=some)
        return over_lanes(ptx, "add.f32", found)

    # Values in memory

    def _load(self, name: str, element: Register, dtype, when: Register) -> list[Register]:
        """The words of a piece of an array, zero where there is none."""
        count = self.case.piece * jnp.dtype(dtype).itemsize // 4
        ptx, words = self.ptx, self.ptx.registers("b32", count)
        for word in words:
            ptx.do("mov.b32", word, 0)
        address = at(self.operands[name] + element * jnp.dtype(dtype).itemsize)
        width, target = wide(words)
        ptx.do(f"ld.global.nc{width}.b32", target, address, when=when)
        return words

    def _floats(self, name: str, element: Register, when: Register) -> list[Register]:
        return self._unpack(
            self._load(name, element, self.case.out_dtype, when), self.case.out_dtype
        )

    def _unpack(self, words: list[Register], dtype) -> list[Register]:
        """The values of words as float32."""
        if dtype == jnp.float32:
            return [word.as_float() for word in words]
        return [value for word in words for value in decoding.unpack(self.ptx, word, dtype)]

    def _pack(self, values: list[Register], dtype) -> list[Register]:
        """The words of values."""
        if dtype == jnp.float32:
            return values
        pairs = zip(values[::2], values[1::2], strict=True)
        return [decoding.pack(self.ptx, *pair, dtype) for pair in pairs]

    def _store(self, name: str, element: Register, values: list[Register], when: Register):
        ptx, dtype = self.ptx, self.case.out_dtype
        words = self._pack(values, dtype)
        address = at(self.operands[name] + element * jnp.dtype(dtype).itemsize)
        width, value = wide(words)
        ptx.do(f"st.global{width}.b32", address, value, when=when)
        return words

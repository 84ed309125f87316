"""From packed codes to the operand registers of the tensor cores, in registers or through a table.

Two ways, by the width of a code:

- 2, 4 and 8 bits: a byte of codes is an index into a table of its 8 / bits values in shared memory. Every
  lane (or pair of lanes, or four, for wider entries) has a copy of the table in banks of its own: no bank
  conflicts, about one integer instruction a weight at 4 bits, and any codebook costs the same.
- 1 bit: a code that stands alone among a bfloat16's bits is a power of two or zero, and two multiply-adds
  make the one or the other value of it: half an integer and a float instruction a weight, no table.
"""

import abc

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ptx import Ptx, at, vector

_TABLE_ROW = 128  # bytes of the table for one byte of codes: copies for all lanes together


def decoder(ptx: Ptx, bits: int, dtype, *, exact: bool = False):
    """The decoder for codes of `bits` into values of `dtype`; see `Decoder`.

    Args:
        ptx: what the decoder writes to.
        bits: 1, 2, 4 or 8.
        dtype: bfloat16 or float16.
        exact: whether the values are those of the codebook, and `factor` None.
    """
    if bits > 1:
        return _Table(ptx, bits, dtype)
    return _Select(ptx, dtype) if exact else _Scaled(ptx, dtype)


class Decoder(abc.ABC):
    """Writes the instructions that decode.

    Attributes:
        shared_bytes: shared memory that it needs, at the start of `fdk_shared`.
        factor: register that the sums of products have to be multiplied by, or None.
    """

    shared_bytes = 0
    factor: str | None = None

    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        """Writes nothing yet."""
        self.ptx, self.bits, self.dtype = ptx, bits, jnp.dtype(dtype)
        self.kind = "bf16" if self.dtype == jnp.bfloat16 else "f16"

    @abc.abstractmethod
    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """What comes before the loop: `codebook` holds the address of 2**bits float32 values."""

    @abc.abstractmethod
    def operands(self, words: list[str], plane: int, step: int) -> list[str]:
        """Four registers: halves of the plane times upper and lower row."""

    def pack(self, low: str, high: str) -> str:
        """A register with two values."""
        return self.ptx.op(f"cvt.rn.{self.kind}x2.f32", high, low)

    def first_two(self, codebook: str) -> list[str]:
        """The first two values of a codebook as `dtype` rounds them: a pair, and each in float32."""
        pair = self.pack(*(self._value(codebook, code) for code in range(2)))
        return [pair, *unpack(self.ptx, pair, self.dtype)]

    def _value(self, codebook: str, code: str | int, when: str | None = None) -> str:
        """A value of the codebook, float32."""
        value = self.ptx.register("f32")
        address = self.ptx.op("mad.wide.u32", code, 4, codebook, kind="b64")
        self.ptx.do("ld.global.nc.f32", value, at(address), when=when)
        return value


def unpack(ptx: Ptx, pair: str, dtype) -> list[str]:
    """The two values of a register of bfloat16 or float16 as float32."""
    if dtype == jnp.bfloat16:
        return [ptx.op("shl.b32", pair, 16), ptx.op("and.b32", pair, "0xffff0000")]
    halves = ptx.registers("b16", 2)
    ptx.do("mov.b32", vector(halves), pair)
    return [ptx.op("cvt.f32.f16", half, kind="f32") for half in halves]


class _Table(Decoder):
    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        super().__init__(ptx, bits, dtype)
        self.shared_bytes = 256 * _TABLE_ROW
        self.entry_bytes = max(4, 16 // bits)

    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """Writes the values of every byte into shared memory, a copy for each lane's banks."""
        ptx = self.ptx
        self.table = ptx.op("mov.u32", "fdk_shared")
        lane_copy = ptx.op("and.b32", thread, _TABLE_ROW // self.entry_bytes - 1)
        self.lane_offset = ptx.op("mul.lo.u32", lane_copy, self.entry_bytes)
        for i in range(-(-256 // threads)):
            byte = ptx.op("add.u32", thread, i * threads)
            mine = ptx.op("setp.lt.u32", byte, 256, kind="pred") if threads > 256 else None
            pattern = self._pattern(byte, codebook, mine)
            row = ptx.op("mad.lo.u32", byte, _TABLE_ROW, self.table)
            for turn in range(_TABLE_ROW // 16):
                # Lanes start at different columns: otherwise all would write to the same banks.
                column = ptx.op("add.u32", thread, turn)
                column = ptx.op("and.b32", column, _TABLE_ROW // 16 - 1)
                address = ptx.op("mad.lo.u32", column, 16, row)
                ptx.do("st.shared.v4.b32", at(address), vector(pattern), when=mine)
        ptx.do("bar.sync", 0)

    def _pattern(self, byte: str, codebook: str, mine: str | None) -> list[str]:
        """16 bytes of a table row: the values of `byte`, repeated."""
        ptx, bits = self.ptx, self.bits
        values = []
        for i in range(8 // bits):
            code = ptx.op("and.b32", ptx.op("shr.u32", byte, bits * i), 2**bits - 1)
            values.append(self._value(codebook, code, mine))
        if bits == 8:
            values *= 2
        pairs = [self.pack(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        return pairs * (4 // len(pairs))

    def operands(self, words: list[str], plane: int, step: int) -> list[str]:
        found = []
        for byte in range(plane * self.bits, (plane + 1) * self.bits):
            found += self._look_up(words[4 * (byte // 4) + step], byte % 4)
        if self.bits == 8:
            pairs = zip(found[::2], found[1::2], strict=True)
            return [self.ptx.op("prmt.b32", low, high, "0x5410") for low, high in pairs]
        return found

    def _look_up(self, word: str, byte: int) -> list[str]:
        """The pairs of values of a byte of a word."""
        ptx = self.ptx
        place = _TABLE_ROW.bit_length() - 1
        opcode, distance = ("shl.b32", place) if byte == 0 else ("shr.u32", 8 * byte - place)
        address = ptx.op(opcode, word, distance)
        address = ptx.op("lop3.b32", address, 255 * _TABLE_ROW, self.lane_offset, "0xEA")
        address = ptx.op("add.u32", address, self.table)
        pairs = ptx.registers("b32", self.entry_bytes // 4)
        width = f".v{len(pairs)}" if len(pairs) > 1 else ""
        ptx.do(f"ld.shared{width}.b32", vector(pairs) if width else pairs[0], at(address))
        return pairs


class _Bits(Decoder):
    """Codes of one bit: those of a register's two values stand 16 bits apart, see `fdk_jax.packing`."""

    def __init__(self, ptx: Ptx, dtype) -> None:
        super().__init__(ptx, 1, dtype)

    def operands(self, words: list[str], plane: int, step: int) -> list[str]:
        word, first = words[4 * (plane // 4) + step], plane % 4 * 4
        return [self._pair(word, first + i) for i in range(4)]

    @abc.abstractmethod
    def _pair(self, word: str, place: int) -> str:
        """The values of the bits at `place` and `place` + 16."""


class _Scaled(_Bits):
    """Decodes to the two values divided by a power of two, which is `factor`.

    A bit among the exponent's, with zeros around it, is a power of two t. A multiply-add of t with
    (second - first) / t and the first value gives the one value or the other, nearly: a difference may have
    more bits than the type. What it lacks comes with another multiply-add; then both values are exact. They
    have to be: over thousands of x that are not balanced, an error of all weights alike adds up.
    """

    _LOWEST = (
        11  # bits 11 to 14 have finite t and 1 / t in both types; the others are shifted there
    )

    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """Computes the first value and the differences."""
        del thread, threads
        ptx = self.ptx
        values = self.first_two(codebook)[1:]
        sizes = [ptx.op("and.b32", value, "0x7fffffff") for value in values]
        largest = ptx.op("max.f32", *sizes, kind="f32")
        self.factor = ptx.op("and.b32", largest, "0x7f800000")  # only its exponent
        inverse = ptx.op("sub.u32", "0x7f000000", self.factor)
        first, second = (ptx.op("mul.f32", value, inverse, kind="f32") for value in values)
        self.first = self.pack(first, first)
        step = ptx.op("sub.f32", second, first, kind="f32")
        high = self.pack(step, step)
        rest = ptx.op("sub.f32", step, unpack(ptx, high, self.dtype)[0], kind="f32")
        low = self.pack(rest, rest)
        powers = (np.uint16(1) << np.arange(4, dtype=np.uint16) + self._LOWEST).view(self.dtype)
        inverses = (1 / powers.astype(np.float64)).astype(self.dtype).view(np.uint16)
        self.steps = []
        for inverse in inverses:
            both = ptx.op("mov.b32", f"0x{int(inverse) * 0x10001:08x}")
            opcode = f"mul.rn.{self.kind}x2"
            self.steps.append([ptx.op(opcode, part, both) for part in (high, low)])

    def _pair(self, word: str, place: int) -> str:
        # The assembler keeps one of a word's equal shifts.
        if place < 3 or place == 15:
            word, place = self.ptx.op("prmt.b32", word, word, "0x2301"), (place + 8) % 16
        shift = (14 - place) // 4 * 4
        if shift:
            word, place = self.ptx.op("shl.b32", word, shift), place + shift
        power = self.ptx.op("and.b32", word, f"0x{0x10001 << place:08x}")
        value = self.first
        for step in self.steps[place - self._LOWEST]:
            value = self.ptx.op(f"fma.rn.{self.kind}x2", power, step, value)
        return value


class _Select(_Bits):
    """Decodes to the values of the codebook themselves, three integer instructions a pair."""

    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """Loads the two values, each twice."""
        del thread, threads
        pair, *_ = self.first_two(codebook)
        self.low = self.ptx.op("prmt.b32", pair, pair, "0x1010")
        self.high = self.ptx.op("prmt.b32", pair, pair, "0x3232")

    def _pair(self, word: str, place: int) -> str:
        signs = self.ptx.op("shl.b32", word, 15 - place)
        mask = self.ptx.op("prmt.b32", signs, signs, "0xBB99")  # bits 15 and 31, 16 times each
        return self.ptx.op("lop3.b32", self.high, self.low, mask, "0xE4")

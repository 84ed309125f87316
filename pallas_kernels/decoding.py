"""From packed codes to the operand registers of the tensor cores, in registers or through a table.

Three ways, by the width of a code and the kind of codebook:

- 2, 4 and 8 bits: a byte of codes is an index into a table of its 8 / bits values in shared memory. Every
  lane (or pair of lanes, or four, for wider entries) has a copy of the table in banks of its own: no bank
  conflicts, half an integer instruction a weight at 4 bits, and any codebook costs the same.
- 4 and 8 bits with evenly spaced values: a code among the mantissa bits of a float is a number, from which a
  subtraction makes the value; no table. At 2 bits the table is less work.
- 1 bit: a code that stands alone among a bfloat16's bits is a power of two or zero, and two multiply-adds
  make the one or the other value of it: half an integer and a float instruction a weight, no table.
"""

import abc

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ptx import Ptx, half_kind
from pallas_kernels.registers import Register, at, vector, wide

_TABLE_ROW = 128  # bytes of the table for one byte of codes: copies for all lanes together


def decoder(ptx: Ptx, bits: int, dtype, *, uniform: bool = False, exact: bool = False):
    """The decoder for codes of `bits` into values of `dtype`; see `Decoder`.

    Args:
        ptx: what the decoder writes to.
        bits: 1, 2, 4 or 8.
        dtype: bfloat16 or float16.
        uniform: whether to compute the values of a uniform codebook, see `Case.computes_values`.
        exact: whether the values are those of the codebook in `dtype`, neighbours in order, `factor` None.
    """
    if 8 % bits:
        raise ValueError(f"there is no decoder for codes of {bits} bits")
    if bits == 1:
        return _Select(ptx, dtype) if exact else _Scaled(ptx, dtype)
    if exact or not uniform:
        return _Table(ptx, bits, dtype)
    return COMPUTED[bits](ptx, bits, dtype)


def shared_bytes(bits: int, *, uniform: bool = False, exact: bool = False) -> int:
    """Shared memory that the decoder of these arguments needs for its table; see `decoder`."""
    return 256 * _TABLE_ROW if bits > 1 and (exact or not uniform) else 0


class Decoder(abc.ABC):
    """Writes the instructions that decode.

    Attributes:
        shared_bytes: shared memory that it needs.
        table_offset: where in `fdk_shared` that is.
        space: where the codebook is, "global" or "shared".
        factor: register that the sums of products have to be multiplied by, or None.
        apart: whether the registers hold weights 0, 2 and 1, 3 of four neighbours instead of 0, 1 and 2, 3.
    """

    shared_bytes = 0
    table_offset = 0
    space = "global"
    factor: Register | None = None
    apart = False

    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        """Writes nothing yet."""
        self.ptx, self.bits, self.dtype = ptx, bits, jnp.dtype(dtype)
        self.kind = half_kind(self.dtype)

    @abc.abstractmethod
    def set_up(self, codebook: Register, thread: Register, threads: int) -> None:
        """What comes before the loop: `codebook` holds the address of 2**bits float32 values in `space`.

        A barrier has to follow it, if there is shared memory.
        """

    @abc.abstractmethod
    def operands(self, words: list[Register], plane: int, step: int) -> list[Register]:
        """Four registers: halves of the plane times upper and lower row."""

    def pack(self, low: Register, high: Register) -> Register:
        """A register with two values."""
        return pack(self.ptx, low, high, self.dtype)

    def paired(self, values: list[Register]) -> list[Register]:
        """Registers of neighbours of x with the pairs that the operands have."""
        if not self.apart:
            return values
        fours = zip(values[::2], values[1::2], strict=True)
        halves = ("0x5410", "0x7632")
        return [self.ptx.op("prmt.b32", *four, half) for four in fours for half in halves]

    def first_two(self, codebook: Register) -> list[Register]:
        """The first two values of a codebook as `dtype` rounds them: a pair, and each in float32."""
        return self.rounded(*(self.value(codebook, code) for code in range(2)))

    def rounded(self, low: Register, high: Register) -> list[Register]:
        """Two values as `dtype` rounds them: a pair, and each in float32."""
        pair = self.pack(low, high)
        return [pair, *unpack(self.ptx, pair, self.dtype)]

    def value(
        self, codebook: Register, code: Register | int, when: Register | None = None
    ) -> Register:
        """A value of the codebook, float32. It stays in L2: from memory it would queue up after the weight."""
        ptx, value = self.ptx, self.ptx.register("f32")
        if self.space == "shared":
            address = ptx.op("mad.lo.u32", code, 4, codebook)
            ptx.do("ld.shared.f32", value, at(address), when=when)
            return value
        address = ptx.op("mad.wide.u32", code, 4, codebook)
        opcode = "ld.global.nc.L2::cache_hint.f32"
        ptx.do(opcode, value, at(address), ptx.policy("evict_last"), when=when)
        return value


def pack(ptx: Ptx, low: Register, high: Register, dtype) -> Register:
    """A register of bfloat16 or float16 with two float32 values."""
    return ptx.op(f"cvt.rn.{half_kind(dtype)}x2.f32", high, low)


def unpack(ptx: Ptx, pair: Register, dtype) -> list[Register]:
    """The two values of a register of bfloat16 or float16 as float32."""
    if dtype == jnp.bfloat16:
        return [(pair << 16).as_float(), (pair & "0xffff0000").as_float()]
    halves = ptx.registers("b16", 2)
    ptx.do("mov.b32", vector(halves), pair)
    return [ptx.op("cvt.f32.f16", half) for half in halves]


class _Table(Decoder):
    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        super().__init__(ptx, bits, dtype)
        self.shared_bytes = shared_bytes(bits)
        self.entry_bytes = max(4, 16 // bits)

    def set_up(self, codebook: Register, thread: Register, threads: int) -> None:
        """Writes the values of every byte into shared memory, a copy for each lane's banks."""
        ptx = self.ptx
        table = ptx.op("mov.u32", "fdk_shared")
        if self.table_offset:
            table = table + self.table_offset
        lane_copy = thread & (_TABLE_ROW // self.entry_bytes - 1)
        self.copy = table + lane_copy * self.entry_bytes
        for i in range(-(-256 // threads)):
            byte = thread + i * threads
            is_owner = (byte < 256) if 256 % threads else None
            pattern = self._pattern(byte, codebook, is_owner)
            row = table + byte * _TABLE_ROW
            for step in range(_TABLE_ROW // 16):
                # Lanes start at different columns: otherwise all would write to the same banks.
                column = thread + step
                column = column & (_TABLE_ROW // 16 - 1)
                address = row + column * 16
                ptx.do("st.shared.v4.b32", at(address), vector(pattern), when=is_owner)

    def _pattern(
        self, byte: Register, codebook: Register, is_owner: Register | None
    ) -> list[Register]:
        """16 bytes of a table row: the values of `byte`, repeated."""
        bits = self.bits
        values = []
        for i in range(8 // bits):
            code = (byte >> (bits * i)) & (2**bits - 1)
            values.append(self.value(codebook, code, is_owner))
        if bits == 8:
            values *= 2
        pairs = [self.pack(values[i], values[i + 1]) for i in range(0, len(values), 2)]
        return pairs * (4 // len(pairs))

    def operands(self, words: list[Register], plane: int, step: int) -> list[Register]:
        found = []
        for byte in range(plane * self.bits, (plane + 1) * self.bits):
            found += self._look_up(words[4 * (byte // 4) + step], byte % 4)
        if self.bits == 8:
            pairs = zip(found[::2], found[1::2], strict=True)
            return [self.ptx.op("prmt.b32", low, high, "0x5410") for low, high in pairs]
        return found

    def _look_up(self, word: Register, byte: int) -> list[Register]:
        """The pairs of values of a byte of a word."""
        ptx = self.ptx
        # The dot product of a word's bytes with one row's size and three zeros is an address.
        row = f"0x{_TABLE_ROW << 8 * byte:08x}"
        address = ptx.op("dp4a.u32.u32", word, row, self.copy)
        pairs = ptx.registers("b32", self.entry_bytes // 4)
        width, target = wide(pairs)
        ptx.do(f"ld.shared{width}.b32", target, at(address))
        return pairs


class _Uniform(Decoder):
    """Evenly spaced values, of which the zero is one or lies halfway between two.

    A code becomes its distance from the zero in steps, divided by a power of two; that power times the step
    is `factor`. It is rounded only if it has more mantissa bits than `dtype` (bfloat16, 8 bits, halves above
    128).
    """

    def _measure(self, codebook: Register) -> Register:
        """Computes `factor`; returns the zero point among the codes, float32, a multiple of a half."""
        ptx, last_code = self.ptx, 2**self.bits - 1
        first, last = (self.value(codebook, code) for code in (0, last_code))
        span = last - first
        unit = 2**self.bits / last_code
        self.factor = span * unit
        share = ptx.op("div.rn.f32", first, span)
        magic = 1.5 * 2**22  # its neighbours are halves
        zero = ptx.op("fma.rn.f32", share, float(-last_code), magic)
        return zero - magic


class _UniformNibbles(_Uniform):
    """4 bits: the codes of two weights among the mantissa bits of a register's two floats.

    A code at bit p (from the lowest) of a mantissa of d bits with the exponent of 2**(d - p) makes it
    2**(d - p) + code. What is subtracted, 2**(d - p) + zero, is a float unless p is 0. All is divided by 16.
    """

    apart = True

    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        super().__init__(ptx, bits, dtype)
        # Positions of even and odd codes in a half word; with float16's mantissa, neighbours need no shift.
        self.mantissa, self.bias, self.positions = {
            "bf16": (7, 127, (3, 3)),
            "f16": (10, 15, (1, 5)),
        }[self.kind]

    def set_up(self, codebook: Register, thread: Register, threads: int) -> None:
        """Computes what is subtracted."""
        del thread, threads
        ptx, zero = self.ptx, self._measure(codebook)
        self.offsets = []
        for position in self.positions:
            base = 2.0 ** (self.mantissa - position - 4)
            offset = ptx.op("fma.rn.f32", zero, 1 / 16, base)
            self.offsets.append(self.pack(offset, offset))

    def operands(self, words: list[Register], plane: int, step: int) -> list[Register]:
        # The codes of a half word: of weights 0 and 1 of the upper row, then of the lower one.
        return [self._pair(words[4 * plane + step], code) for code in (0, 2, 1, 3)]

    def _pair(self, word: Register, code: int) -> Register:
        ptx, position = self.ptx, self.positions[code % 2]
        shift = 4 * code - position
        word = (word >> shift) if shift > 0 else (word << (-shift))
        exponent = self.bias + self.mantissa - position - 4 << self.mantissa
        number = ptx.op("lop3.b32", word, _twice(15 << position), _twice(exponent), "0xEA")
        return ptx.subtract_halves(self.kind, number, self.offsets[code % 2])


class _UniformBytes(_Uniform):
    """8 bits: more than a bfloat16's mantissa has, so each by itself as 128 + code / 256 in float32."""

    def set_up(self, codebook: Register, thread: Register, threads: int) -> None:
        """Computes what is subtracted."""
        del thread, threads
        zero, unit = self._measure(codebook), 1 / 256
        self.offset = self.ptx.op("fma.rn.f32", zero, unit, 128.0)

    def operands(self, words: list[Register], plane: int, step: int) -> list[Register]:
        del plane
        return [self._pair(words[4 * half + step], row) for half in range(2) for row in range(2)]

    def _pair(self, word: Register, row: int) -> Register:
        ptx, values = self.ptx, []
        for byte in (2 * row, 2 * row + 1):
            value = ptx.op("prmt.b32", word, "0x43000000", f"0x74{byte}4")
            values.append(value.as_float() - self.offset)
        return self.pack(*values)


# By the width of a code: how evenly spaced values are computed. Other widths look them up.
COMPUTED = {4: _UniformNibbles, 8: _UniformBytes}


def _twice(half: int) -> str:
    """16 bits in both halves of a register."""
    return f"0x{half * 0x10001:08x}"


class _Bits(Decoder):
    """Codes of one bit: those of a register's two values stand 16 bits apart, see `fdk_jax.format.packing`."""

    def __init__(self, ptx: Ptx, dtype) -> None:
        super().__init__(ptx, 1, dtype)

    def operands(self, words: list[Register], plane: int, step: int) -> list[Register]:
        word, first = words[4 * (plane // 4) + step], plane % 4 * 4
        return [self._pair(word, first + i) for i in range(4)]

    @abc.abstractmethod
    def _pair(self, word: Register, position: int) -> Register:
        """The values of the bits at `position` and `position` + 16."""


class _Scaled(_Bits):
    """Decodes to the two values divided by a power of two, which is `factor`.

    A bit among the exponent's, with zeros around it, is a power of two t. A multiply-add of t with
    (second - first) / t and the first value gives the one value or the other, nearly: a difference may have
    more bits than the type, and the sum is rounded. Another multiply-add brings what the result lacks, so that
    both values are exact. They have to be: over thousands of x that do not average to zero, an error that all
    weights share adds up.
    """

    # Bits 11 to 14 have finite t and 1 / t in both types; the others are shifted there.
    _LOWEST = 11

    def set_up(self, codebook: Register, thread: Register, threads: int) -> None:
        """Computes the first value and the differences."""
        del thread, threads
        ptx = self.ptx
        values = self.first_two(codebook)[1:]
        sizes = [value & "0x7fffffff" for value in values]
        largest = ptx.op("max.f32", *sizes)
        self.factor = largest & "0x7f800000"  # only its exponent
        inverse = ptx.op("sub.u32", "0x7f000000", self.factor).as_float()
        first, second = (value * inverse for value in values)
        self.first = self.pack(first, first)
        step = second - first
        high = self.pack(step, step)
        # The first multiply-add rounds to a neighbour of the second value: the other one goes on from there.
        one = ptx.op("mov.b32", _twice(int(np.ones((), self.dtype).view(np.uint16))))
        near = ptx.op(f"fma.rn.{self.kind}x2", one, high, self.first)
        rest = second - unpack(ptx, near, self.dtype)[0]
        low = self.pack(rest, rest)
        powers = (np.uint16(1) << np.arange(4, dtype=np.uint16) + self._LOWEST).view(self.dtype)
        inverses = (1 / powers.astype(np.float64)).astype(self.dtype).view(np.uint16)
        self.steps = []
        for inverse in inverses:
            both = ptx.op("mov.b32", _twice(int(inverse)))
            self.steps.append([ptx.multiply_halves(self.kind, part, both) for part in (high, low)])

    def _pair(self, word: Register, position: int) -> Register:
        # The assembler keeps one of a word's equal shifts.
        if position < 3 or position == 15:
            word, position = self.ptx.op("prmt.b32", word, word, "0x2301"), (position + 8) % 16
        shift = (14 - position) // 4 * 4
        if shift:
            word, position = word << shift, position + shift
        power = word & _twice(1 << position)
        value = self.first
        for step in self.steps[position - self._LOWEST]:
            value = self.ptx.op(f"fma.rn.{self.kind}x2", power, step, value)
        return value


class _Select(_Bits):
    """Decodes to the values of the codebook themselves, three integer instructions a pair."""

    def set_up(self, codebook: Register, thread: Register, threads: int) -> None:
        """Loads the two values, each twice."""
        del thread, threads
        pair, *_ = self.first_two(codebook)
        self.low = self.ptx.op("prmt.b32", pair, pair, "0x1010")
        self.high = self.ptx.op("prmt.b32", pair, pair, "0x3232")

    def _pair(self, word: Register, position: int) -> Register:
        signs = word << (15 - position)
        mask = self.ptx.op("prmt.b32", signs, signs, "0xBB99")  # bits 15 and 31, 16 times each
        return self.ptx.op("lop3.b32", self.high, self.low, mask, "0xE4")

"""From packed codes to the operand registers of the tensor cores, in registers or through a table.

Three ways, by the width of a code and the kind of codebook:

- 2, 4 and 8 bits: a byte of codes is an index into a table of its 8 / bits values in shared memory. Every
  lane (or pair of lanes, or four, for wider entries) has a copy of the table in banks of its own: no bank
  conflicts, half an integer instruction a weight at 4 bits, and any codebook costs the same.
- 4 and 8 bits with evenly spaced values: a code among the digits of a float is a number, from which a
  subtraction makes the value; no table. At 2 bits the table is less work.
- 1 bit: a code that stands alone among a bfloat16's bits is a power of two or zero, and two multiply-adds
  make the one or the other value of it: half an integer and a float instruction a weight, no table.
"""

import abc

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ptx import Ptx, at, float_constant, half_kind, vector, wide

_TABLE_ROW = 128  # bytes of the table for one byte of codes: copies for all lanes together


def decoder(ptx: Ptx, bits: int, dtype, *, even: bool = False, exact: bool = False):
    """The decoder for codes of `bits` into values of `dtype`; see `Decoder`.

    Args:
        ptx: what the decoder writes to.
        bits: 1, 2, 4 or 8.
        dtype: bfloat16 or float16.
        even: whether to compute evenly spaced values, see `Case.even`.
        exact: whether the values are those of the codebook in `dtype`, neighbours in order, `factor` None.
    """
    if bits == 1:
        return _Select(ptx, dtype) if exact else _Scaled(ptx, dtype)
    if exact or not even:
        return _Table(ptx, bits, dtype)
    return (_EvenNibbles if bits == 4 else _EvenBytes)(ptx, bits, dtype)


class Decoder(abc.ABC):
    """Writes the instructions that decode.

    Attributes:
        shared_bytes: shared memory that it needs.
        place: where in `fdk_shared` that is.
        space: where the codebook is, "global" or "shared".
        factor: register that the sums of products have to be multiplied by, or None.
        apart: whether the registers hold weights 0, 2 and 1, 3 of four neighbours instead of 0, 1 and 2, 3.
    """

    shared_bytes = 0
    place = 0
    space = "global"
    factor: str | None = None
    apart = False

    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        """Writes nothing yet."""
        self.ptx, self.bits, self.dtype = ptx, bits, jnp.dtype(dtype)
        self.kind = half_kind(self.dtype)

    @abc.abstractmethod
    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """What comes before the loop: `codebook` holds the address of 2**bits float32 values in `space`.

        Threads have to meet behind it, if there is shared memory.
        """

    @abc.abstractmethod
    def operands(self, words: list[str], plane: int, step: int) -> list[str]:
        """Four registers: halves of the plane times upper and lower row."""

    def pack(self, low: str, high: str) -> str:
        """A register with two values."""
        return pack(self.ptx, low, high, self.dtype)

    def paired(self, values: list[str]) -> list[str]:
        """Registers of neighbours of x with the pairs that the operands have."""
        if not self.apart:
            return values
        fours = zip(values[::2], values[1::2], strict=True)
        halves = ("0x5410", "0x7632")
        return [self.ptx.op("prmt.b32", *four, half) for four in fours for half in halves]

    def first_two(self, codebook: str) -> list[str]:
        """The first two values of a codebook as `dtype` rounds them: a pair, and each in float32."""
        return self.rounded(*(self.value(codebook, code) for code in range(2)))

    def rounded(self, low: str, high: str) -> list[str]:
        """Two values as `dtype` rounds them: a pair, and each in float32."""
        pair = self.pack(low, high)
        return [pair, *unpack(self.ptx, pair, self.dtype)]

    def value(self, codebook: str, code: str | int, when: str | None = None) -> str:
        """A value of the codebook, float32. It stays in L2: from memory it would queue up behind the weight."""
        ptx, value = self.ptx, self.ptx.register("f32")
        if self.space == "shared":
            address = ptx.op("mad.lo.u32", code, 4, codebook)
            ptx.do("ld.shared.f32", value, at(address), when=when)
            return value
        address = ptx.op("mad.wide.u32", code, 4, codebook, kind="b64")
        opcode = "ld.global.nc.L2::cache_hint.f32"
        ptx.do(opcode, value, at(address), ptx.policy("evict_last"), when=when)
        return value


def pack(ptx: Ptx, low: str, high: str, dtype) -> str:
    """A register of bfloat16 or float16 with two float32 values."""
    return ptx.op(f"cvt.rn.{half_kind(dtype)}x2.f32", high, low)


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
        table = ptx.op("mov.u32", "fdk_shared")
        if self.place:
            table = ptx.op("add.u32", table, self.place)
        lane_copy = ptx.op("and.b32", thread, _TABLE_ROW // self.entry_bytes - 1)
        self.copy = ptx.op("mad.lo.u32", lane_copy, self.entry_bytes, table)
        for i in range(-(-256 // threads)):
            byte = ptx.op("add.u32", thread, i * threads)
            is_owner = ptx.op("setp.lt.u32", byte, 256, kind="pred") if 256 % threads else None
            pattern = self._pattern(byte, codebook, is_owner)
            row = ptx.op("mad.lo.u32", byte, _TABLE_ROW, table)
            for turn in range(_TABLE_ROW // 16):
                # Lanes start at different columns: otherwise all would write to the same banks.
                column = ptx.op("add.u32", thread, turn)
                column = ptx.op("and.b32", column, _TABLE_ROW // 16 - 1)
                address = ptx.op("mad.lo.u32", column, 16, row)
                ptx.do("st.shared.v4.b32", at(address), vector(pattern), when=is_owner)

    def _pattern(self, byte: str, codebook: str, is_owner: str | None) -> list[str]:
        """16 bytes of a table row: the values of `byte`, repeated."""
        ptx, bits = self.ptx, self.bits
        values = []
        for i in range(8 // bits):
            code = ptx.op("and.b32", ptx.op("shr.u32", byte, bits * i), 2**bits - 1)
            values.append(self.value(codebook, code, is_owner))
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
        # The dot product of a word's bytes with one row's size and three zeros is an address.
        row = f"0x{_TABLE_ROW << 8 * byte:08x}"
        address = ptx.op("dp4a.u32.u32", word, row, self.copy)
        pairs = ptx.registers("b32", self.entry_bytes // 4)
        width, target = wide(pairs)
        ptx.do(f"ld.shared{width}.b32", target, at(address))
        return pairs


class _Evenly(Decoder):
    """Evenly spaced values, of which the zero is one or lies halfway between two.

    A code becomes its distance from the zero in steps, divided by a power of two; that power times the step
    is `factor`. It is rounded only if it has more digits than `dtype` (bfloat16, 8 bits, halves above 128).
    """

    def _measure(self, codebook: str) -> str:
        """Computes `factor`; returns the place of the zero among the codes, float32, a multiple of a half."""
        ptx, last_code = self.ptx, 2**self.bits - 1
        first, last = (self.value(codebook, code) for code in (0, last_code))
        span = ptx.op("sub.f32", last, first, kind="f32")
        unit = float_constant(2**self.bits / last_code)
        self.factor = ptx.op("mul.f32", span, unit, kind="f32")
        share = ptx.op("div.rn.f32", first, span, kind="f32")
        magic = float_constant(1.5 * 2**22)  # its neighbours are halves
        zero = ptx.op("fma.rn.f32", share, float_constant(-last_code), magic, kind="f32")
        return ptx.op("sub.f32", zero, magic, kind="f32")


class _EvenNibbles(_Evenly):
    """4 bits: the codes of two weights among the digits of a register's two floats.

    A code at digit p (from the lowest) of a float of d digits with the exponent of 2**(d - p) makes it
    2**(d - p) + code. What is subtracted, 2**(d - p) + zero, is a float unless p is 0. All is divided by 16.
    """

    apart = True

    def __init__(self, ptx: Ptx, bits: int, dtype) -> None:
        super().__init__(ptx, bits, dtype)
        # Places for even and odd codes of a half word; with the digits of float16, neighbours need no shift.
        self.digits, self.bias, self.places = {"bf16": (7, 127, (3, 3)), "f16": (10, 15, (1, 5))}[
            self.kind
        ]

    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """Computes what is subtracted."""
        del thread, threads
        ptx, zero = self.ptx, self._measure(codebook)
        self.offsets = []
        for place in self.places:
            base = float_constant(2.0 ** (self.digits - place - 4))
            offset = ptx.op("fma.rn.f32", zero, float_constant(1 / 16), base, kind="f32")
            self.offsets.append(self.pack(offset, offset))

    def operands(self, words: list[str], plane: int, step: int) -> list[str]:
        # The codes of a half word: of weights 0 and 1 of the upper row, then of the lower one.
        return [self._pair(words[4 * plane + step], code) for code in (0, 2, 1, 3)]

    def _pair(self, word: str, code: int) -> str:
        ptx, place = self.ptx, self.places[code % 2]
        shift = 4 * code - place
        word = ptx.op("shr.u32", word, shift) if shift > 0 else ptx.op("shl.b32", word, -shift)
        exponent = self.bias + self.digits - place - 4 << self.digits
        number = ptx.op("lop3.b32", word, _twice(15 << place), _twice(exponent), "0xEA")
        return ptx.subtract_halves(self.kind, number, self.offsets[code % 2])


class _EvenBytes(_Evenly):
    """8 bits: more than a bfloat16 has digits, so each by itself as 128 + code / 256 in float32."""

    def set_up(self, codebook: str, thread: str, threads: int) -> None:
        """Computes what is subtracted."""
        del thread, threads
        zero, unit = self._measure(codebook), float_constant(1 / 256)
        self.offset = self.ptx.op("fma.rn.f32", zero, unit, float_constant(128), kind="f32")

    def operands(self, words: list[str], plane: int, step: int) -> list[str]:
        del plane
        return [self._pair(words[4 * half + step], row) for half in range(2) for row in range(2)]

    def _pair(self, word: str, row: int) -> str:
        ptx, values = self.ptx, []
        for byte in (2 * row, 2 * row + 1):
            value = ptx.op("prmt.b32", word, "0x43000000", f"0x74{byte}4")
            values.append(ptx.op("sub.f32", value, self.offset, kind="f32"))
        return self.pack(*values)


def _twice(half: int) -> str:
    """16 bits in both halves of a register."""
    return f"0x{half * 0x10001:08x}"


class _Bits(Decoder):
    """Codes of one bit: those of a register's two values stand 16 bits apart, see `fdk_jax.format.packing`."""

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
    more bits than the type, and the sum is rounded. What the result lacks comes with another multiply-add; then
    both values are exact. They
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
        # The first multiply-add rounds to a neighbour of the second value: the other one goes on from there.
        one = ptx.op("mov.b32", _twice(int(np.ones((), self.dtype).view(np.uint16))))
        near = ptx.op(f"fma.rn.{self.kind}x2", one, high, self.first)
        rest = ptx.op("sub.f32", second, unpack(ptx, near, self.dtype)[0], kind="f32")
        low = self.pack(rest, rest)
        powers = (np.uint16(1) << np.arange(4, dtype=np.uint16) + self._LOWEST).view(self.dtype)
        inverses = (1 / powers.astype(np.float64)).astype(self.dtype).view(np.uint16)
        self.steps = []
        for inverse in inverses:
            both = ptx.op("mov.b32", _twice(int(inverse)))
            self.steps.append([ptx.multiply_halves(self.kind, part, both) for part in (high, low)])

    def _pair(self, word: str, place: int) -> str:
        # The assembler keeps one of a word's equal shifts.
        if place < 3 or place == 15:
            word, place = self.ptx.op("prmt.b32", word, word, "0x2301"), (place + 8) % 16
        shift = (14 - place) // 4 * 4
        if shift:
            word, place = self.ptx.op("shl.b32", word, shift), place + shift
        power = self.ptx.op("and.b32", word, _twice(1 << place))
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

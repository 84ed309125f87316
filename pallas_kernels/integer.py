"""The kernel for one row of x and codes of one bit: sums of integers on the tensor cores.

Decoding to floats takes an instruction a weight, more than reading takes time. Masked codes are integers
already, a byte each, four to an instruction, for `mma.sync.m16n8k32`. So x becomes integers: 16 bits, scaled
by the largest of 64 neighbours, as a high and a low byte. With two values any codebook is affine:

    sum x w = scale (first * sum x + (second - first) * sum of the x whose code is set)

The eight columns of the instruction are the high and low bytes of four planes of x; a weight's product with
the other planes is nought, as these have noughts in its place. A mask leaves a code at bit 0 to 3 of its byte:
the x of codes at twice and thrice the distance are divided by four, and the sums of the lower rows by two.
An infinity in x makes the scale infinite and itself the only integer that is not nought.

What is left to wait for is memory: codes and scales are copied to shared memory several blocks ahead, each
lane's to a place of its own, so that no lane waits for another.

Glossary as in `matvec`: R tiles of 16 rows a warp (`Config.tiles`), W warps that share K (`Config.warps`), D
blocks in flight a warp (`Config.stages`). A fourfold is four planes, half a block of a tile.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels import decoding, matvec
from pallas_kernels.case import Case
from pallas_kernels.ptx import at, float_constant, vector

_STEPS = 4
_FOURFOLD_X = 4 * 64 * 2  # bytes of x
_FOURFOLD_CODES = 512  # bytes of a tile's codes
_LARGEST = 32512.0  # of the integers: its high byte, rounded, is 127
_MAGIC = 12582912.0  # 1.5 * 2**23: a float's last bits are an integer
_MAGIC_BITS = "0x4B400000"
_TINY = 2.0**-112  # smaller x are not told apart from nought, if there are no others


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: R, W and D of the module's glossary."""

    tiles: int = 2
    warps: int = 4
    stages: int = 4
    cluster: ClassVar[int] = 1

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return self.as_matvec.rows

    @property
    def as_matvec(self) -> matvec.Config:
        """What the parts shared with `matvec` see."""
        return matvec.Config(self.tiles, self.warps, self.stages, diagonal=True)


def unsupported_reason(case: Case, config: Config) -> str | None:
    """Why the kernel does not take a case, or None."""
    if case.bits != 1 or case.m != 1 or case.group_size != 64:
        return (
            f"{case.m} tokens, {case.bits} bits in groups of {case.group_size} are not 1, 1 and 64"
        )
    return case.unsupported_reason(config, lambda: _Writer(case, config.as_matvec).shared_bytes)


def grid(case: Case, config: Config) -> tuple[int, int]:
    """Programs along N and M."""
    return matvec.grid(case, config.as_matvec)


def source(case: Case, config: Config) -> str:
    """The kernel's PTX."""
    return _Writer(case, config.as_matvec).write()


class _Writer(matvec._Writer):
    """Writes the PTX of one case."""

    def __init__(self, case: Case, config: matvec.Config) -> None:
        super().__init__(case, config)
        # A lane needs the scales of one plane of each fourfold.
        self.scale_part = 64 * self.scale_bytes
        self.tile_bytes = 2 * (_FOURFOLD_CODES + self.scale_part)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        config = self.config
        in_flight = config.warps * config.stages * config.tiles * self.tile_bytes
        return max(in_flight, super().shared_bytes)

    def _decoder(self) -> decoding.Decoder:
        return decoding.decoder(self.ptx, 1, self.case.x_dtype, exact=True)

    def _set_up_decoder(self) -> None:
        ptx = self.ptx
        _, self.first, second = self.decoder.first_two(self._codebook())
        step = ptx.op("sub.f32", second, self.first, kind="f32")
        # A lower row's codes stand one bit higher.
        self.row_steps = [step, ptx.op("mul.f32", step, float_constant(0.5), kind="f32")]

    def _locate_x(self) -> None:
        """Where this lane's x starts, and constants of the lane."""
        ptx, case = self.ptx, self.case
        plane = ptx.op("shr.u32", self.row, 1)
        low = ptx.op("setp.eq.u32", ptx.op("and.b32", self.row, 1), 1, kind="pred")
        address = ptx.op("mad.wide.u32", self.quad, 16, "$1", kind="b64")
        address = ptx.op("mad.wide.u32", self.k_warp, case.span * 2, address, kind="b64")
        self.x = [ptx.op("mad.wide.u32", plane, 128, address, kind="b64")]
        self.x_buffers = [[ptx.registers("b32", 8)] for _ in range(2)]
        # Takes the low or the high byte of two integers, each twice; a low byte has a bias of 128.
        self.selector = ptx.op("selp.b32", "0x4400", "0x5511", low)
        self.flip = ptx.op("selp.b32", "0x80808080", 0, low)
        # Planes 0 and 1 have the even bytes of an operand, planes 2 and 3 the odd ones; 0 and 2 go with
        # the first codes of a byte, 1 and 3 with the others.
        upper = ptx.op("setp.ge.u32", plane, 2, kind="pred")
        bytes_ = ptx.op("selp.b32", "0xFF00FF00", "0x00FF00FF", upper)
        odd = ptx.op("setp.eq.u32", ptx.op("and.b32", plane, 1), 1, kind="pred")
        self.masks = [
            ptx.op("selp.b32", 0, bytes_, odd),
            ptx.op("selp.b32", bytes_, 0, odd),
        ]
        warp_bytes = self.config.stages * self.config.tiles * self.tile_bytes
        warp = ptx.op("mad.lo.u32", self.warp, warp_bytes, self.shared)
        self.codes = ptx.op("mad.lo.u32", self.lane, 16, warp)
        scales = ptx.op("mad.lo.u32", self.lane, 2 * self.scale_bytes, warp)
        self.lane_scales = ptx.op("add.u32", scales, 2 * _FOURFOLD_CODES)
        # Lanes that have the high and the low bytes of the plane whose sums this lane has.
        self.source_lane = ptx.op("mul.lo.u32", self.quad, 8)
        self.low_lane = ptx.op("add.u32", self.source_lane, 4)
        self.infinite = ptx.register("pred")
        zero, magic = ptx.op("mov.u32", 0), ptx.op("mov.u32", _MAGIC_BITS)
        self.zeros = [zero, magic] * 2
        self.totals = [
            [[ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in range(4)]]
            for _ in self.packed
        ]

    def _advance_to_warp(self, address: str) -> str:
        """The scales of the warp's first block and of the plane whose sums the lane has."""
        ptx = self.ptx
        quads = ptx.op("mul.lo.u32", self.k_warp, 2)
        address = ptx.op("mad.wide.u32", quads, 64 * self.scale_bytes, address, kind="b64")
        return ptx.op("mad.wide.u32", self.quad, 2 * self.scale_bytes, address, kind="b64")

    def _buffer(self, number: int) -> list[int]:
        """Where the tiles of one block in flight are, behind this lane's place for codes."""
        first = number * self.config.tiles
        return [(first + i) * self.tile_bytes for i in range(self.config.tiles)]

    def _load(self, buffer: list[int], ahead: int) -> None:
        """Starts the copies of the block `ahead` steps of this warp after the current one."""
        ptx, blocks = self.ptx, ahead * self.config.k_warps
        there = ptx.op("setp.gt.u32", self.left, ahead, kind="pred")
        for place, packed, scales in zip(buffer, self.packed, self.scales, strict=True):
            for half in range(2):
                source = at(packed, blocks * 2 * _FOURFOLD_CODES + half * _FOURFOLD_CODES)
                target = at(self.codes, place + half * _FOURFOLD_CODES)
                ptx.do("cp.async.cg.shared.global", target, source, 16, when=there)
                source = at(scales, (2 * blocks + half) * self.scale_part)
                target = at(self.lane_scales, place + half * self.scale_part)
                size = 2 * self.scale_bytes
                ptx.do("cp.async.ca.shared.global", target, source, size, when=there)
        ptx.do("cp.async.commit_group")

    def _load_x(self, buffer: int, ahead: int, fourfold: int) -> None:
        """Starts the loads of a fourfold's x: 16 of this lane's plane."""
        ptx = self.ptx
        there = ptx.op("setp.gt.u32", self.left, ahead, kind="pred")
        offset = ahead * self.config.k_warps * self.case.span * 2 + fourfold * _FOURFOLD_X
        [address], [values] = self.x, self.x_buffers[buffer]
        for half in range(2):
            part = vector(values[4 * half : 4 * half + 4])
            ptx.do("ld.global.nc.v4.b32", part, at(address, offset + 64 * half), when=there)

    def _turn_x(self, loads: int) -> None:
        """Nothing to do: a turn of the loop is an even number of fourfolds."""

    def _multiply(self, buffer: list[int], stage: int) -> None:
        """Multiplies a block with its stretch of x."""
        self.ptx.do("cp.async.wait_group", self.config.stages - 1)
        for fourfold in range(2):
            flat = 2 * stage + fourfold
            self._load_x(1 - flat % 2, *divmod(flat + 1, 2))
            words = [self._codes(place + fourfold * _FOURFOLD_CODES) for place in buffer]
            factors = [self._lane_factors(place + fourfold * self.scale_part) for place in buffer]
            self._multiply_fourfold(words, factors, self.x_buffers[flat % 2][0], f"{flat}")

    def _codes(self, place: int) -> list[str]:
        words = self.ptx.registers("b32", 4)
        self.ptx.do("ld.shared.v4.b32", vector(words), at(self.codes, place))
        return words

    def _lane_factors(self, place: int) -> list[str]:
        """The scales of the upper and the lower row, float32."""
        registers = self.ptx.registers("b32", self.scale_bytes // 2)
        self._load_vector(registers, self.lane_scales, place, space="shared")
        return self._factors(registers, 0)

    def _multiply_fourfold(self, words, factors, x: list[str], name: str) -> None:
        ptx = self.ptx
        scale, inverses = self._scale_of(x, name)
        sums = [ptx.registers("b32", 4) for _ in words]
        all_x = ptx.op("mov.u32", 0)
        for step in range(_STEPS):
            pairs = [self._integers(x[2 * step + q], inverses[q]) for q in range(2)]
            for pair, weight in zip(pairs, ("0x00010001", "0x00040004"), strict=True):
                ptx.do("dp4a.s32.s32", all_x, pair, weight, all_x)
            for part, mask in enumerate(self.masks):
                b = [ptx.op("and.b32", pair, mask) for pair in pairs]
                fresh = step == part == 0
                for tile_words, tile_sums in zip(words, sums, strict=True):
                    word = tile_words[step]
                    if part:
                        word = ptx.op("shr.u32", word, 4)
                    a = [ptx.op("and.b32", word, f"0x{0x01010101 << i:08x}") for i in range(4)]
                    self._dot_integers(tile_sums, a, b, fresh)
        base = ptx.op("mul.f32", self._whole(all_x), self.first, kind="f32")
        for tile_factors, tile_sums, [totals] in zip(factors, sums, self.totals, strict=True):
            for row, row_step in enumerate(self.row_steps):
                value = self._float(*tile_sums[2 * row : 2 * row + 2])
                value = ptx.op("fma.rn.f32", row_step, value, base, kind="f32")
                factor = ptx.op("mul.f32", tile_factors[row], scale, kind="f32")
                ptx.do("fma.rn.f32", totals[2 * row], factor, value, totals[2 * row])

    def _scale_of(self, x: list[str], name: str) -> tuple[str, list[str]]:
        """The scale of the plane whose sums the lane has, and what makes integers of the lane's own x.

        Where there is an infinity, all x are brought into the finite range first.
        """
        ptx, kind = self.ptx, self.decoder.kind
        sizes = [ptx.op("and.b32", pair, "0x7fff7fff") for pair in x]
        pair = functools.reduce(lambda a, b: ptx.op(f"max.NaN.{kind}x2", a, b), sizes)
        most = ptx.op("max.NaN.f32", *decoding.unpack(ptx, pair, self.case.x_dtype), kind="f32")
        for distance in (1, 2):
            other = ptx.register("f32")
            ptx.do("shfl.sync.bfly.b32", other, most, distance, 31, "0xffffffff")
            most = ptx.op("max.NaN.f32", most, other, kind="f32")
        scale = ptx.op("mul.f32", most, float_constant(1 / _LARGEST), kind="f32")
        of_sums = ptx.register("f32")
        ptx.do("shfl.sync.idx.b32", of_sums, scale, self.source_lane, 31, "0xffffffff")

        ptx.do("setp.eq.f32", self.infinite, most, float_constant(jnp.inf))
        somewhere = ptx.register("pred")
        ptx.do("vote.sync.any.pred", somewhere, self.infinite, "0xffffffff")
        largest = 2.0**127 if kind == "bf16" else 2.0**15
        ptx.do("bra", f"fdk_finite{name}", when=f"!{somewhere}")
        bounds = [ptx.op("mov.f32", float_constant(b), kind="f32") for b in (-largest, largest)]
        low, high = (self.decoder.pack(bound, bound) for bound in bounds)
        for pair in x:
            ptx.do(f"max.{kind}x2", pair, pair, low)
            ptx.do(f"min.{kind}x2", pair, pair, high)
        ptx.do("selp.f32", most, float_constant(largest), most, self.infinite)
        ptx.label(f"fdk_finite{name}")
        most = ptx.op("max.f32", most, float_constant(_TINY), kind="f32")
        inverse = ptx.op("rcp.approx.f32", most, kind="f32")
        return of_sums, [
            ptx.op("mul.f32", inverse, float_constant(_LARGEST / divisor), kind="f32")
            for divisor in (1, 4)
        ]

    def _integers(self, pair: str, inverse: str) -> str:
        """The high or the low bytes of two x as integers, each twice, without their bias."""
        ptx = self.ptx
        magic = float_constant(_MAGIC + 128)
        values = [
            ptx.op("fma.rn.f32", value, inverse, magic, kind="f32")
            for value in decoding.unpack(ptx, pair, self.case.x_dtype)
        ]
        return ptx.op("xor.b32", ptx.op("prmt.b32", *values, self.selector), self.flip)

    def _whole(self, part: str) -> str:
        """The sum of all x of the plane whose sums the lane has, from each lane's part of its own plane."""
        ptx = self.ptx
        for distance in (1, 2):
            other = ptx.register("b32")
            ptx.do("shfl.sync.bfly.b32", other, part, distance, 31, "0xffffffff")
            part = ptx.op("add.u32", part, other)
        high, low = ptx.registers("b32", 2)
        for half, lane in ((high, self.source_lane), (low, self.low_lane)):
            ptx.do("shfl.sync.idx.b32", half, part, lane, 31, "0xffffffff")
        whole = ptx.op("mad.lo.u32", high, 256, low)
        return ptx.op("cvt.rn.f32.s32", whole, kind="f32")

    def _dot_integers(self, sums: list[str], a: list[str], b: list[str], fresh: bool) -> None:
        self.ptx.do(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
            vector(sums),
            vector(a),
            vector(b),
            vector(self.zeros if fresh else sums),
        )

    def _float(self, high: str, low: str) -> str:
        """256 * high + low as float32; low has started at the magic number."""
        bits = self.ptx.op("mad.lo.u32", high, 256, low)
        return self.ptx.op("sub.f32", bits, float_constant(_MAGIC), kind="f32")

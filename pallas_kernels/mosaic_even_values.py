"""Evenly spaced values of 8 bits by arithmetic instead of look-ups, in MLIR; see `mosaic_decoding`.

A value is the step times the code's distance from the zero, which is a code or lies halfway between two. In
the weights the power of two below the step stands in its place, so that they are rounded as those with the
step would be; what is left of it, a factor from 1 on, multiplies the sums.
"""

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith

from pallas_kernels.mosaic_values import U32, do, f32, i32, inline_asm, load, op, pack

TABLE_BYTES = 16  # the power of two, the zero's distance from code 128 times it, the factor
_LEAST = {"bf16": "0f00800000", "f16": "0f38800000"}  # the least normal numbers


def measure(first: ir.Value, last: ir.Value, table: U32, half: str) -> None:
    """Stores what `weights` and `factor` read.

    Args:
        first: the value of code 0, float32.
        last: the value of code 255.
        table: address in shared memory.
        half: "bf16" or "f16", of the weights.
    """

    def single(text: str, *values: ir.Value) -> ir.Value:
        return inline_asm(f32(), list(values), text, ",".join(["=f"] + ["f"] * len(values)))

    span = arith.subf(last, first)
    step = single("mul.rn.f32 $0, $1, 0f3B808081;", span)  # 1 / 255
    exponent = "{ .reg .b32 e; mov.b32 e, $1; and.b32 e, e, 0x7f800000; mov.b32 $0, e; }"
    power = single(f"max.f32 $0, $1, {_LEAST[half]};", single(exponent, step))
    # The zero, -255 first / span, is a multiple of a half, as the neighbours of 1.5 * 2**22 are.
    zero = single("fma.rn.f32 $0, $1, 0fC37F0000, 0f4AC00000;", arith.divf(first, span))
    zero = single("sub.rn.f32 $0, $1, 0f4AC00000;", zero)
    distance = arith.mulf(single("sub.rn.f32 $0, 0f43000000, $1;", zero), power)
    do("st.shared.b32 [$0], $1;", table, pack(power, power, half))
    do("st.shared.b32 [$0+4], $1;", table, pack(distance, distance, half))
    factor = arith.divf(step, power)
    do("st.shared.b32 [$0+8], $1;", table, U32(arith.bitcast(i32(), factor)))


def factor(table: U32) -> ir.Value:
    """What sums are multiplied by, float32."""
    return load(table + 8, f32())


def weights(word: U32, table: U32, half: str) -> list[U32]:
    """The four codes of a word, of two rows each, as weights without their scales: two a register."""
    power, distance = (U32(load(table + 4 * i, i32())) for i in range(2))
    found = []
    for order in ("0x4140", "0x4342"):
        pair = op(f"prmt.b32 $0, $1, 0, {order};", word)
        if half == "bf16":
            # Seven bits of mantissa: 128 and the lower seven bits, less 128, or 256 without the highest bit.
            low = op("lop3.b32 $0, $1, $2, $3, 0xEA;", pair, U32(0x007F007F), U32(0x43004300))
            base = op("lop3.b32 $0, $1, $2, $3, 0x6A;", pair, U32(0x00800080), U32(0x43804380))
        else:
            low, base = op("or.b32 $0, $1, 0x64006400;", pair), U32(0x64806480)  # 1024 and the code
        code = op(f"sub.rn.{half}x2 $0, $1, $2;", low, base)  # less 128, exactly
        found.append(op(f"fma.rn.{half}x2 $0, $1, $2, $3;", code, power, distance))
    return found

"""The notation of kernels in PTX: which instruction an operator writes, and what it refuses to write."""

import pytest

from pallas_kernels.ptx import Ptx
from pallas_kernels.registers import at


@pytest.fixture
def ptx():
    return Ptx()


@pytest.mark.parametrize(
    ("write", "instruction"),
    [
        (lambda a, x, f, p: a + 5, "add.u32 b32_1, b32_0, 5;"),
        (lambda a, x, f, p: 5 - a, "sub.u32 b32_1, 5, b32_0;"),
        (lambda a, x, f, p: a + a * 3, "mad.lo.u32 b32_1, b32_0, 3, b32_0;"),
        (lambda a, x, f, p: a - a * 3, "mad.lo.u32 b32_1, b32_0, 4294967293, b32_0;"),
        (lambda a, x, f, p: x + a * 3, "mad.wide.u32 b64_0, b32_0, 3, $1;"),
        (lambda a, x, f, p: x + 8, "add.u64 b64_0, $1, 8;"),
        (lambda a, x, f, p: (a * 3).low(), "mul.lo.u32 b32_1, b32_0, 3;"),
        (lambda a, x, f, p: (a * 3).wide(), "mul.wide.u32 b64_0, b32_0, 3;"),
        (lambda a, x, f, p: a // 8, "shr.u32 b32_1, b32_0, 3;"),
        (lambda a, x, f, p: a % 8, "and.b32 b32_1, b32_0, 7;"),
        (lambda a, x, f, p: a >= 7, "setp.ge.u32 pred_1, b32_0, 7;"),
        (lambda a, x, f, p: a.eq(7), "setp.eq.u32 pred_1, b32_0, 7;"),
        (lambda a, x, f, p: p & p, "and.pred pred_1, pred_0, pred_0;"),
        (lambda a, x, f, p: f * 0.5, "mul.f32 f32_1, f32_0, 0f3F000000;"),
        (lambda a, x, f, p: a.as_float() + f, "add.f32 f32_1, b32_0, f32_0;"),
    ],
)
def test_operators(ptx, write, instruction):
    x = ptx.operands("x")["x"]
    write(ptx.register("b32"), x, ptx.register("f32"), ptx.register("pred"))
    assert ptx.text().splitlines()[-2] == instruction


@pytest.mark.parametrize(
    "write",
    [
        lambda ptx, a, x, f, p: a + f,
        lambda ptx, a, x, f, p: f + 1,
        lambda ptx, a, x, f, p: a + 1.0,
        lambda ptx, a, x, f, p: x + a,
        lambda ptx, a, x, f, p: p + 1,
        lambda ptx, a, x, f, p: ~a,
        lambda ptx, a, x, f, p: 1 if a < 2 else 0,
        lambda ptx, a, x, f, p: ptx.op("mov.u32", a * 3),
        lambda ptx, a, x, f, p: ptx.op("min.u32", a, x),
        lambda ptx, a, x, f, p: ptx.op("ld.global.b32", at(a)),
        lambda ptx, a, x, f, p: ptx.op("ld.shared.b32", at(x)),
        lambda ptx, a, x, f, p: ptx.do("bra", "fdk_end", when=a),
    ],
)
def test_refuses_other_types(ptx, write):
    x = ptx.operands("x")["x"]
    registers = ptx.register("b32"), x, ptx.register("f32"), ptx.register("pred")
    with pytest.raises(TypeError):
        write(ptx, *registers)


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("setp.lt.u32", "pred"),
        ("mad.wide.u32", "b64"),
        ("cvt.rn.bf16x2.f32", "b32"),
        ("cvt.f32.f16", "f32"),
        ("cvt.rn.f16.f32", "b16"),
        ("ld.global.nc.f32", "f32"),
    ],
)
def test_an_instruction_fills_a_register_of_its_type(ptx, opcode, kind):
    assert ptx.op(opcode).kind == kind

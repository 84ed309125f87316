"""The arithmetic of the planar order is the order in which `packing` writes it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import planar
import pytest
from backends import for_a_gpu

from fdk_jax.format import packing
from pallas_kernels import choice, decoding, layout, mosaic_matmul, plain
from pallas_kernels.case import Arrays, Case
from pallas_kernels.ptx import Ptx
from pallas_kernels.target import H200


@pytest.mark.parametrize("bits", packing.BITS)
def test_shifts_find_each_code_where_packing_puts_it(rng, bits):
    n, k = 2 * layout.TILE_ROWS, 2 * layout.planes(bits) * layout.PLANE
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    scales = jnp.ones((n, k // 64), jnp.float32)
    spec = dict(bits=bits, group_size=64, out_features=n, in_features=k)
    words = np.asarray(packing.to_planar(packing.pack(codes, bits), scales, **spec)[0], int)
    found = np.full((2, 2, layout.TILE_ROWS, k // 2), -1)
    row, word = np.arange(8)[:, None], np.arange(layout.WORDS)[None, :]
    for shift in layout.shifts(bits):
        lower = np.asarray([shift.lower(0), shift.lower(1)])[word & 1]
        column = shift.column(word)
        assert (
            column // layout.PLANE == np.asarray([shift.plane(0), shift.plane(1)])[word & 1]
        ).all()
        code = shift.code([words[:, :, part] for part in range(layout.parts(bits))])
        assert (found[:, :, row + 8 * lower, column] == -1).all(), "a code twice"
        found[:, :, row + 8 * lower, column] = code
    expected = codes.reshape(2, layout.TILE_ROWS, 2, k // 2).swapaxes(1, 2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", packing.BITS)
def test_each_width_has_a_planar_order_of_its_size(bits):
    weights = layout.planes(bits) * layout.PLANE * layout.TILE_ROWS
    assert layout.parts(bits) * layout.PART_BYTES * 8 == weights * bits


@pytest.mark.parametrize("bits", [3, 16, 4.0, True])
def test_a_width_without_a_planar_order_is_refused(bits):
    case = planar.case(1, 16, 64, bits)
    with pytest.raises(ValueError, match=re.escape(f"bits={bits} is not supported by GPU kernels")):
        choice.choose(case, H200)


def test_a_width_without_a_decoder_is_refused():
    with pytest.raises(ValueError, match="no decoder for codes of 3 bits"):
        decoding.decoder(Ptx(H200), 3, jnp.bfloat16)
    case = planar.case(64, 64, 64, 3)
    assert "no codes of 3 bits" in str(
        mosaic_matmul.unsupported_reason(case, mosaic_matmul.ANY, H200)
    )


@pytest.mark.parametrize(("m", "kernel"), [(1, "matvec"), (4096, "dequantise")])
def test_a_width_without_rows_takes_what_runs_everywhere(monkeypatch, m, kernel):
    rows = [row for row in choice.table() if row["bits"] != 2]
    monkeypatch.setattr(choice, "table", lambda: rows)
    plan = choice.choose(planar.case(m, 4096, 4096, 2), H200)
    assert plan.kernel == kernel and "no product of 2 bits has been measured" in plan.reason


def test_scales_are_where_packing_puts_them(rng):
    n, groups = 16, 7
    scales = jnp.asarray(rng.normal(size=(n, groups)), jnp.float32)
    packed = packing.pack(np.zeros((n, groups * 64), np.uint8), 4)
    spec = dict(bits=4, group_size=64, out_features=n, in_features=groups * 64)
    planar = np.asarray(packing.to_planar(packed, scales, **spec)[1])[0]
    row, group = np.arange(n)[:, None], np.arange(groups)[None, :]
    np.testing.assert_array_equal(planar[layout.scale_index(row, group)], scales)


@pytest.mark.slow
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "dtype", "codebooks"),
    [
        (1, 33, 130, 64, "float32", 1),
        (3, 48, 600, 24, "float32", 3),
        (17, 33, 96, 32, "bfloat16", 1),
        (1, 20, 700, 128, "float16", 1),
    ],
)
def test_the_plain_kernel_in_the_interpreter(rng, bits, m, n, k, group_size, dtype, codebooks):
    arrays, spec, wanted = planar.product(rng, m, n, k, bits, group_size, dtype, codebooks)
    arrays = Arrays(*arrays, bias=None)
    case = Case.of(arrays, **spec, out_dtype=jnp.float32)
    wanted.check(plain.matmul(case, arrays, interpret=True))


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("m", "group_size"), [(1, 64), (16, 24)])
def test_the_plain_kernel_lowers_for_a_gpu(rng, bits, m, group_size):
    arrays, spec, _ = planar.product(rng, m, 64, 1024, bits, group_size, "bfloat16")
    arrays = Arrays(*arrays, bias=None)
    run = functools.partial(plain.matmul, Case.of(arrays, **spec), interpret=False)
    with for_a_gpu():
        text = jax.jit(run).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1

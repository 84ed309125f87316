"""The arithmetic of the planar order is the order in which `packing` writes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import planar
import pytest
from backends import for_a_gpu

from fdk_jax.format import packing
from pallas_kernels import layout, plain
from pallas_kernels.case import Arrays, Case


@pytest.mark.parametrize("bits", packing.BITS)
def test_shifts_find_each_code_where_packing_puts_it(rng, bits):
    n, k = 2 * layout.TILE_ROWS, 2 * 8 // bits * layout.PLANE
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
        code = words[:, :, shift.half] >> (bits * shift.number) & (2**bits - 1)
        assert (found[:, :, row + 8 * lower, column] == -1).all(), "a code twice"
        found[:, :, row + 8 * lower, column] = code
    expected = codes.reshape(2, layout.TILE_ROWS, 2, k // 2).swapaxes(1, 2)
    np.testing.assert_array_equal(found, expected)


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

"""The arithmetic of the planar order is the order in which `packing` writes it."""

import jax.numpy as jnp
import numpy as np
import pytest

from fdk_jax.format import packing
from pallas_kernels import layout


@pytest.mark.parametrize("bits", packing.BITS)
def test_shifts_find_each_code_where_packing_puts_it(rng, bits):
    n, k = 2 * layout.TILE_ROWS, 2 * 8 // bits * layout.PLANE
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    scales = jnp.ones((n, k // 64), jnp.float32)
    facts = dict(bits=bits, group_size=64, out_features=n, in_features=k)
    words = np.asarray(packing.to_planar(packing.pack(codes, bits), scales, **facts)[0], int)
    found = np.full((2, 2, layout.TILE_ROWS, k // 2), -1)
    row, place = np.arange(8)[:, None], np.arange(layout.PLACES)[None, :]
    for shift in layout.shifts(bits):
        lower = np.asarray([shift.lower(0), shift.lower(1)])[place & 1]
        column = shift.column(place)
        assert (
            column // layout.PLANE == np.asarray([shift.plane(0), shift.plane(1)])[place & 1]
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
    facts = dict(bits=4, group_size=64, out_features=n, in_features=groups * 64)
    planar = np.asarray(packing.to_planar(packed, scales, **facts)[1])[0]
    row, group = np.arange(n)[:, None], np.arange(groups)[None, :]
    np.testing.assert_array_equal(planar[layout.scale_place(row, group)], scales)

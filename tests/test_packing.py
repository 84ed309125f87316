"""The interchange layout, byte for byte, and the exact inverses of the kernels' layouts."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fdk_jax.files import bits as bits_of_files
from fdk_jax.format import packing
from fdk_jax.format.packing import BITS


@pytest.mark.parametrize(
    ("bits", "codes", "byte"),
    [
        (4, [3, 10], 0x3A),
        (2, [0, 1, 2, 3], 0x1B),
        (1, [1, 0, 0, 0, 0, 0, 0, 1], 0x81),
        (8, [0xC5], 0xC5),
    ],
)
def test_first_element_is_in_the_highest_bits(bits, codes, byte):
    packed = packing.pack(np.array(codes, np.uint8), bits)
    assert packed.tolist() == [byte]
    assert packing.unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 64), (2, 5, 129), (4, 0)])
def test_pack_agrees_with_the_oracle_and_inverts(bits, shape, rng):
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert (np.asarray(packing.unpack(packed, bits, shape[-1])) == codes).all()
    if codes.size:
        flat = np.asarray(packed).reshape(-1, packed.shape[-1])
        assert (oracle.unpack(flat, bits, shape[-1]) == codes.reshape(-1, shape[-1])).all()


@pytest.mark.parametrize("layout", sorted(packing.LAYOUTS))
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "k", "group"), [(1, 64, 64), (5, 130, 32), (33, 192, 64), (16, 17, 64)]
)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_layouts_are_exactly_invertible(layout, bits, n, k, group, lead, rng):
    spec = dict(bits=bits, group_size=group, out_features=n, in_features=k)
    codes = rng.integers(0, 2**bits, (*lead, n, k)).astype(np.uint8)
    packed = packing.pack(codes, bits)
    scales = jnp.asarray(rng.standard_normal((*lead, n, -(-k // group))), jnp.bfloat16)
    there = packing.convert(packed, scales, "interchange", layout, **spec)
    struct = packing.layout_struct(layout, dtype=jnp.bfloat16, **spec)
    for array, expected in zip(there, struct, strict=True):
        assert array.shape == (*lead, *expected.shape)
        assert array.dtype == expected.dtype
    back = packing.convert(*there, layout, "interchange", **spec)
    assert (np.asarray(back[0]) == np.asarray(packed)).all()
    assert (np.asarray(back[1]) == np.asarray(scales)).all()


@pytest.mark.parametrize("bits", [0, 3, 5, 16, -1])
def test_unknown_widths_are_refused(bits):
    with pytest.raises(ValueError, match="bits="):
        packing.pack(np.zeros(8, np.uint8), bits)
    with pytest.raises(ValueError, match="bits="):
        packing.unpack(np.zeros(8, np.uint8), bits, 8)


def test_a_width_that_does_not_divide_a_byte_has_to_be_answered(monkeypatch):
    """Not taken for 8 // 3 codes a byte by whatever takes bytes apart."""
    monkeypatch.setattr(packing, "BITS", (*packing.BITS, 3))
    assert packing.row_bytes(3, 11) == 5
    codes, some = np.zeros((16, 8), np.uint8), np.zeros((16, 3), np.uint8)
    for call in (
        lambda: packing.pack(codes, 3),
        lambda: packing.unpack(some, 3, 8),
        lambda: packing.from_planar(
            jnp.zeros((1, 1, 2, 8, 32), jnp.uint16), jnp.ones((1, 1, 64)), **_spec(3)
        ),
        lambda: packing.from_tiled(
            jnp.zeros((1, 1, 64), jnp.uint8), jnp.ones((1, 1, 16)), **_spec(3)
        ),
        lambda: bits_of_files.turned(some, 3),
        lambda: bits_of_files.turn(some, 3),
        lambda: bits_of_files.pack(codes, 3),
        lambda: bits_of_files.unpack(some, 3),
    ):
        with pytest.raises(ValueError, match="codes of 3 bits do not divide a byte"):
            call()


def _spec(bits):
    return dict(bits=bits, group_size=64, out_features=16, in_features=8)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="uint8"):
        packing.pack(np.zeros(8, np.int32), 4)
    with pytest.raises(ValueError, match="does not fit"):
        packing.pack(np.full(8, 16, np.uint8), 4)
    with pytest.raises(ValueError, match="scalar"):
        packing.pack(np.uint8(1), 4)
    with pytest.raises(ValueError, match="does not hold"):
        packing.unpack(np.zeros((2, 8), np.uint8), 4, 17)
    with pytest.raises(TypeError, match="uint8"):
        packing.unpack(np.zeros((2, 8), np.int8), 4, 16)
    with pytest.raises(ValueError, match="layout"):
        packing.convert(
            jnp.zeros((1, 1), jnp.uint8),
            jnp.zeros((1, 1)),
            "interchange",
            "diagonal",
            bits=8,
            group_size=1,
            out_features=1,
            in_features=1,
        )

"""The Mosaic GPU kernel without a GPU: where a thread finds its codes, what it lowers to, what it refuses.

Values are compared in tests/test_gpu.py, on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import for_a_gpu

from fdk_jax.format import packing
from pallas_kernels import (
    choice,
    mosaic_decoding,
    mosaic_integers,
    mosaic_matmul,
    mosaic_values,
    rounding,
)
from pallas_kernels.case import Arrays, Case
from pallas_kernels.layout import PLANE
from pallas_kernels.mosaic_matmul import Config
from pallas_kernels.target import H200, Target

BF16 = jnp.dtype(jnp.bfloat16)


F16, F32 = jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)


def case(m=40, n=264, k=1032, bits=4, group=64, codebooks=1, dtype=BF16, bias=None, **others):
    scales, uniform = others.get("scales") or dtype, others.get("uniform", False)
    return Case(m, n, k, bits, group, codebooks, dtype, scales, bias, dtype, uniform)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_thread_finds_the_codes_of_its_operands(bits, rng):
    """Against the packing: element e of pair q of chunk j is column 8 j + 2 c + e, of rows g and g + 8."""
    planes, blocks = 8 // bits, 2
    n, k, group = 64, blocks * planes * 64, 32
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    scales = rng.permutation(n * k // group).reshape(n, -1).astype(np.float32)
    packed, planar = packing.to_planar(
        packing.pack(codes, bits),
        jnp.asarray(scales),
        bits=bits,
        group_size=group,
        out_features=n,
        in_features=k,
    )
    raw = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, 8, 8, 16)
    shared = np.empty_like(raw)  # 16 bytes at a time, as the copies swizzle lines of 128
    for line in range(8):
        for column in range(8):
            shared[:, line, column ^ line] = raw[:, line, column]
    shared = np.concatenate([shared.reshape(-1), np.zeros(4, np.uint8)])
    thread = np.arange(128)
    warp, g, c = mosaic_values.lane_of(thread)
    swapped = mosaic_decoding.swaps_halves(bits, thread)
    for plane in range(planes * blocks):
        for chunk, (offset, bit) in enumerate(
            mosaic_decoding.code_offsets(bits, thread, plane, blocks)
        ):
            word = sum(shared[offset + i].astype(np.int64) << 8 * i for i in range(4)) >> bit
            first = 64 * plane + 8 * ((chunk + 4 * swapped) % 8)
            for row in range(2):
                for e in range(2):
                    shift = row + 16 * e if bits == 1 else bits * (2 * row + e)
                    found = word >> shift & 2**bits - 1
                    wanted = codes[16 * warp + g + 8 * row, first + 2 * c + e]
                    np.testing.assert_array_equal(found, wanted)
        offsets, pairs = mosaic_decoding.own_codes(bits, thread, plane, blocks)
        for number, (unit, index, bit) in enumerate(pairs):
            where = offsets[unit] + 4 * index
            word = sum(shared[where + i].astype(np.int64) << 8 * i for i in range(4)) >> bit
            for row in range(2):
                for e in range(2):
                    shift = row + 16 * e if bits == 1 else bits * (2 * row + e)
                    column = 32 * (number // 4) + 8 * c + 2 * (number % 4) + e
                    wanted = codes[16 * warp + g + 8 * row, 64 * plane + column]
                    np.testing.assert_array_equal(word >> shift & 2**bits - 1, wanted)
    planar = np.asarray(planar).reshape(-1)
    for index in range(k // group):
        offset = mosaic_decoding.scale_offset(thread, index, k // group // 4) // 2
        np.testing.assert_array_equal(planar[offset], scales[16 * warp + g, index])
        np.testing.assert_array_equal(planar[offset + 1], scales[16 * warp + g + 8, index])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_of_a_warp_are_in_banks_of_their_own(bits):
    """Words that a warp reads at once, where they are not the same one, are in different banks."""
    for thread in np.split(np.arange(128), 4):
        for plane in range(8 // bits):
            for offset, _ in mosaic_decoding.code_offsets(bits, thread, plane, 1):
                words = np.unique(offset // 4)
                assert len(words) == len(np.unique(words % 32))


@pytest.mark.parametrize(
    ("product", "config"),
    [
        (case(bits=1, group=32), Config(16, 1, 4, 16, 2)),
        (case(bits=2, dtype=F16), Config(128, 2, 1, 4, 2, cluster=2)),
        (case(bits=1, group=128, scales=F16), Config(16, 1, 4, 16, 2)),
        (case(bits=4, group=16, scales=F32), Config(64, 2, 2, 8, 2)),
        (case(bits=8, group=1032, scales=BF16, dtype=F16), Config(64, 1, 2, 8, 2)),
        (case(bits=4, group=768, scales=F16, n=256, codebooks=2), Config(128, 2, 1, 4, 2)),
        (case(bits=4, bias=BF16), Config(64, 2, 2, 8, 2, splits=2)),
        (case(bits=8, n=256, codebooks=2), Config(64, 1, 2, 8, 2)),
        (case(bits=4, k=2056), Config(64, 1, 4, 8, 2, splits=2)),
        (case(bits=4, bias=BF16), Config(96, 3, 1, 8, 3, splits=2)),
        (case(bits=1), Config(64, 4, 1, 8, 3)),
        (case(bits=8, uniform=True), Config(128, 2, 1, 4, 2, splits=2)),
        (case(bits=8, n=256, codebooks=2, dtype=F16, uniform=True), Config(64, 1, 2, 8, 2)),
    ],
)
def test_lowers_for_a_gpu(product, config):
    assert mosaic_matmul.unsupported_reason(product, config, H200) is None
    shape = jax.ShapeDtypeStruct
    half, bits = product.x_dtype, product.bits
    codebooks = (2**bits,) if product.codebooks == 1 else (product.codebooks, 2**bits)
    arrays = Arrays(
        shape((product.m, product.k), half),
        shape((product.tiles, product.blocks, 2, 8, 32), jnp.uint16),
        shape((product.tiles, product.scale_fours, 64), product.scale_dtype),
        shape(codebooks, jnp.float32),
        None if product.bias_dtype is None else shape((product.n,), product.bias_dtype),
    )
    with for_a_gpu():
        traced = jax.jit(lambda a: mosaic_matmul.matmul(product, config, a)).trace(arrays)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (dict(k=1028), Config(), "multiples of 8"),
        (dict(group_size=48), Config(), "power of two"),
        (dict(group_size=192), Config(), "whole row"),
        (dict(out_dtype=F32), Config(), "outputs"),
        (dict(x_dtype=F32), Config(), "float32"),
        (dict(codebooks=3), Config(), "codebooks"),
        (dict(k=256), Config(splits=2), "too small"),
        ({}, Config(256, 2, 1, 16, 4), "shared memory"),
        ({}, Config(64, 1, 4, 6), "do not divide"),
        ({}, Config(144, 1, 4, 8), "registers"),
        ({}, Config(64, 1, 1, 4), "one warpgroup"),
        ({}, Config(cluster=2, splits=2), "two programs"),
    ],
)
def test_refuses_what_it_cannot_do(change, config, words):
    product = dataclasses.replace(case(), **change)
    assert words in mosaic_matmul.unsupported_reason(product, config, H200)


def test_needs_the_instruction_of_one_architecture():
    for name in ("sm_80", "sm_89", "sm_100", "sm_120"):
        assert "wgmma" in mosaic_matmul.unsupported_reason(case(), Config(), Target.parse(name))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("k_groups", [1, 2, 4])
def test_a_loop_decodes_into_registers_that_no_product_reads(bits, k_groups):
    """An even number of planes: else the first one writes what the last one's products read."""
    planes = mosaic_matmul.slab(case(bits=bits), Config(k_groups=k_groups)) // PLANE
    assert planes % (2 * k_groups) == 0


@pytest.mark.parametrize("m", [1, 33, 100, 129, 257, 300, 1000, 8192])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_guesses_waste_few_tokens(m, bits):
    found = mosaic_matmul.guess(case(m=m, n=4096, k=4096, bits=bits), H200)
    padded = -(-m // found.tokens) * found.tokens
    assert padded - m < 16 * -(-m // found.tokens) + 0.1 * m


def test_integers_of_x_are_in_the_order_of_the_operand():
    """Of 32 columns a lane has 8 c to 8 c + 7, where the operand has 4 of them and, 16 further, the others."""
    x = jnp.arange(-127, 129, dtype=jnp.float32)[None].clip(-127, 127)
    found, factors = (np.asarray(a) for a in mosaic_integers.integers(x))
    np.testing.assert_array_equal(factors, [1])
    for run in range(8):
        for c in range(4):
            for j in range(8):
                place = 32 * run + 16 * (j // 4) + 4 * c + j % 4
                assert int(found[0, place]) == int(x[0, 32 * run + 8 * c + j])


def test_rows_of_x_that_are_zero_or_not_finite():
    x = jnp.ones((4, 32)).at[0].set(0).at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf)
    found, factors = mosaic_integers.integers(x)
    assert not found[0].any() and np.isfinite(factors[0])
    assert not np.isfinite(factors[1:3]).any()
    np.testing.assert_array_equal(found[3], np.full(32, 127))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("group", "scales"), [(8, F16), (64, BF16), (128, F32)])
def test_integers_of_a_weight_are_within_half_a_step(rng, bits, group, scales):
    product = case(n=48, k=1024, bits=bits, group=group, codebooks=3, scales=scales)
    codes = rng.integers(0, 2**bits, (48, 1024)).astype(np.uint8)
    levels = rng.normal(size=(3, 2**bits)).astype(np.float32)
    factors = jnp.asarray(rng.normal(size=(48, 1024 // group)), scales).at[5].set(0)
    spec = dict(bits=bits, group_size=group, out_features=48, in_features=1024)
    _, planar = packing.to_planar(packing.pack(codes, bits), factors, **spec)
    relative, table, rows = (
        np.asarray(a, np.float64) for a in mosaic_integers.relative(product, planar, levels)
    )
    # A tile's scales of four groups: row g, group, row g or g + 8.
    by_row = relative.reshape(3, -1, 8, 4, 2).transpose(0, 4, 2, 1, 3).reshape(48, -1)
    integers = np.rint(
        np.asarray(table[np.arange(48)[:, None] // 16, codes], np.float16).astype(np.float64)
        * np.repeat(by_row, group, 1)[:, :1024]
    )
    assert np.abs(integers).max() <= 127
    wanted = levels[np.arange(48)[:, None] // 16, codes] * np.repeat(
        np.asarray(factors, np.float64), group, 1
    )
    # And what the table and the scales lose as float16.
    assert np.all(np.abs(integers * rows[:, None] - wanted) <= 0.63 * rows[:, None])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_integers_lower_for_a_gpu(bits):
    product = case(m=300, n=264, k=1056, bits=bits, group=32, bias=BF16)
    config, reason = mosaic_integers.choose(product, H200)
    assert config is not None and not reason
    shape = jax.ShapeDtypeStruct
    arrays = Arrays(
        shape((300, 1056), BF16),
        shape((product.tiles, product.blocks, 2, 8, 32), jnp.uint16),
        shape((product.tiles, product.scale_fours, 64), BF16),
        shape((2**bits,), jnp.float32),
        shape((264,), BF16),
    )
    with for_a_gpu():
        traced = jax.jit(lambda a: mosaic_integers.matmul(product, config, a)).trace(arrays)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "target", "words"),
    [
        (dict(m=64), H200, "as fast without"),
        (dict(k=1040), H200, "multiple of 32"),
        ({}, Target.parse("sm_80"), "wgmma"),
        (dict(codebooks=2), H200, "codebooks"),
    ],
)
def test_exact_kernels_run_where_integers_do_not(change, target, words):
    product = dataclasses.replace(case(m=300, k=1056), arithmetic="int8", **change)
    plan = choice.choose(product, target)
    assert plan.kernel != "mosaic_integers" and words in plan.reason
    exact = choice.choose(dataclasses.replace(product, arithmetic="exact"), target)
    assert (plan.kernel, plan.config) == (exact.kernel, exact.config)


@pytest.mark.parametrize("k", [32, 96, 1024])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_integers_in_one_launch_are_those_of_xla(rng, k, dtype):
    x = jnp.asarray(rng.normal(size=(5, k)), dtype).at[1].set(0).at[3, 7].set(jnp.nan)
    found, factors = rounding.integers(x, 16, interpret=True)
    wanted, wanted_factors = mosaic_integers.integers(x)
    np.testing.assert_allclose(factors[:5], wanted_factors, rtol=1e-6)
    apart = np.asarray(found[:3], np.int32) - np.asarray(wanted[:3], np.int32)
    # A quotient half way between two integers goes either way.
    assert np.abs(apart).max() <= 1 and np.count_nonzero(apart) <= 0.01 * apart.size


def test_a_row_that_is_not_finite_has_no_finite_factor():
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        x = jnp.ones((2, 64), BF16).at[1, 60].set(value)
        _, factors = rounding.integers(x, 2, interpret=True)
        np.testing.assert_array_equal(np.isfinite(factors), [True, False])


@pytest.mark.parametrize(("n", "codebooks", "group"), [(48, 3, 8), (40, 1, 64), (64, 1, 1024)])
def test_relative_scales_in_one_launch_are_those_of_xla(rng, n, codebooks, group):
    product = case(n=n, k=1024, group=group, codebooks=codebooks)
    shape = product.tiles, product.scale_fours, 64
    scales = jnp.asarray(rng.normal(size=shape), BF16).at[0, :, ::8].set(0)
    levels = jnp.asarray(rng.normal(size=(codebooks, 16)), jnp.float32)
    found = rounding.relative(product, scales, levels, interpret=True)
    wanted = mosaic_integers.relative(product, scales, levels)
    for a, b in zip(found, wanted, strict=True):
        a = np.asarray(a, np.float64)[: len(b)]
        np.testing.assert_allclose(a, np.asarray(b, np.float64), rtol=2e-3, atol=1e-6)

"""The PTX of kernels on the emulator: values against float64, at odd shapes and with odd numbers."""

import dataclasses

import emulator
import jax.numpy as jnp
import numpy as np
import oracle
import planar
import pytest
from golden import DECODERS
from planar import HALF

from fdk_jax.format import codebooks, packing
from pallas_kernels import (
    choice,
    dequantise,
    integer,
    integer_plan,
    integer_tokens,
    matvec,
    mma,
    wgmma,
)
from pallas_kernels.case import Case
from pallas_kernels.ptx import Ptx
from pallas_kernels.registers import at
from pallas_kernels.target import H200, Target


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 12, 16, 42, 131, 132, 4096, 42752, 2**29 + 1])
def test_quotients_and_remainders(rng, divisor):
    """Around multiples of the divisor, where a rounded reciprocal would show, to the largest values."""
    near = rng.integers(0, 2**30 // divisor, 60, endpoint=True) * divisor
    values = np.concatenate([near - 1, near, near + 1, [0, 2**30 - 1], rng.integers(0, 2**30, 10)])
    values = np.clip(values, 0, 2**30 - 1).astype(np.uint32)
    ptx, threads = Ptx(), len(values)
    ptx.share(16)
    address = ptx.op("mad.wide.u32", ptx.op("mov.u32", "%tid.x"), 4, "$1", kind="b64")
    value = ptx.op("ld.global.nc.b32", at(address))
    for target, result in (
        ("$2", ptx.quotient(value, divisor)),
        ("$3", ptx.remainder(value, divisor)),
    ):
        address = ptx.op("mad.wide.u32", ptx.op("mov.u32", "%tid.x"), 4, target, kind="b64")
        ptx.do("st.global.b32", at(address), result)
    found = np.full((2, threads), 2**32 - 1, np.uint32)
    emulator.run(ptx.text(), [values, *found], (1, 1), threads)
    np.testing.assert_array_equal(found, np.divmod(values, np.uint32(divisor)))


def _run_ptx(case, config, arrays, bias, target=H200):
    """A kernel's PTX on numpy: its result, poisoned beforehand."""
    x, packed, scales, codebook = (np.asarray(a) for a in arrays)
    x = np.pad(x, ((0, 0), (0, case.blocks * case.span - case.k)))
    operands = [x, packed, scales, codebook] + ([] if bias is None else [bias])
    out = np.full((case.m, case.n), np.nan, case.out_dtype)
    module = choice.KERNELS[choice.kernel_of(config)]
    threads = 32 * config.warps
    emulator.run(
        module.source(case, config, target),
        [*operands, out],
        module.grid(case, config),
        threads,
        config.cluster,
    )
    return out


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "codebooks", "dtype", "config"),
    [
        (1, 33, 600, 64, 1, "bfloat16", matvec.Config(2, 4, 1, 1)),
        (1, 20, 1100, 128, 1, "bfloat16", matvec.Config(1, 4, 8, 1, 1, True)),
        (3, 48, 700, 32, 3, "float16", matvec.Config(1, 4, 2, 1)),
        (11, 40, 520, 64, 1, "float16", matvec.Config(1, 8, 1, 2, 2)),
        (2, 17, 1030, 1024, 1, "bfloat16", matvec.Config(2, 4, 1, 1)),
        (1, 16, 900, 192, 1, "bfloat16", matvec.Config(1, 8, 1, 1)),
        (5, 16, 300, 8, 1, "float16", matvec.Config(1, 4, 1, 1)),
        (35, 70, 700, 64, 1, "bfloat16", wgmma.Config(32, 1, 2, 2)),
        (9, 192, 300, 32, 3, "float16", wgmma.Config(16, 1, 1, 2)),
        (70, 130, 260, 128, 1, "bfloat16", wgmma.Config(128, 2, 1, 2)),
        (19, 70, 2100, 64, 1, "bfloat16", matvec.Config(2, 4, 1, 2, 2, cluster=2)),
        (3, 33, 1100, 32, 1, "float16", matvec.Config(1, 4, 1, 1, cluster=4)),
        (35, 70, 2100, 64, 1, "bfloat16", wgmma.Config(32, 1, 2, 2, cluster=2)),
        (1, 33, 2100, 64, 1, "bfloat16", matvec.Config(2, 4, 4, ring=True)),
        (3, 48, 700, 32, 3, "float16", matvec.Config(1, 4, 2, 1, ring=True)),
        (9, 20, 1100, 128, 1, "bfloat16", matvec.Config(1, 4, 3, 2, ring=True)),
        (1, 100, 600, 64, 1, "bfloat16", matvec.Config(1, 4, 1, 1, programs=3)),
        (1, 96, 1100, 64, 3, "float16", matvec.Config(1, 4, 3, 1, programs=5)),
        (1, 130, 1100, 32, 1, "bfloat16", matvec.Config(2, 4, 8, 1, 2, True, programs=2)),
        (1, 70, 300, 64, 1, "bfloat16", matvec.Config(1, 4, 1, 1, programs=64)),
        (1, 33, 1100, 16, 1, "bfloat16", matvec.Config(2, 4, 2, 1)),
        (1, 100, 600, 16, 1, "float16", matvec.Config(1, 4, 1, 1, programs=3)),
        (1, 48, 2100, 16, 3, "bfloat16", matvec.Config(1, 4, 3, 1, ring=True)),
        (1, 33, 2100, 32, 1, "bfloat16", matvec.Config(1, 8, 2, 1)),
        (35, 70, 2100, 64, 1, "bfloat16", wgmma.Config(32, 1, 2, 4, 2, ring=True)),
        (5, 64, 1100, 16, 1, "float16", wgmma.Config(16, 1, 1, 4, ring=True)),
        (70, 130, 1100, 64, 1, "float16", wgmma.Config(64, 2, 1, 2, cluster=4)),
        (130, 130, 300, 64, 1, "bfloat16", wgmma.Config(128, 2, 2, 2, cluster=2)),
        (35, 70, 1300, 64, 1, "bfloat16", mma.Config(32, 2, 2, 2, 2, 2)),
        (19, 96, 900, 32, 3, "float16", mma.Config(32, 1, 2, 3, 4, 4)),
        (9, 33, 600, 16, 1, "bfloat16", mma.Config(16, 1, 1, 4, 4, 4)),
        (3, 70, 1100, 64, 1, "bfloat16", mma.Config(16, 2, 2, 4, 2, 2)),
        (19, 48, 900, 64, 1, "float16", mma.Config(32, 1, 2, 3, 4, 4)),
        (70, 40, 520, 128, 1, "float16", mma.Config(64, 1, 2, 2, 2, 2)),
        (41, 40, 700, 64, 1, "bfloat16", mma.Config(48, 1, 2, 4, 2, 2)),
        (21, 70, 700, 64, 1, "bfloat16", mma.Config(24, 2, 2, 4, 2, 2)),
        (64, 66, 2300, 64, 1, "float16", mma.Config(64, 2, 2, 4, 4, 4)),
    ],
)
def test_ptx_values_and_bounds(rng, bits, uniform, m, n, k, group_size, codebooks, dtype, config):
    arrays, _, wanted = planar.product(
        rng, m, n, k, bits, group_size, dtype, codebooks, uniform=uniform
    )
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(m, n, k, bits, group_size, codebooks, half, half, single, single, uniform)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("wide_scales", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "codebooks", "config"),
    [
        (33, 600, 1, integer.Config(2, 2)),
        (64, 1100, 2, integer.Config(7, 3)),
        (70, 2100, 1, integer.Config(4, 132)),
        (20, 3000, 1, integer.Config(16, 1)),
        (1100, 12000, 1, integer.Config(8, 2)),  # more than the ring holds
        (16 * 150, 300, 150, integer.Config(3, 4)),
    ],
)
def test_integer_kernel(rng, n, k, codebooks, config, dtype, wide_scales):
    (x, packed, scales, codebook), _, wanted = planar.product(rng, 1, n, k, 1, 64, dtype, codebooks)
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    scale_dtype = single if wide_scales else half
    case = Case(1, n, k, 1, 64, codebooks, half, scale_dtype, single, single)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    arrays = (x, packed, scales.astype(scale_dtype), codebook)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "scale_dtype", "config"),
    [
        (33, 600, 64, "float16", integer.Config(2, 2)),
        (800, 5000, 64, "bfloat16", integer.Config(5, 2)),  # more than the ring holds
        (33, 1100, 32, "float32", integer.Config(3, 2)),
        (33, 8192, 1024, "bfloat16", integer.Config(16, 2)),
        (33, 1100, 16, "float16", integer.Config(3, 2)),
        (33, 2104, 2104, "bfloat16", integer.Config(4, 2)),
    ],
)
def test_integer_kernel_whose_lanes_copy(rng, n, k, group_size, scale_dtype, config, architecture):
    """Each lane of the producer warp copies a part of a slot: without bulk copies, or where asked for."""
    arrays, _, wanted = planar.product(
        rng, 1, n, k, 1, group_size, "bfloat16", scale_dtype=scale_dtype
    )
    kind = dict(group_size=group_size, scales=arrays[2].dtype, out=jnp.dtype(jnp.float32))
    case, target = planar.case(1, n, k, 1, **kind), Target.parse(architecture)
    config = dataclasses.replace(config, lane_copies=target.has_bulk_copies)
    assert choice.unsupported_reason(case, config, target) is None
    assert "bulk" not in integer.source(case, config, target)
    wanted.check(_run_ptx(case, config, arrays, None, target))


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("n", "k", "codebooks", "group_size", "config"),
    [
        (33, 1100, 1, 32, integer.Config(3, 2)),
        (64, 2048, 2, 32, integer.Config(7, 3)),
        (33, 2000, 1, 32, integer.Config(9, 2)),  # two warps a chunk of x
        (33, 1100, 1, 32, integer.Config(22, 2)),
        (33, 1100, 1, 128, integer.Config(5, 2)),
        (64, 2048, 2, 128, integer.Config(22, 3)),
        (48, 3000, 1, 256, integer.Config(22, 2)),
        (48, 4000, 1, 512, integer.Config(4, 2)),
        (33, 8192, 1, 1024, integer.Config(16, 2)),
        (33, 1100, 1, 16, integer.Config(3, 2)),  # quarters of a plane
        (64, 2048, 2, 16, integer.Config(7, 3)),
        (33, 2000, 1, 16, integer.Config(9, 2)),  # two warps a chunk of x
        (800, 5000, 1, 16, integer.Config(5, 2)),  # more than the ring holds
        # Scales that are kept: of a row, of a row that is no whole blocks, of several groups a row.
        (33, 2048, 1, 2048, integer.Config(12, 2)),
        (33, 2104, 1, 2104, integer.Config(4, 2)),
        (70, 3000, 1, 4096, integer.Config(22, 2)),
        (64, 5000, 2, 512, integer.Config(7, 3)),
        (48, 9000, 1, 1024, integer.Config(12, 2)),
        (2100, 600, 1, 600, integer.Config(1, 2)),  # more scales than threads load at once
    ],
)
def test_groups_and_scales_of_the_integer_kernel(
    rng, n, k, codebooks, group_size, config, scale_dtype
):
    arrays, _, wanted = planar.product(
        rng, 1, n, k, 1, group_size, "bfloat16", codebooks, scale_dtype=scale_dtype
    )
    single = jnp.dtype(jnp.float32)
    case = planar.case(
        *(1, n, k, 1),
        group_size=group_size,
        codebooks=codebooks,
        scales=arrays[2].dtype,
        out=single,
    )
    assert choice.unsupported_reason(case, config, H200) is None
    wanted.check(_run_ptx(case, config, arrays, None))


@pytest.mark.parametrize("m", integer_tokens.TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "codebooks", "group_size", "dtype", "scale_dtype", "config"),
    [
        (33, 600, 1, 64, "bfloat16", "bfloat16", integer_tokens.Config(2, 2)),
        (64, 1100, 2, 64, "float16", "float32", integer_tokens.Config(7, 3)),
        (20, 3000, 1, 64, "bfloat16", "float16", integer_tokens.Config(16, 1)),
        (700, 6000, 1, 64, "float16", "float16", integer_tokens.Config(4, 1)),  # more than the ring
        (16 * 50, 300, 50, 64, "bfloat16", "bfloat16", integer_tokens.Config(3, 4)),
        (33, 1100, 1, 32, "bfloat16", "float32", integer_tokens.Config(3, 2)),
        (64, 2048, 2, 128, "bfloat16", "bfloat16", integer_tokens.Config(5, 3)),
        (48, 3000, 1, 256, "float16", "bfloat16", integer_tokens.Config(4, 2)),
        (33, 8192, 1, 1024, "bfloat16", "float16", integer_tokens.Config(16, 2)),
        (33, 2104, 1, 2104, "bfloat16", "bfloat16", integer_tokens.Config(5, 2, True)),
        (48, 5000, 1, 1024, "float16", "float32", integer_tokens.Config(7, 2)),
    ],
)
def test_integer_kernel_of_several_tokens(
    rng, m, n, k, codebooks, group_size, dtype, scale_dtype, config
):
    arrays, _, wanted = planar.product(
        rng, m, n, k, 1, group_size, dtype, codebooks, scale_dtype=scale_dtype
    )
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(m, n, k, 1, group_size, codebooks, half, arrays[2].dtype, single, single)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "codebook",
    # The last one's difference is rounded such that the sum lands beside the second value.
    [[-0.797, 0.801], [-3.1, 0.01], [70000.0, 71000.0], [2.0, 2.0], [0.0671, 0.2057]],
)
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, matvec.Config(1, 8, 1, 1)),
        (1, integer.Config(4, 2)),
        (3, integer_tokens.Config(4, 2)),
        (16, wgmma.Config(16, 1, 4, 2)),
    ],
    ids=str,
)
def test_values_of_one_bit_are_exact(rng, codebook, dtype, m, config):
    """An error of all weights alike would add up over x that are all positive."""
    half, single, n, k = jnp.dtype(dtype), jnp.dtype(jnp.float32), 32, 4096
    if dtype == "float16":
        codebook = [min(value, 60000.0) for value in codebook]
    (_, packed, scales, _), spec, _ = planar.product(rng, m, n, k, 1, 64, dtype)
    x = jnp.asarray(1 + 0.1 * rng.normal(size=(m, k)), half)
    interchange, plain = packing.from_planar(packed, scales, in_features=k, **spec)
    values = np.asarray(jnp.asarray(codebook, half), np.float64)
    weight = values[np.asarray(packing.unpack(interchange, 1, k))]
    weight *= np.repeat(np.asarray(plain, np.float64), 64, -1)
    case = Case(m, n, k, 1, 64, 1, half, half, None, single)
    y = _run_ptx(case, config, (x, packed, scales, jnp.asarray([codebook], jnp.float32)), None)
    # Where scales multiply weights these are rounded, and all of a group alike if both values are the same.
    rounded = 4 * oracle.rounded(weight / 4, half)  # by 4: in float16 some are too large
    planar.Wanted(np.asarray(x), [weight, rounded], 1).check(y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("where", ["first", "last", "middle", "code", "between"])
@pytest.mark.parametrize("step", [1 / 7, 1e-39, 1e33])
@pytest.mark.parametrize("config", [matvec.Config(1, 4, 2), wgmma.Config(16, 1, 2, 2)], ids=str)
def test_evenly_spaced_values_are_exact(rng, bits, where, step, dtype, config):
    half, single, n, k, last = jnp.dtype(dtype), jnp.dtype(jnp.float32), 32, 2048, 2**bits - 1
    zero = {"first": 0, "last": last, "middle": last / 2, "code": 5, "between": 5.5}[where]
    codebook = ((np.arange(2**bits) - zero) * step).astype(np.float32)
    assert codebooks.is_uniform(codebook)
    (_, packed, _, _), spec, _ = planar.product(rng, 1, n, k, bits, 64, dtype)
    x = jnp.asarray(1 + 0.1 * rng.normal(size=(1, k)), half)  # errors of all weights alike add up
    scales = jnp.full((2, k // 256, 64), 0.5, half)
    interchange, _ = packing.from_planar(packed, scales, in_features=k, **spec)
    weight = 0.5 * codebook.astype(np.float64)[np.asarray(packing.unpack(interchange, bits, k))]
    case = Case(1, n, k, bits, 64, 1, half, half, None, single, True)
    y = _run_ptx(case, config, (x, packed, scales, jnp.asarray([codebook])), None)
    exact = np.asarray(x, np.float64)
    # The sums are in float32; the least numbers of float32 have fewer digits. 249.5 has more than a bfloat16.
    relative = 1e-3 if (where, bits, dtype) == ("between", 8, "bfloat16") else 2e-6
    bound = relative * (exact @ abs(weight).T).max() + 1e-41
    np.testing.assert_allclose(y, exact @ weight.T, rtol=0, atol=bound)


def test_a_value_of_zero_stays_zero(rng):
    (x, packed, scales, _), _, _ = planar.product(rng, 1, 16, 1024, 4, 64, "bfloat16")
    codebook = (np.arange(16, dtype=np.float32) - 8) / 7
    packed = jnp.full_like(packed, 0x8888)
    case = planar.case(1, 16, 1024, 4, uniform=True)
    y = _run_ptx(case, matvec.Config(1, 4, 1), (x, packed, scales, codebook), None)
    np.testing.assert_array_equal(y.astype(np.float32), 0)


def test_integer_kernel_is_exact_for_integers(rng):
    arrays, spec, _ = planar.product(rng, 1, 32, 1024, 1, 64, "bfloat16")
    _, packed, scales, _ = arrays
    x = rng.integers(-127, 128, (1, 1024)).astype(np.float32)
    x[:, ::64] = 127  # so that a unit of every plane is the same
    codebook = np.asarray([[-1.0, 3.0]], np.float32)
    interchange, plain = packing.from_planar(packed, scales, in_features=1024, **spec)
    weight = codebook[0][np.asarray(packing.unpack(interchange, 1, 1024))]
    weight = weight * np.repeat(np.asarray(plain, np.float64), 64, -1)
    case = planar.case(1, 32, 1024, 1, out=jnp.dtype(jnp.float32))
    y = _run_ptx(case, integer.Config(4, 1), (jnp.asarray(x, HALF), packed, scales, codebook), None)
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("bits", "uniform", "n", "k", "codebooks", "config"),
    [
        (1, False, 33, 600, 1, integer.Config(2, 2)),
        (1, False, 64, 2060, 2, integer.Config(3, 3)),
        (1, False, 20, 1024, 1, integer.Config(16, 132)),
        (1, False, 400, 600, 1, integer.Config(1, 2)),  # more outputs than threads
        (1, False, 70, 1100, 1, matvec.Config(1, 8, 1, 1, 1, True)),
        (2, False, 96, 520, 3, matvec.Config(1, 8, 2, 1, 2)),
        (2, True, 96, 1024, 3, integer.Config(4, 3)),
        (2, True, 33, 512, 1, integer.Config(6, 2)),
        (4, True, 70, 1024, 1, integer.Config(4, 2)),
        (4, False, 33, 600, 1, matvec.Config(2, 4, 1, 1)),
        (4, False, 40, 1100, 1, matvec.Config(1, 8, 4, 1, 1, True)),
        (4, True, 70, 700, 1, matvec.Config(4, 1, 1, 1)),  # more outputs than threads
        (8, False, 20, 300, 1, matvec.Config(1, 16, 1, 1, 2)),
        (8, True, 100, 300, 1, matvec.Config(2, 8, 1, 1)),
        (4, False, 96, 600, 2, matvec.Config(1, 4, 1, 1, programs=4)),
    ],
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_sums_and_norms_around_a_product(
    rng, bits, uniform, n, k, codebooks, config, normed, residual
):
    before, after, weight, _, wanted, inverse = planar.residual_product(
        rng, n, k, codebooks, 70, bits, uniform
    )
    options = dict(norm_eps=planar.NORM_EPS, squares=70) if normed else {}
    case = Case(
        *(1, n, k, bits, 64, codebooks, HALF, HALF, HALF, HALF, uniform),
        residual=residual,
        **options,
    )
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(HALF)
    _, x, squares = (np.asarray(a) for a in before)
    operands = [np.asarray(case.pad(x)), *map(np.asarray, weight), bias]
    operands += [squares] * normed + [np.asarray(a) for a in after] * residual
    kernel = choice.KERNELS[choice.kernel_of(config)]
    row, outputs = np.full((1, n), np.nan, HALF), ()
    if residual:
        outputs = (row.copy(), np.full(kernel.squares(case, config, H200), np.nan, np.float32))
    outputs = (row, *outputs)
    emulator.run(
        kernel.source(case, config, H200),
        [*operands, *outputs],
        kernel.grid(case, config),
        32 * config.warps,
    )
    factor = inverse if normed else 1.0
    expectations = [
        e.then(factor=factor, add=bias.astype(np.float64)) for e in wanted.expectations()
    ]
    if residual:
        planar.check_residual(outputs, after, expectations)
    else:
        oracle.check(row, expectations)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group_size", [16, 32, 64, 1024])
@pytest.mark.parametrize(
    ("m", "config"),
    [
        *((1, integer.Config(consumers, 3)) for consumers in (2, 4, 9)),
        (4, integer_tokens.Config(2, 3)),
    ],
    ids=str,
)
def test_integer_kernel_propagates_like_a_dense_product(rng, value, group_size, m, config):
    """Within its own token: the others' results are finite."""
    if m > 1 and group_size < integer_plan.MIN_GROUP:
        pytest.skip("the kernel of several tokens takes no such groups")
    arrays, spec, _ = planar.product(rng, m, 32, 1024, 1, group_size, "bfloat16")
    x, packed, scales, _ = arrays
    x = x.at[-1, 700].set(value)
    codebook = np.asarray([[-0.5, 0.75]], np.float32)
    interchange, _ = packing.from_planar(packed, scales, in_features=1024, **spec)
    weight = codebook[0][np.asarray(packing.unpack(interchange, 1, 1024))]
    case = planar.case(m, 32, 1024, 1, group_size=group_size)
    y = _run_ptx(case, config, (x, packed, scales, codebook), None).astype(np.float64)
    expected = np.asarray(x, np.float64) @ weight.T
    np.testing.assert_array_equal(y[-1], expected[-1])
    assert not np.isfinite(y[-1]).any() and np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_ptx_propagates_like_a_dense_product(rng, value):
    arrays, _, _ = planar.product(rng, 1, 16, 1024, 1, 64, "bfloat16")
    x, *weight = arrays
    x = x.at[0, 700].set(value)
    case = planar.case(1, 16, 1024, 1)
    for diagonal in (False, True):
        y = _run_ptx(case, matvec.Config(1, 4, 1, 1, 1, diagonal), (x, *weight), None)
        assert np.isnan(y.astype(np.float32)).all() == np.isnan(value)
        assert not np.isfinite(y.astype(np.float32)).any()


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("group_size", "dtype"), [(64, "bfloat16"), (16, "float16")])
def test_ptx_decodes_whole_weights(rng, bits, group_size, dtype):
    n, k, half = 20, 700, jnp.dtype(dtype)
    arrays, _, _ = planar.product(rng, 1, n, k, bits, group_size, dtype)
    _, packed, scales, codebook = arrays
    case = planar.case(1, n, k, bits, group_size=group_size, dtype=half, scales=half)
    out = np.full((16 * case.tiles, case.blocks * case.span), np.nan, half)
    operands = [np.asarray(a) for a in (packed, scales, codebook)]
    emulator.run(dequantise.source(case, H200), [*operands, out], (case.tiles, 1), 256)
    interchange, plain = packing.from_planar(
        packed, scales, bits=bits, group_size=group_size, out_features=n, in_features=k
    )
    codes = np.asarray(packing.unpack(interchange, bits, k)).astype(int)
    values = np.asarray(codebook[0].astype(half)).astype(np.float64)[codes]
    values *= np.repeat(np.asarray(plain).astype(np.float64), group_size, -1)[:, :k]
    np.testing.assert_array_equal(out[:n, :k], values.astype(half))

"""One product of two or four bits by sums of integers, on the emulator; see `test_ptx_values` for one bit."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import planar
import pytest
from test_ptx_values import _run_ptx

from fdk_jax.format import packing
from pallas_kernels import choice, integer
from pallas_kernels.case import Case
from pallas_kernels.target import H200


@pytest.mark.parametrize(("bits", "uniform"), [(2, False), (2, True), (4, True)])
@pytest.mark.parametrize(
    ("n", "k", "codebooks", "group_size", "dtype", "scale_dtype", "config"),
    [
        (33, 512, 1, 64, "bfloat16", "bfloat16", integer.Config(2, 2)),
        (64, 1024, 2, 32, "float16", "float32", integer.Config(8, 3)),
        (700, 1536, 1, 64, "float16", "float16", integer.Config(4, 1)),  # more than the ring holds
        (16 * 50, 512, 50, 64, "bfloat16", "bfloat16", integer.Config(3, 4)),
        (33, 2048, 1, 128, "bfloat16", "float16", integer.Config(16, 2)),
        (48, 4096, 3, 1024, "bfloat16", "bfloat16", integer.Config(16, 2)),
    ],
)
def test_integer_kernel_of_two_and_four_bits(
    rng, bits, uniform, n, k, codebooks, group_size, dtype, scale_dtype, config
):
    arrays, _, wanted = planar.product(
        rng, 1, n, k, bits, group_size, dtype, codebooks, uniform=uniform, scale_dtype=scale_dtype
    )
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(
        1, n, k, bits, group_size, codebooks, half, arrays[2].dtype, single, single, uniform
    )
    whole = (
        4 * group_size // math.gcd(4 * group_size, case.span)
    )  # a slot has whole fours of groups
    config = dataclasses.replace(config, workers=-(-config.workers // whole) * whole)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "codebook",
    # Symmetric ones, of which two steps are enough, and others.
    [[-1.51, -0.453, 0.453, 1.51], [-3.1, -3.0, 0.01, 0.011], [2.0] * 4, [0.0, 0, 0, 1]],
)
def test_four_values_are_exact(rng, codebook, dtype):
    """An error of all weights alike would add up over x that are all positive."""
    half, single, n, k = jnp.dtype(dtype), jnp.dtype(jnp.float32), 32, 4096
    (_, packed, scales, _), spec, _ = planar.product(rng, 1, n, k, 2, 64, dtype)
    x = jnp.asarray(1 + 0.1 * rng.normal(size=(1, k)), half)
    interchange, plain = packing.from_planar(packed, scales, in_features=k, **spec)
    values = np.asarray(jnp.asarray(codebook, half), np.float64)
    weight = values[np.asarray(packing.unpack(interchange, 2, k))]
    weight *= np.repeat(np.asarray(plain, np.float64), 64, -1)
    case = Case(1, n, k, 2, 64, 1, half, half, None, single)
    arrays = x, packed, scales, jnp.asarray([codebook], jnp.float32)
    y = _run_ptx(case, integer.Config(8, 2), arrays, None)
    planar.Wanted(np.asarray(x), [weight], 2).check(y)

"""One product of two or four evenly spaced bits by sums of integers, on the emulator."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import planar
import pytest
from test_ptx_values import _run_ptx

from pallas_kernels import choice, integer
from pallas_kernels.case import Case
from pallas_kernels.target import H200


@pytest.mark.parametrize("bits", [2, 4])
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
    rng, bits, n, k, codebooks, group_size, dtype, scale_dtype, config
):
    arrays, _, wanted = planar.product(
        rng, 1, n, k, bits, group_size, dtype, codebooks, uniform=True, scale_dtype=scale_dtype
    )
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(1, n, k, bits, group_size, codebooks, half, arrays[2].dtype, single, single, True)
    # A slot has whole fours of groups.
    whole = 4 * group_size // math.gcd(4 * group_size, case.span)
    config = dataclasses.replace(config, consumers=-(-config.consumers // whole) * whole)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)

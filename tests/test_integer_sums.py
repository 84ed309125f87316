"""One product of one token by sums of integers, of two or four evenly spaced bits and copied by lanes."""

import dataclasses
import math

import emulator
import golden
import jax.numpy as jnp
import numpy as np
import planar
import pytest
from test_ptx_values import _run_ptx

from pallas_kernels import choice, integer
from pallas_kernels.case import Case
from pallas_kernels.target import H200, Target


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
        (70, 1536, 1, 128, "float16", "float32", integer.Config(5, 2, lane_copies=True)),
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


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("bits", "k", "group_size"), [(1, 1100, 32), (1, 2104, 2104), (4, 1024, 64)]
)
def test_copies_by_lanes_with_warps_in_any_order(rng, bits, k, group_size, architecture):
    """Through a ring that is filled several times: nothing but its barriers orders copies and loads."""
    arrays, _, wanted = planar.product(
        rng, 1, 200, k, bits, group_size, "bfloat16", uniform=bits > 1
    )
    kind = dict(group_size=group_size, out=jnp.dtype(jnp.float32), uniform=bits > 1)
    case = planar.case(1, 200, k, bits, **kind)
    target = Target.parse(f"{architecture}:shared_bytes=24576")
    config = integer.Config(4, 2, lane_copies=target.has_bulk_copies)
    assert choice.unsupported_reason(case, config, target) is None
    x, *weight = (np.asarray(a) for a in arrays)
    y = np.full((1, case.n), np.nan, np.float32)
    emulator.run(
        integer.source(case, config, target),
        [np.asarray(case.pad(x)), *weight, y],
        integer.grid(case, config),
        32 * config.warps,
        chance=rng,
    )
    wanted.check(y)


@pytest.mark.parametrize(("bits", "uniform"), [(1, False), (2, True), (4, True)])
def test_copies_by_lanes_are_the_same_code_everywhere(bits, uniform):
    case = planar.case(1, 4096, 4096, bits, uniform=uniform)
    lanes, bulk = integer.Config(16, 132, lane_copies=True), integer.Config(16, 132)
    older = dataclasses.replace(Target.parse("sm_80"), shared_bytes=H200.shared_bytes)
    runs = ((lanes, H200), (lanes, older), (bulk, older), (bulk, H200))
    source, *others, in_bulk = (golden.record(integer.source(case, *run)) for run in runs)
    assert [source, source] == others and source != in_bulk

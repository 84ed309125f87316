"""The kernel suite: cases, random inputs, the oracle, the timed loop."""

import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import for_a_gpu

import fdk_jax
import pallas_kernels
from fdk_jax.benchmark import (
    cases,
    environment,
    inputs,
    kernels,
    records,
    timing,
)
from fdk_jax.benchmark.cases import KernelCase
from pallas_kernels import target
from pallas_kernels.target import H200

SMALL = dict(backends=["xla"], m=[1], k=[64], n=["k"], bits=[4])


# Cases


def test_cases_cover_every_combination_once():
    made = cases.make_cases(
        backends=["cpu", "xla"],
        m=[1, 4],
        k=[64, 128],
        n=["k", 64],
        bits=[16, 32, 4, 1],
        dtypes=["bfloat16", "float32"],
        arithmetics=["exact", "int8"],
    )
    assert len({c.name for c in made}) == len(made)
    # k = 64 twice names the same size: 3 shapes. Dense: bfloat16, float32. Others: 3 backends x 2 dtypes.
    assert len(made) == 2 * 3 * (2 + 2 * 2 * 3)
    assert {(c.k, c.n) for c in made} == {(64, 64), (128, 128), (128, 64)}
    for case in made:
        assert (case.bits == 32) == (case.dense and case.dtype == "float32")
        assert case.arithmetic == "exact" or case.backend == "cpu"
        assert KernelCase.parse(case.name) == case


@pytest.mark.parametrize(
    "name",
    [
        "",
        "xla-b4-m1-k64-n64-bfloat16",
        "xla-b16-m1-k64-n64-g64-uniform-bfloat16",
        "xla-b3-m1-k64-n64-g64-uniform-bfloat16",
        "xla-b4-m0-k64-n64-g64-uniform-bfloat16",
        "xla-b4-m1-k64-n64-g64-uniform-bfloat16-",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        KernelCase.parse(name)


def test_select_includes_and_excludes():
    made = cases.make_cases(**SMALL | dict(bits=[16, 4, 1], m=[1, 4]))
    names = [c.name for c in cases.select(made, include="-b(4|1)-", exclude="-m4-")]
    assert names == [
        "xla-b4-m1-k64-n64-g64-uniform-bfloat16",
        "xla-b1-m1-k64-n64-g64-uniform-bfloat16",
    ]
    assert cases.select(made) == made


# Inputs and the oracle


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("k, group_size", [(64, 64), (37, 16), (5, 64)])
def test_oracle_reads_the_format(bits, k, group_size, rng):
    case = KernelCase("xla", 3, k, 7, bits, group_size, "kmeans", "float32")
    w = inputs.quantised_weight(case, rng)
    w.validate()
    x = inputs.activations(case, rng)
    # Every weight by the definition of the format, one at a time.
    expected = np.zeros((3, 7))
    packed, scales, codebook = (np.asarray(a) for a in (w.packed, w.scales, w.codebook))
    for n, i in itertools.product(range(7), range(k)):
        digits = "".join(f"{byte:08b}" for byte in packed[n])
        code = int(digits[i * bits : (i + 1) * bits], 2)
        weight = float(scales[n, i // group_size]) * float(codebook[code])
        expected[:, n] += x[:, i].astype(np.float64) * weight
        if i == k - 1:
            assert not digits[k * bits :].strip("0"), "padding must be zero codes"
    np.testing.assert_allclose(
        inputs.reference(case, x, w).expected[0].value, expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("bits", [16, 4])
def test_some_rows_of_a_weight_may_be_checked(bits, rng):
    """Those of blocks that are spread over it, with the results that they have among all."""
    case = KernelCase("xla", 3, 64, 2000, bits, *((64, "uniform") if bits == 4 else ()))
    x = inputs.activations(case, rng)
    w = inputs.quantised_weight(case, rng) if bits == 4 else inputs.dense_weight(case, rng)
    whole, part = inputs.reference(case, x, w), inputs.reference(case, x, w, 512)
    assert part.rows.tolist() == [*range(256), *range(1024, 1280)]
    for some, all_ in zip(part.expected, whole.expected, strict=True):
        np.testing.assert_array_equal(some.value, all_.value[:, part.rows])
    assert len(whole.rows) == 2000


@pytest.mark.parametrize("bits", [16, 1, 4])
def test_products_keep_their_size(bits, rng):
    dense = bits == 16
    case = KernelCase("xla", 4, 512, 512, bits, None if dense else 64, None if dense else "uniform")
    w = inputs.dense_weight(case, rng) if dense else inputs.quantised_weight(case, rng)
    y = inputs.reference(case, inputs.activations(case, rng), w).expected[0].value
    assert 0.8 < np.sqrt(np.mean(np.square(y))) < 1.25


def test_nf4_has_four_bits(rng):
    with pytest.raises(NotImplementedError, match="2-bit"):
        inputs.quantised_weight(KernelCase("xla", 1, 64, 64, 2, 64, "nf4"), rng)


def test_relative_error_sees_wrong_and_missing_values(rng):
    expected = rng.standard_normal((4, 5))
    assert inputs.relative_rms_error(expected * 1.01, expected) == pytest.approx(0.01)
    broken = expected.copy()
    broken[1, 2] = np.nan
    assert inputs.relative_rms_error(broken, expected) == math.inf
    with pytest.raises(ValueError, match="shape"):
        inputs.relative_rms_error(expected.T, expected)


# The loop


@pytest.mark.parametrize("link_every", [True, False])
def test_loop_runs_every_call_in_turn(link_every, rng):
    x = jnp.asarray(rng.standard_normal((2, 8)), jnp.float32)
    copies = [jnp.float32(v) for v in (0.5, 1.25, 2.0)]
    program = timing.loop_program(
        lambda x, w: x * jnp.float32(0.5) + w, x, copies, loops=4, link_every=link_every
    )
    expected = np.asarray(x, np.float64)
    for _, w in itertools.product(range(4), copies):
        expected = expected * 0.5 + float(w)
    last, results = jax.jit(program)(x, copies)
    np.testing.assert_allclose(last, expected, rtol=1e-6)
    assert results == []


@pytest.mark.parametrize("link_every", [True, False])
def test_loop_links_results_of_another_shape(link_every, rng):
    x = np.asarray(rng.standard_normal((2, 8)), np.float32)
    copies = [jnp.asarray(rng.standard_normal((8, 6)) / 3, jnp.float32) for _ in range(3)]
    program = timing.loop_program(
        lambda x, w: x @ w, jnp.asarray(x), copies, loops=3, link_every=link_every
    )
    last, results = jax.jit(program)(x, copies)
    for _ in range(3):
        expected = []
        for i, w in enumerate(copies):
            expected.append(x @ np.asarray(w))
            if link_every or i == 2:
                x[0, 0] = expected[-1][0, 0]
    np.testing.assert_allclose(last, x, rtol=1e-4)
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [256, 384])
def test_nothing_is_hoisted_out_of_the_compiled_loop(n):
    work = kernels.prepare(KernelCase("xla", 1, 256, n, 4, 64, "uniform"))
    copies = timing.copy_weight(work.weight, 3)
    assert len({w.packed.unsafe_buffer_pointer() for w in copies}) == 3
    program = timing.loop_program(work.step, work.x, copies, loops=5, link_every=True)
    compiled = jax.jit(program).lower(work.x, tuple(copies)).compile().as_text()
    computations = re.split(r"\n(?=\S)", compiled)
    entry = next(c for c in computations if c.startswith("ENTRY"))
    bodies = [c for c in computations if len(re.findall(r" dot\(", c)) == 3]
    assert len(bodies) == 1 and not re.search(r" dot\(", entry)
    assert not re.search(r"\bcopy\(.*u8\[", compiled), "weights must not be copied"
    unpacked = rf"[us]\d+\[{n},\d+,2\]|(f32|bf16)\[{n},256\]"
    assert not re.search(unpacked, entry), "nothing may be dequantised outside of the loop"
    assert re.search(unpacked, bodies[0])


@pytest.mark.parametrize("m", [1, 16])
def test_a_gpu_runs_nothing_but_the_kernels(m, rng):
    case = KernelCase("pallas", m, 512, 512, 4, 64, "uniform")
    weight = fdk_jax.prepare(inputs.quantised_weight(case, rng), backend="pallas")
    x, copies = jnp.asarray(inputs.activations(case, rng)), timing.copy_weight(weight, 5)
    spec = dict(bits=4, group_size=64, out_features=512, uniform=True)

    def step(x, w):
        return pallas_kernels.matmul(x, w.packed, w.scales, w.codebook, **spec)

    program = timing.loop_program(step, x, copies, loops=7, link_every=False)
    with for_a_gpu():
        traced = jax.jit(program).trace(x, tuple(copies))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    body = text[text.index("stablehlo.while") :]
    assert len(re.findall(r"@__gpu\$xla\.gpu\.triton", body)) == 5
    # Per loop: its counter. Per product: one kernel and views of its operands.
    free = {"while", "return", "constant", "compare", "add", "optimization_barrier", "reshape"}
    assert set(re.findall(r"stablehlo\.(\w+)", body)) <= free | {"custom_call"}


def test_statistics_keep_every_sample():
    found = records.statistics([3.0, 1.0, 2.0, 10.0])
    assert found["samples_us"] == [3.0, 1.0, 2.0, 10.0]
    assert (found["median_us"], found["mean_us"]) == (2.5, 4.0)
    assert found["stderr_us"] == pytest.approx(np.std([3, 1, 2, 10], ddof=1) / 2, abs=1e-4)
    assert found["p95_us"] == pytest.approx(8.95)
    assert records.statistics([1.0])["stderr_us"] is None


def test_more_copies_than_caches_hold():
    work = kernels.prepare(KernelCase("xla", 1, 1024, 1024, 32, dtype="float32"))
    held = kernels.copies_for(work) * work.weight_bytes
    assert held >= 2 * environment.cache_bytes(work.device) or kernels.copies_for(work) == 96
    assert held <= max(300 << 20, environment.memory_bytes(work.device) // 15)


@pytest.mark.parametrize(
    ("seconds_a_pass", "wanted"), [(1e-3, 50), (2.4e-3, 21), (2.6e-3, 10), (9e-3, 10), (11e-3, 5)]
)
def test_a_sample_of_another_length_gets_other_passes(seconds_a_pass, wanted, monkeypatch):
    built = []

    def build(work, copies, loops):
        built.append(loops)
        return lambda: loops * seconds_a_pass

    monkeypatch.setattr(kernels, "build", build)
    work = kernels.prepare(KernelCase("xla", 1, 64, 64, 32, dtype="float32"))
    session = timing.Session(sample_seconds=0.05)
    loops, run = kernels._of_length(work, 1, 10, session)
    assert built[0] == 10
    assert loops == built[-1] == wanted
    assert run() == wanted * seconds_a_pass


def test_a_row_says_which_gpus_kernels_it_measured():
    gpu = types.SimpleNamespace(platform="gpu", device_kind=H200.kind)
    with target.using(H200):
        assert environment.device_name(gpu) == "NVIDIA H200"
    with target.using(target.Target.parse("sm_89", H200)):
        assert environment.device_name(gpu) == "NVIDIA H200 as sm_89"

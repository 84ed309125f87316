"""The Pallas kernels on a GPU: every tuned configuration, ragged shapes, extreme values.

`tests/gpu.sh` runs them as they are, and again under compute-sanitizer, each array an allocation of its own.
"""

import dataclasses
import functools
import gc
import os

import chains
import decode_attention
import jax
import jax.numpy as jnp
import layered
import numpy as np
import oracle
import planar
import pytest
import rounding_bits
from golden import DECODERS

import fdk_jax
import pallas_kernels
from fdk_jax import models
from fdk_jax.format import packing
from fdk_jax.format.dequantisation import round_to
from fdk_jax.models import fused_layers, fused_products
from fdk_jax.models.config import ModelConfig
from pallas_kernels import (
    attention,
    chain,
    choice,
    integer,
    integer_tokens,
    layers,
    matvec,
    ring_arithmetic,
    wgmma,
)
from pallas_kernels.case import Case
from pallas_kernels.target import Target, current

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


TARGET = current()  # set FDK_JAX_TARGET=sm_80 to test what older GPUs get


# Groups and scales of checkpoints that people have: see docs/files.md.
GROUPS = [
    *((1, 128, "float16"), (1, 32, "float16"), (1, 256, "float32"), (2, 128, "float16")),
    *((2, 256, "float16"), (2, 2048, "float32"), (4, 16, "float32"), (4, 32, "float16")),
    *((4, 128, "bfloat16"), (8, 32, "float16"), (8, 2048, "bfloat16"), (1, 16, "bfloat16")),
    *((1, 2048, "float32"), (1, 1024, "bfloat16"), (2, 32, "bfloat16"), (4, 16, "bfloat16")),
]


def _check(
    rng,
    m,
    n,
    k,
    bits,
    uniform,
    group_size,
    dtype,
    *,
    config=None,
    codebooks=1,
    bias=True,
    scale=1.0,
    **kind,
):
    arrays, spec, wanted = planar.product(
        rng, m, n, k, bits, group_size, dtype, codebooks, scale, uniform, **kind
    )
    added = rng.normal(size=n).astype(np.float32) * bias
    y = pallas_kernels.matmul(
        *arrays,
        **spec,
        uniform=uniform,
        bias=jnp.asarray(added) if bias else None,
        out_dtype=jnp.float32,
        config=config,
    )
    assert y.shape == (m, n)
    wanted.check(y, added)


def _is_ours(row):
    """Whether a row of the table is for GPUs like the one that the kernels are written for, and fits there."""
    other = Target.parse(choice.architecture_of(row))
    alike = choice.class_of(other.architecture) == choice.class_of(TARGET.architecture)
    return alike and other.shared_bytes <= TARGET.shared_bytes


def _tuned():
    """Each configuration of the table once for a kind of codebook, with its number of tokens."""
    found = {}
    for row in choice.table():
        if row["kernel"] in choice.KERNELS and _is_ours(row):
            config = choice.configuration(row, TARGET)
            found[row["bits"], choice.is_uniform(row), config] = row["m"]
    return [(*key, m) for key, m in found.items()]


@pytest.mark.parametrize(("bits", "uniform", "config", "m"), _tuned(), ids=str)
def test_tuned_configurations(rng, bits, uniform, config, m):
    rows = getattr(config, "programs", 0) * config.rows  # so that programs take more than one turn
    whole = bits > 1 and isinstance(config, integer.Config)  # sums of more bits have whole blocks
    k = 2560 if whole else 2100
    _check(rng, m, rows + 517, k, bits, uniform, 64, "bfloat16", config=config)


@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "codebooks"),
    [
        (1, 1, 7, 64, 1),
        (1, 4096, 4096, 64, 1),
        (1, 33, 1111, 128, 1),
        (2, 5, 600, 24, 1),
        (3, 100, 700, 32, 1),
        (16, 96, 2048, 64, 3),
        (64, 130, 1000, 64, 1),
        (300, 200, 600, 64, 1),
        (700, 64, 512, 64, 1),
    ],
)
def test_shapes(rng, dtype, bits, uniform, m, n, k, group_size, codebooks):
    if dtype == "float32" and not TARGET.has_pallas:
        with pytest.raises(NotImplementedError, match="x is float32"):
            _check(rng, m, n, k, bits, uniform, group_size, dtype, codebooks=codebooks)
        return
    _check(rng, m, n, k, bits, uniform, group_size, dtype, codebooks=codebooks)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "consumers", "each"),
    [(4096, 4096, 64, 16, 1), (8200, 8192, 128, 24, 1), (700, 1536, 32, 12, 2)],
)
def test_sums_of_integers(rng, bits, n, k, group_size, consumers, each):
    config = integer.Config(consumers, each * TARGET.multiprocessors)
    for dtype in ("bfloat16", "float16"):
        _check(rng, 1, n, k, bits, True, group_size, dtype, config=config)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "consumers", "programs"),
    [
        *((4096, 4096, 64, 16, 132), (8200, 8192, 128, 24, 132), (700, 1536, 32, 12, 264)),
        (2100, 8192, 64, 12, 8),  # more than the ring holds
        (4100, 4096, 4096, 16, 132),  # scales that are kept
    ],
)
def test_copies_by_lanes(rng, bits, n, k, group_size, consumers, programs):
    config = integer.Config(consumers, programs, lane_copies=True)
    for dtype in ("bfloat16", "float16"):
        _check(rng, 1, n, k, bits, bits > 1, group_size, dtype, config=config)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_copies_by_lanes_of_several_tokens(rng, m):
    config = integer_tokens.Config(16, TARGET.multiprocessors, lane_copies=True)
    _check(rng, m, 8200, 8192, 1, False, 64, "bfloat16", config=config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_gives_numpys_bits(rng, dtype):
    rounding_bits.check(rng, dtype, round_to)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_that_xla_dequantises_have_the_rounded_codebook(rng, bits, dtype):
    """XLA may be more exact than it was asked to be, and leave out a cast to a narrower type and back."""
    matrix = rng.normal(size=(64, 256)).astype(np.float32)
    w = fdk_jax.quantise(matrix, bits, codebook="kmeans", dtype=jnp.dtype(dtype))
    assert not (np.asarray(w.codebook) == np.asarray(w.codebook).astype(oracle.DTYPES[dtype])).all()
    found = np.asarray(jax.jit(lambda w: w.dequantise("float32"))(w))
    np.testing.assert_array_equal(found, oracle.weights(w).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("bits", "group_size", "scales"), GROUPS)
@pytest.mark.parametrize("m", [1, 9, 40, 300])
def test_groups_and_scales(rng, m, bits, group_size, scales, dtype):
    _check(rng, m, 264, 2048, bits, False, group_size, dtype, scale_dtype=scales)


@pytest.mark.parametrize("m", range(1, 34))
@pytest.mark.parametrize(("bits", "uniform"), [(1, False), (4, False), (4, True)])
def test_every_small_number_of_tokens(rng, m, bits, uniform):
    _check(rng, m, 47, 900, bits, uniform, 64, "bfloat16", bias=False)


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize("m", [1, 9, 40])
@pytest.mark.parametrize(
    ("dtype", "scale"), [("bfloat16", 1e-20), ("bfloat16", 1e20), ("float16", 1e-3)]
)
def test_large_and_tiny_scales(rng, bits, uniform, m, dtype, scale):
    _check(rng, m, 40, 1024, bits, uniform, 64, dtype, bias=False, scale=scale)


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize(("n", "k", "codebooks"), [(33, 600, 1), (6144, 4096, 3), (128, 21512, 2)])
def test_sums_and_norms_around_a_product(rng, bits, uniform, n, k, codebooks):
    before, after, weight, spec, wanted, inverse = planar.residual_product(
        rng, n, k, codebooks, bits=bits, uniform=uniform
    )
    residual, norm_scale = after
    outputs = pallas_kernels.residual_matmul(
        pallas_kernels.Scaled(*before),
        *weight,
        eps=planar.NORM_EPS,
        residual=residual,
        norm_scale=norm_scale,
        **spec,
        uniform=uniform,
    )
    planar.check_residual(outputs, after, [e.then(factor=inverse) for e in wanted.expectations()])


@pytest.mark.parametrize(("bits", "uniform"), [*DECODERS, (2, True)])
@pytest.mark.parametrize(
    ("hidden", "inner", "count"),
    [(512, 1024, 4), (3072, 5632, 4), (512, 12800, 4), (1024, 512, 3)],
)
def test_chains(rng, bits, uniform, hidden, inner, count):
    _check_chain(rng, bits, uniform, hidden, inner, count)


@pytest.mark.parametrize(("bits", "group_size", "scales"), GROUPS)
def test_chains_of_other_groups_and_scales(rng, bits, group_size, scales):
    kind = dict(group_size=group_size, scales=scales)
    _check_chain(rng, bits, False, 2048, 4096, 4, width=2048, **kind)


def _check_chain(rng, bits, uniform, hidden, inner, count, width=512, **kind):
    """Again and again, to the bit: programs of a launch meet at counters that the one before it has left."""
    shapes = [(hidden, width), (2 * inner, hidden), (hidden, inner), (1536, hidden)][:count]
    weights = chains.weights(rng, shapes, bits, (1, 2, 1, 3), uniform, bias=True, **kind)
    cases = [case for case, *_ in weights]
    config = ring_arithmetic.config(cases, TARGET, chain.GATED)
    if (reason := chain.unsupported_reason(cases, config, TARGET)) is not None:
        pytest.skip(reason)
    x, residual, scales = chains.inputs(rng, width, hidden)
    spec = dict(bits=bits, group_size=weights[0][0].group_size, uniform=uniform)
    arguments = [(arrays, spec | {"out_features": case.n}) for case, arrays, *_ in weights]

    @jax.jit
    def repeated(x, residual, arrays):
        def run(_, __):
            pairs = [(a, spec) for a, (_, spec) in zip(arrays, arguments, strict=True)]
            scaled, y = pallas_kernels.chain_matmul(x, residual, pairs, scales, chains.EPS)
            return None, (*scaled, y)

        return jax.lax.scan(run, None, length=200)[1]

    found = repeated(x, residual, [arrays for _, arrays, *_ in weights])
    chains.check(jax.tree.map(lambda a: a[0], found), weights, x, residual, scales)
    for a in jax.tree.leaves(found):
        bits_of = np.asarray(a).view(f"u{a.dtype.itemsize}")
        np.testing.assert_array_equal(bits_of, np.broadcast_to(bits_of[:1], bits_of.shape))


@pytest.mark.parametrize(
    "kind",
    [
        dict(group_size=128, hidden=2048, inner=6144, heads=16, kv_heads=8),
        dict(hidden=6144, inner=5632, heads=48, kv_heads=8, normed=False, capacity=960),
        dict(codebooks=(4, 1, 2, 1), hidden=4096, inner=12288, heads=32, kv_heads=8),
        dict(group_size=128, scales="float16", bias=True),
        dict(uniform=True, group_size=32, scales="float32", length=63),
        dict(group_size=32, dim=64, heads=8, kv_heads=1, bias=True, length=0),
        dict(hidden=2048, inner=2048, heads=16, kv_heads=4, length=300, capacity=512),
    ],
)
def test_layers(rng, kind):
    """Each part of a layer, element by element; and several, again and again, to the bit as one by one."""
    if not TARGET.has_bulk_copies or TARGET.no_grid_barriers:
        pytest.skip(f"layers are not one launch on {TARGET}")
    made = layered.make(rng, None, target=TARGET, **kind)
    plan, arrays, _, x = made
    found = jax.jit(lambda arrays, x: layers.launch(plan, arrays, **x))(arrays, x)
    layered.check(*made, layered.found_in(plan, *found))
    several = 3
    plan, arrays, _, x = layered.make(rng, None, target=TARGET, count=several, **kind)
    alone = dataclasses.replace(plan, layers=1)

    @jax.jit
    def repeated(arrays, x):
        def run(_, __):
            return None, layers.run(plan, arrays, **x)

        return jax.lax.scan(run, None, length=200)[1]

    @jax.jit
    def one_by_one(arrays, x):
        keys, values = [], []
        for layer in arrays:
            x["stream"], k, v = layers.run(alone, [layer], **x)
            keys, values = [*keys, *k], [*values, *v]
        return x["stream"], tuple(keys), tuple(values)

    found, wanted = repeated(arrays, x), one_by_one(arrays, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        bits_of = (np.asarray(c).view(f"u{c.dtype.itemsize}") for c in (a, b))
        np.testing.assert_array_equal(*np.broadcast_arrays(*bits_of))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{}, dict(output_bias=True, qkv_bias=True, mlp_bias=True)])
def test_a_models_step_in_fewer_launches(bits, options, monkeypatch):
    """In one launch, in chains, with sums and norms in the products, and with every operation by itself."""
    config = ModelConfig(512, 512, 1024, 3, 4, 2, 128, **options)
    model = models.random_model(config, bits=bits, codebook="kmeans", backend="pallas")
    tokens = jnp.asarray([[3, 1, 4, 1, 5]])
    _, cache = model.prefill(tokens, jnp.asarray([5]), 128)

    def step():
        logits, after = jax.jit(model.decode)(jnp.asarray([9]), cache)
        return [np.asarray(a, np.float64) for a in (logits, after.keys[-1], after.values[-1])]

    chains, products = fused_products.PLANS
    x = jnp.zeros((1, 512), config.dtype)
    plan = chains if TARGET.has_bulk_copies else products
    assert fused_products.choose(model.layers, model.norm, x) is plan
    whole = fused_layers.choose(model.layers, model.norm, x, cache)
    assert (whole is not None) == (TARGET.has_bulk_copies and bits == 1)
    found = [step()]
    monkeypatch.setattr(fused_layers, "choose", lambda *arguments: None)
    found.append(step())
    monkeypatch.setattr(fused_products, "PLANS", (products,))
    found.append(step())
    monkeypatch.setattr(fused_products, "PLANS", ())
    for *ours, apart in zip(*found, step(), strict=True):
        for fewer in ours:
            assert np.sqrt(np.mean((fewer - apart) ** 2)) < 2e-2 * np.sqrt(np.mean(apart**2))


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "head_dim", "capacity", "length"),
    [
        (1, 8, 6, 128, 128, 33),
        (1, 8, 4, 64, 512, 300),
        (3, 2, 5, 256, 192, None),
        (1, 1, 1, 128, 64, 0),
        (1, 2, 3, 128, 128, 1000),
        (40, 2, 4, 128, 128, None),
        (2, 1, 17, 32, 64, None),
        (1, 8, 6, 128, 2048, 1500),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("normed", [False, True])
def test_attention(rng, batch, kv_heads, group, head_dim, capacity, length, dtype, normed):
    sizes = batch, kv_heads, group, head_dim, capacity
    lengths = None if length is None else [min(length, capacity - 1)] * batch
    arguments, norms = decode_attention.inputs(rng, *sizes, dtype, normed, lengths)
    *others, at, keys, values = arguments
    if length is not None:
        at = jnp.full_like(at, length)  # a cache may be full
    run = jax.jit(functools.partial(attention.decode, norms=norms), donate_argnums=(4, 5))
    found = run(*others, at, jnp.copy(keys), jnp.copy(values))
    decode_attention.check(found, arguments, norms)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize(
    "config",
    [None, matvec.Config(1, 8, 1, 1), integer.Config(8, 2), wgmma.Config(16, 1, 2, 2)],
    ids=str,
)
def test_non_finite_x_propagates_like_a_dense_product(rng, bits, uniform, value, config):
    arrays, spec, _ = planar.product(rng, 1, 48, 1024, bits, 64, "bfloat16", uniform=uniform)
    x, packed, scales, codebook = arrays
    x = x.at[0, 700].set(value)
    if config is not None and choice.unsupported_reason(_case(bits), config, TARGET) is not None:
        pytest.skip("the kernel does not take this width")
    interchange, _ = packing.from_planar(packed, scales, in_features=1024, **spec)
    values = np.asarray(codebook.astype(jnp.bfloat16), np.float64)[0]
    weight = values[np.asarray(packing.unpack(interchange, bits, 1024))]
    y = pallas_kernels.matmul(x, packed, scales, codebook, **spec, uniform=uniform, config=config)
    with np.errstate(invalid="ignore"):
        expected = np.asarray(x, np.float64) @ weight.T
    np.testing.assert_array_equal(np.asarray(y, np.float64), expected)
    assert not np.isfinite(expected).any()


def _case(bits):
    half = jnp.dtype(jnp.bfloat16)
    return Case(1, 48, 1024, bits, 64, 1, half, half, None, half)


def _varied(rng, count):
    """Products of ever new shapes with their gradients, weights made and prepared, a model that generates."""
    for _ in range(count):
        n, k, m = (int(size) for size in rng.integers(1, [600, 1500, 40]))
        bits, group = int(rng.choice([1, 2, 4, 8])), int(rng.choice([16, 24, 64]))
        weight = jnp.asarray(rng.standard_normal((n, k)), jnp.bfloat16)
        w = fdk_jax.prepare(fdk_jax.quantise(weight, bits, group_size=group), "pallas")
        x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
        fdk_jax.matmul(x, w)
        jax.jit(jax.grad(lambda x, w=w: fdk_jax.matmul(x, w).sum().astype(jnp.float32)))(x)
    config = ModelConfig(512, 64, 128, 2, 4, 2, 32, tie_embeddings=True)
    model = models.random_model(config, bits=int(rng.choice([1, 4])), backend="pallas")
    prompts = [[1] * int(length) for length in rng.integers(1, 40, 2)]
    models.Generator(model).generate(prompts, max_tokens=int(rng.integers(2, 40)))


def test_long_runs_leave_nothing_on_the_device(rng):
    device = jax.devices()[0]
    if device.memory_stats() is None:
        pytest.skip("this allocator does not count")
    held = []
    for _ in range(5):
        _varied(rng, 5 * int(os.environ.get("FDK_FUZZ_ROUNDS", "1")))
        jax.clear_caches()
        gc.collect()
        held.append(device.memory_stats()["bytes_in_use"])
    print(f"bytes in use {held}")
    assert max(held[1:]) <= held[0]


def test_repeated_calls_leave_nothing_on_the_device(rng):
    device = jax.devices()[0]
    if device.memory_stats() is None:
        pytest.skip("this allocator does not count")
    weight = jnp.asarray(rng.standard_normal((512, 1024)), jnp.bfloat16)
    w = fdk_jax.prepare(fdk_jax.quantise(weight, 4), "pallas")
    x = jnp.asarray(rng.standard_normal((3, 1024)), jnp.bfloat16)
    held = []
    for _ in range(4):
        for _ in range(200):
            fdk_jax.matmul(x, w)
        jax.block_until_ready(fdk_jax.matmul(x, w))
        gc.collect()
        held.append(device.memory_stats()["bytes_in_use"])
    assert held[1:] == held[:1] * 3

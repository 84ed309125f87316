"""Weights sharded along N or K on 8 devices: the right numbers, and nothing gathered."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from backends import BACKENDS, CPU_MISSING, running
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fdk_jax
from fdk_jax.product import sharding

N, K = 128, 4096


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


def operands(rng):
    w = fdk_jax.quantise(rng.standard_normal((N, K)).astype(np.float32), 4, codebook="nf4")
    x = jnp.asarray(rng.standard_normal((4, K)), jnp.float32)
    return x, w, jnp.asarray(rng.standard_normal(N), jnp.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("along", ["n", "k"])
@pytest.mark.parametrize("rows", [None, "data"])
def test_plain_jit_multiplies_a_sharded_weight_where_it_lies(backend, along, rows, mesh, rng):
    x, w, bias = operands(rng)
    expected = oracle.product(x, w, bias)
    placed = sharding.shard(fdk_jax.prepare(w, backend), mesh, **{along: "model"})
    x = jax.device_put(x, NamedSharding(mesh, P(rows)))
    bias = jax.device_put(bias, NamedSharding(mesh, P()))
    with running(backend):
        call = jax.jit(lambda x, w, b: fdk_jax.matmul(x, w, backend=backend, bias=b))
        compiled = call.lower(x, placed, bias).compile()
        y = call(x, placed, bias)
    assert oracle.relative_rms(y, expected) < 1e-5
    assert gathered_bytes(compiled.as_text()) < w.packed.size // 8


def gathered_bytes(text: str) -> int:
    """Size of the largest result of an all-gather or all-to-all in compiled HLO."""
    sizes = [0]
    width = {"u8": 1, "u16": 2, "u32": 4, "bf16": 2, "f16": 2, "f32": 4}
    for line in text.splitlines():
        found = re.search(r"= \(?(\w+)\[([\d,]*)\].* (all-gather|all-to-all)(-start)?\(", line)
        if found:
            count = np.prod([int(d) for d in found[2].split(",") if d] or [1])
            sizes.append(int(count) * width.get(found[1], 8))
    return max(sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("along", ["n", "k"])
def test_shard_map(backend, along, mesh, rng):
    x, w, _ = operands(rng)
    placed = sharding.shard(fdk_jax.prepare(w, backend), mesh, **{along: "model"})
    with running(backend):
        y = jax.jit(lambda x, w: sharding.matmul(x, w, mesh, **{along: "model"}, backend=backend))(
            x, placed
        )
    oracle.check_product(y, x, w)


def test_gradients_of_a_sharded_weight(mesh, rng):
    x, w, _ = operands(rng)
    placed = sharding.shard(w, mesh, n="model")
    dx = jax.jit(jax.grad(lambda x, w: fdk_jax.matmul(x, w).sum()))(x, placed)
    expected = np.broadcast_to(oracle.weights(w).sum(0), x.shape)
    assert oracle.relative_rms(dx, expected) < 1e-5


def test_parts_that_would_cut_a_group_are_refused(mesh, rng):
    w = fdk_jax.quantise(rng.standard_normal((6, 192)).astype(np.float32), 4)
    with pytest.raises(ValueError, match="split evenly"):
        sharding.shard(w, mesh, n="model")
    with pytest.raises(ValueError, match="split evenly"):
        sharding.shard(w, mesh, k="model")
    with pytest.raises(ValueError, match="heads"):
        sharding.shard(w, mesh, n="heads")


@pytest.mark.parametrize("backend", ["xla", "cpu"] if CPU_MISSING is None else ["xla"])
@pytest.mark.parametrize("along", ["n", "k"])
@pytest.mark.parametrize("current", [False, True])
def test_explicit_meshes(backend, along, current, rng):
    explicit = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    x, w, bias = operands(rng)
    placed = sharding.shard(fdk_jax.prepare(w, backend), explicit, **{along: "model"})
    x = jax.device_put(x, NamedSharding(explicit, P("data")))
    with jax.set_mesh(explicit) if current else contextlib.nullcontext():
        y = jax.jit(lambda x, w, b: fdk_jax.matmul(x, w, backend=backend, bias=b))(x, placed, bias)
        dx = jax.jit(jax.grad(lambda x, w: fdk_jax.matmul(x, w, backend=backend).sum()))(x, placed)
    assert y.sharding.spec == P("data", "model" if along == "n" else None)
    oracle.check_product(y, x, w, bias)
    expected = np.broadcast_to(oracle.weights(w).sum(0), x.shape)
    assert oracle.relative_rms(dx, expected) < 1e-5

"""Whole layers in one launch, without a GPU: each part against float64, many against one by one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import emulator
import jax
import jax.numpy as jnp
import layered
import numpy as np
import pytest
from backends import ONLY_WITH_A_GPU
from flax import nnx

from fdk_jax import models
from fdk_jax.models import fused_layers
from fdk_jax.models.config import ModelConfig
from pallas_kernels import layers, liveness, ring
from pallas_kernels.target import H200, using


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ring.Config(5, 5), dict(group_size=128)),
        (ring.Config(4, 4), dict(codebooks=(2, 1, 2, 1), normed=False, bias=True)),
        (ring.Config(9, 4), dict(codebooks=(4, 1, 2, 1), scales="float16")),
        (ring.Config(4, 5), dict(group_size=32, scales="float32", normed=False)),
        (ring.Config(4, 6), dict(bias=True, length=70, capacity=128)),
        (ring.Config(2, 8), dict(dim=64, heads=8, kv_heads=1, length=0)),
        (ring.Config(4, 5), dict(uniform=True, length=63)),
    ],
)
@pytest.mark.parametrize("by_chance", [False, True])
def test_values_of_a_layer(rng, config, kind, by_chance):
    made = layered.make(rng, config, **kind)
    plan, arrays, _, x = made
    layered.check(*made, layered.run(plan, arrays, x, rng if by_chance else None))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ring.Config(4, 4), dict(group_size=128)),
        (ring.Config(4, 5), dict(codebooks=(4, 1, 2, 1), bias=True, normed=False)),
    ],
)
def test_layers_are_those_of_a_launch_each(rng, config, kind):
    """To the bit, with warps in any order: nothing of a layer is overwritten before all have read it."""
    plan, arrays, _, x = layered.make(rng, config, count=2, **kind)
    found = layered.run(plan, arrays, x, rng)
    for ours, alone in zip(found, layered.one_by_one(plan, arrays, x), strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_a_launch_goes_on_with_what_an_even_number_of_layers_left(rng):
    plan, made, _, x = layered.make(rng, ring.Config(4, 4), count=3, group_size=128)
    two, one = (dataclasses.replace(plan, layers=count) for count in (2, 1))
    total, words, sums, *cache = layered.launch(two, made[:2], x, rng)
    x_then = x | dict(stream=layers.Stream(total, total, sums[0], (words, sums)))
    left, keys, values = layered.run(one, made[2:], x_then, rng)
    found = left, [*cache[::2], *keys], [*cache[1::2], *values]
    for ours, alone in zip(found, layered.one_by_one(plan, made, x), strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize(
    ("count", "most"), [(1, 20), (20, 20), (28, 25), (27, 25), (60, 21), (36, 2)]
)
def test_launches_are_of_an_even_number_of_layers(count, most):
    parts = fused_layers._parts(list(range(count)), most)  # type: ignore[arg-type]
    assert [layer for part in parts for layer in part] == list(range(count))
    assert all(len(part) <= most for part in parts)
    assert all(len(part) % 2 == 0 for part in parts[:-1])
    assert len(parts) == 1 or len(parts) == -(-count // (most - most % 2))


def _plan(**changes: Any) -> layers.Plan:
    plan, *_ = layered.make(np.random.default_rng(0), ring.Config(4, 6))
    return dataclasses.replace(plan, **changes)


def _other_product(place: int, **changes: Any) -> Callable[[layers.Plan], layers.Plan]:
    def change(plan: layers.Plan) -> layers.Plan:
        products = list(plan.products)
        products[place] = dataclasses.replace(products[place], **changes)
        return dataclasses.replace(plan, products=tuple(products))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_product(layers.OUT, bits=2), "several kinds"),
        (_other_product(layers.QKV, bits=2), "as fast in chains"),
        (_other_product(layers.DOWN, group_size=128), "several sizes"),
        (_other_product(layers.DOWN, k=1024), "do not follow one another"),
        (lambda plan: dataclasses.replace(plan, layers=40), "operands are more"),
        (
            lambda plan: dataclasses.replace(plan, config=ring.Config(4, 3)),
            "4 heads are more than 3",
        ),
        (lambda plan: dataclasses.replace(plan, config=ring.Config(2, 6)), "threads"),
        (lambda plan: dataclasses.replace(plan, config=ring.Config(4, 6, True)), "copy in bulk"),
        (
            lambda plan: dataclasses.replace(
                plan, attention=dataclasses.replace(plan.attention, dim=96)
            ),
            "has no kernel",
        ),
        (
            lambda plan: dataclasses.replace(
                plan, target=dataclasses.replace(H200, no_grid_barriers="it is shared")
            ),
            "it is shared",
        ),
    ],
)
def test_what_no_launch_takes(change, reason):
    plan = _plan()
    assert layers.unsupported_reason(plan) is None
    assert reason in str(layers.unsupported_reason(change(plan)))


def test_as_many_layers_as_a_launch_has_parameters_for():
    plan = _plan()
    most = layers.max_layers(plan)
    assert layers.unsupported_reason(dataclasses.replace(plan, layers=most)) is None
    assert "operands" in str(layers.unsupported_reason(dataclasses.replace(plan, layers=most + 1)))


@pytest.mark.parametrize(
    ("options", "capacity", "launches"),
    [
        ({}, 64, 2),
        (dict(qkv_bias=True, qk_norm=True), 960, 2),
        (dict(qkv_bias=True, qk_norm=True, output_bias=True, mlp_bias=True), 64, 2),
        ({}, 1024, 0),  # split among programs, by a kernel of its own
        (dict(post_norms=True), 64, 0),
    ],
)
@ONLY_WITH_A_GPU
def test_a_decoding_step_is_a_launch_for_many_layers(options, capacity, launches):
    _check_launches(ModelConfig(256, 512, 512, 28, 4, 2, 128, **options), capacity, launches)


@ONLY_WITH_A_GPU
def test_a_switch_forbids_layers_in_one_launch(monkeypatch):
    config = ModelConfig(256, 512, 512, 3, 4, 2, 128)
    monkeypatch.setenv(fused_layers.LAYERS, "0")
    _check_launches(config, 64, 0)
    monkeypatch.setenv(fused_layers.LAYERS, "yes")
    with pytest.raises(ValueError, match="FDK_JAX_LAYERS='yes' must be 0 or 1"):
        _check_launches(config, 64, 0)


@pytest.mark.parametrize(
    ("bits", "codebook", "launches"),
    [(1, "kmeans", 1), (1, "uniform", 1), (2, "uniform", 0), (4, "uniform", 0)],
)
@ONLY_WITH_A_GPU
def test_layers_are_in_one_launch_at_one_bit(bits, codebook, launches):
    config = ModelConfig(256, 512, 512, 3, 4, 2, 128)
    _check_launches(config, 64, launches, bits=bits, codebook=codebook)


def _check_launches(config, capacity, launches, bits=1, **kind):
    kind |= dict(bits=bits, backend="pallas")
    model = jax.eval_shape(lambda: models.random_model(config, **kind))
    graph, state = nnx.split(model)
    cache = (jax.ShapeDtypeStruct((1, 2, capacity, 128), jnp.bfloat16),) * config.num_layers
    cache = models.KVCache(cache, cache, jax.ShapeDtypeStruct((1,), jnp.int32))
    program = jax.jit(lambda s, t, c: nnx.merge(graph, s).decode(t, c))
    with using(H200):
        traced = program.trace(state, jax.ShapeDtypeStruct((1,), jnp.int32), cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "fdk_layers"') == launches
    assert (text.count('name = "decode_attention"') == 0) == (launches > 0)


_LOOP = """{
.reg .b32 b32_<3>;
.reg .pred pred_<2>;
mov.u32 b32_0, 0;
fdk_loop:
// define
setp.eq.u32 pred_0, b32_0, 3;
@pred_0 mov.u32 b32_1, 7;
@pred_0 st.global.b32 [$1+0], b32_1;
add.u32 b32_0, b32_0, 1;
setp.lt.u32 pred_1, b32_0, 5;
@pred_1 bra fdk_loop;
}"""


def test_registers_are_defined_where_a_loop_would_keep_them():
    """What is written under a predicate gets a value before; what a loop carries or surely writes does not."""
    found = liveness.define(_LOOP, "fdk_loop")
    assert found == _LOOP.replace("// define", "// define\nmov.b32 b32_1, 0;")
    result = np.zeros(1, np.int32)
    emulator.run(found, [result], (1, 1), 32)
    assert result[0] == 7
    with pytest.raises(ValueError, match="before the first mark"):
        liveness.define(_LOOP.replace("// define\n", ""), "fdk_loop")

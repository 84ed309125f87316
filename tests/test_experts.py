"""Mixtures of experts: against loops in float64, and quantised as their files or while they are read."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from fdk_jax import models
from fdk_jax.models.config import Experts, LayerOptions, ModelConfig
from fdk_jax.models.experts import MixtureOfExperts, QuantisedStack, StackedLinear
from fdk_jax.models.modules import make_feed_forward

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dtype="float32",
)
KINDS = {
    "normalised": Experts(5, 2, 32),
    "not normalised": Experts(7, 3, 24, normalised=False),
    "one of one": Experts(1, 1, 16),
    "all": Experts(4, 4, 16),
    "biases and clamp": Experts(6, 2, 32, bias=True, clamp=0.6, gate_slope=1.7),
}


def block(experts: Experts, rng) -> MixtureOfExperts:
    """With random parameters, biases too."""
    module: Any = make_feed_forward(CONFIG, LayerOptions(experts=experts), None, nnx.Rngs(0))
    graph, state = nnx.split(module)
    state = jax.tree.map(
        lambda a: (
            jnp.asarray(rng.normal(size=a.shape) / math.sqrt(a.shape[-2]), jnp.float32)
            if a.ndim > 1
            else jnp.asarray(rng.normal(size=a.shape), jnp.float32)
        ),
        state,
    )
    return nnx.merge(graph, state)


def by_loops(module: MixtureOfExperts, x: np.ndarray) -> np.ndarray:
    """Token by token and expert by expert, in float64."""
    e = module.experts

    def wide(variable):
        return np.asarray(variable[...], np.float64)

    def bias(layer, *index):
        return wide(layer.bias)[index] if layer.bias is not None else 0.0

    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    scores = rows @ wide(module.router.kernel) + bias(module.router)
    out = np.zeros_like(rows)
    for row, score, into in zip(rows, scores, out, strict=True):
        chosen = sorted(range(e.count), key=lambda i: -score[i])[: e.per_token]
        total = sum(math.exp(score[i]) for i in (chosen if e.normalised else range(e.count)))
        for i in chosen:
            hidden = row @ wide(module.gate_up.kernel)[i] + bias(module.gate_up, i)
            gate, up = hidden[: e.size], hidden[e.size :]
            if e.clamp is None:
                inner = gate / (1 + np.exp(-gate)) * up
            else:
                gate, up = np.minimum(gate, e.clamp), np.clip(up, -e.clamp, e.clamp)
                inner = gate / (1 + np.exp(-e.gate_slope * gate)) * (up + 1)
            y = inner @ wide(module.down.kernel)[i] + bias(module.down, i)
            into += math.exp(score[i]) / total * y
    return out.reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 48), (2, 9, 48)])
def test_the_block_equals_loops(kind, shape, rng):
    module = block(KINDS[kind], rng)
    x = rng.normal(size=shape).astype(np.float32)
    wanted = by_loops(module, x)
    np.testing.assert_allclose(module(jnp.asarray(x)), wanted, atol=2e-5 * np.abs(wanted).max())


# --- checkpoints ------------------------------------------------------------------------------

SHAPE = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)


def arrays_of(family: str, rng, **settings) -> dict[str, np.ndarray]:
    """Random float arrays of a checkpoint, by the names that it needs."""
    from fdk_jax.models.stages import expected

    config = ModelConfig.from_hf(SHAPE | dict(model_type=family) | settings)
    return {
        name: (rng.normal(size=shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).astype(
            np.float32
        )
        for name, shape in expected(config).items()
    }


def write(folder, family: str, arrays, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE | dict(model_type=family) | settings))
    save_file(arrays, folder / "model.safetensors")
    return folder


def logits(model):
    tokens = np.arange(24).reshape(2, 12)
    return np.asarray(models.Generator(model).logits(tokens), np.float64)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_quantised_while_loading_equals_dequantised_weights(family, rng, tmp_path):
    folder = write(tmp_path / "x", family, arrays_of(family, rng))
    found = models.load(folder, dtype="float32", quantisation=models.Quantisation(4, 32))
    plain = models.load(folder, dtype="float32", quantisation=models.Quantisation(4, 32))
    for layer, float_layer in zip(found.layers, plain.layers, strict=True):
        assert isinstance(layer.mlp.gate_up, QuantisedStack)
        assert isinstance(layer.mlp.router, nnx.Linear), "a router is never quantised"
        for name in ("gate_up", "down"):
            stack = getattr(layer.mlp, name)
            matrices = stack.weight.get_value().dequantise(jnp.float32).swapaxes(-1, -2)
            linear = StackedLinear(*matrices.shape, "float32", family == "gpt_oss", nnx.Rngs(0))
            linear.kernel, linear.bias = nnx.Param(matrices), stack.bias
            setattr(float_layer.mlp, name, nnx.data(linear))
    wanted = logits(plain)
    assert np.abs(logits(found) - wanted).max() < 2e-5 * wanted.std()
    exact = logits(models.load(folder, dtype="float32"))
    assert 1e-3 < np.abs(wanted - exact).std() / exact.std() < 1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("count", [2, 4])
def test_several_devices_share_the_experts(family, bits, count, rng, tmp_path):
    """Of 4 experts each has some, of biases of sums one device has all, and each has sinks of its heads."""
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    folder = write(tmp_path / "x", family, arrays_of(family, rng, **heads), **heads)
    quantisation = models.Quantisation(bits, 16) if bits else None
    options = dict(dtype="float32", quantisation=quantisation)
    parallel = models.Parallel(jax.make_mesh((count,), ("model",), devices=jax.devices()[:count]))
    one = models.load(folder, **options)
    shared = models.load(folder, parallel=parallel, **options)
    wanted = logits(one)
    assert np.abs(logits(shared) - wanted).max() < 2e-5 * wanted.std()
    weight = shared.layers[0].mlp.down
    held = jax.tree.leaves(nnx.state(weight))[0].addressable_shards
    assert [shard.data.shape[0] for shard in held] == [4 // count] * count
    prompts = [[1, 5, 9, 30], [7, 2]]
    tokens = [models.Generator(m).generate(prompts, max_tokens=8).tokens for m in (one, shared)]
    assert tokens[0] == tokens[1]


def test_devices_that_do_not_divide_the_experts_are_refused(rng, tmp_path):
    heads = dict(num_attention_heads=8, num_key_value_heads=8)
    folder = write(tmp_path / "x", "mixtral", arrays_of("mixtral", rng, **heads), **heads)
    with pytest.raises(ValueError, match="4 experts must be divisible by the 8 devices"):
        models.load(folder, parallel=models.Parallel(jax.make_mesh((8,), ("model",))))


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def test_mxfp4_experts_of_gpt_oss(rng, tmp_path):
    """Against the same weights as floats, decoded here: rows, columns, and which half is the gate."""
    arrays = arrays_of("gpt_oss", rng)
    packed = dict(arrays)
    for name in [name for name in arrays if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = arrays[name].shape
        blocks = rng.integers(0, 256, (experts, n, k // 32, 16)).astype(np.uint8)
        scales = rng.integers(121, 125, (experts, n, k // 32)).astype(np.uint8)
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(experts, n, k // 32, 32)
        values = np.where(codes < 8, 1, -1) * FP4[codes & 7]
        values = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
        arrays[name] = np.ascontiguousarray(
            values.reshape(experts, n, k).swapaxes(1, 2).astype(np.float32)
        )
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    plain = models.load(write(tmp_path / "plain", "gpt_oss", arrays), dtype="float32")
    settings = dict(quantization_config=dict(quant_method="mxfp4"))
    quantised = models.load(write(tmp_path / "mx", "gpt_oss", packed, **settings), dtype="float32")
    weight = quantised.layers[0].mlp.down.weight.get_value()
    assert weight.bits == 4 and weight.group_size == 32
    wanted = logits(plain)
    assert np.abs(logits(quantised) - wanted).max() < 2e-5 * wanted.std()


def test_stacked_experts_of_a_byte_without_scales_are_refused(rng, tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    for dtype in (ml_dtypes.float8_e4m3fn, np.uint8):
        arrays = arrays_of("gpt_oss", rng)
        arrays[name] = arrays[name].astype(dtype)
        with pytest.raises(ValueError, match="without scales"):
            models.load(write(tmp_path / np.dtype(dtype).name, "gpt_oss", arrays))


def test_missing_experts_are_named(rng, tmp_path):
    arrays = arrays_of("mixtral", rng)
    del arrays["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    arrays["model.layers.0.block_sparse_moe.experts.4.w1.weight"] = np.zeros((96, 64), np.float32)
    with pytest.raises(
        ValueError, match=r"1 missing: .*experts\.3\.w3.*1 unexpected: .*experts\.4"
    ):
        models.load(write(tmp_path / "x", "mixtral", arrays))


def test_random_weights_and_joined_files_refuse_what_they_cannot(rng, tmp_path):
    config = ModelConfig.from_hf(SHAPE | dict(model_type="mixtral"))
    with pytest.raises(NotImplementedError, match="mixture of experts"):
        models.random_model(config)
    dense = dataclasses.replace(config, layers=(), family="phi3")
    from fdk_jax.models import names

    with pytest.raises(NotImplementedError, match="joined in the file"):
        names.check_cut(dense)

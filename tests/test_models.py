"""Models against golden values of `transformers`, loading, tensor parallelism, decode attention."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import decode_attention
import emulator
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from backends import ONLY_WITH_A_GPU, for_a_gpu
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import fdk_jax
from fdk_jax import models
from fdk_jax.benchmark import accuracy
from fdk_jax.models import attention, platforms, rope
from fdk_jax.models.cache import append
from fdk_jax.models.config import ModelConfig, custom_llama
from fdk_jax.models.loading import read_config
from fdk_jax.product import cpu_backend
from pallas_kernels import attention as pallas_attention
from pallas_kernels import chain, dense, norm, short_attention, split_attention
from pallas_kernels.target import H200, using

DATA = Path(__file__).parent / "data" / "models"
FOLDERS = sorted(path.name for path in DATA.iterdir())


def relative(found, wanted) -> float:
    """||found - wanted|| / ||wanted|| in float64."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def expected(name: str) -> dict[str, np.ndarray]:
    """What `transformers` computed for a folder."""
    return dict(np.load(DATA / name / "expected.npz"))


@pytest.fixture
def copy(writable):
    """A function that copies a golden folder to where a test may change it."""
    return lambda name: writable(DATA / name)


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dictionary of arrays of a one-file folder."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


# --- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_greedy_tokens_equal_transformers(name):
    generator = models.Generator(models.load(DATA / name, dtype="float32"))
    golden = expected(name)
    assert relative(generator.logits(golden["tokens"]), golden["logits"]) < 1e-5
    out = generator.generate(golden["tokens"][:, :7].tolist(), max_tokens=24)
    assert out.tokens == golden["greedy"].tolist()


@pytest.mark.parametrize(
    ("name", "bits"), [("llama2", 1), ("llama3", 4), ("qwen2", 2), ("qwen3", 8)]
)
def test_quantised_while_loading_equals_dequantised_weights(name, bits):
    quantised = models.load(
        DATA / name, dtype="float32", quantisation=models.Quantisation(bits, codebook="kmeans")
    )
    plain = models.Generator(fdk_jax.dequantise(quantised))
    generator = models.Generator(quantised)
    tokens = expected(name)["tokens"]
    assert relative(generator.logits(tokens), plain.logits(tokens)) < 1e-5
    prompt = tokens[:, :5].tolist()
    assert generator.generate(prompt, max_tokens=8).tokens == (
        plain.generate(prompt, max_tokens=8).tokens
    )
    kinds = {type(layer.attention.qkv) for layer in quantised.layers}
    assert kinds == {fdk_jax.QuantisedLinear}


def test_quantising_the_module_equals_quantising_while_loading():
    plain = models.load(DATA / "qwen2", dtype="float32")
    tokens = expected("qwen2")["tokens"]
    loaded = models.load(DATA / "qwen2", dtype="float32", quantisation=models.Quantisation(4))
    swapped = fdk_jax.quantise(plain, bits=4)
    assert isinstance(swapped.lm_head, nnx.Linear)
    found = models.Generator(swapped).logits(tokens)
    np.testing.assert_allclose(found, models.Generator(loaded).logits(tokens), rtol=2e-4, atol=2e-4)


def test_head_can_be_quantised_too():
    options = models.Quantisation(4, head_bits=8)
    model = models.load(DATA / "qwen2", dtype="float32", quantisation=options)
    assert model.lm_head.weight.get_value().bits == 8
    plain = models.Generator(fdk_jax.dequantise(model))
    tokens = expected("qwen2")["tokens"]
    assert relative(models.Generator(model).logits(tokens), plain.logits(tokens)) < 1e-5


def test_arithmetic_of_activations():
    if (reason := cpu_backend.unavailable_reason()) is not None:
        pytest.skip(reason)
    options = dict(quantisation=models.Quantisation(4, 32, head_bits=8), dtype="float32")
    tokens = expected("qwen2")["tokens"]
    exact, int8 = (
        models.Generator(models.load(DATA / "qwen2", **options, **more), backend="cpu")
        for more in ({}, dict(backend="cpu", arithmetic="int8"))
    )
    assert 1e-4 < relative(int8.logits(tokens), exact.logits(tokens)) < 0.1
    assert len(int8.generate(tokens[:, :4].tolist(), max_tokens=5).tokens[0]) == 5
    with pytest.raises(ValueError, match="needs backend=\"cpu\", not 'xla'"):
        models.load(DATA / "qwen2", **options, backend="xla", arithmetic="int8")
    with pytest.raises(ValueError, match="arithmetic='fp8'"):
        models.load(DATA / "qwen2", arithmetic="fp8")


def test_bfloat16_model_is_close_to_float32():
    golden = expected("llama3")
    logits = models.Generator(models.load(DATA / "llama3")).logits(golden["tokens"])
    assert relative(logits, golden["logits"]) < 3e-2


# --- configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "billions"), [("4B", 3.88), ("12B", 11.52), ("31B", 30.64), ("1B", 1.24)]
)
def test_custom_shapes_have_the_published_parameter_counts(size, billions):
    assert custom_llama(size).num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_unknown_size():
    with pytest.raises(ValueError, match="'13B'"):
        custom_llama("13B")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="mamba"), "mamba"),
        (dict(hidden_act="relu"), "relu"),
        (dict(use_sliding_window=True), "sliding"),
        (dict(rope_scaling=dict(rope_type="spiral", factor=2.0)), "spiral"),
        (dict(num_attention_heads=5), "num_heads=5"),
        (dict(hidden_size=None), None),
    ],
)
def test_unsupported_configuration_is_named(change, words):
    facts = json.loads((DATA / "llama2" / "config.json").read_text())
    facts.pop("rope_parameters", None)
    facts |= change
    if words is None:
        del facts["hidden_size"]
        words = "hidden_size"
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_hf(facts)


def test_both_spellings_of_rope_give_the_same():
    facts = json.loads((DATA / "llama3" / "config.json").read_text())
    new = ModelConfig.from_hf(facts)
    rope = facts.pop("rope_parameters")
    facts["rope_theta"] = rope.pop("rope_theta")
    facts["rope_scaling"] = rope
    assert ModelConfig.from_hf(facts) == new


def test_linear_rope_scaling_divides_frequencies():
    config = read_config(DATA / "llama2")
    scaled = dataclasses.replace(config, rope_scaling=models.RopeScaling("linear", 4.0))
    ratio = rope.inverse_frequencies(
        config.layer(0).rope, config.head_dim
    ) / rope.inverse_frequencies(scaled.layer(0).rope, scaled.head_dim)
    np.testing.assert_allclose(ratio, 4.0, rtol=1e-6)


# --- loading ----------------------------------------------------------------------------------


def test_every_wrong_name_is_reported_at_once(copy):
    folder = copy("qwen3")

    def change(arrays):
        del arrays["model.norm.weight"]
        del arrays["model.layers.1.mlp.up_proj.weight"]
        arrays["model.layers.0.self_attn.q_norm.weight"] = np.ones(5, np.float32)
        arrays["model.layers.7.extra"] = np.ones(3, np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        models.load(folder)
    text = str(caught.value)
    assert "2 missing" in text and "1 unexpected" in text and "1 mis-shaped" in text
    for name in ("model.norm.weight", "up_proj", "q_norm.weight is [5], not [32]", "7.extra"):
        assert name in text


def test_ignored_names_do_not_matter(copy):
    folder = copy("llama3")

    def change(arrays):
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]

    rewrite(folder, change)
    models.load(folder)


def test_missing_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        models.load(tmp_path / "nowhere")
    folder = copy("llama2")
    gone = next(folder.glob("model-00002*"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        models.load(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*safetensors"):
        models.load(folder)


@pytest.mark.parametrize("size", [0, 5, 40, 5000])
def test_truncated_weights_are_refused(copy, size):
    folder = copy("qwen3")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        models.load(folder)


def test_quantised_checkpoints_are_not_quantised_again():
    with pytest.raises(ValueError, match="quantised already"):
        models.load(DATA / "kmeans-4bit", quantisation=models.Quantisation(2))


def test_unknown_quantisation_method(copy):
    folder = copy("kmeans-1bit")
    (folder / "quantization_config.json").write_text('{"quant_method": "hqq", "bits": 4}')
    with pytest.raises(ValueError, match="hqq"):
        models.load(folder)


def test_tied_head_becomes_a_quantised_copy():
    options = models.Quantisation(4, head_bits=8)
    model = models.load(DATA / "qwen3", dtype="float32", quantisation=options)
    assert model.lm_head.weight.get_value().bits == 8
    tokens = expected("qwen3")["tokens"]
    plain = models.Generator(fdk_jax.dequantise(model))
    assert relative(models.Generator(model).logits(tokens), plain.logits(tokens)) < 1e-5


def test_fewer_centroids_than_codes(copy):
    folder = copy("kmeans-4bit")
    with safe_open(folder / "model.safetensors", "flax") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in list(arrays):
        if name.endswith(".centroids"):
            arrays[name] = arrays[name][:11]
    from safetensors.flax import save_file as save_jax

    save_jax(arrays, folder / "model.safetensors")
    weight = models.load(folder, backend="xla").layers[0].mlp.down.weight.get_value()
    assert weight.codebook.shape == (16,)
    assert (np.asarray(weight.codebook)[10:] == np.asarray(weight.codebook)[10]).all()


def test_progress_counts_layers():
    seen = []
    models.load(DATA / "qwen2", progress=lambda *args: seen.append(args))
    assert seen == [(1, 2), (2, 2)]


def test_saved_model_is_loaded_again(tmp_path):
    model = models.load(DATA / "kmeans-4bit", dtype="float32")
    fdk_jax.checkpoint.save(tmp_path / "model.fdk", model)
    again = fdk_jax.checkpoint.load(tmp_path / "model.fdk", like=model)
    tokens = expected("kmeans-4bit")["tokens"]
    np.testing.assert_array_equal(
        models.Generator(again).logits(tokens), models.Generator(model).logits(tokens)
    )


# --- operations by platform -------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k", "n"), [(1, 192, 128), (3, 256, 256), (16, 1024, 384)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_kernel(rng, m, k, n, dtype):
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, k), (k, n)))
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    found = dense.matmul(x, w, out_dtype=jnp.float32, interpret=True)
    assert relative(found, wanted) < 1e-5
    assert relative(platforms.linear(x, w, jnp.float32), wanted) < 1e-5
    rows = np.asarray(w, np.float64).T
    oracle.check(platforms.linear(x, w, x.dtype), oracle.expectations(x, [rows]))
    with pytest.raises(ValueError, match="multiples"):
        dense.matmul(x, w[:, 1:], out_dtype=jnp.float32, interpret=True)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_of_rows(rng, m, dtype):
    x, rows = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((m, 64), (40, 64)))
    wanted = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    assert relative(platforms.linear_of_rows(x, rows), wanted) < 1e-5


@pytest.mark.parametrize("features", [96, 128, 3072])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_add_rms_norm_kernel(rng, features, dtype):
    x, delta = (jnp.asarray(rng.normal(size=(2, features)), dtype) for _ in range(2))
    scale = jnp.asarray(rng.normal(size=features), dtype)
    total = np.asarray(x, np.float64) + np.asarray(delta, np.float64)
    root = np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5)
    wanted = total / root * np.asarray(scale, np.float64)
    for found in (
        norm.add_rms_norm(x, delta, scale, eps=1e-5, interpret=True),
        platforms.add_rms_norm(x, delta, scale, 1e-5),
    ):
        oracle.check_values(found[0], total)
        # Some normalise the sum as it was rounded.
        near = np.asarray(found[0], np.float64)
        again = near / np.sqrt((near**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale, float)
        slack = 1e-6 * (1 + np.abs(wanted))
        # And some round what is normalised before they scale it.
        noise = 0.0 if dtype == "float32" else accuracy.half_ulp(wanted, x.dtype)
        oracle.check(found[1], [accuracy.Expected.of(a, slack, noise) for a in (wanted, again)])


@ONLY_WITH_A_GPU
@pytest.mark.parametrize(
    ("batch", "launches"),
    [
        # The first projection; attention and four products, in the first layer behind another norm; the last
        # layer, with no next one; the head.
        (1, 1 + 2 * (1 + 4) + (1 + 3) + 1),
        # Two norms more in a layer, and the first one like the others.
        (2, 1 + (1 + 4 + 2) + (1 + 3 + 2) + 1),
    ],
)
def test_a_decoding_step_lowers_for_cuda_with_one_copy_of_a_layer(batch, launches):
    config = ModelConfig(1024, 512, 1024, 7, 4, 2, 128)
    graph, state = nnx.split(models.random_model(config, bits=4, backend="pallas"))
    shape = (batch, config.num_kv_heads, 64, config.head_dim)
    arrays = (jnp.zeros(shape, config.dtype),) * config.num_layers
    cache = models.KVCache(arrays, arrays, jnp.zeros(batch, jnp.int32))
    program = jax.jit(lambda s, t, c: nnx.merge(graph, s).decode(t, c))
    traced = program.trace(state, jnp.zeros(batch, jnp.int32), cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_run_layer") == 7
    assert text.count("custom_call @__gpu$xla.gpu.triton") == launches


@ONLY_WITH_A_GPU
@pytest.mark.parametrize("bits", [1, 4])
def test_a_decoding_step_of_chains_is_two_launches_a_layer(bits, monkeypatch):
    monkeypatch.setattr(chain, "_WORKERS", {bits: 8})
    config = ModelConfig(1024, 512, 1024, 7, 4, 2, 128)
    graph, state = nnx.split(models.random_model(config, bits=bits, backend="pallas"))
    arrays = (jnp.zeros((1, config.num_kv_heads, 64, config.head_dim), config.dtype),) * 7
    cache = models.KVCache(arrays, arrays, jnp.zeros(1, jnp.int32))
    program = jax.jit(lambda s, t, c: nnx.merge(graph, s).decode(t, c))
    with using(H200):
        traced = program.trace(state, jnp.zeros(1, jnp.int32), cache)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_run_layer") == 7
    # The last layer, with no next one, is not like the others.
    assert text.count('name = "fdk_chain"') == text.count('name = "decode_attention"') == 2


# --- random models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "codebook"),
    [(16, "uniform"), (8, "uniform"), (4, "kmeans"), (2, "kmeans"), (1, "kmeans")],
)
def test_random_models_run_and_stay_finite(bits, codebook):
    config = ModelConfig(256, 128, 192, 2, 4, 2, 32, dtype="bfloat16")
    model = models.random_model(config, bits=bits, codebook=codebook)
    logits = np.asarray(models.Generator(model).logits(np.arange(12).reshape(2, 6)))
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 5
    if bits < 16:
        weight = model.layers[0].attention.qkv.weight.get_value()
        weight.validate()
        assert weight.codebook.ndim == (2 if codebook == "kmeans" and bits > 0 else 1)


# --- tensor parallelism -----------------------------------------------------------------------


def wide_config(**options) -> ModelConfig:
    """A model that 8 devices can share, groups of 16 included."""
    fields = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_layers=2)
    fields |= dict(num_heads=16, num_kv_heads=8, head_dim=16, dtype="float32", qk_norm=True)
    return ModelConfig(**(fields | options))


def write_folder(folder: Path, config: ModelConfig) -> Path:
    """A checkpoint with random weights."""
    from fdk_jax.models.loading import expected

    rng = np.random.default_rng(3)
    folder.mkdir()
    facts = dict(
        model_type="qwen3" if config.qk_norm else "llama",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_embeddings,
        dtype=config.dtype,
    )
    (folder / "config.json").write_text(json.dumps(facts))
    arrays = {
        name: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in expected(config).items()
    }
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("quantisation", "options"),
    [
        (None, dict(tie_embeddings=False)),
        (None, dict(tie_embeddings=True, qk_norm=False)),
        (models.Quantisation(4, 16, "kmeans"), dict(tie_embeddings=True)),
        (models.Quantisation(4, 16, head_bits=8), dict(tie_embeddings=True)),
        (models.Quantisation(1, 16), dict(tie_embeddings=False)),
    ],
    ids=["qwen3-16bit", "llama-16bit-tied", "4bit-tied", "4bit-tied-head8", "1bit"],
)
def test_tensor_parallel_equals_one_device_and_gathers_no_weight(tmp_path, quantisation, options):
    folder = write_folder(tmp_path / "model", wide_config(**options))
    parallel = models.Parallel(jax.make_mesh((8,), ("model",)))
    one = models.Generator(models.load(folder, quantisation=quantisation))
    eight = models.Generator(models.load(folder, quantisation=quantisation, parallel=parallel))
    tokens = np.random.default_rng().integers(0, 256, (2, 20))
    assert relative(eight.logits(tokens), one.logits(tokens)) < 1e-5
    prompts = [tokens[0, :9].tolist(), tokens[1, :3].tolist()]
    assert (
        eight.generate(prompts, max_tokens=6).tokens == one.generate(prompts, max_tokens=6).tokens
    )
    (decode,) = (p for name, p in eight.programs.items() if name[0] == "decode")
    moved = re.findall(
        r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(",
        decode.as_text(),
    )
    # Sums of one activation, and logits [2, 256] put together from eight parts of 32.
    assert {shape.partition("{")[0] for shape, kind in moved if kind == "all-reduce"} == {
        "f32[2,128]"
    }
    assert {(shape.partition("{")[0], kind) for shape, kind in moved if kind != "all-reduce"} <= {
        ("f32[2,256]", "all-gather"),
        ("f32[16,32]", "all-gather"),
    }
    for leaf in eight.leaves:
        held = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert held in ({leaf.nbytes // 8}, {leaf.nbytes}) and (
            leaf.nbytes <= 4 * 256 or held == {leaf.nbytes // 8}
        )


def test_inputs_need_not_be_whole_groups_on_one_device(tmp_path):
    folder = write_folder(tmp_path / "model", wide_config())
    quantisation = models.Quantisation(8, 48)  # of 128 and 256 inputs
    one = models.load(folder, quantisation=quantisation)
    assert one.layers[0].mlp.down.weight.get_value().group_size == 48
    tokens = np.random.default_rng(1).integers(0, 256, (2, 9))
    quantised, plain = (models.Generator(m).logits(tokens) for m in (one, models.load(folder)))
    assert 1e-4 < relative(quantised, plain) < 5e-2


def test_tensor_parallel_refuses_what_does_not_divide(tmp_path):
    folder = write_folder(tmp_path / "model", wide_config(num_kv_heads=4))
    parallel = models.Parallel(jax.make_mesh((8,), ("model",)))
    with pytest.raises(ValueError, match="num_kv_heads=4"):
        models.load(folder, parallel=parallel)
    folder = write_folder(tmp_path / "other", wide_config())
    with pytest.raises(ValueError, match="groups of 64"):
        models.load(folder, quantisation=models.Quantisation(4, 64), parallel=parallel)
    with pytest.raises(ValueError, match="axis"):
        models.Parallel(jax.make_mesh((8,), ("data",)))


# --- decode attention -------------------------------------------------------------------------


def run_attention(kernel: str, *args, splits=None, norms=None):
    """One of the kernels for a token's attention; the C++ one inside jit, its cache copied."""
    if kernel == "pallas":
        return pallas_attention.decode(*args, splits=splits, norms=norms, interpret=True)
    if kernel == "ptx":
        return run_short_attention(*args, norms=norms)
    if kernel == "split":
        return run_split_attention(*args, norms, splits or 2)
    if (reason := cpu_backend.unavailable_reason()) is not None:
        pytest.skip(reason)
    return jax.jit(functools.partial(cpu_backend.attention, norms=norms))(*args)


def run_short_attention(qkv, cos, sin, lengths, keys, values, norms, chance=None):
    """The kernel for short caches on the emulator, its result poisoned before."""
    batch, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    eps = None if norms is None else 1e-6
    case = short_attention.Case(heads, kv_heads, dim, capacity, keys.dtype, eps)
    if not case.supported(batch, H200):
        pytest.skip("the kernel does not take this case")
    keys, values = np.array(keys), np.array(values)
    mixed = np.full((batch, heads * dim), np.nan, keys.dtype)
    emulator.run(
        short_attention.source(case, H200),
        [np.asarray(a) for a in (qkv, cos, sin, lengths)]
        + [keys, values, *map(np.asarray, norms or ()), mixed, keys, values],
        (heads, batch),
        32 * short_attention._WARPS,
        chance=chance,
    )
    return mixed, keys, values


def run_split_attention(
    qkv, cos, sin, lengths, keys, values, norms, splits, window=None, chance=None
):
    """The kernel for long caches on the emulator, its results poisoned before, and their sum."""
    _, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    eps = None if norms is None else 1e-6
    case = split_attention.Case(heads, kv_heads, dim, capacity, keys.dtype, eps, window)
    if not case.supported(H200):
        pytest.skip("the kernel does not take this case")

    def emulated(source, operands, outputs, target, *, grid, num_warps, **_):
        found = [np.full(o.shape, np.nan, o.dtype) for o in outputs[:3]]
        cache = [np.array(a) for a in operands[4:6]]
        operands = [np.asarray(a) for a in operands]
        operands[4:6] = cache
        emulator.run(source, [*operands, *found, *cache], grid, 32 * num_warps, chance=chance)
        return *map(jnp.asarray, found), *cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_attention.xla_call, "ptx_call", emulated)
        return split_attention.decode(
            case, qkv, cos, sin, lengths, keys, values, norms or (), H200, splits
        )


KERNELS = pytest.mark.parametrize("kernel", ["pallas", "cpu", "ptx", "split"])


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "head_dim", "capacity", "splits"),
    [
        (2, 2, 3, 32, 128, 1),
        (3, 1, 4, 64, 192, 3),
        (1, 2, 1, 128, 128, 2),
        (2, 1, 17, 32, 64, 1),
        (1, 1, 2, 256, 64, 1),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("normed", [False, True])
@KERNELS
def test_decode_attention_kernel(
    rng, batch, kv_heads, group, head_dim, capacity, splits, dtype, normed, kernel
):
    sizes = batch, kv_heads, group, head_dim, capacity
    arguments, norms = decode_attention.inputs(rng, *sizes, dtype, normed)
    found = run_attention(kernel, *arguments, norms=norms, splits=splits)
    decode_attention.check(found, arguments, norms)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129, 191])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), (128, "bfloat16")])
def test_short_attention_at_the_edges_of_blocks(rng, length, head_dim, dtype):
    arguments, norms = decode_attention.inputs(rng, 1, 1, 2, head_dim, 192, dtype, True, [length])
    found = run_short_attention(*arguments, norms, chance=rng)
    decode_attention.check(found, arguments, norms)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 63, 64, 65, 127, 129, 191])
@pytest.mark.parametrize(("group", "dtype"), [(2, "float16"), (11, "bfloat16")])
def test_split_attention_at_the_edges_of_tiles(rng, length, group, dtype):
    arguments, norms = decode_attention.inputs(rng, 1, 1, group, 64, 192, dtype, True, [length])
    found = run_split_attention(*arguments, norms, 3, chance=rng)
    decode_attention.check(found, arguments, norms)


@pytest.mark.parametrize("window", [1, 16, 37, 128])
@pytest.mark.parametrize("splits", [1, 3])
def test_split_attention_within_a_window(rng, window, splits):
    lengths = [0, 1, 36, 37, 100, 255]
    arguments, _ = decode_attention.inputs(rng, 6, 1, 3, 64, 256, "bfloat16", False, lengths)
    found = run_split_attention(*arguments, None, splits, window)
    # A cache whose slots before the window are not there.
    qkv, cos, sin, _, keys, values = arguments
    for row, length in enumerate(lengths):
        first = max(0, length + 1 - window)
        cache = (jnp.roll(a[row : row + 1], -first, axis=2) for a in (keys, values))
        one = (*(a[row : row + 1] for a in (qkv, cos, sin)), jnp.asarray([length - first]), *cache)
        mixed, *after = (a[row : row + 1] for a in found)
        after = [np.roll(a, -first, axis=2) for a in after]
        decode_attention.check((mixed, *after), one, None)


def test_short_attention_passes_a_nan_on(rng):
    (qkv, *rest), _ = decode_attention.inputs(rng, 1, 1, 2, 64, 64, "bfloat16", False, [9])
    mixed, *_ = run_short_attention(qkv.at[0, 5].set(jnp.nan), *rest, None)
    assert np.isnan(mixed[0, :64].astype(np.float32)).all()
    assert np.isfinite(mixed[0, 64:].astype(np.float32)).all()


@pytest.mark.parametrize(
    ("capacity", "splits", "head_dim", "group", "dtype"),
    [
        (128, 1, 128, 4, "bfloat16"),
        (256, 1, 64, 1, "float16"),
        (64, 1, 32, 8, "bfloat16"),
        (128, 1, 256, 2, "bfloat16"),
        (128, 1, 64, 3, "float32"),
        (320, 1, 32, 2, "float16"),
        (256, 3, 128, 2, "bfloat16"),
    ],
)
def test_decode_attention_at_the_edges_of_blocks(rng, capacity, splits, head_dim, group, dtype):
    lengths = jnp.array([0, 1, 63, 64, 65, 127, 128, 129, capacity - 1])
    lengths = jnp.minimum(lengths, capacity - 1)
    batch = len(lengths)
    qkv = jnp.asarray(rng.normal(size=(batch, (group + 2) * head_dim)), dtype)
    keys, values = (
        jnp.asarray(rng.normal(size=(batch, 1, capacity, head_dim)), dtype) for _ in range(2)
    )
    cos, sin = jnp.ones((batch, head_dim // 2)), jnp.zeros((batch, head_dim // 2))
    found, *cache = pallas_attention.decode(
        qkv, cos, sin, lengths, keys, values, splits=splits, interpret=True
    )
    q = qkv.reshape(batch, group + 2, head_dim)[:, :group]
    wide = [a.astype(jnp.float32) for a in (q, *cache)]
    wanted = attention.over_cache(*wide, lengths + 1).reshape(found.shape)
    assert relative(found.astype(jnp.float32), wanted) < (1e-5 if dtype == "float32" else 4e-3)


@KERNELS
def test_decode_attention_never_writes_past_a_full_cache(rng, kernel):
    qkv = jnp.asarray(rng.normal(size=(2, 4 * 32)), jnp.float32)
    cache = jnp.zeros((2, 1, 64, 32), jnp.float32)
    turn = jnp.ones((2, 16), jnp.float32)
    lengths = jnp.array([64, 1000], jnp.int32)
    _, keys, _ = run_attention(kernel, qkv, turn, turn, lengths, cache, cache)
    assert (np.asarray(keys)[:, :, :63] == 0).all() and (np.asarray(keys)[:, :, 63] != 0).any()


@pytest.mark.parametrize("capacity", [128, 1024])
def test_decode_attention_lowers_for_cuda(capacity):
    struct = jax.ShapeDtypeStruct
    cache = struct((1, 8, capacity, 128), jnp.bfloat16)
    args = [struct((1, 48 * 128), jnp.bfloat16), *[struct((1, 64), jnp.float32)] * 2]
    args += [struct((1,), jnp.int32), cache, cache]
    with for_a_gpu():
        program = jax.jit(pallas_attention.decode).trace(*args)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("decode_attention") >= 1


def test_attention_over_a_long_prompt_in_blocks(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1536, h, 16)), jnp.float32) for h in (4, 2, 2))
    found = attention.over_prompt(q, k, v)
    rows = [0, 511, 512, 1023, 1535]
    for row in rows:
        lengths = jnp.array([row + 1], jnp.int32)
        wanted = attention.over_cache(
            q[:, row], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), lengths
        )
        assert relative(found[:, row], wanted) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_cache_append_touches_one_slot(rng, batch):
    cache = jnp.asarray(rng.normal(size=(batch, 2, 8, 4)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(batch, 2, 4)), jnp.float32)
    lengths = np.array([3, 0, 7][:batch], np.int32)
    wanted = np.array(cache)
    for b, slot in enumerate(lengths):
        wanted[b, :, slot] = new[b]
    np.testing.assert_array_equal(append(cache, new, jnp.asarray(lengths)), wanted)

"""Models on several devices: the same logits, no weight gathered, refusals."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from model_data import relative, wide_config, write_folder

import fdk_jax
from fdk_jax import models
from fdk_jax.benchmark import model_errors, runner, timing
from fdk_jax.benchmark import models as suite
from fdk_jax.models import parallel
from fdk_jax.models.weights import Placer
from fdk_jax.product import sharding


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
    # Sums of one activation, and of each part of the vocabulary the best logits and tokens of both sequences.
    assert {shape.partition("{")[0] for shape, kind in moved if kind == "all-reduce"} == {
        "f32[2,128]"
    }
    gathered = {shape.partition("{")[0] for shape, kind in moved if kind != "all-reduce"}
    assert gathered <= {"f32[2,16]", "f32[2,8,2]", "f32[16,2]"}, gathered
    assert {kind for _, kind in moved} <= {"all-reduce", "all-gather"}
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


@pytest.mark.parametrize(("bits", "backend"), [(16, "xla"), (4, "xla"), (1, "cpu")])
def test_random_models_on_several_devices(bits, backend):
    config = models.ModelConfig(256, 128, 192 * 2, 2, 4, 2, 32, dtype="bfloat16")
    parallel = models.Parallel(jax.make_mesh((2,), ("model",)))
    options = dict(bits=bits, codebook="kmeans", backend=backend)
    model = models.random_model(config, parallel=parallel, **options)
    placed = {len(leaf.addressable_shards) for leaf in models.Generator(model).leaves}
    assert placed == {2}
    tokens = np.arange(12).reshape(2, 6)
    logits = np.asarray(models.Generator(model).logits(tokens))
    assert np.isfinite(logits).all() and 0.2 < logits.std() < 5
    weight = model.layers[0].mlp.down.kernel[...] if bits == 16 else None
    if weight is not None:
        halves = [np.asarray(part.data) for part in weight.addressable_shards]
        assert not (halves[0] == halves[1]).all()


def test_the_models_suite_on_several_devices():
    cases = suite.make_cases(
        models=["custom-llama-1B"], backends=["cpu"], bits=[4], batches=[1], devices=[1, 2, 64]
    )
    assert [case.devices for case in cases] == [1, 2, 64]
    assert len({case.name for case in cases}) == 3
    (row,) = runner.measure(suite, cases[2:], timing.Session(2))
    assert row["status"] == "skipped" and "64 devices" in row["reason"]


@pytest.mark.parametrize(("bits", "count"), [(4, 1), (4, 2), (1, 2)])
def test_the_models_suite_compares_with_float32_on_several_devices(bits, count):
    config = models.ModelConfig(256, 256, 512, 3, 4, 2, 64, dtype="bfloat16")
    parallel = models.Parallel(jax.make_mesh((2,), ("model",))) if count > 1 else None
    model = models.random_model(config, bits=bits, codebook="kmeans", parallel=parallel)
    errors = model_errors.measure(model, None, batch=2, prompt=5)
    for name in ("rel_rms_error", "prefill_rel_rms_error"):
        assert 0 < errors[name] < 1.5 * errors[f"plain_{name}"] + 1e-3, errors


@pytest.mark.parametrize(("bits", "cut"), [(4, "n"), (4, "k"), (1, "n"), (1, "k"), (8, "k")])
@pytest.mark.parametrize("backend", ["pallas", "cpu", "xla"])
def test_each_devices_slice_in_the_layout_of_the_kernels(rng, bits, cut, backend):
    """Parts joined along the outputs, of which each device has its share of all; or its inputs."""
    parallel = models.Parallel(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
    rows, k = (64, 32, 32) if cut == "n" else (48,), 2048
    parts = [
        jax.tree.map(np.asarray, fdk_jax.quantise(rng.normal(size=(n, k)).astype(np.float32), bits))
        for n in rows
    ]
    placed = Placer(parallel, "float32", backend).quantised(parts, cut)
    whole = [np.asarray(part.dequantise("float32")) for part in parts]
    for device in range(2):
        arrays = [
            np.asarray(array.addressable_shards[device].data)
            for array in (placed.packed, placed.scales, placed.codebook)
        ]
        packed, scales, codebook = (jax.numpy.asarray(a) for a in arrays)
        own = dataclasses.replace(placed, packed=packed, scales=scales, codebook=codebook)
        if cut == "n":
            wanted = np.concatenate(
                [w[device * len(w) // 2 : (device + 1) * len(w) // 2] for w in whole]
            )
        else:
            wanted = whole[0][:, device * k // 2 : (device + 1) * k // 2]
        np.testing.assert_array_equal(np.asarray(own.dequantise("float32")), wanted)


@pytest.mark.parametrize("spec", [P(), P("model"), P(None, "model"), P("model", "data")])
def test_few_bytes_are_on_their_way_at_a_time(spec, monkeypatch):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    value = np.arange(40 * 48, dtype=np.float32).reshape(40, 48)
    under_way, most = [0], [0]
    put, wait = jax.device_put, jax.block_until_ready

    def counting(array, where):
        copies = 1 if isinstance(where, jax.Device) else len(where.device_set)
        part = array.nbytes if copies == 1 else copies * np.prod(where.shard_shape(array.shape)) * 4
        under_way[0] += int(part)
        most[0] = max(most[0], under_way[0])
        return put(array, where)

    def waiting(arrays):
        under_way[0] = 0
        return wait(arrays)

    monkeypatch.setattr(jax, "device_put", counting)
    monkeypatch.setattr(jax, "block_until_ready", waiting)
    limit, row = 2048, 48 * 4 * 8
    placed = sharding.place_in_runs(value, NamedSharding(mesh, spec), limit)
    np.testing.assert_array_equal(placed, value)
    assert placed.sharding == NamedSharding(mesh, spec) and placed.committed
    # A run has a row of each device's slice at the least.
    assert 0 < most[0] <= max(limit, row) and under_way[0] == 0
    whole = sharding.place_in_runs(value, NamedSharding(mesh, spec), 1 << 20)
    np.testing.assert_array_equal(whole, value)
    assert under_way[0] == 0 and most[0] >= value.nbytes


def test_several_devices_are_given_what_one_is_whatever_is_under_way(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model", wide_config(tie_embeddings=False))
    of = models.Parallel(jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
    q = models.Quantisation(4, 16)
    wanted = jax.tree.leaves(nnx.state(models.load(folder, quantisation=q, parallel=of)))
    put, limits = parallel.place_in_runs, []

    def in_runs(value, sharding, limit):
        limits.append(limit)
        return put(value, sharding, 1000)

    monkeypatch.setattr(parallel, "place_in_runs", in_runs)
    found = jax.tree.leaves(nnx.state(models.load(folder, quantisation=q, parallel=of)))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.sharding == b.sharding
    assert len(limits) >= len(found) and max(limits) <= 64 << 20

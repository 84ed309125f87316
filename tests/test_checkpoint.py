"""Checkpoints: round trips, every kind of damage, atomic replacement, and Orbax."""

import dataclasses
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import fdk_jax
from fdk_jax import checkpoint
from fdk_jax.files import contents


@pytest.fixture
def tree(rng):
    w = jnp.asarray(rng.standard_normal((3, 24, 130)), jnp.bfloat16)
    return {
        "layers": [
            {"kernel": fdk_jax.quantise(w[0], 4, codebook="kmeans"), "bias": jnp.ones(24)},
            {"kernel": fdk_jax.quantise(w, 1), "bias": None},
        ],
        "pair": (w[1], jnp.arange(5)),
        "blocks": {7: fdk_jax.quantise(w[2].T, 2, axes="kn", group_size=8)},
    }


def equal(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_round_trip(tree, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, tree)
    assert equal(checkpoint.load(path), tree)
    assert equal(checkpoint.load(path, like=tree), tree)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_kernel_layouts_are_written_as_interchange(tree, tmp_path):
    for backend in ("pallas", "cpu"):
        checkpoint.save(tmp_path / backend, fdk_jax.prepare(tree, backend))
        assert equal(checkpoint.load(tmp_path / backend), tree)


def test_arrays_that_are_sent_by_pieces(tree, tmp_path, monkeypatch):
    """As to a device with memory of its own: the same bits, in whatever runs of rows they were sent."""
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, tree)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(contents, "_RUN_BYTES", 700)
    assert equal(checkpoint.load(path), tree)


def test_modules(tmp_path):
    def model(seed):
        plain = nnx.Sequential(
            nnx.Linear(64, 32, rngs=nnx.Rngs(seed)), nnx.Linear(32, 8, rngs=nnx.Rngs(seed + 1))
        )
        return fdk_jax.quantise(plain, 4, group_size=32)

    checkpoint.save(tmp_path / "m", model(0))
    loaded = checkpoint.load(tmp_path / "m", like=model(5))
    x = jnp.ones((2, 64))
    assert (loaded(x) == model(0)(x)).all()


def rewrite(path, change):
    """Changes the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    body = json.loads(header["__metadata__"]["fdk_jax"])
    change(header, body)
    if "fdk_jax" in header["__metadata__"]:
        header["__metadata__"]["fdk_jax"] = json.dumps(body)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first(body):
    layers = dict(body["tree"]["items"])["layers"]["items"]
    return dict(layers[0]["items"])["kernel"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda h, b: h["__metadata__"].pop("fdk_jax"), "not written by"),
        (lambda h, b: b.update(version=2), "version 2"),
        (lambda h, b: b.pop("tree"), "not a complete checkpoint"),
        (lambda h, b: first(b).update(bits=8), "bits=8"),
        (lambda h, b: first(b).update(bits=3), "bits=3"),
        (lambda h, b: first(b).update(group_size=32), "group_size=32"),
        (lambda h, b: first(b).update(shape=[24, 131, 2]), "axes"),
        (lambda h, b: first(b).update(shape=[48, 130]), "packed.shape"),
        (lambda h, b: first(b).update(layout="diagonal"), "layout"),
        (lambda h, b: first(b).update(name="nobody"), "nobody"),
        (lambda h, b: first(b).update(kind="program"), "program"),
        (lambda h, b: b["tree"]["items"].pop(), "does not name"),
    ],
)
def test_inconsistent_headers_are_refused(damage, words, tree, tmp_path):
    path = tmp_path / "model"
    checkpoint.save(path, tree)
    rewrite(path, damage)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(path)


def test_truncated_and_foreign_files_are_refused(tree, tmp_path, rng):
    path = tmp_path / "model"
    checkpoint.save(path, tree)
    data = path.read_bytes()
    for size in {0, 4, 8, 100, len(data) // 2, len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="model"):
            checkpoint.load(path)
    path.write_bytes(rng.bytes(1000))
    with pytest.raises(ValueError, match="model"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.load(tmp_path / "nothing")


def test_every_difference_to_the_expected_tree_is_listed(tmp_path):
    w = fdk_jax.quantise(jnp.ones((8, 64)), 4)
    checkpoint.save(tmp_path / "m", {"a": w, "b": jnp.ones(3), "c": jnp.ones(1)})
    wanted = {
        "a": dataclasses.replace(w, axes="kn", shape=(64, 8)),
        "b": jnp.ones(4),
        "d": jnp.ones(1),
    }
    with pytest.raises(ValueError) as caught:
        checkpoint.load(tmp_path / "m", like=wanted)
    for words in ("missing ['d']", "unexpected ['c']", "['a'] is", "['b'] is"):
        assert words in str(caught.value)


def test_a_failed_save_keeps_the_old_file(tree, tmp_path):
    path = tmp_path / "model"
    checkpoint.save(path, {"a": jnp.ones(3)})
    for bad in ({"a": object()}, {"a": "text"}, {("x",): jnp.ones(1)}, {"a": 1.5}):
        with pytest.raises(TypeError):
            checkpoint.save(path, bad)
    with pytest.raises(ValueError, match="two arrays"):
        checkpoint.save(path, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    with pytest.raises(RuntimeError, match="power"), checkpoint.atomic_path(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError("power")
    assert checkpoint.load(path)["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["model"]


def test_orbax_round_trip_and_changed_metadata(tree, tmp_path):
    saved = {"kernel": tree["layers"][0]["kernel"], "bias": jnp.ones(24)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        assert equal(checkpointer.restore(tmp_path / "orbax", abstract), saved)
        for change in (
            dict(uniform=True),
            dict(axes="kn", shape=(130, 24)),
            dict(group_size=60),
            dict(layout="planar"),
        ):
            other = dataclasses.replace(abstract["kernel"], **change)
            with pytest.raises((ValueError, KeyError)):
                checkpointer.restore(tmp_path / "orbax", {**abstract, "kernel": other})


def test_values_of_64_bits_are_kept_or_refused(tmp_path):
    """JAX would make other integers, or infinities, of them; of those in a file, too."""
    path = tmp_path / "model"
    checkpoint.save(path, {"step": np.int64(7).reshape(1), "rate": np.asarray([1 / 3])})
    assert checkpoint.load(path)["step"].tolist() == [7]
    assert checkpoint.load(path)["rate"].tolist() == [np.float32(1 / 3)]
    for value in (np.asarray([2**40]), np.asarray([2**63], np.uint64), np.asarray([1e300])):
        with pytest.raises(ValueError, match=r"a\.b holds .*64 values too large for"):
            checkpoint.save(path, {"a": {"b": value}})
        with jax.enable_x64(True):
            checkpoint.save(tmp_path / "wide", {"a": {"b": value}})
            assert np.array_equal(checkpoint.load(tmp_path / "wide")["a"]["b"], value)
        with pytest.raises(ValueError, match=r"a\.b holds .*64 values too large for"):
            checkpoint.load(tmp_path / "wide")
    assert checkpoint.load(path)["step"].tolist() == [7]


def test_what_would_come_back_as_something_else_is_refused(tmp_path):
    state = optax.adam(1e-3).init({"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"0 is a named tuple, ScaleByAdamState.*_asdict"):
        checkpoint.save(tmp_path / "model", state)
    with pytest.raises(TypeError, match="a is a PaddedList, not an array"):
        checkpoint.save(tmp_path / "model", {"a": type("PaddedList", (list,), {})([jnp.ones(1)])})
    assert not list(tmp_path.iterdir())


def test_random_keys_are_kept(tmp_path):
    """Any module with Dropout has them."""
    path, x = tmp_path / "model", jnp.ones((2, 64))
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(3))
    module = fdk_jax.quantise(nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), dropout), 4)
    checkpoint.save(path, module)
    again = checkpoint.load(path, like=module)
    assert (again(x) == module(x)).all() and (again(x) == module(x)).all()
    for impl in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(1, impl=impl), 3)
        checkpoint.save(path, {"keys": keys})
        found = checkpoint.load(path)["keys"]
        assert found.dtype == keys.dtype and (found == keys).all()
    checkpoint.save(path, {"keys": jax.random.key(0)})
    damaged = path.read_bytes().replace(b"fry", b"fly")
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="PRNG"):
        checkpoint.load(path)


@pytest.mark.parametrize("dtype", ["complex64", "int4", "float4_e2m1fn"])
def test_dtypes_that_could_not_be_read_again_are_not_written(dtype, tmp_path):
    with pytest.raises(TypeError, match=f"a is {dtype}, which a checkpoint does not hold"):
        checkpoint.save(tmp_path / "model", {"a": jnp.zeros(2, dtype)})
    with pytest.raises(TypeError, match="__metadata__ has a name of the format's own"):
        checkpoint.save(tmp_path / "model", {"__metadata__": jnp.zeros(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_a_link_stays_and_what_is_no_file_is_not_replaced(tmp_path):
    """A pipe stands for devices: root could replace /dev/null by a file."""
    (tmp_path / "elsewhere").mkdir()
    target, link, pipe = tmp_path / "elsewhere" / "model", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    checkpoint.save(link, {"a": jnp.zeros(2)})
    checkpoint.save(link, {"a": jnp.ones(2)})
    assert link.is_symlink() and checkpoint.load(target)["a"].tolist() == [1, 1]
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe is no ordinary file"):
        checkpoint.save(pipe, {"a": jnp.ones(2)})
    with pytest.raises(IsADirectoryError, match="elsewhere is a folder"):
        checkpoint.save(tmp_path / "elsewhere", {"a": jnp.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link", "pipe"]

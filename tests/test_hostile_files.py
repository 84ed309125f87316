"""Checkpoints that are damaged, hostile or half written: a clear error in bounded time and memory.

FDK_FUZZ_ROUNDS multiplies the number of mutated files and of writers that are killed (`make fuzz`).
"""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import ROUNDS, rounds

import fdk_jax
from fdk_jax import checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[bytes, dict]:
    """Bytes of a small checkpoint, and its tree."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 70)), jnp.float32)
    tree = {
        "a": {"kernel": fdk_jax.quantise(weights[0], 4, codebook="kmeans"), "bias": jnp.ones(24)},
        "b": [fdk_jax.quantise(weights, 2, group_size=8), None, (jnp.arange(5),)],
    }
    path = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(path, tree)
    return path.read_bytes(), tree


def split(data: bytes) -> tuple[dict, bytes]:
    """The safetensors header and the data after it."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict | str, body: bytes, size: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


@contextlib.contextmanager
def bounded(seconds: float, mebibytes: int):
    """Fails when the block takes longer, or needs more address space than there is now and this much."""
    page = os.sysconf("SC_PAGE_SIZE")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), hard))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < seconds


def refused(path: Path, data: bytes) -> str:
    """The message with which a file is refused."""
    path.write_bytes(data)
    with bounded(60, 4096), pytest.raises(ValueError) as caught:
        checkpoint.load(path)
    return str(caught.value)


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_every_length_of_header_is_checked(saved, tmp_path):
    header, body = split(saved[0])
    real = len(json.dumps(header))
    for size in (0, 1, real - 1, real + len(body) + 1, 2**31, 2**40, 2**63, 2**64 - 1):
        assert "model" in refused(tmp_path / "model", join(header, body, size))


HEADERS = {
    "terabytes": lambda h: h["a.bias"].update(shape=[2**38], data_offsets=[0, 2**40]),
    "shape overflows": lambda h: h["a.bias"].update(shape=[2**33, 2**33], data_offsets=[0, 0]),
    "shape wraps around": lambda h: h["a.bias"].update(shape=[2**62, 4, 24]),
    "negative shape": lambda h: h["a.bias"].update(shape=[-1]),
    "shape of floats": lambda h: h["a.bias"].update(shape=[24.5]),
    "offsets reversed": lambda h: h["a.bias"].update(
        data_offsets=h["a.bias"]["data_offsets"][::-1]
    ),
    "offsets overlap": lambda h: h["a.bias"].update(
        data_offsets=[h["a.bias"]["data_offsets"][0] + 4, h["a.bias"]["data_offsets"][1] + 4]
    ),
    "unknown dtype": lambda h: h["a.bias"].update(dtype="F7"),
    "dtype of another size": lambda h: h["a.bias"].update(dtype="F64"),
    "same size, other dtype": lambda h: h["a.kernel.scales"].update(dtype="I32"),
    "an array is missing": lambda h: h.pop("a.bias"),
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata is no text": lambda h: h["__metadata__"].update(fdk_jax={"version": 1}),
    "metadata is no JSON": lambda h: h["__metadata__"].update(fdk_jax="{"),
    "metadata is a list": lambda h: h["__metadata__"].update(fdk_jax="[]"),
    "metadata is a number": lambda h: h["__metadata__"].update(fdk_jax="1e999"),
    "deep nesting": lambda h: h["__metadata__"].update(
        fdk_jax='{"version": 1, "tree": ' + '{"kind": "list", "items": [' * 9000 + "]}" * 9000 + "}"
    ),
    "deeper than json reads": lambda h: h["__metadata__"].update(fdk_jax="[" * 200_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(name, saved, tmp_path):
    header, body = split(saved[0])
    HEADERS[name](header)
    assert refused(tmp_path / "model", join(header, body))


def test_duplicate_names(saved, tmp_path):
    header, body = split(saved[0])
    text = json.dumps(header)
    twice = '{"a.bias": ' + json.dumps(header["b.0.packed"]) + ", " + text[1:]
    assert refused(tmp_path / "model", join(twice, body))


def described(tree: dict, name: str) -> dict:
    return next(node for key, node in tree["items"] if key == name)


TREES = {
    "huge group": lambda t: described(described(t, "a"), "kernel").update(group_size=2**62),
    "group of text": lambda t: described(described(t, "a"), "kernel").update(group_size="64"),
    "group is true": lambda t: described(described(t, "a"), "kernel").update(group_size=True),
    "huge shape": lambda t: described(described(t, "a"), "kernel").update(shape=[2**40, 2**40]),
    "negative shape": lambda t: described(described(t, "a"), "kernel").update(shape=[-24, -70]),
    "shape of text": lambda t: described(described(t, "a"), "kernel").update(shape=["24", "70"]),
    "shape of floats": lambda t: described(described(t, "a"), "kernel").update(shape=[24.0, 70.0]),
    "shape is a number": lambda t: described(described(t, "a"), "kernel").update(shape=24),
    "bits of text": lambda t: described(described(t, "a"), "kernel").update(bits="4"),
    "bits is a list": lambda t: described(described(t, "a"), "kernel").update(bits=[4]),
    "bits is true": lambda t: described(described(t, "a"), "kernel").update(bits=True),
    "axes of numbers": lambda t: described(described(t, "a"), "kernel").update(axes=[1, 0]),
    "layout of a kernel": lambda t: described(described(t, "a"), "kernel").update(layout="tiled"),
    "uniform is text": lambda t: described(described(t, "a"), "kernel").update(uniform="no"),
    "uniform, but is not": lambda t: described(described(t, "a"), "kernel").update(uniform=True),
    "an array used twice": lambda t: t["items"].append(["c", described(described(t, "a"), "bias")]),
    "one name twice": lambda t: t["items"].append(["a", {"kind": "none"}]),
    "a key that is a list": lambda t: t["items"].append([["c"], {"kind": "none"}]),
    "items of a mapping": lambda t: t.update(items={"a": {"kind": "none"}}),
    "no kind": lambda t: t.pop("kind"),
}


@pytest.mark.parametrize("name", TREES)
def test_hostile_descriptions(name, saved, tmp_path):
    header, body = split(saved[0])
    description = json.loads(header["__metadata__"]["fdk_jax"])
    TREES[name](description["tree"])
    header["__metadata__"]["fdk_jax"] = json.dumps(description)
    assert refused(tmp_path / "model", join(header, body))


def test_codebooks_out_of_order_or_not_finite(saved, tmp_path):
    header, body = split(saved[0])
    begin, end = header["a.kernel.codebook"]["data_offsets"]
    for values in (np.linspace(1, 0, 16), np.full(16, np.nan), np.full(16, np.inf)):
        damaged = body[:begin] + values.astype(np.float32).tobytes() + body[end:]
        assert "ascending" in refused(tmp_path / "model", join(header, damaged))


def test_mutated_files_are_refused_or_whole(saved, tmp_path, rng):
    """Bit flips, truncation, insertions, swaps. A file that loads has valid tensors of valid shapes."""
    data, tree = saved
    path, header_size, loaded = tmp_path / "model", 8 + struct.unpack("<Q", data[:8])[0], 0
    for i in rounds(300 * ROUNDS):
        damaged = bytearray(data)
        # Most damage is in the header: the body is plain numbers.
        at = int(rng.integers(header_size if i % 4 else len(data)))
        match int(rng.integers(5)):
            case 0:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 1:
                del damaged[at:]
            case 2:
                damaged[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 3:
                damaged[at : at + 8] = rng.bytes(8)
            case _:
                other = int(rng.integers(header_size))
                damaged[at : at + 4], damaged[other : other + 4] = (
                    damaged[other : other + 4],
                    damaged[at : at + 4],
                )
        path.write_bytes(damaged)
        with bounded(60, 4096):
            try:
                result = checkpoint.load(path)
            except ValueError:
                continue
        loaded += 1
        for leaf in jax.tree.leaves(result, is_leaf=fdk_jax.is_quantised):
            if fdk_jax.is_quantised(leaf):
                leaf.validate()
        if jax.tree.structure(result) == jax.tree.structure(tree):
            with contextlib.suppress(ValueError):
                checkpoint.load(path, like=tree)
    print(f"{i + 1} mutated files, {loaded} of them valid, the others refused")


def test_links_directories_and_special_files(saved, tmp_path):
    real, link, loop = tmp_path / "real", tmp_path / "link", tmp_path / "loop"
    real.write_bytes(saved[0])
    link.symlink_to(real)
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "fifo")
    assert equal(checkpoint.load(link), saved[1])
    for name in ("loop", "fifo", "", "real/below"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            checkpoint.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "dangling" / "model")
    # Writing through a link keeps the link, and replaces what it leads to.
    checkpoint.save(link, {"a": jnp.ones(1)})
    assert link.is_symlink() and equal(checkpoint.load(real), {"a": jnp.ones(1)})
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "no such folder" / "model", {"a": jnp.ones(1)})
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link", "loop", "real"]


def test_a_full_disk_keeps_the_old_file(saved, tmp_path):
    """A limit on the size of files stands for a disk that fills up."""
    path = tmp_path / "model"
    path.write_bytes(saved[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="model"):
            checkpoint.save(path, saved[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == saved[0]
    assert os.listdir(tmp_path) == ["model"]


WRITER = """
    import os, sys, jax.numpy as jnp
    from fdk_jax import checkpoint
    trees = [{"a": jnp.full((200_000,), i, jnp.float32), "n": jnp.full((1,), i)} for i in range(9)]
    parent = os.getpid()
    for line in sys.stdin:
        child = os.fork()  # a writer a line: starting JAX anew would take seconds
        if child == 0:
            for i in range(10_000):
                checkpoint.save(sys.argv[1], trees[i % 9])
        print(child, flush=True)
        os.waitpid(child, 0)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_writers_killed_at_any_moment_leave_a_whole_file(start, tmp_path, rng):
    path = tmp_path / "model"
    checkpoint.save(path, {"a": jnp.zeros((200_000,)), "n": jnp.zeros((1,))})
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WRITER), str(path)]
    kills, seen = 0, set()
    writer = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in rounds(40 * ROUNDS):
        writer.stdin.write("\n")
        writer.stdin.flush()
        pid = int(writer.stdout.readline())
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        tree = checkpoint.load(path)
        number = float(tree["n"][0])
        assert (np.asarray(tree["a"]) == number).all()
        seen.add(number)
        kills += 1
    writer.stdin.close()
    leftovers = [name for name in os.listdir(tmp_path) if name != "model"]
    print(f"{kills} writers killed, {len(leftovers)} within a save, contents {sorted(seen)}")
    assert all(name.startswith((".model.", ".tmp")) for name in leftovers)
    # What killed writers left behind is neither read nor in the way.
    checkpoint.save(path, {"a": jnp.ones(1)})
    assert checkpoint.load(path)["a"].tolist() == [1]

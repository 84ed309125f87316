"""Attention of one token over a cache: every kernel against float64."""

import functools

import decode_attention
import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import for_a_gpu

from fdk_jax.product import cpu_backend
from pallas_kernels import attention as pallas_attention
from pallas_kernels import short_attention, split_attention
from pallas_kernels.target import H200


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
    if (reason := case.unsupported_reason(batch, H200)) is not None:
        pytest.skip(reason)
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
    if (reason := case.unsupported_reason(H200)) is not None:
        pytest.skip(reason)

    def emulated(source, operands, outputs, target, *, grid, num_warps, **_):
        mixed, *parts = (np.full(o.shape, np.nan, o.dtype) for o in (outputs[0], *outputs[3:]))
        operands = [np.array(a) for a in operands]
        results = [mixed, *operands[4:6], *parts]
        emulator.run(source, [*operands, *results], grid, 32 * num_warps, chance=chance)
        if parts:
            assert not operands[-1].any(), "the counters are not zero again"
        return results

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
    lengths = np.minimum([0, 1, 63, 64, 65, 127, 128, 129, capacity - 1], capacity - 1)
    sizes = len(lengths), 1, group, head_dim, capacity
    arguments, _ = decode_attention.inputs(rng, *sizes, dtype, False, lengths)
    found = pallas_attention.decode(*arguments, splits=splits, interpret=True)
    decode_attention.check(found, arguments, None)


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

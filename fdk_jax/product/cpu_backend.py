"""The C++ library for CPUs: finds it, registers its FFI handler, calls it.

The library is the extension module `_cpu`, either installed inside this package (pip) or in
`cpu/build/python/` of a checkout (`ninja -C cpu`). Inside jit a product is one FFI call on XLA's own
threads, on the arrays where they lie: weights are never copied. `FDK_NUM_THREADS` bounds the threads,
`FDK_CPU_ISA` chooses an instruction set ("scalar", "avx2", ...) other than the best.
"""

import functools
import importlib.util
import math
import threading
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from fdk_jax.format import host_arrays, packing

ARITHMETIC = {"exact": 0, "int16": 1, "int8": 2}
BITS = (1, 2, 4, 8)  # of check_bits in cpu/src/plan.cpp
INTERFACE = 6  # of cpu/bindings/module.cpp
FEW_TOKENS = 16  # that `dense` takes at most
_ONE_THREAD = 1 << 20  # bytes of a weight that one thread converts sooner than several start
_loading = threading.Lock()
# Of codes that are read and converted at a time, at most, and for each processor: a run passes the
# interpreter's lock on some twenty times, which costs the more the more threads there are.
_RUN_BYTES, _RUN_BYTES_EACH = 8 << 20, 1 << 20


def _load() -> ModuleType | str:
    """The extension module with its handlers registered, or the reason why there is none.

    The threads that load a model may be the first to ask: one of them alone imports it.
    """
    with _loading:
        return _load_once()


@functools.cache
def _load_once() -> ModuleType | str:
    package = Path(__file__).parents[1]
    folders = [package, package.parent / "cpu" / "build" / "python"]
    spec = PathFinder.find_spec("_cpu", [str(folder) for folder in folders])
    if spec is None or spec.loader is None:
        return (
            "the C++ library is not built: install a C++20 compiler (g++ or clang++) and reinstall"
            " fdk-jax, or run `ninja -C cpu` in a checkout"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return f"{spec.origin} does not load: {error}"
    if (found := getattr(module, "interface", 1)) != INTERFACE:
        return (
            f"{spec.origin} has interface {found}, expected {INTERFACE}: rebuild it"
            " (`ninja -C cpu`, or reinstall fdk-jax)"
        )
    for name, handler in module.ffi_handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return module


def library() -> ModuleType:
    """The extension module.

    Raises:
        NotImplementedError: it is not there; the message says what to do.
    """
    module = _load()
    if isinstance(module, str):
        raise NotImplementedError(f'backend="cpu" is not available: {module}')
    return module


def unavailable_reason() -> str | None:
    """Why `backend="cpu"` cannot be used here, or None."""
    module = _load()
    return module if isinstance(module, str) else None


def unsupported_reason(bits: int, group_size: int) -> str | None:
    """Why the library cannot multiply by weights of this width and group size here, or None."""
    if bits not in BITS:
        return f"the C++ library has codes of {BITS} bits, not of {bits}"
    if group_size % 8:
        return f"the C++ library needs group_size to be a multiple of 8, not {group_size}"
    return unavailable_reason()


def compiler() -> str:
    """The compiler that made the loaded library.

    Raises:
        NotImplementedError: the library is not available.
    """
    return getattr(library(), "compiler", "an unknown compiler")


def describe() -> str:
    """One line about the kernels in use: instruction set and threads."""
    if (reason := unavailable_reason()) is not None:
        return reason
    return f"C++ library, {library().isa()}, {library().num_threads()} threads"


def kernel_name(x: Any, w: Any, arithmetic: str = "exact") -> str | None:
    """The kernel that a product takes, such as "amx.bfloat16_4bit"; None where there is no such library.

    Args:
        x: activations [..., K], or their shape and dtype.
        w: the weight, a `QuantisedTensor`.
        arithmetic: as given to `matmul`.
    """
    module, reason = _load(), unsupported_reason(w.bits, w.group_size)
    if isinstance(module, str) or reason is not None or not hasattr(module, "kernel_name"):
        return None
    return module.kernel_name(
        m=max(math.prod(x.shape[:-1]), 1),
        k=w.spec["in_features"],
        bits=w.bits,
        group_size=w.group_size,
        uniform=w.uniform,
        num_codebooks=1 if w.codebook.ndim == 1 else w.codebook.shape[-2],
        x_size=jnp.dtype(x.dtype).itemsize,
        x_is_f16=x.dtype == jnp.float16,
        scales_size=jnp.dtype(w.scales.dtype).itemsize,
        scales_are_f16=w.scales.dtype == jnp.float16,
        arithmetic=ARITHMETIC[arithmetic],
    )


def matmul(
    x: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    uniform: bool,
    bias: Array | None = None,
    out_dtype: Any = None,
    arithmetic: str = "exact",
) -> Array:
    """Y = x @ W.T + bias for a weight in the tiled layout; works under jit.

    Args:
        x: bfloat16, float16 or float32 [M, K], M >= 1.
        packed: uint8 [tiles, steps, 64] of `packing.to_tiled`.
        scales: bfloat16, float16 or float32 [tiles, groups, 16].
        codebook: float32 [2**bits] or [C, 2**bits], C dividing N: row n uses codebook n // (N // C).
        bits: 1, 2, 4 or 8.
        group_size: weights along K that share a scale, a multiple of 8.
        out_features: N.
        uniform: whether codebook[q] = codebook[0] + q * step.
        bias: [N], added in float32; or None.
        out_dtype: dtype of y; None for that of x.
        arithmetic: "exact", or "int16" or "int8" activations (docs/cpu.md states their errors).

    Returns:
        y [M, N].

    Raises:
        NotImplementedError: there is no library, or it cannot do this width or group size.
    """
    if (reason := unsupported_reason(bits, group_size)) is not None:
        raise NotImplementedError(f'backend="cpu" cannot do this: {reason}')
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    call = jax.ffi.ffi_call(
        "fdk_matmul",
        jax.ShapeDtypeStruct((x.shape[0], out_features), out_dtype),
        vmap_method="sequential",
    )
    return call(
        x,
        packed,
        scales,
        codebook.astype(jnp.float32),
        jnp.zeros((0,), jnp.float32) if bias is None else bias,
        bits=np.int64(bits),
        group_size=np.int64(group_size),
        uniform=bool(uniform),
        arithmetic=np.int64(ARITHMETIC[arithmetic]),
    )


def dense(x: Array, weight: Array, *, rows: bool, out_dtype: Any) -> Array:
    """A few tokens times an unquantised matrix, which is read once, in its own dtype.

    Args:
        x: bfloat16, float16 or float32 [M, K], M at most `FEW_TOKENS`.
        weight: [N, K] if `rows`, else [K, N]; any of these dtypes. Products and sums are float32.
        rows: see `weight`.
        out_dtype: dtype of y.

    Returns:
        y [M, N].

    Raises:
        NotImplementedError: there is no library.
    """
    library()
    shape = (x.shape[0], weight.shape[0 if rows else 1])
    call = jax.ffi.ffi_call("fdk_dense", jax.ShapeDtypeStruct(shape, out_dtype))
    return call(x, weight, rows=rows)


def take_rows(table: Array, index: Array) -> Array:
    """Rows of a table [N, D] at int32 [M], out of range the nearest one: [M, D].

    Raises:
        NotImplementedError: there is no library.
    """
    library()
    struct = jax.ShapeDtypeStruct((index.shape[0], table.shape[1]), table.dtype)
    return jax.ffi.ffi_call("fdk_take_rows", struct)(table, index)


def add_rms_norm(x: Array, delta: Array, scale: Array, *, eps: float) -> tuple[Array, Array]:
    """(x + delta, its RMS norm times `scale`) of [M, D] each, in one call; see `pallas_kernels.norm`.

    Raises:
        NotImplementedError: there is no library.
    """
    library()
    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = jax.ffi.ffi_call("fdk_add_norm", (struct, struct))(
        x, delta, scale, eps=np.float32(eps)
    )
    return total, normed


def attention(
    qkv: Array,
    cos: Array,
    sin: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    *,
    norms: tuple[Array, Array] | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Array, Array, Array]:
    """Attention of one new token a sequence over the cache and itself, in one call.

    Head norms, RoPE, the cache's update in place and softmax over as many slots as are filled; all in
    float32 between its inputs and results. See `pallas_kernels.attention.decode` for the arguments.

    Returns:
        ([B, H * D], keys, values).

    Raises:
        NotImplementedError: there is no library.
    """
    library()
    struct = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
    batch, kv_heads, _, head_dim = keys.shape
    width = qkv.shape[1] - 2 * kv_heads * head_dim
    none = jnp.zeros((0,), qkv.dtype)
    call = jax.ffi.ffi_call(
        "fdk_attention",
        (jax.ShapeDtypeStruct((batch, width), qkv.dtype), struct(keys), struct(values)),
        input_output_aliases={4: 1, 5: 2},
    )
    out, keys, values = call(
        qkv,
        cos,
        sin,
        lengths,
        keys,
        values,
        *(norms or (none, none)),
        norm_eps=np.float32(norm_eps),
    )
    return out, keys, values


def prompt_attention(
    q: Array, keys: Array, values: Array, starts: Array, *, window: int | None, by_token: bool
) -> Array:
    """Causal attention of many tokens over the keys of these and of earlier ones, in float32.

    Args:
        q: [B, T, H, D] float32, bfloat16 or float16.
        keys: [B, KV, S, D] of q's dtype; [B, S, KV, D] if `by_token`.
        values: Like keys.
        starts: int32 [B] or [1], the place in S of each sequence's first token.
        window: Keys that a token sees, its own included; None for all before it.
        by_token: See `keys`.

    Returns:
        [B, T, H, D] of q's dtype.

    Raises:
        NotImplementedError: there is no library.
    """
    library()
    call = jax.ffi.ffi_call(
        "fdk_prompt_attention",
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        vmap_method="sequential",
    )
    return call(q, keys, values, starts, by_token=by_token, window=np.int64(window or 0))


def _to_tiled(packed: Array, scales: Array, **spec) -> tuple[Array, Array] | None:
    """`packing.to_tiled` of concrete arrays in this host's memory; None for any others."""
    n, k = spec["out_features"], spec["in_features"]
    if not _is_native(packed, scales, spec):
        return None
    tiles = -(-n // packing.TILE_ROWS)
    shapes = (
        (tiles, -(-k * spec["bits"] // 32), packing.STEP_BYTES),
        (tiles, scales.shape[-1], packing.TILE_ROWS),
    )
    lead, heights = packed.shape[:-2], (packing.TILE_ROWS, 1)
    return _convert(library().to_tiled, packed, scales, lead, shapes, heights, spec)


def _from_tiled(packed: Array, scales: Array, **spec) -> tuple[Array, Array] | None:
    """The inverse of `_to_tiled`."""
    n, k = spec["out_features"], spec["in_features"]
    if not _is_native(packed, scales, spec):
        return None
    shapes = ((n, -(-k * spec["bits"] // 8)), (n, scales.shape[-2]))
    lead, heights = packed.shape[:-3], (1, packing.TILE_ROWS)
    return _convert(library().from_tiled, packed, scales, lead, shapes, heights, spec)


packing.NATIVE["tiled"] = (_to_tiled, _from_tiled)


def _to_tiled_by_rows(
    read: Callable[[int, int, np.ndarray], tuple[np.ndarray, np.ndarray]],
    each: Callable[[Callable[[int], None], Iterable[int]], None],
    dtype: Any,
    **spec,
) -> tuple[Array, Array]:
    """`packing.to_tiled` of a matrix of which `read` gives runs of rows: see `packing.STREAMED`."""
    n, k, bits = spec["out_features"], spec["in_features"], spec["bits"]
    dtype, tiles = np.dtype(dtype), -(-n // packing.TILE_ROWS)
    shapes = (
        (tiles, -(-k * bits // 32), packing.STEP_BYTES),
        (tiles, -(-k // spec["group_size"]), packing.TILE_ROWS),
    )
    targets = [
        host_arrays.aligned(math.prod(shape) * size).reshape(tiles, -1)
        for shape, size in zip(shapes, (1, dtype.itemsize), strict=True)
    ]
    width = -(-k * bits // 8)
    run = min(_RUN_BYTES, _RUN_BYTES_EACH * host_arrays.threads())
    step = max(run * 8 // (k * bits * packing.TILE_ROWS), 1) * packing.TILE_ROWS

    def convert(begin: int) -> None:
        end = min(begin + step, n)
        found = read(begin, end, host_arrays.scratch((end - begin) * width, "run"))
        sources = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in found)
        first, last = begin // packing.TILE_ROWS, -(-end // packing.TILE_ROWS)
        library().to_tiled(
            *sources,
            *(a[first:last].reshape(-1) for a in targets),
            **(spec | {"out_features": end - begin}),
            scale_size=dtype.itemsize,
        )

    each(convert, range(0, n, step))
    packed, scales = (
        jax.device_put(a.reshape(-1).view(kind).reshape(shape))
        for a, kind, shape in zip(targets, (np.uint8, dtype), shapes, strict=True)
    )
    return packed, scales


packing.STREAMED["tiled"] = _to_tiled_by_rows


def _is_native(packed: Array, scales: Array, spec: dict[str, Any]) -> bool:
    """Whether the library can convert these arrays: concrete, in this host's memory."""
    if any(isinstance(a, Tracer) for a in (packed, scales)):
        return False
    arrays = (a for a in (packed, scales) if isinstance(a, Array))
    return (
        packed.size > 0
        and unsupported_reason(spec["bits"], spec["group_size"]) is None
        and all(a.devices() == {jax.devices("cpu")[0]} for a in arrays)
    )


def _convert(function, packed, scales, lead, shapes, heights, spec) -> tuple[Array, Array]:
    """Converts each matrix, a run of its tiles on each thread.

    Args:
        function: of the library.
        packed: codes.
        scales: their scales.
        lead: the leading axes of both.
        shapes: of one converted (packed, scales).
        heights: lines of a tile in the arrays that are converted, and in those that they become.
        spec: the arguments of `packing.convert`.
    """
    dtype, count, n = np.dtype(scales.dtype), math.prod(lead), spec["out_features"]
    sizes = 1, dtype.itemsize
    targets = [
        host_arrays.aligned(count * math.prod(shape) * size)
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    sources = [np.require(a, requirements=["C", "A"]).reshape(-1) for a in (packed, scales)]
    tiles = -(-n // packing.TILE_ROWS)
    lines = [tiles if height == 1 else n for height in heights]
    views = [
        (a.view(np.uint8).reshape(count, lines[i], -1), heights[i])
        for i, both in enumerate((sources, targets))
        for a in both
    ]
    each = -(-tiles // host_arrays.threads())
    if sum(a.nbytes for a in targets) < _ONE_THREAD:
        each = tiles

    def convert(run: tuple[int, int]) -> None:
        matrix, first = run
        last = min(first + each, tiles)
        parts = (a[matrix, first * h : last * h].reshape(-1) for a, h in views)
        rows = min(n, last * packing.TILE_ROWS) - first * packing.TILE_ROWS
        function(*parts, **(spec | {"out_features": rows}), scale_size=dtype.itemsize)

    host_arrays.on_threads(convert, [(m, t) for m in range(count) for t in range(0, tiles, each)])
    packed, scales = (
        a.view(kind).reshape(*lead, *shape)
        for a, kind, shape in zip(targets, (np.uint8, dtype), shapes, strict=True)
    )
    return jax.device_put(packed), jax.device_put(scales)

"""Random inputs of a case, and the float64 oracle that its output is checked against.

The oracle shares no code with the library: it reads the bytes of the interchange format itself.
"""

import concurrent.futures
import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from fdk_jax.benchmark import accuracy
from fdk_jax.benchmark.cases import KernelCase
from fdk_jax.format import codebooks, packing
from fdk_jax.format.quantised_tensor import QuantisedTensor

_MOST_INTEGERS = 4  # tokens
_ROWS = 256  # of a weight, decoded at a time by one thread


def activations(case: KernelCase, rng: np.random.Generator) -> np.ndarray:
    """Activations [m, k], N(0, 1) in the case's dtype."""
    return rng.standard_normal((case.m, case.k), np.float32).astype(jnp.dtype(case.dtype))


def dense_weight(case: KernelCase, rng: np.random.Generator) -> np.ndarray:
    """W [n, k] of variance 1 / k in the case's dtype: products of products stay near one."""
    w = rng.standard_normal((case.n, case.k), np.float32)
    w *= 1 / math.sqrt(case.k)
    return w.astype(jnp.dtype(case.dtype))


def quantised_weight(case: KernelCase, rng: np.random.Generator) -> QuantisedTensor:
    """Random codes with scales such that the weights have variance 1 / k.

    Raises:
        NotImplementedError: no such codebook at this width.
    """
    bits, group_size = case.bits, case.group_size
    if group_size is None or case.codebook is None:
        raise ValueError(f"{case.name} is not quantised")
    codebook = _codebook(case.codebook, bits)
    packed = rng.integers(0, 256, (case.n, packing.row_bytes(bits, case.k)), np.uint8)
    # Codes that pad the last byte are zero; the first code of a byte is in its highest bits.
    packed[:, -1] &= np.uint8(256 - (1 << -case.k * bits % 8))
    scale = 1 / math.sqrt(case.k * float(np.mean(np.square(codebook))))
    spread = rng.uniform(0.8, 1.2, (case.n, -(-case.k // group_size)))
    return QuantisedTensor(
        packed=jnp.asarray(packed),
        scales=jnp.asarray((scale * spread).astype(jnp.dtype(case.dtype))),
        codebook=jnp.asarray(codebook),
        bits=bits,
        group_size=group_size,
        shape=(case.n, case.k),
        axes="nk",
        uniform=codebooks.is_uniform(codebook),
    )


@functools.lru_cache(maxsize=16)
def _codebook(kind: str, bits: int) -> np.ndarray:
    if kind == "uniform":
        return codebooks.uniform(bits)
    if kind == "kmeans":
        sample = np.random.default_rng(0).standard_normal(2**18, np.float32)
        return np.asarray(codebooks.kmeans(sample, bits))
    if bits != 4:
        raise NotImplementedError(f"{kind} is a 4-bit codebook, not {bits}-bit")
    return codebooks.nf4()


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a case should give.

    Attributes:
        expected: by each way of rounding a weight that kernels have, see `accuracy.compare`.
        plain: relative RMS error of the same product with a weight that was dequantised to the dtype of the
            activations and exact sums: what is lost without any kernel of ours.
        rows: those of the weight whose results these are.
    """

    expected: list[accuracy.Expected]
    plain: float
    rows: np.ndarray


def reference(
    case: KernelCase,
    x: np.ndarray,
    w: np.ndarray | QuantisedTensor,
    checked_rows: int | None = None,
) -> Reference:
    """The product of x [m, k] and a weight [n, k], transposed, in float64.

    Integer activations and levels are noise: each is off by up to half a step. Levels may lean to one side by a
    fifth of a percent.

    Args:
        case: what x and w are of.
        x: [m, k].
        w: [n, k].
        checked_rows: rows of the weight that are multiplied, about so many, in blocks spread over it; None for
            all.
    """
    wide = x.astype(np.float64)
    rows = w.out_features if isinstance(w, QuantisedTensor) else w.shape[0]
    noisy = functools.partial(_integer_noise, case, wide) if case.arithmetic != "exact" else None

    def block(first: int) -> list[accuracy.Expected]:
        part = slice(first, min(first + _ROWS, rows))
        exact, *others = _matrices(w, part, x.dtype)
        e = accuracy.product(wide, exact)
        size = np.sqrt(wide**2 @ (exact**2).T)
        if noisy is not None:
            slack = e.slack + 2e-3 * np.abs(e.value)
            e = accuracy.Expected(e.value, slack, noisy(exact, w, part))
        elif case.dense:
            # XLA's product may add up partial sums that it has rounded.
            e = dataclasses.replace(e, noise=accuracy.half_ulp(size, x.dtype))
        elif case.bits == 1 and case.m <= _MOST_INTEGERS and x.dtype != np.float32:
            # The activations of few tokens may be integers of 16 bits.
            e = dataclasses.replace(e, noise=1e-4 * size)
        return [e, *(dataclasses.replace(e, value=wide @ matrix.T) for matrix in others)]

    starts = range(0, rows, _ROWS)
    if checked_rows is not None:
        starts = starts[:: max(1, len(starts) * _ROWS // max(_ROWS, checked_rows))]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        blocks = list(pool.map(block, starts))
    expected = [
        accuracy.Expected(
            *(np.concatenate(arrays, 1) for arrays in zip(*map(_arrays, parts), strict=True))
        )
        for parts in zip(*blocks, strict=True)
    ]
    exact, narrow = expected[0].value, expected[1 if len(expected) > 1 else 0].value
    plain = relative_rms_error(narrow.astype(np.float32).astype(x.dtype), exact)
    chosen = [np.arange(start, min(start + _ROWS, rows)) for start in starts]
    return Reference(expected, plain, np.concatenate(chosen))


def _arrays(e: accuracy.Expected) -> tuple[np.ndarray, ...]:
    return e.value, e.slack, e.noise


def _matrices(w: np.ndarray | QuantisedTensor, rows: slice, dtype: np.dtype) -> list[np.ndarray]:
    """Rows [R, K] in float64: as the format says, with each weight rounded, and by distances in steps."""
    if not isinstance(w, QuantisedTensor):
        return [w[rows].astype(np.float64)]

    def rounded(a: np.ndarray) -> np.ndarray:
        return a.astype(np.float32).astype(dtype).astype(np.float64)

    packed, scales, codebook = (np.asarray(a) for a in (w.packed, w.scales, w.codebook))
    decode = functools.partial(
        _decode, packed, scales, bits=w.bits, group_size=w.group_size, k=w.in_features
    )
    exact = decode(codebook.astype(scales.dtype), rows=rows)
    if dtype == np.float32:
        return [exact]
    found = [exact, rounded(exact)]
    if w.uniform:
        step = (float(codebook[-1]) - float(codebook[0])) / (len(codebook) - 1)
        in_steps = decode(rounded(codebook.astype(np.float64) / step), rows=rows)
        found += [in_steps * step, rounded(in_steps) * step]
    return found


def _decode(packed, scales, codebook, *, bits, group_size, k, rows: slice) -> np.ndarray:
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    codes = (packed[rows, :, None] >> shifts) & np.uint8(2**bits - 1)
    values = codebook.astype(np.float64)[codes.reshape(len(codes), -1)[:, :k]]
    return values * np.repeat(scales[rows].astype(np.float64), group_size, axis=1)[:, :k]


def _integer_noise(
    case: KernelCase, x: np.ndarray, matrix: np.ndarray, w: Any, rows: slice
) -> np.ndarray:
    """The standard deviation of each output's error [m, R] if x and the levels are integers."""
    if case.backend == "pallas":  # see `pallas_kernels.mosaic_integers`
        steps = np.abs(x).max(1, keepdims=True) / 127
        scales = np.abs(np.asarray(w.scales)[rows].astype(np.float64)).max(1)
        levels = scales * float(np.abs(np.asarray(w.codebook)).max()) / 127
        noise = steps**2 * (matrix**2).sum(1) + (x**2).sum(1, keepdims=True) * levels**2
        return np.sqrt(noise / 12)
    limit, levels = (127, 223) if case.arithmetic == "int8" else (8191, 8190)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % w.group_size)))
    largest = np.abs(padded).reshape(len(x), -1, w.group_size).max(-1)
    steps = np.repeat(largest, w.group_size, -1)[:, : x.shape[1]] / limit
    level = float(np.ptp(np.asarray(w.codebook))) / levels / 2
    scales = np.repeat(np.asarray(w.scales)[rows].astype(np.float64), w.group_size, -1)[
        :, : x.shape[1]
    ]
    return np.sqrt(steps**2 @ (matrix**2).T / 12 + x**2 @ ((level * scales) ** 2).T)


def relative_rms_error(y: np.ndarray, expected: np.ndarray) -> float:
    """||y - expected|| / ||expected||; infinite when `y` is not finite."""
    y = y.astype(np.float64)
    if y.shape != expected.shape:
        raise ValueError(f"{y.shape=} must be {expected.shape}")
    if not np.isfinite(y).all():
        return math.inf
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

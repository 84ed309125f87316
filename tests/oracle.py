"""What the format says, in plain numpy: shares no code with the library."""

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def unpack(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Integer codes [N, k] of interchange bytes [N, ceil(k * bits / 8)]."""
    flat = np.unpackbits(packed, axis=-1).reshape(packed.shape[0], -1, bits)
    return (flat.astype(np.int64) << np.arange(bits - 1, -1, -1)).sum(-1)[:, :k]


def weights(w) -> np.ndarray:
    """float64 [N, K] of a QuantisedTensor in the interchange layout."""
    n, k = w.out_features, w.in_features
    codes = unpack(np.asarray(w.packed), w.bits, k)
    codebook = np.asarray(w.codebook).astype(np.asarray(w.scales).dtype).astype(np.float64)
    codebook = np.broadcast_to(codebook, (1, *codebook.shape)) if codebook.ndim == 1 else codebook
    out = np.zeros((n, k))
    scales = np.asarray(w.scales).astype(np.float64)
    for row in range(n):
        table = codebook[row * codebook.shape[0] // n]
        for col in range(k):
            out[row, col] = scales[row, col // w.group_size] * table[codes[row, col]]
    return out


def product(x: np.ndarray, w, bias: np.ndarray | None = None) -> np.ndarray:
    """float64 x @ w.T + bias."""
    return _product_and_size(x, w, bias)[0]


def _product_and_size(x, w, bias) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and what it would measure if its terms did not cancel."""
    x, w = np.asarray(x).astype(np.float64), weights(w)
    bias = np.zeros(len(w)) if bias is None else np.asarray(bias).astype(np.float64)
    return x @ w.T + bias, np.sqrt(x**2 @ (w**2).T + bias**2)


def relative_rms(got: np.ndarray, expected: np.ndarray, size: np.ndarray | None = None) -> float:
    """||got - expected|| / ||expected||, or / ||size||; NaN counts as infinite."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == np.shape(expected)
    error = np.linalg.norm(got - expected)
    error /= max(np.linalg.norm(expected if size is None else size), 1e-300)
    return float(error) if np.isfinite(error) else np.inf


def product_error(got: np.ndarray, x: np.ndarray, w, bias: np.ndarray | None = None) -> float:
    """||got - (x @ w.T + bias)|| relative to what the product measures without cancellation.

    The terms of a single output may happen to cancel: its arithmetic is no worse for that.
    """
    return relative_rms(got, *_product_and_size(x, w, bias))


def quantise(w: np.ndarray, bits: int, group: int, codebook: np.ndarray, kind: str):
    """(codes, scales) of [N, K] by the published rules, every step in the dtype of w."""
    dtype = w.dtype
    narrow = lambda a: np.asarray(a, np.float32).astype(dtype)  # noqa: E731
    n, k = w.shape
    levels = np.pad(narrow(codebook), (0, 2**bits - len(codebook)), mode="edge")
    middle = narrow(narrow(levels[1:].astype(np.float32) + levels[:-1].astype(np.float32)) / 2)
    codes = np.zeros((n, k), np.int64)
    scales = np.zeros((n, -(-k // group)), dtype)
    for g in range(scales.shape[1]):
        part = w[:, g * group : (g + 1) * group].astype(np.float32)
        if kind == "absmean":
            scale = np.abs(part).mean(-1)
        elif kind == "absmax":
            scale = np.abs(part).max(-1)
        elif kind == "rms":
            scale = np.sqrt((part * part).mean(-1))
        else:
            scale = np.ones(n, np.float32)
        floor = max(1e-12, float(ml_dtypes.finfo(dtype).tiny))
        scale = np.maximum(narrow(scale), narrow(floor))
        v = narrow(part / scale.astype(np.float32)[:, None])
        scales[:, g] = scale
        codes[:, g * group : (g + 1) * group] = np.searchsorted(
            middle.astype(np.float32), v.astype(np.float32), side="left"
        )
    return codes, scales

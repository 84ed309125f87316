"""What the format says, in plain numpy: shares no code with the library but the arithmetic of tolerances."""

import integers
import ml_dtypes
import numpy as np

from fdk_jax.benchmark import accuracy

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def unpack(packed: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Integer codes [N, k] of interchange bytes [N, ceil(k * bits / 8)]."""
    flat = np.unpackbits(packed, axis=-1)[:, : k * bits].reshape(packed.shape[0], k, bits)
    return (flat.astype(np.int64) << np.arange(bits - 1, -1, -1)).sum(-1)


def weights(w, *, exact_codebook: bool = False) -> np.ndarray:
    """float64 [N, K] of a QuantisedTensor in the interchange layout.

    The codebook is rounded to the dtype of the scales, which is how it multiplies; `exact_codebook` leaves
    it as it is, which is how kernels for evenly spaced values multiply.
    """
    k = w.in_features
    codes = unpack(np.asarray(w.packed), w.bits, k)
    codebook = np.asarray(w.codebook)
    if not exact_codebook:
        codebook = codebook.astype(np.asarray(w.scales).dtype)
    return decode(codes, codebook, np.asarray(w.scales), w.group_size)


def decode(codes: np.ndarray, codebook: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """float64 [N, K] of integer codes [N, K], codebooks [B, 2**bits] or one, and scales [N, groups]."""
    tables = np.atleast_2d(codebook.astype(np.float64))
    rows = np.arange(len(codes)) * len(tables) // max(len(codes), 1)
    values = tables[rows[:, None], codes]
    k = codes.shape[1]
    return values * np.repeat(scales.astype(np.float64), max(1, min(group, k)), -1)[:, :k]


def product(x: np.ndarray, w, bias: np.ndarray | None = None) -> np.ndarray:
    """float64 x @ w.T + bias."""
    added = 0.0 if bias is None else np.asarray(bias).astype(np.float64)
    return np.asarray(x).astype(np.float64) @ weights(w).T + added


def rounded(values: np.ndarray, dtype) -> np.ndarray:
    """Float64 values as a dtype holds them."""
    return values.astype(np.float32).astype(np.dtype(dtype)).astype(np.float64)


def expectations(x: np.ndarray, matrices, bias=None, **inexact) -> list[accuracy.Expected]:
    """What a product may be: of each matrix, as it is and with each weight rounded to the dtype of x.

    Args:
        x: [..., K] in the dtype that the kernel is given.
        matrices: weights [N, K] in float64, each a way in which a kernel may read the format.
        bias: [N].
        **inexact: `slack` and `noise` of the arithmetic, see `accuracy.product`.
    """
    x = np.asarray(x)
    bias = None if bias is None else np.asarray(bias).astype(np.float64)
    matrices = list(matrices)
    if x.dtype != np.float32:
        with np.errstate(over="ignore"):
            narrow = [rounded(m, x.dtype) for m in matrices]
        matrices += [m for m in narrow if np.isfinite(m).all()]
    wide = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1]).astype(np.float64)
    found = []
    for matrix in matrices:
        e = accuracy.product(wide, matrix, bias, **inexact)
        shape = (*x.shape[:-1], len(matrix))
        found.append(accuracy.Expected(*(a.reshape(shape) for a in (e.value, e.slack, e.noise))))
    return found


def check(got: np.ndarray, expected) -> None:
    """Fails, with the worst element, unless a result is what its arithmetic allows: `accuracy.compare`."""
    outcome = accuracy.compare(np.asarray(got), expected)
    print(outcome)
    assert outcome.ok, str(outcome)


def check_product(got, x, w, bias=None, arithmetic: str = "exact") -> None:
    """Compares with x @ w.T + bias for a QuantisedTensor in the interchange layout.

    Args:
        got: [..., N].
        x: [..., K].
        w: the weight.
        bias: [N].
        arithmetic: of the activations, see `fdk_jax.matmul`.
    """
    if arithmetic == "exact":
        matrices = [weights(w), *([weights(w, exact_codebook=True)] if w.uniform else [])]
        check(got, expectations(x, matrices, bias))
    else:
        check(got, integers.expected(x, w, bias, arithmetic))


def check_values(got, expected, *, slack: float = 0.0, size=None) -> None:
    """Compares with float64 values that were made by a few float32 operations each.

    Args:
        got: a result.
        expected: in float64.
        slack: relative to `size`, beyond the rounding of the result.
        size: what the terms of an element measure; by default the root of the mean square of all.
    """
    expected = np.asarray(expected, np.float64)
    if size is None:
        size = np.sqrt(np.mean(expected**2)) if expected.size else 0.0
    check(got, accuracy.Expected.of(expected, (slack + 2.0**-22) * (size + np.abs(expected))))


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||, for what a format or a recipe loses; NaN counts as infinite."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == np.shape(expected)
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-300)
    return float(error) if np.isfinite(error) else np.inf


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

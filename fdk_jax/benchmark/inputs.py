"""Random inputs of a case, and the float64 oracle that its output is checked against.

The oracle shares no code with the library: it reads the bytes of the interchange format itself.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np

from fdk_jax.benchmark.cases import KernelCase
from fdk_jax.format import codebooks
from fdk_jax.format.quantised_tensor import QuantisedTensor

# Largest relative RMS error of a correct kernel: the rounding of its output and of its arithmetic.
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
ARITHMETIC_TOLERANCES = {"exact": 0.0, "int16": 2e-2, "int8": 4e-2}
_ROWS = 1024


def tolerance(case: KernelCase) -> float:
    """The relative RMS error above which a case has failed."""
    return max(TOLERANCES[case.dtype], ARITHMETIC_TOLERANCES[case.arithmetic])


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
    codes_per_byte = 8 // bits
    packed = rng.integers(0, 256, (case.n, -(-case.k // codes_per_byte)), np.uint8)
    # Codes that pad the last byte are zero; the first code of a byte is in its highest bits.
    packed[:, -1] &= np.uint8(256 - (1 << (-case.k % codes_per_byte) * bits))
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


@functools.cache
def _codebook(kind: str, bits: int) -> np.ndarray:
    if kind == "uniform":
        return codebooks.uniform(bits)
    if kind == "kmeans":
        sample = np.random.default_rng(0).standard_normal(2**18, np.float32)
        return np.asarray(codebooks.kmeans(sample, bits))
    if bits != 4:
        raise NotImplementedError(f"{kind} is a 4-bit codebook, not {bits}-bit")
    return codebooks.nf4()


def oracle(x: np.ndarray, w: np.ndarray | QuantisedTensor) -> np.ndarray:
    """The product of x [m, k] and a weight [n, k], transposed, in float64: [m, n]."""
    x = x.astype(np.float64)
    if isinstance(w, QuantisedTensor):
        arrays = [np.asarray(a) for a in (w.packed, w.scales, w.codebook)]
        rows = w.out_features
        part = functools.partial(_decode, *arrays, w.bits, w.group_size, w.in_features)
    else:
        rows, part = w.shape[0], lambda rows: w[rows].astype(np.float64)
    blocks = [x @ part(slice(r, r + _ROWS)).T for r in range(0, rows, _ROWS)]
    return np.concatenate(blocks, axis=1)


def _decode(packed, scales, codebook, bits, group_size, k, rows: slice) -> np.ndarray:
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    codes = (packed[rows, :, None] >> shifts) & np.uint8(2**bits - 1)
    values = codebook.astype(scales.dtype).astype(np.float64)[codes.reshape(len(codes), -1)[:, :k]]
    return values * np.repeat(scales[rows].astype(np.float64), group_size, axis=1)[:, :k]


def relative_rms_error(y: np.ndarray, expected: np.ndarray) -> float:
    """||y - expected|| / ||expected||; infinite when `y` is not finite."""
    y = y.astype(np.float64)
    if y.shape != expected.shape:
        raise ValueError(f"{y.shape=} must be {expected.shape}")
    if not np.isfinite(y).all():
        return math.inf
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

"""Products with planar weights for the tests of the Pallas kernels, with their float64 oracle."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import oracle

from fdk_jax.benchmark import accuracy
from fdk_jax.format import packing
from pallas_kernels.case import Case

HALF = jnp.dtype(jnp.bfloat16)
_UNIT = 64  # activations that share a scale in the kernel of integers
_LARGEST = 32512  # of its integers


def case(
    *shape, group_size=64, codebooks=1, dtype=HALF, scales=HALF, bias=None, out=HALF, uniform=False
):
    """A product of shape (M, N, K, bits)."""
    return Case(*shape, group_size, codebooks, dtype, scales, bias, out, uniform)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a product should be.

    Attributes:
        x: activations [M, K] in the kernel's dtype.
        matrices: the weight [N, K] in float64, as the format says and in each other way that kernels read it.
        bits: width of the codes.
        of_integers: the index of the matrix that sums of integers multiply.
    """

    x: np.ndarray
    matrices: list[np.ndarray]
    bits: int
    of_integers: int = 0

    @property
    def value(self) -> np.ndarray:
        """The product in float64, [M, N]."""
        return np.asarray(self.x, np.float64) @ self.matrices[0].T

    def check(self, y, bias=None, **inexact) -> None:
        """Compares a result [M, N], see `oracle.check`."""
        oracle.check(y, self.expectations(bias, **inexact))

    def expectations(self, bias=None, **inexact):
        """What the result may be, see `oracle.expectations`."""
        found = oracle.expectations(self.x, self.matrices, bias, **inexact)
        integers = self.bits == 1 or (self.bits < 8 and len(self.x) == 1)
        if integers and self.x.dtype != np.float32 and len(self.x):
            matrix = self.matrices[self.of_integers]
            x, quarters = np.asarray(self.x, np.float64), self.bits < 4
            noise, slack = of_integers(x, matrix, quarters=quarters)
            found += oracle.expectations(self.x, [matrix], bias, noise=noise, slack=slack)[:1]
        return found


def of_integers(x, matrix, *, quarters=True):
    """Noise and slack of x [M, K] times matrix [N, K] transposed where activations become integers.

    Each is rounded by up to half a step. With `quarters` two of four neighbours are a quarter of what they
    measure: their codes are read from a higher bit.
    """
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % _UNIT))).reshape(len(x), -1, _UNIT)
    steps = np.repeat(np.abs(padded).max(-1), _UNIT, -1)[:, : x.shape[1]] / _LARGEST
    if quarters:
        steps[:, np.arange(x.shape[1]) % 4 > 1] *= 4
    noise = np.sqrt(steps**2 @ (matrix**2).T / 12)
    # Where both values have the same sign, columns share a part of it, which no mean takes out.
    shared = np.sqrt((steps**2).sum(1) / 12)[:, None] * np.abs(matrix.mean(1))
    return noise, accuracy.SIGMAS * shared


def product(
    rng, m, n, k, bits, group_size, dtype, codebooks=1, scale=1.0, uniform=False, scale_dtype=None
):
    """Arguments of `pallas_kernels.matmul`, and what it should give; `scale_dtype` is `dtype` if None."""
    dtype, scale_dtype = jnp.dtype(dtype), jnp.dtype(scale_dtype or dtype)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    codebook = np.sort(rng.normal(size=(codebooks, 2**bits)), -1).astype(np.float32)
    if uniform:
        zero = rng.integers(0, 2 ** (bits + 1) - 1, (codebooks, 1)) / 2
        step = rng.uniform(0.5, 2, (codebooks, 1)) / 2**bits
        codebook = ((np.arange(2**bits) - zero) * step).astype(np.float32)
    # NumPy rounds to a dtype without a program for each shape.
    factors = (scale * rng.uniform(0.5, 2, (n, -(-k // group_size)))).astype(np.float32)
    scales = factors.astype(scale_dtype)
    x = jnp.asarray(rng.normal(size=(m, k)).astype(np.float32).astype(dtype))
    spec = dict(bits=bits, group_size=group_size, out_features=n)
    packed, planar = packing.to_planar(
        packing.pack(codes, bits), jnp.asarray(scales), in_features=k, **spec
    )
    matrices = []
    # Scales of another dtype multiply sums as they are, and weights as the dtype of x rounds them.
    for factors in (scales, scales.astype(dtype))[: 1 + (scale_dtype != dtype)]:
        decode = functools.partial(oracle.decode, codes, scales=factors, group=group_size)
        matrices.append(decode(codebook.astype(dtype)))
        if uniform:
            # Kernels multiply by distances from zero in steps, and by the step in the end; those that scale
            # weights multiply the distances by a power of two before, 2**-bits or the one below the step:
            # float16 notices where scales are tiny.
            distances = oracle.rounded(np.arange(2**bits) - zero, dtype)
            steps = np.repeat(step, n // codebooks, 0)
            in_steps = decode(distances)
            matrices += [in_steps * steps, oracle.rounded(in_steps, dtype) * steps]
            for power in (2.0**-bits, 2.0 ** np.floor(np.log2(steps))):
                matrices += [oracle.rounded(in_steps * power, dtype) * (steps / power)]
    wanted = Wanted(np.asarray(x), matrices, bits, int(uniform))
    return (x, packed, planar, jnp.asarray(codebook)), spec, wanted


NORM_EPS = 1e-3


def residual_product(rng, n, k, codebooks=1, parts=5, bits=1, uniform=False):
    """A `Scaled` [1, K] and a residual [1, N] for `pallas_kernels.residual_matmul`, bfloat16.

    Returns:
        (total, scaled, squares) of the input; (residual, scale); weight arrays; spec; what the product of
        `scaled` should be; the inverse root of the mean square by which a norm multiplies it.
    """
    dtype = jnp.bfloat16
    (x, *weight), spec, wanted = product(rng, 1, n, k, bits, 64, dtype, codebooks, uniform=uniform)
    factors = jnp.asarray(rng.uniform(0.5, 2, k), dtype)
    squares = np.zeros(parts, np.float32)
    np.add.at(squares, np.arange(k) % parts, np.asarray(x, np.float32)[0] ** 2)
    scaled = x * factors[None, :]
    wanted = dataclasses.replace(wanted, x=np.asarray(scaled))
    inverse = 1 / np.sqrt(np.mean(np.asarray(x, np.float64) ** 2) + NORM_EPS)
    residual = jnp.asarray(3 * rng.normal(size=(1, n)), dtype)
    after = residual, jnp.asarray(rng.uniform(0.5, 2, n), dtype)
    return (x, scaled, jnp.asarray(squares)), after, weight, spec, wanted, inverse


def check_residual(outputs, after, expectations):
    """Compares (sum, scaled, squares) of a product with a residual to float64.

    Args:
        outputs: as the kernel leaves them.
        after: (residual, scale).
        expectations: of the product before the residual is added, as `Wanted.expectations` gives them.
    """
    residual, scale = (np.asarray(a, np.float64) for a in after)
    oracle.check(outputs[0], [e.then(add=residual) for e in expectations])
    check_scaled(outputs, scale)


def check_scaled(outputs, scale):
    """What is scaled and squared is the sum as it was rounded."""
    total, _, squares = (np.asarray(a, np.float64) for a in outputs)
    oracle.check(outputs[1], accuracy.Expected.of(total).then(factor=scale))
    oracle.check_values(squares.sum(), (total**2).sum(), slack=1e-5)

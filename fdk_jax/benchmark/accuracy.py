"""How far a right result may be from float64: bounds for each element, from its terms and the dtypes.

A result of a kernel differs from the exact one by
  - the rounding of the result to its dtype, half a unit in the last place: known for each element,
  - the rounding of float32 sums: a few units of 2**-24 of what the terms measure, growing with the square
    root of how many there are,
  - noise: roundings inside of the kernel of which only the size is known, such as that of activations to
    integers.
A kernel whose results are all half a percent too large can hide below the first where results have 8 bits. So
`compare` looks at the single elements and at the mean of the errors in the direction of the results, over
everything, over each row and over each column: roundings cancel there, a wrong factor does not.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

SIGMAS = 6.0  # of noise: a right result is outside once in 500 million elements
_U32 = 2.0**-24
_LEAST = 2.0**-126  # what may be flushed to zero, of each term


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a result should be, in float64, with what it may be off by before it is rounded to its dtype.

    Attributes:
        value: the exact result.
        slack: at most so much in either direction, for each element; may be the same for all elements.
        noise: the standard deviation of errors that are independent of each other.
    """

    value: np.ndarray
    slack: np.ndarray
    noise: np.ndarray

    @classmethod
    def of(
        cls, value: np.ndarray, slack: np.ndarray | float = 0.0, noise: np.ndarray | float = 0.0
    ):
        """With slack and noise spread over all elements."""
        value = np.asarray(value, np.float64)
        slack, noise = (
            np.broadcast_to(np.asarray(a, np.float64), value.shape) for a in (slack, noise)
        )
        return cls(value, slack, noise)

    def then(self, factor: np.ndarray | float = 1.0, add: np.ndarray | float = 0.0) -> "Expected":
        """What the result times a factor plus an addend should be, each step in float32."""
        size = np.abs(factor)
        value = self.value * factor + add
        slack = self.slack * size + 4 * _U32 * (np.abs(self.value) * size + np.abs(add))
        return Expected.of(value, slack, self.noise * size)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Attributes:
        ratio: the largest error of an element over its bound.
        worst: where that is: index, result, expected value, error and bound.
        bias: the largest mean error in the direction of the results, over its bound.
        biased: of what: "all", ("row", i) or ("column", i), with the bias itself and its bound.
    """

    ratio: float
    worst: str
    bias: float
    biased: str

    @property
    def ok(self) -> bool:
        """Whether everything is within its bounds."""
        return self.ratio <= 1.0 and self.bias <= 1.0

    def __str__(self) -> str:
        return f"worst element {self.worst}: {self.ratio:.3g} of its bound; worst mean error {self.biased}"


def half_ulp(value: np.ndarray, dtype) -> np.ndarray:
    """At most so much a value changes when it is rounded to a dtype; 0 for float64."""
    if np.dtype(dtype) == np.float64:
        return np.zeros(np.shape(value))
    info = ml_dtypes.finfo(dtype)
    size = np.maximum(np.abs(np.asarray(value, np.float64)), float(info.smallest_normal))
    return np.exp2(np.floor(np.log2(size)) - info.nmant - 1)


def product(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    noise: np.ndarray | float = 0.0,
    slack: np.ndarray | float = 0.0,
) -> Expected:
    """Activations [M, K] times the transpose of a weight [N, K], plus a bias [N], by float32 sums.

    Args:
        x: in float64, as the kernel multiplies it.
        weight: in float64, as the kernel multiplies it.
        bias: in float64.
        noise: standard deviation of an element's error for other reasons.
        slack: bound of an element's error for other reasons.
    """
    exact = x @ weight.T
    size = np.sqrt(x**2 @ (weight**2).T)
    terms = np.abs(x) @ np.abs(weight).T
    if bias is not None:
        exact, terms, size = exact + bias, terms + np.abs(bias), np.hypot(size, bias)
    count = x.shape[-1]
    # Partial sums are about as large as their terms' root of squares, and as the result.
    sums = (
        4 * _U32 * np.sqrt(count + 4) * (size + np.abs(exact)) + 2 * _U32 * terms + count * _LEAST
    )
    return Expected.of(exact, sums + slack, noise)


def compare(got: np.ndarray, expected: Expected | Sequence[Expected]) -> Comparison:
    """Compares a result with what it should be.

    Args:
        got: of any shape and float dtype.
        expected: or several, where a kernel may round its operands in one way or another: the nearest counts.

    Raises:
        ValueError: the shapes differ.
    """
    found = [_compare(got, e) for e in ([expected] if isinstance(expected, Expected) else expected)]
    return min(found, key=lambda c: (not c.ok, max(c.ratio, c.bias)))


def _compare(got: np.ndarray, expected: Expected) -> Comparison:
    got = np.asarray(got)
    if got.shape != expected.value.shape:
        raise ValueError(f"{got.shape=} must be {expected.value.shape}")
    if got.size == 0:
        return Comparison(0.0, "(none)", 0.0, "(none)")
    wide = got.astype(np.float64)
    value, slack, noise = expected.value, expected.slack, expected.noise
    reach = slack + SIGMAS * noise
    rounding = half_ulp(np.abs(value) + reach, got.dtype)
    bound = reach + rounding
    error = wide - value
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error == 0, 0.0, np.abs(error) / bound)
    ratios = np.where(np.isfinite(wide), ratios, np.inf)
    index = np.unravel_index(np.argmax(ratios), ratios.shape)
    worst = (
        f"{tuple(int(i) for i in index)} is {wide[index]:.8g}, should be {value[index]:.8g}"
        f" (off by {error[index]:.3g} of {bound[index]:.3g})"
    )
    if not np.isfinite(ratios[index]):
        return Comparison(np.inf, worst, np.inf, "not finite")
    biases = list(_biases(error, value, slack, noise, rounding))
    ratio, biased = max(biases, default=(0.0, "(none)"))
    return Comparison(float(ratios[index]), worst, ratio, biased)


def _biases(error, value, slack, noise, rounding) -> Iterator[tuple[float, str]]:
    """(Mean error in the direction of the results over its bound, words), of all, rows and columns."""
    spread = noise**2 + rounding**2 / 3  # that of an error anywhere within half a unit
    matrix = value.ndim > 1 and value.size
    views = [("of all elements", lambda a: a.reshape(1, -1))]
    if matrix:
        views.append(("of row", lambda a: a.reshape(-1, a.shape[-1])))
        views.append(("of column", lambda a: a.reshape(-1, a.shape[-1]).T))
    for words, view in views:
        v, e, s, sp = view(value), view(error), view(slack), view(spread)
        square = np.maximum((v * v).sum(-1), 1e-300)
        slope = (v * e).sum(-1) / square
        limit = (SIGMAS * np.sqrt((sp * v * v).sum(-1)) + (s * np.abs(v)).sum(-1)) / square
        limit = np.maximum(limit, 1e-300)
        i = int(np.argmax(np.abs(slope) / limit))
        name = words if words == "of all elements" else f"{words} {i}"
        yield (
            float(abs(slope[i]) / limit[i]),
            f"{name} {slope[i]:+.3g} of the result, bound {limit[i]:.3g}",
        )

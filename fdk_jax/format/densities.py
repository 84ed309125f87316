"""Codebooks for weights of a known distribution: levels as dense as the cube root of its density.

Panter and Dite (1951): of all codebooks with many levels, that of least squared error has a density of levels
proportional to the cube root of the density of the values. Orr et al. (arXiv 2505.12988) apply the rule to
weights that were divided by a scale; their construction is followed here, with quantiles by quadrature
instead of closed forms.
"""

import math

import numpy as np

DISTRIBUTIONS = ("normal", "laplace", "student")
_POINTS = 2**16 + 1
_REACH = 22.0  # The grid is sinh(-22 .. 22): heavy tails end at 2e9 standard deviations.


def cube_root(
    entries: int,
    *,
    scale: str = "absmax",
    group_size: int = 64,
    distribution: str = "normal",
    degrees: float = 7.0,
) -> np.ndarray:
    """The cube-root-density codebook of a distribution of weights.

    Args:
        entries: number of levels, 2 or more.
        scale: how groups are scaled: "rms" or "none" (weights of unit variance), "absmean" (of unit mean
            magnitude), or "absmax": the density is cut off at the expected largest magnitude of a group,
            which becomes 1, and -1 and 1 are levels.
        group_size: weights in a group, at least 4; only "absmax" depends on it.
        distribution: "normal", "laplace" or "student".
        degrees: degrees of freedom of Student's distribution, above 3.

    Returns:
        float32 [entries], ascending and symmetric.

    Raises:
        ValueError: an argument out of range.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"{distribution=} is not one of {DISTRIBUTIONS}")
    if scale not in ("absmax", "absmean", "rms", "none"):
        raise ValueError(f'{scale=} is not one of "absmax", "absmean", "rms", "none"')
    if entries < 2:
        raise ValueError(f"a cube-root-density codebook has at least 2 entries, got {entries=}")
    if degrees <= 3:
        raise ValueError(f"{degrees=} must be above 3: heavier tails have no optimal codebook")
    if scale == "absmax" and group_size < 4:
        raise ValueError(f'{group_size=} must be at least 4 for scale="absmax"')
    x = np.sinh(np.linspace(-_REACH, _REACH, _POINTS))
    density = _unit_variance(x, distribution, degrees)
    if scale == "absmax":
        unit = expected_absmax(group_size, distribution, degrees)
        x = np.linspace(-unit, unit, _POINTS)
        density = _unit_variance(x, distribution, degrees)
        ranks = np.linspace(0.0, 1.0, entries)
    else:
        magnitude = np.trapezoid(np.abs(x) * density, x)
        unit = magnitude if scale == "absmean" else 1.0
        ranks = np.arange(1, entries + 1) / (entries + 1)
    root = np.cbrt(density)
    steps = (root[1:] + root[:-1]) / 2 * np.diff(x)
    mass = np.concatenate([[0.0], np.cumsum(steps)])
    levels = np.interp(ranks * mass[-1], mass, x) / unit
    return ((levels - levels[::-1]) / 2).astype(np.float32)


def _unit_variance(x: np.ndarray, distribution: str, degrees: float) -> np.ndarray:
    """Density at x of the distribution with variance 1."""
    if distribution == "normal":
        return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    if distribution == "laplace":
        return np.exp(-math.sqrt(2) * np.abs(x)) / math.sqrt(2)
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log -= math.log(math.pi * (degrees - 2)) / 2
    return np.exp(log - (degrees + 1) / 2 * np.log1p(x * x / (degrees - 2)))


def expected_absmax(group_size: int, distribution: str, degrees: float = 7.0) -> float:
    """The largest magnitude to expect among `group_size` values of variance 1, as approximated by Orr et al."""
    tail = 2 * math.log(group_size / math.pi)
    if distribution == "normal":
        return math.sqrt(tail)
    if distribution == "laplace":
        return (np.euler_gamma + math.log(group_size)) / math.sqrt(2)
    return (group_size * tail ** ((degrees - 3) / 2)) ** (1 / degrees)

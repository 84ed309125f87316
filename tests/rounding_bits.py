"""Rounding to a dtype's grid against numpy's casts, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
from oracle import DTYPES


def cases(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """float32 of every kind: all of a dtype, what lies half way between two or next to that, any bits."""
    grid = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float32)
    finite = np.sort(grid[np.isfinite(grid)]).astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate(
        [grid, middle, *beside, rng.integers(0, 2**32, 2**16, np.uint32).view(np.float32)]
    )


def check(rng: np.random.Generator, dtype: str, round_to) -> None:
    """That `round_to` gives numpy's bits, alone and within a program that goes on computing."""
    x = cases(rng, dtype)
    with np.errstate(all="ignore"):
        wanted = x.astype(DTYPES[dtype]).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: round_to(x, jnp.dtype(dtype)))(x))
    np.testing.assert_array_equal(found.view(np.uint32), _one_nan(wanted, found))
    # Numbers with doubles that float32 has, and normal ones: arithmetic may set others to zero.
    some = (np.abs(x) < 1e38) & (np.abs(x) > 1e-37)
    found = np.asarray(jax.jit(lambda x: round_to(x, jnp.dtype(dtype)) * jnp.float32(2))(x[some]))
    np.testing.assert_array_equal(found, wanted[some] * 2)


def _one_nan(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The bits of what is wanted; where both are NaN, those of what was found."""
    both = np.isnan(wanted) & np.isnan(found)
    return np.where(both, found, wanted).view(np.uint32)

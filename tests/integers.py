"""The integer arithmetics of the CPU library as docs/cpu.md states them, in numpy.

Activations become integers with a scale for each block of at most 64 within a group; a codebook's values become
integers between its ends. What is left is the order of float32 sums, and a value of x that lies between two
integers to the last bit: two such values an element of the result are allowed for.
"""

import numpy as np
import oracle

from fdk_jax.benchmark import accuracy

_BLOCK = 64
_LEVELS_16 = 4095
_LIMITS_16 = {True: 32767, False: 8191}  # of x, by whether the values are evenly spaced


def expected(x, w, bias, arithmetic: str) -> list[accuracy.Expected]:
    """What x @ w.T + bias is when both factors are rounded to integers as the arithmetic says."""
    scales = np.asarray(w.scales)
    codebooks = np.atleast_2d(np.asarray(w.codebook).astype(scales.dtype)).astype(np.float64)
    uniform = w.uniform or w.bits == 1  # two values always are
    uniform = uniform and (arithmetic == "int8" or all(map(_is_uniform, codebooks)))
    levels = np.stack([_on_line(b) if uniform else _LEVELS[arithmetic](b) for b in codebooks])
    codes = oracle.unpack(np.asarray(w.packed), w.bits, w.in_features)
    matrix = oracle.decode(codes, levels, scales, w.group_size)
    limit = 127 if arithmetic == "int8" else _LIMITS_16[uniform]
    wide = np.asarray(x).astype(np.float64).reshape(-1, w.in_features)
    whole, steps = _activations(wide, w.group_size, limit)
    # Two values of x that fall to the other side.
    slack = np.stack([2 * (np.abs(matrix) * row).max(-1) for row in steps]) if len(wide) else 0.0
    e = accuracy.product(
        whole, matrix, None if bias is None else np.asarray(bias, np.float64), slack=slack
    )
    shape = (*np.shape(x)[:-1], len(matrix))
    return [accuracy.Expected(*(a.reshape(shape) for a in (e.value, e.slack, e.noise)))]


def _activations(x: np.ndarray, group: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations [M, K] as integers times their steps, and the step of each value."""
    whole, steps = np.zeros_like(x), np.zeros_like(x)
    for start in range(0, x.shape[1], group):
        for first in range(start, min(start + group, x.shape[1]), _BLOCK):
            part = slice(first, min(first + _BLOCK, start + group, x.shape[1]))
            step = np.abs(x[:, part]).max(-1, keepdims=True) / limit
            steps[:, part] = step
            whole[:, part] = np.round(x[:, part] / np.where(step == 0, 1, step)) * step
    return whole, steps


def _is_uniform(codebook: np.ndarray) -> bool:
    line = _on_line(codebook)
    return np.abs(codebook - line).max() <= 1e-5 * abs(codebook[-1] - codebook[0])


def _on_line(codebook: np.ndarray) -> np.ndarray:
    return codebook[0] + np.arange(len(codebook)) * (codebook[-1] - codebook[0]) / (
        len(codebook) - 1
    )


def _eight_bits(codebook: np.ndarray) -> np.ndarray:
    """The range on 0..top: of 224..255 the top that rounds best, where there are few values."""
    low, span = codebook.min(), np.ptp(codebook)
    if span == 0:
        return codebook
    tops = np.arange(224, 256) if len(codebook) <= 16 else np.array([255])
    rounded = [low + np.floor((codebook - low) * (top / span) + 0.5) * (span / top) for top in tops]
    return min(rounded, key=lambda levels: ((levels - codebook) ** 2).sum())


def _sixteen_bits(codebook: np.ndarray) -> np.ndarray:
    middle = (codebook.min() + codebook.max()) / 2
    half = codebook.max() - middle
    return (
        codebook
        if half == 0
        else middle + np.round((codebook - middle) / half * _LEVELS_16) * (half / _LEVELS_16)
    )


_LEVELS = {"int8": _eight_bits, "int16": _sixteen_bits}

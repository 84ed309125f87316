"""Instructions on floats: functions of raw bits [threads] uint64.

What is rounded is rounded once, as IEEE 754 has it. Of the approximate ones the result is the nearest float32,
which is closer than a GPU promises.
"""

import functools
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

from emulator.integers import Operation, signed

HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def singles(bits: np.ndarray) -> np.ndarray:
    """The low 32 bits as float32."""
    return bits.astype(np.uint32).view(np.float32)


def bits_of(values: np.ndarray) -> np.ndarray:
    """The bits of float32 or half-precision values."""
    return values.view(f"u{values.dtype.itemsize}").astype(np.uint64)


def halves(bits: np.ndarray, dtype: type) -> np.ndarray:
    """The two halves [2, ...] of each register, the low one first."""
    words = bits.astype(np.uint32)
    return np.stack([words & 0xFFFF, words >> 16]).astype(np.uint16).view(dtype)


def _join(pair: np.ndarray) -> np.ndarray:
    low, high = bits_of(pair)
    return low | high << np.uint64(16)


def _to_odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Of the two floats around value + error the odd one, so that rounding once more rounds right."""
    even = value.view(f"u{value.dtype.itemsize}") & 1 == 0
    away = np.where(error > 0, value.dtype.type(np.inf), -value.dtype.type(np.inf))
    return np.where(even & (np.abs(error) > 0), np.nextafter(value, away), value)


def _narrow(value: np.ndarray, dtype: type) -> np.ndarray:
    """Float64 in another type, rounded once: ml_dtypes goes to bfloat16 by way of float32."""
    if dtype is ml_dtypes.bfloat16:
        between = value.astype(np.float32)
        value = _to_odd(between, value - between.astype(np.float64))
    return value.astype(dtype)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A * b + c in the type of the operands, rounded once."""
    dtype = a.dtype.type
    a, b, c = (v.astype(np.float64) for v in (a, b, c))
    product = a * b  # exact: at most 48 bits
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # what the sum has lost
    return _narrow(_to_odd(total, error), dtype)


def _nearest(function: Callable[[np.ndarray], np.ndarray], a: np.ndarray) -> np.ndarray:
    return function(a.astype(np.float64)).astype(np.float32)


def _extreme(largest: bool, nans: bool, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The larger or smaller; a NaN wins or loses; minus zero is below zero."""
    choose = {(True, False): np.fmax, (True, True): np.maximum, (False, False): np.fmin}
    found = choose.get((largest, nans), np.minimum)(a, b)
    x, y = (v.view(np.uint32) for v in (a, b))
    equal = (x & y if largest else x | y).view(np.float32)
    return np.where(a == b, equal, found)


_SINGLE: dict[str, Operation] = {
    r"add(?:\.rn)?": np.add,
    r"sub(?:\.rn)?": np.subtract,
    r"mul(?:\.rn)?": np.multiply,
    r"div\.rn": np.divide,
    r"fma\.rn": multiply_add,
    r"abs": np.abs,
    r"neg": np.negative,
    r"rcp\.approx": functools.partial(_nearest, np.reciprocal),
    r"ex2\.approx": functools.partial(_nearest, np.exp2),
    r"rsqrt\.approx": functools.partial(_nearest, lambda a: 1 / np.sqrt(a)),
    r"max": functools.partial(_extreme, True, False),
    r"max\.NaN": functools.partial(_extreme, True, True),
    r"min": functools.partial(_extreme, False, False),
    r"min\.NaN": functools.partial(_extreme, False, True),
}
_PAIRS: dict[str, Operation] = {
    "add": lambda a, b: multiply_add(a, np.ones_like(a), b),
    "sub": lambda a, b: multiply_add(b, -np.ones_like(b), a),
    "mul": lambda a, b: multiply_add(a, b, -np.zeros_like(a)),  # minus zero changes no zero
    "fma": multiply_add,
}


def _single(operation: Operation, *bits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return bits_of(operation(*map(singles, bits)))


def _pair(operation: Operation, dtype: type, *bits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return _join(operation(*(halves(b, dtype) for b in bits)))


def _halve(dtype: type, bits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return bits_of(singles(bits).astype(dtype))


def _halve_two(dtype: type, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return _halve(dtype, low) | _halve(dtype, high) << np.uint64(16)


def _widen(dtype: type, bits: np.ndarray) -> np.ndarray:
    return bits_of(bits.astype(np.uint16).view(dtype).astype(np.float32))


def _count(kind: str, bits: np.ndarray) -> np.ndarray:
    number = signed(bits, 32) if kind == "s" else bits & np.uint64(2**32 - 1)
    return bits_of(number.astype(np.float32))


def find(opcode: str) -> Operation | None:
    """The function of an opcode's sources, or None."""
    if opcode.endswith(".f32"):
        for pattern, operation in _SINGLE.items():
            if re.fullmatch(pattern, opcode.removesuffix(".f32")):
                return functools.partial(_single, operation)
    if found := re.fullmatch(r"(add|sub|mul|fma)\.rn\.(b?f16)x2", opcode):
        return functools.partial(_pair, _PAIRS[found[1]], HALVES[found[2]])
    if found := re.fullmatch(r"cvt\.rn\.(b?f16)(x2)?\.f32", opcode):
        return functools.partial(_halve_two if found[2] else _halve, HALVES[found[1]])
    if found := re.fullmatch(r"cvt\.f32\.(b?f16)", opcode):
        return functools.partial(_widen, HALVES[found[1]])
    if found := re.fullmatch(r"cvt\.rn\.f32\.([us])32", opcode):
        return functools.partial(_count, found[1])
    return None

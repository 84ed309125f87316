"""E2M1 weights, E8M0 and E4M3 scales of the OCP Microscaling formats (version 1.0) and of NVFP4."""

import ml_dtypes
import numpy as np

from fdk_jax.format.codebooks import FP4

# Codes of E2M1 are a sign and a magnitude. Ascending, zero stands twice: once for minus zero.
E2M1 = np.asarray([*(-np.float32(v) for v in reversed(FP4[1:])), 0.0, *FP4], np.float32)


def ascending_e2m1(packed: np.ndarray) -> np.ndarray:
    """Bytes of two E2M1 codes each, with codes that index `E2M1`: uint8 of the same shape."""
    signs = packed & np.uint8(0x88)
    # A code s m becomes 8 + m, or 7 - m if it is negative.
    return packed ^ (np.uint8(0x88) | (signs - (signs >> np.uint8(3))))


def from_ascending_e2m1(packed: np.ndarray) -> np.ndarray:
    """The inverse of `ascending_e2m1`."""
    negative = ~packed & np.uint8(0x88)
    return packed ^ (np.uint8(0x88) | (negative - (negative >> np.uint8(3))))


def e8m0(exponents: np.ndarray) -> np.ndarray:
    """2**(e - 127) of uint8 exponents: bfloat16 of the same shape, exactly.

    Raises:
        ValueError: 255, which is NaN.
    """
    if (exponents == 255).any():
        raise ValueError("the E8M0 scales hold NaN: the file is damaged")
    words = exponents.astype(np.uint16) << np.uint16(7)
    words[exponents == 0] = 0x40  # 2**-127 is below the normal numbers
    return words.view(ml_dtypes.bfloat16)


def e4m3(values: np.ndarray) -> np.ndarray:
    """Bytes or float8_e4m3fn as float32 of the same shape."""
    return values.view(ml_dtypes.float8_e4m3fn).astype(np.float32)

"""The backends that a test body runs against."""

import contextlib

import pytest

import fdk_jax
from fdk_jax import cpu_backend

CPU_MISSING = cpu_backend.unavailable_reason()
BACKENDS = [
    "xla",
    "pallas",
    pytest.param("cpu", marks=pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))),
]
# Relative RMS of the arithmetic, for activations of each dtype.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


def running(backend: str):
    """A context in which `backend` runs on a CPU: Pallas kernels are interpreted."""
    return fdk_jax.interpret_pallas() if backend == "pallas" else contextlib.nullcontext()

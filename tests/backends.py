"""The backends that a test body runs against."""

import contextlib

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import fdk_jax
from fdk_jax.product import cpu_backend

CPU_MISSING = cpu_backend.unavailable_reason()
BACKENDS = [
    "xla",
    "pallas",
    pytest.param("cpu", marks=pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))),
]

ONLY_WITH_A_GPU = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu",
    reason="from JAX 0.11 on, partitioned calls lower for a GPU only where there is one",
)


def for_a_gpu():
    """A context in which kernels lower for an NVIDIA GPU, which this machine need not have."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def running(backend: str):
    """A context in which `backend` runs on a CPU: Pallas kernels are interpreted."""
    return fdk_jax.interpret_pallas() if backend == "pallas" else contextlib.nullcontext()

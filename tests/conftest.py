"""Strict JAX for every test: 8 virtual CPU devices, no implicit dtype or rank promotion."""

import os
import shutil
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def _strict_jax():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh random inputs on every run; the seed is printed when a test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"seed={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def writable(tmp_path):
    """A function that copies a folder, read-only or not, to where a test may change it."""

    def make(source: Path) -> Path:
        target = tmp_path / source.name
        target.mkdir()
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
        return target

    return make

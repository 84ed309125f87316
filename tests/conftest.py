"""Strict JAX for every test: 8 virtual CPU devices, no implicit dtype or rank promotion."""

import collections
import os
import shutil
import time
import zlib
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


# Of a test with more cases than these, others are marked slow: `make test` runs it for this many.
QUICK_CASES = 3
# `make fuzz` sets both: seeds that differ from run to run, and when no more tests should start.
RANDOM_SEEDS = bool(os.environ.get("FDK_RANDOM_SEEDS"))
DEADLINE = time.monotonic() + float(os.environ.get("FDK_FUZZ_SECONDS", "inf"))


def pytest_collection_modifyitems(items) -> None:
    """Marks tests by what they need, and all but some cases of those with many as slow."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.path.name.startswith("test_gpu"):
            item.add_marker(pytest.mark.gpu)
        if item.path.name == "test_arm.py" or "adbd" in item.fixturenames:
            item.add_marker(pytest.mark.arm)
        if hasattr(item.module, "ptx_machine"):
            item.add_marker(pytest.mark.emulated)
        cases[item.path, getattr(item, "originalname", item.name)].append(item)
    for alike in cases.values():
        # In an order of chance, but always the same one: neighbours share most of their parameters.
        alike.sort(key=lambda item: zlib.crc32(item.name.encode()))
        for item in alike[QUICK_CASES:]:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup() -> None:
    """Skips what would start after the time for random input is over."""
    if time.monotonic() > DEADLINE:
        pytest.skip("FDK_FUZZ_SECONDS are over")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random inputs, the same in every run unless FDK_RANDOM_SEEDS is set; a failure prints the seed."""
    seed = zlib.crc32(request.node.name.encode())
    if RANDOM_SEEDS:
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

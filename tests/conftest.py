"""Strict JAX for every test: 8 virtual CPU devices, no implicit dtype or rank promotion."""

import collections
import os
import random
import shutil
import subprocess
import zlib
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Most programs of the tests run once: to make them faster costs XLA's compiler more than it saves. On a GPU
# they are compiled as users' are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(not shutil.which("nvidia-smi"))))

import children
import fuzzing
import jax
import numpy as np
import pytest

from fdk_jax.product import cpu_backend


@pytest.fixture(scope="session", autouse=True)
def _strict_jax():
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module():
    """Compiled programs go with the module whose tests they are of: all of them together take 7 MB a test."""
    yield
    jax.clear_caches()


@pytest.fixture
def start():
    """`subprocess.Popen` of processes that end with the test, whatever happens in it."""
    with children.children() as start:
        yield start


# Of a test with more cases than these, others are marked slow: `make test` runs it for this many.
QUICK_CASES = 3
# `make fuzz` sets it: seeds that differ from run to run.
RANDOM_SEEDS = bool(os.environ.get("FDK_RANDOM_SEEDS"))


# Tests that take more seconds of the processor than this, by name: `make test` leaves them out.
LONG = Path(__file__).with_name("long.txt")
LONG_SECONDS = 2.5


def pytest_addoption(parser) -> None:
    """Adds `--write-long`, which brings the list of long tests up to date, and `--part`: a share of them."""
    parser.addoption("--write-long", action="store_true", help=f"rewrite tests/{LONG.name}")
    parser.addoption("--part", help="K/N: only the K-th of N parts of the tests, from 0 on")


def pytest_collection_modifyitems(config, items) -> None:
    """Marks tests by what they need, and all but some cases of those with many as slow; picks a part."""
    cases = collections.defaultdict(list)
    long = set(_long_tests())
    for item in items:
        if "gpu" in item.path.stem.split("_"):
            item.add_marker(pytest.mark.gpu)
        if item.nodeid.removeprefix("tests/") in long or "toolchain" in item.fixturenames:
            item.add_marker(pytest.mark.long)
        if hasattr(item.module, "emulator"):
            item.add_marker(pytest.mark.emulated)
        cases[item.path, getattr(item, "originalname", item.name)].append(item)
    for alike in cases.values():
        # In an order of chance, but always the same one: neighbours share most of their parameters.
        alike.sort(key=lambda item: zlib.crc32(item.name.encode()))
        for item in alike[QUICK_CASES:]:
            if item.get_closest_marker("whole") is None:
                item.add_marker(pytest.mark.slow)
    # Other tests first in every run, as the time may be over before all have begun.
    if RANDOM_SEEDS:
        random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).shuffle(items)
    if part := config.getoption("--part"):
        number, count = map(int, part.split("/"))
        if not 0 <= number < count:
            raise pytest.UsageError(f"--part={part}: K must be from 0 to N - 1")
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == number]


def pytest_collection_finish() -> None:
    """The time for random input does not include what came before the first test."""
    fuzzing.begin()


def pytest_runtest_setup() -> None:
    """Skips what would start after the time for random input is over."""
    if fuzzing.over():
        pytest.skip("FDK_FUZZ_SECONDS are over")


def _long_tests() -> dict[str, float]:
    lines = LONG.read_text(encoding="utf-8").splitlines() if LONG.exists() else []
    return {name: float(seconds) for seconds, name in (line.split(" ", 1) for line in lines)}


def _processor_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Takes the time of a test, its child processes included."""
    start = _processor_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor_s", _processor_seconds() - start))


class _Times:
    """Collects the times of tests, from all workers, and writes those of the long ones."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def pytest_runtest_logreport(self, report) -> None:
        seconds = dict(report.user_properties).get("processor_s")
        if report.when == "teardown" and seconds is not None:
            self.found[report.nodeid.removeprefix("tests/")] = seconds

    def pytest_sessionfinish(self) -> None:
        known = {name: s for name, s in _long_tests().items() if name not in self.found}
        known |= {name: s for name, s in self.found.items() if s > LONG_SECONDS}
        LONG.write_text("".join(f"{s:.0f} {name}\n" for name, s in sorted(known.items())), "utf-8")


def pytest_configure(config) -> None:
    """Registers the list's writer, in the process that hears of all tests."""
    if config.getoption("--write-long") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Times())


@pytest.fixture(scope="session")
def toolchain():
    """A function that installs what a test of another machine's programs needs, or skips it: minutes, once."""
    script = Path(__file__).parent.parent / "cpu/toolchain/install.sh"

    def install(part: str) -> None:
        found = subprocess.run([script, part], capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"no toolchain: {found.stderr.strip().splitlines()[-1]}")

    return install


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


@pytest.fixture(params=["avx512vnni", "avx2", "neon", "scalar"])
def isa(request):
    """Each ISA of the C++ library that has loops of its own, one after the other."""
    module = cpu_backend.library()
    if request.param not in module.isas():
        pytest.skip(f"this machine lacks {request.param}")
    module.set_isa(request.param)
    yield request.param
    module.set_isa(None)

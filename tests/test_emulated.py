"""The AVX-512 and AMX kernels on any x86 processor: their instructions replaced by plain loops."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parent.parent / "cpu"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program() -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulated ISAs are those of x86-64")
    if importlib.util.find_spec("simde_py") is None:
        pytest.skip("the package simde-py, which emulates AVX-512, is not installed")
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    run = subprocess.run(
        ["ninja", "-C", CPU, "emulated"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return CPU / "build" / "emulated" / "fdk_test"


def test_the_kernels_of_every_isa(program):
    """The tests of the library, a share of their products: amx is the ISA in use, all others follow."""
    run = subprocess.run([program, "--share", "0.05"], capture_output=True, text=True, timeout=900)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ISA amx" in run.stdout

"""The C++ library, its benchmark and its tests for macOS and Windows: they build, and hold the kernels.

Nothing here runs what was built: there is no such machine. What is looked for are the instructions of each
ISA and the question to the operating system whether the processor has them.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parent.parent / "cpu"
pytestmark = pytest.mark.slow
# Target: the format, instructions of its ISAs, what asks for them.
TARGETS = {
    "aarch64-macos": ("Mach-O", ("sdot", "smmla", "bfmmla"), "hw.optional.arm.FEAT_I8MM"),
    "aarch64-windows": ("PE32+", ("sdot", "smmla", "bfmmla"), "IsProcessorFeaturePresent"),
    "x86_64-windows": ("PE32+", ("vpdpbusd", "vpdpwssd", "vfmadd231ps", "tdpbf16ps"), "GetProcess"),
}
_MAGIC = {"Mach-O": b"\xcf\xfa\xed\xfe", "PE32+": b"MZ"}


@pytest.fixture(scope="module")
def built() -> Path:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("the package ziglang, which compiles for other systems, is not installed")
    if shutil.which("ninja") is None or shutil.which("llvm-objdump-19") is None:
        pytest.skip("needs ninja and llvm-objdump-19: cpu/toolchain/install.sh arm64")
    run = subprocess.run(
        ["ninja", "-C", CPU, "-f", "zig.ninja"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return CPU / "build" / "zig"


@pytest.mark.parametrize("target", TARGETS)
def test_the_programs_hold_every_isa(built, target):
    kind, instructions, question = TARGETS[target]
    suffix = ".exe" if kind == "PE32+" else ""
    for name in ("fdk_test", "fdk_bench"):
        program = built / target / f"{name}{suffix}"
        content = program.read_bytes()
        assert content.startswith(_MAGIC[kind])
        assert question.encode() in content
    listing = subprocess.run(
        ["llvm-objdump-19", "-d", "--no-show-raw-insn", program], capture_output=True, text=True
    ).stdout
    missing = [name for name in instructions if f"{name}" not in listing]
    assert not missing

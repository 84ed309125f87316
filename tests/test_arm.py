"""The C++ library on ARM, by emulation: old, middle and new cores, and the Python module."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parent.parent / "cpu"
CACHE = Path(
    os.environ.get("FDK_TOOLCHAIN_DIR")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdk_jax"
)
SYSROOT = CPU / "build" / "sysroot-arm64"
# Core: the best ISA that it has.
CORES = {
    "cortex-a53": "neon",
    "cortex-a72": "neon",
    "cortex-a76": "dotprod",
    "neoverse-n1": "dotprod",
    "a64fx": "neon",
    "max,sve=off": "bf16",
    "max,sve128=on,sve-default-vector-length=16": "sve2",
    "max,sve256=on,sve-default-vector-length=32": "sve2",
    "max,sve512=on,sve-default-vector-length=64": "sve2",
}
ISAS = ("sve2", "bf16", "i8mm", "dotprod", "neon", "scalar")


def _ninja(file: str) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    found = subprocess.run(
        ["flock", CACHE / "ninja.lock", "ninja", "-C", CPU, "-f", file],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:]


@pytest.fixture(scope="session")
def programs(toolchain) -> Path:
    if sys.platform != "linux":
        pytest.skip("the emulator runs on Linux")
    toolchain("arm64")
    _ninja("../android/static.ninja")
    return CPU / "build" / "android-static"


def _emulate(core: str, *command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["qemu-aarch64-static", "-cpu", core, *map(str, command)],
        capture_output=True, text=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("core", CORES)
def test_every_kernel_on(programs, core):
    """All kernels of the ISAs that the core has; an instruction it lacks would end the program."""
    found = _emulate(core, programs / "fdk_test", "--share", "0.004")
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert " 0 failures" in found.stdout


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a76", "max"])
def test_isa_is_the_best_or_the_one_forced(programs, core):
    arguments = "--m 1 --k 64 --n 16 --bits 4 --rounds 2 --round_ms 1 --rotate_mib 1 --threads 1"
    best = CORES.get(core, "sve2")
    available = ISAS[ISAS.index(best) :]
    for forced in ("", *ISAS):
        found = _emulate(core, programs / "fdk_bench", *arguments.split(), FDK_CPU_ISA=forced)
        assert found.returncode == 0, (forced, found.stderr[-500:])
        isa = re.search(r"ISA (\w+)", found.stdout)
        assert isa is not None
        assert isa[1] == (forced if forced in available else best)


def test_new_instructions_stay_in_their_isa(programs):
    """What a translation unit for new cores shares with others, the linker could give to old ones."""
    for name in ISAS[:-1]:
        found = subprocess.run(
            ["llvm-nm-19", "--defined-only", "-C", CPU / f"build/arm64/{name}.o"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        shared = [line for line in found.stdout.splitlines() if re.search(r" [WVu] ", line)]
        assert not shared, shared


@pytest.mark.slow
def test_modelled_speed_is_no_worse(toolchain):
    """The committed table of modelled cycles per weight still holds, within a tenth."""
    toolchain("model")
    found = subprocess.run(
        [sys.executable, CPU / "model/arm.py"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def _arm64_packages() -> Path:
    """Wheels of this Python's packages for arm64, unpacked; the versions are those installed."""
    names = {n: version(n) for n in ("jax", "jaxlib", "numpy", "ml_dtypes", "scipy", "opt_einsum")}
    key = "-".join(f"{n}{v}" for n, v in names.items() if n in ("jax", "jaxlib", "numpy"))
    final = CACHE / f"arm64-python-{key}"
    if final.exists():
        return final
    partial = CACHE / f"arm64-python-{os.getpid()}"
    wheels = partial / "wheels"
    found = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version", "3.11", "--platform", "manylinux_2_27_aarch64",
         "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux2014_aarch64",
         "--platform", "manylinux_2_17_aarch64", "-d", wheels,
         *(f"{n}=={v}" for n, v in names.items())],
        capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        pytest.skip(f"no arm64 wheels: {found.stderr.strip().splitlines()[-1]}")
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(partial / "site")
    (partial / "site").rename(final)
    return final


# The library's own Python files without the rest of the package, which would need arm64 builds of
# all its dependencies.
PRODUCT = """
import jax, jax.numpy as jnp, numpy as np
from fdk_jax.product import cpu_backend
from fdk_jax.format import packing
assert cpu_backend.unavailable_reason() is None, cpu_backend.unavailable_reason()
rng = np.random.default_rng()
k, n, group_size = 96, 40, 32
codes = rng.integers(0, 16, (n, k), np.uint8)
scales = rng.uniform(0.5, 2.0, (n, k // group_size)).astype(np.float32)
codebook = np.sort(rng.standard_normal(16)).astype(np.float32)
x = rng.standard_normal((3, k)).astype(np.float32)
shape = dict(bits=4, group_size=group_size, out_features=n)
tiled = packing.to_tiled(packing.pack(codes, 4), jnp.asarray(scales), in_features=k, **shape)
product = jax.jit(lambda x, p, s: cpu_backend.matmul(x, p, s, codebook, uniform=False, **shape))
y = np.asarray(product(jnp.asarray(x), *tiled))
weight = codebook[codes].astype(np.float64) * np.repeat(scales, group_size, axis=1)
expected = x.astype(np.float64) @ weight.T
error = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
print(cpu_backend.describe(), error)
assert error < 1e-5, error
"""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the sysroot's Python is 3.11")
@pytest.mark.slow
def test_python_module_under_arm64_python(programs, tmp_path):
    """The extension module and its FFI handler in jit, under an emulated arm64 Python."""
    _ninja("arm64.ninja")
    packages = _arm64_packages()
    package = tmp_path / "fdk_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("product/cpu_backend.py", "format/host_arrays.py", "format/packing.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).symlink_to(CPU.parent / "fdk_jax" / name)
    module = "_cpu.cpython-311-aarch64-linux-gnu.so"
    (package / module).symlink_to(CPU / "build/arm64" / module)
    found = subprocess.run(
        ["qemu-aarch64-static", "-L", SYSROOT, "-cpu", "max,sve=off",
         "-E", "LD_LIBRARY_PATH=/usr/lib/llvm-19/lib", "-E", f"PYTHONPATH={packages}:{tmp_path}",
         "-E", "PYTHONHOME=/usr", SYSROOT / "usr/bin/python3.11", "-S", "-c", PRODUCT],
        capture_output=True, text=True, timeout=500, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert "bf16" in found.stdout

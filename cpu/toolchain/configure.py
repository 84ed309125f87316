"""Writes build/host/: what the ninja file needs to know of this machine.

    cxx          the compiler: $CXX, else the first of clang++ and g++ that compiles C++20
    ISA.rsp      its options for each instruction set, none on another processor
    zig/         the same for zig.ninja, by processor
    emulated/    the same where AVX-512 and AMX are SIMDe's plain loops
    openmp.rsp   -fopenmp, or nothing when the compiler lacks it (then std::thread is used)
    user.rsp     $CXXFLAGS; link.rsp: $LDFLAGS
    python.rsp   include folders of Python, pybind11 and XLA's FFI headers
    module       file name of the Python module, or "none: " and the reason

usage: configure.py FOLDER
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

COMPILERS = ("clang++", *(f"clang++-{version}" for version in range(22, 16, -1)), "g++", "c++")
X86_ISAS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni"
    " -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
X86_ISAS["avx512bf16"] = X86_ISAS["avx512vnni"] + " -mavx512bf16"
X86_ISAS["amx"] = X86_ISAS["avx512bf16"] + " -mamx-tile -mamx-int8 -mamx-bf16"
ARM_ISAS = {
    "neon": "-march=armv8-a",
    "dotprod": "-march=armv8.2-a+dotprod",
    "i8mm": "-march=armv8.2-a+dotprod+i8mm",
    "bf16": "-march=armv8.2-a+dotprod+i8mm+bf16",
    "sve2": "-march=armv8.2-a+dotprod+i8mm+bf16+sve2",
}
# For zig's clang, which takes features after the name of a processor. No SVE2 outside Linux.
ZIG_ARM_ISAS = {
    "neon": "",
    "dotprod": "-mcpu=generic+dotprod",
    "i8mm": "-mcpu=generic+dotprod+i8mm",
    "bf16": "-mcpu=generic+dotprod+i8mm+bf16",
    "sve2": "",
}
# GCC's own AVX-512 header reads a variable before it is set (GCC bug 105593).
GCC_AVX512 = " -Wno-uninitialized -Wno-maybe-uninitialized"
# SIMDe passes the emulated vectors in memory.
EMULATED = "-DFDK_EMULATED -isystem tests/emulated -mavx2 -mfma -mf16c -Wno-psabi"
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"
CXX20 = "#include <span>\nint main() { return static_cast<int>(std::span<int>().size()); }\n"


def compiles(compiler: str, program: str, *options: str) -> bool:
    """Whether the compiler turns the program into an executable."""
    command = [*compiler.split(), "-std=c++20", *options, "-x", "c++", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def find_compiler() -> tuple[str, str]:
    """The compiler and its OpenMP option; one that has OpenMP is preferred."""
    wanted = os.environ.get("CXX")
    present = [wanted] if wanted else [name for name in COMPILERS if shutil.which(name)]
    for name in present:
        if compiles(name, OPENMP, "-fopenmp"):
            return name, "-fopenmp"
    for name in present:
        if compiles(name, CXX20):
            return name, ""
    if wanted:
        sys.exit(f"CXX={wanted} does not compile and link C++20")
    sys.exit("no C++20 compiler found: install g++ (Debian: apt install g++) or set CXX")


def folder_of(package: str) -> Path | None:
    """The folder of a package, without the time that importing it takes."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def python_module() -> tuple[str, str]:
    """Include options for the Python module, and its file name."""
    pybind11, jaxlib = folder_of("pybind11"), folder_of("jaxlib")
    if pybind11 is None or jaxlib is None:
        missing = " and ".join(n for n in ("pybind11", "jaxlib") if folder_of(n) is None)
        return "", f"none: {sys.executable} has no {missing}"
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        return "", f"none: {python} has no Python.h (Debian: apt install python3-dev)"
    folders = (python, pybind11 / "include", jaxlib / "include")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    options = [f"-isystem {folder}" for folder in folders]
    if sys.platform == "darwin":  # Python's own symbols are found when it loads the module
        options.append("-undefined dynamic_lookup")
    return " ".join(options), f"_cpu{suffix}"


def write(path: Path, text: str) -> None:
    """Writes a line unless it is there already, so that ninja sees only real changes."""
    text += "\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)


def main() -> None:
    """Writes the files into the folder that the command line names."""
    folder = Path(sys.argv[1])
    compiler, openmp = find_compiler()
    version = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True
    ).stdout
    includes, module = python_module()
    x86 = platform.machine() in ("x86_64", "AMD64")
    arm = platform.machine() in ("aarch64", "arm64")
    write(folder / "cxx", compiler)
    write(folder / "openmp.rsp", openmp)
    write(folder / "user.rsp", os.environ.get("CXXFLAGS", ""))
    write(folder / "link.rsp", os.environ.get("LDFLAGS", ""))
    write(folder / "python.rsp", includes)
    write(folder / "module", module)
    for name in (*X86_ISAS, *ARM_ISAS):
        write(folder / "zig" / "x86" / f"{name}.rsp", X86_ISAS.get(name, ""))
        write(folder / "zig" / "arm" / f"{name}.rsp", ZIG_ARM_ISAS.get(name, ""))
    simde = folder_of("simde_py")
    emulated = EMULATED if simde is None else f"{EMULATED} -isystem {simde / 'simde'}"
    for isas, wanted in ((X86_ISAS, x86), (ARM_ISAS, arm)):
        for name, options in isas.items():
            wide = name.startswith(("avx512", "amx"))
            extra = GCC_AVX512 if wide and "clang" not in version else ""
            write(folder / f"{name}.rsp", options + extra if wanted else "")
            write(
                folder / "emulated" / f"{name}.rsp",
                (emulated if wide else options) + extra if wanted else "",
            )


if __name__ == "__main__":
    main()

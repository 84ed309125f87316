"""Build backend of the project: setuptools, with the C++ library compiled into the wheel.

Where a C++20 compiler is there, `pip install .` runs ninja on cpu/build.ninja and adds the extension
module to the package `fdk_jax`; the wheel then carries this platform's tag. Where none is there, the
wheel is pure Python, the build log says so, and `backend="cpu"` reports that the library is missing.
Set FDK_BUILD_CPU=0 for a wheel without the library, FDK_BUILD_CPU=1 to fail when it cannot be built.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import build_meta, dist
from setuptools.build_meta import (  # noqa: F401 (hooks that pip calls on this module)
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.egg_info import manifest_maker

_CPU = Path(__file__).resolve().parent
_PACKAGE = _CPU.parent / "fdk_jax"
_COMPILERS = ("clang++", *(f"clang++-{n}" for n in range(22, 16, -1)), "g++", "c++")
# jaxlib for its XLA FFI headers: the oldest supported ones, because a newer runtime accepts what is
# built with them and the reverse is not promised.
_REQUIRES = [
    "ninja>=1.11",
    "pybind11>=2.13",
    "jaxlib==0.10.2; python_version < '3.15'",
    "jaxlib>=0.10.2; python_version >= '3.15'",
]


def _wanted() -> str:
    return os.environ.get("FDK_BUILD_CPU", "auto")


def _has_compiler() -> bool:
    wanted = os.environ.get("CXX")
    return bool(wanted) or any(shutil.which(name) for name in _COMPILERS)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Setuptools' requirements, and the library's where it can be compiled."""
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires + (_REQUIRES if _wanted() != "0" and _has_compiler() else [])


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """A wheel with the extension module inside, where it can be compiled."""
    with _extension_in_package():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """An editable install, which finds the module in cpu/build/python/."""
    _compile()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None) -> str:
    """A source distribution that holds the C++ sources, which setuptools does not know of."""
    add_defaults = manifest_maker.add_defaults

    def add_sources(self) -> None:
        add_defaults(self)
        for folder in ("bench", "bindings", "include", "src", "tests", "toolchain"):
            self.filelist.graft(f"cpu/{folder}")
        for pattern in ("cpu/*.py", "cpu/*.ninja"):
            self.filelist.include(pattern)
        self.filelist.global_exclude("*.py[cod]")

    manifest_maker.add_defaults = add_sources
    try:
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        manifest_maker.add_defaults = add_defaults


def _say(text: str) -> None:
    print(f"\nfdk-jax: {text}\n", file=sys.stderr, flush=True)


def _compile() -> Path | None:
    """Builds the extension module and returns its path, None where that is not possible."""
    if _wanted() == "0":
        _say("FDK_BUILD_CPU=0: without the C++ library")
        return None
    reason = _run_ninja() if _has_compiler() else "no C++ compiler was found"
    if reason is None:
        name = (_CPU / "build" / "host" / "module").read_text().strip()
        if not name.startswith("none: "):
            return _CPU / "build" / "python" / name
        reason = name.removeprefix("none: ")
    message = (
        f'the C++ library is not built: {reason}. backend="cpu" will not be available; install g++ (or'
        " clang++) and reinstall fdk-jax to get it."
    )
    if _wanted() == "1":
        raise SystemExit(f"FDK_BUILD_CPU=1, but {message}")
    _say(message)
    return None


def _run_ninja() -> str | None:
    """Runs ninja; the reason when it fails. Another Python's module links anew from the same objects."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    ninja = shutil.which("ninja", path=os.pathsep.join(folders))
    if ninja is None:
        return "ninja was not found"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([ninja, "-C", str(_CPU), "build/_cpu.so"], env=environment)
    return f"ninja failed with status {done.returncode}" if done.returncode else None


@contextmanager
def _extension_in_package() -> Iterator[None]:
    """While the wheel is made, the module lies in the package and the wheel counts as binary."""
    module = _compile()
    if module is None:
        yield
        return
    target = _PACKAGE / module.name
    is_binary = dist.Distribution.has_ext_modules
    with tempfile.NamedTemporaryFile(dir=_PACKAGE, delete=False) as partial:
        partial.write(module.read_bytes())
    os.chmod(partial.name, 0o755)
    os.replace(partial.name, target)
    dist.Distribution.has_ext_modules = lambda self: True
    try:
        yield
    finally:
        dist.Distribution.has_ext_modules = is_binary
        target.unlink()

"""What a row says of the machine, the software and the source."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from fdk_jax.benchmark import source
from fdk_jax.product import cpu_backend
from pallas_kernels import target

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_DISTRIBUTIONS = (
    "jax",
    "jaxlib",
    "numpy",
    "flax",
    "fdk-jax",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)


def device_for(backend: str) -> jax.Device:
    """The device that a backend runs on.

    Raises:
        NotImplementedError: this machine has none.
    """
    if backend == "cpu":
        return jax.devices("cpu")[0]
    device = jax.devices()[0]
    if backend == "pallas" and device.platform != "gpu":
        raise NotImplementedError(f"the pallas backend needs a GPU, JAX runs on {device.platform}")
    return device


def devices_for(backend: str, count: int) -> list[jax.Device]:
    """The devices that share a model, the backend's own one first.

    Raises:
        NotImplementedError: this machine has fewer.
    """
    first = device_for(backend)
    devices = jax.devices(first.platform)
    if len(devices) < count:
        raise NotImplementedError(
            f"needs {count} devices, JAX has {len(devices)} of platform {first.platform}"
        )
    return devices[:count]


def device_name(device: jax.Device) -> str:
    """A GPU's name as its driver gives it, with the target that kernels are written for if that is another one
    ("NVIDIA H200 as sm_89"); a CPU's model name.
    """
    return _cpu_name() if device.platform == "cpu" else target.current().kind


@functools.cache
def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for key in ("model name", "Hardware", "Model", "CPU part"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            name = found[1].strip()
            return f"{platform.machine()} part {name}" if key == "CPU part" else name
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=16)
def driver(platform_name: str) -> str | None:
    """Version of the GPU's driver; None for other devices or when nothing tells."""
    if platform_name != "gpu":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if version := _output(command):
        return version.splitlines()[0].strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


@functools.cache
def versions() -> dict[str, str]:
    """Python, each installed distribution that a measurement may depend on, the compiler of the C++ library."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if cpu_backend.unavailable_reason() is None:
        found["compiler"] = cpu_backend.compiler()
    return found


def threads(device: jax.Device) -> int | None:
    """Processors that this process may use; None for a GPU, where they do no arithmetic."""
    if device.platform != "cpu":
        return None
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


@functools.lru_cache(maxsize=16)
def cache_bytes(device: jax.Device) -> int:
    """Size of the last-level cache; a generous guess where it cannot be read."""
    if device.platform != "cpu":
        return 64 << 20  # 50 MB of L2 on an H100 or H200, more than on earlier GPUs.
    sizes = []
    for path in _CACHES.glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=32 << 20)


@functools.lru_cache(maxsize=16)
def memory_bytes(device: jax.Device) -> int | None:
    """Memory that programs may use, where the device or the system tells."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def working_set_bytes(device: jax.Device) -> int:
    """Bytes of weights that caches cannot hold, bounded to what a small machine can spare."""
    if device.platform != "cpu":
        return max(200 << 20, 4 * cache_bytes(device))
    spare = max(256 << 20, (memory_bytes(device) or 0) // 16)
    return min(max(64 << 20, 3 * cache_bytes(device)), spare)


def probe_bytes(device: jax.Device) -> int:
    """Size of the array that the bandwidth probes pass over."""
    return (1 << 30) if device.platform != "cpu" else working_set_bytes(device)


def describe(device: jax.Device) -> dict[str, Any]:
    """The keys of a row that say where it was measured, and with what."""
    digest, commit = source.identity()
    return {
        "device": device_name(device),
        "driver": driver(device.platform),
        "threads": threads(device),
        "versions": versions(),
        "digest": digest,
        "commit": commit,
    }


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None

"""Which GPU a kernel is written for: what it has and what it may be asked for.

The tables know NVIDIA's architectures from compute capability 8.0 to 12.1. Every kernel says for a target
whether it runs there. To see what another GPU would get, or to run the kernels of an older architecture on a
newer GPU:

    FDK_JAX_TARGET=sm_80 python ...          the architecture, with its shared memory
    FDK_JAX_TARGET=sm_89:multiprocessors=58,shared_bytes=101376 python ...
    FDK_JAX_TRITON=0 python ...              as if Pallas had no Triton lowering, see `triton_compat`

Kernels whose thread blocks wait for each other across the grid (`chain`) need every one of them resident at
once. Where another process may hold a part of the GPU (MPS, MIG) that is not certain, and separate launches are
used; FDK_JAX_GRID_BARRIERS=0 turns such kernels off everywhere.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

# Bytes of shared memory that a thread block may have, by compute capability: CUDA C++ Programming Guide,
# technical specifications per compute capability, "maximum amount of shared memory per thread block".
_KIB = 1024
SHARED_BYTES = {
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 7): 163 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (10, 3): 227 * _KIB,
    (11, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
    (12, 1): 99 * _KIB,
}
_OLDEST = min(SHARED_BYTES)
_PTX_ISA_8_0 = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0))
# Multiprocessors of a GPU of each architecture, where none is at hand to ask.
_MULTIPROCESSORS = {
    **{(8, 0): 108, (8, 6): 82, (8, 7): 16, (8, 9): 128, (9, 0): 132},
    **{(10, 0): 148, (10, 3): 148, (11, 0): 20, (12, 0): 170, (12, 1): 48},
}
_MPS = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_CLIENT_PRIORITY")
_MPS_PIPE = Path("/tmp/nvidia-mps/control")  # where its daemon listens by default
_BARRIERS = "FDK_JAX_GRID_BARRIERS"
_PRETEND = "FDK_JAX_TARGET"
_TRITON = "FDK_JAX_TRITON"


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU that kernels are written for.

    Attributes:
        capability: compute capability, e.g. (9, 0); None for a GPU that is not NVIDIA's.
        multiprocessors: how many it has.
        shared_bytes: shared memory that a thread block may have.
        kind: as JAX names the device, e.g. "NVIDIA H200": rows of the tuned table measured on it come first.
        no_grid_barriers: why thread blocks may not wait for each other across the grid; empty if they may.
        triton: whether Pallas lowers kernels through Triton.
    """

    capability: tuple[int, int] | None
    multiprocessors: int
    shared_bytes: int
    kind: str
    no_grid_barriers: str = ""
    triton: bool = True

    @staticmethod
    def of(device: Any) -> "Target":
        """The target that a JAX device is.

        Args:
            device: a GPU of `jax.devices()`, or of a topology.
        """
        found = str(getattr(device, "compute_capability", ""))
        capability = None
        if re.fullmatch(r"\d+\.\d+", found):
            major, minor = found.split(".")
            capability = int(major), int(minor)
        return Target(
            capability,
            int(getattr(device, "core_count", 1)),
            int(getattr(device, "shared_memory_per_block_optin", 48 * _KIB)),
            device.device_kind,
            _no_grid_barriers(device.device_kind),
            _has_triton(),
        )

    @staticmethod
    def parse(text: str, base: "Target | None" = None) -> "Target":
        """The target that a text such as "sm_89" or "sm_80:multiprocessors=58" names.

        Args:
            text: an architecture, then fields with their values.
            base: what stands for fields that are not named; shared memory is the architecture's.

        Raises:
            ValueError: a text of another form, or an architecture that is not in the tables.
        """
        match = re.fullmatch(r"sm_(\d+)(\d)a?(?::(.+))?", text)
        capability = (int(match[1]), int(match[2])) if match else None
        if match is None or capability not in SHARED_BYTES:
            known = ", ".join(f"sm_{major}{minor}" for major, minor in SHARED_BYTES)
            raise ValueError(f"{_PRETEND}={text!r} names no known target: use one of {known}")
        fields: dict[str, Any] = {}
        for part in (match[3] or "").split(",") if match[3] else ():
            name, _, value = part.partition("=")
            if name not in ("multiprocessors", "shared_bytes") or not value.isdecimal():
                raise ValueError(
                    f"{_PRETEND}={text!r}: {part!r} is neither multiprocessors=COUNT nor"
                    " shared_bytes=BYTES"
                )
            fields[name] = int(value)
        base = base or Target(None, _MULTIPROCESSORS[capability], 0, "")
        same = base.capability == capability
        name = text.partition(":")[0]
        named = f"{base.kind} as {name}" if base.kind else name
        return dataclasses.replace(
            base,
            **{
                "capability": capability,
                "shared_bytes": SHARED_BYTES[capability],
                "kind": base.kind if same else named,
                **fields,
            },
        )

    @property
    def architecture(self) -> str:
        """As NVIDIA's tools name it, e.g. "sm_90"; "another vendor's" otherwise."""
        if self.capability is None:
            return "another vendor's"
        return "sm_{}{}".format(*self.capability)

    @property
    def unknown(self) -> str:
        """Why kernels in PTX do not run here; empty if they do."""
        if self.capability is None:
            return f"{self.kind} is no NVIDIA GPU"
        if self.capability < _OLDEST:
            return f"{self.kind} is {self.architecture}, older than sm_80"
        if self.capability not in SHARED_BYTES:
            return f"{self.kind} is {self.architecture}, which these kernels do not know"
        return ""

    @property
    def no_pallas(self) -> str:
        """Why kernels in ordinary Pallas operations do not run here, which Triton lowers; empty if they do."""
        if self.capability is None or self.capability < _OLDEST:
            return self.unknown
        return "" if self.triton else "Pallas has no Triton lowering"

    @property
    def has_pallas(self) -> bool:
        """Whether kernels in ordinary Pallas operations run here: an NVIDIA GPU from sm_80 on, by Triton."""
        return not self.no_pallas

    @property
    def has_kernels(self) -> bool:
        """Whether any kernels run here."""
        return not self.unknown or self.has_pallas

    @property
    def has_wgmma(self) -> bool:
        """Whether there is `wgmma`: on sm_90 alone."""
        return self.capability == (9, 0)

    @property
    def has_clusters(self) -> bool:
        """Whether thread blocks form clusters that read each other's shared memory."""
        return not self.unknown and self.capability is not None and self.capability >= (9, 0)

    @property
    def has_bulk_copies(self) -> bool:
        """Whether there are `cp.async.bulk` and the barriers in shared memory that count its bytes."""
        return self.has_clusters

    @property
    def has_dependent_launches(self) -> bool:
        """Whether there is `griddepcontrol`: a launch that may begin before the one before it ends."""
        return self.has_clusters

    @property
    def has_bfloat16_arithmetic(self) -> bool:
        """Whether bfloat16 has `mul` and `sub`; `fma` it has everywhere."""
        return self.has_clusters

    def lacks_shared_memory(self, config: object, needed: int) -> str | None:
        """Why a thread block of a launch configuration cannot have so many bytes, or None."""
        if needed <= self.shared_bytes:
            return None
        return (
            f"{config} needs {needed} bytes of shared memory, {self.architecture} gives a thread block"
            f" {self.shared_bytes}"
        )

    def ptx_target(self, *, wgmma: bool) -> str:
        """The `.target` of a whole kernel: the newest that PTX ISA 8.0 knows; newer GPUs compile it anew.

        Args:
            wgmma: whether the kernel has instructions of sm_90a.
        """
        if wgmma or self.has_wgmma:
            return "sm_90a"
        own = self.capability or _OLDEST
        return "sm_{}{}".format(*max(known for known in _PTX_ISA_8_0 if known <= own))

    def __str__(self) -> str:
        return (
            f"{self.kind} ({self.architecture}, {self.multiprocessors} multiprocessors,"
            f" {self.shared_bytes // _KIB} KiB of shared memory a thread block)"
        )


# What kernels are written for where there is no GPU: programs are lowered, not run.
H200 = Target((9, 0), 132, SHARED_BYTES[9, 0], "NVIDIA H200")

_used: list[Target] = []  # by `using`


def current() -> Target:
    """The target that kernels are written for: of `using`, else the GPUs at hand, else an H200."""
    return _used[-1] if _used else _at_hand()


@contextlib.contextmanager
def using(target: Target) -> Iterator[Target]:
    """Kernels are written for this target inside the context, whatever GPU there is.

    JAX's caches are cleared at both ends, as programs in them are another target's. Not for several threads.
    """
    jax.clear_caches()
    _used.append(target)
    try:
        yield target
    finally:
        _used.pop()
        jax.clear_caches()


@functools.cache
def _at_hand() -> Target:
    gpus = [d for d in jax.devices() if d.platform in ("gpu", "cuda", "rocm")]
    if gpus:
        found = common([Target.of(device) for device in gpus])
    else:
        found = dataclasses.replace(
            H200, no_grid_barriers="no GPU is at hand", triton=_has_triton()
        )
    if text := os.environ.get(_PRETEND):
        found = Target.parse(text, found)
    if found.unknown:
        instead = "plain, slower kernels run" if found.has_kernels else "XLA runs, without kernels"
        warnings.warn(f"{found.unknown}: {instead}", stacklevel=2)
    return found


def common(targets: Sequence[Target]) -> Target:
    """What all of a machine's GPUs have: one program may run on each of them."""
    first = targets[0]
    capabilities = {target.capability for target in targets}
    capability = None if None in capabilities else min(c for c in capabilities if c)
    if len(capabilities) > 1 and capability == (9, 0):
        capability = (8, 9)  # what is Hopper's alone does not run on the others
    return dataclasses.replace(
        first,
        capability=capability,
        multiprocessors=min(target.multiprocessors for target in targets),
        shared_bytes=min(target.shared_bytes for target in targets),
        no_grid_barriers=next((t.no_grid_barriers for t in targets if t.no_grid_barriers), ""),
    )


def _has_triton() -> bool:
    """Whether Pallas lowers through Triton: JAX has that, and it is not switched off."""
    switch = os.environ.get(_TRITON, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{_TRITON}={switch!r} must be 0 or 1")
    try:
        return switch == "1" and importlib.util.find_spec("jax._src.pallas.triton") is not None
    except ValueError:  # taken out of `sys.modules`
        return False


def _no_grid_barriers(kind: str) -> str:
    """Why thread blocks of one grid may not all be resident on a device; empty if they are."""
    switch = os.environ.get(_BARRIERS, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{_BARRIERS}={switch!r} must be 0 or 1")
    if switch == "0":
        return f"{_BARRIERS}=0"
    if "MIG" in kind:
        return f"{kind} is a part of a GPU"
    for name in _MPS:
        if name in os.environ:
            return f"{name} is set: other processes may hold a part of the GPU"
    if _MPS_PIPE.exists():
        return f"{_MPS_PIPE} exists: other processes may hold a part of the GPU"
    return ""

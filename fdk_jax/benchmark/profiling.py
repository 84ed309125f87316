"""One case under JAX's profiler."""

import collections
from pathlib import Path

import jax

from fdk_jax.benchmark import kernels
from fdk_jax.benchmark.cases import KernelCase

_LOOPS = 2
_MAX_COPIES = 16


def profile(case: KernelCase, folder: Path, copies: int | None = None) -> str:
    """Runs the loop of a case once, warm, under the profiler.

    Args:
        case: what to run.
        folder: where the trace goes; TensorBoard and xprof read it.
        copies: copies of the weight in the loop.

    Returns:
        A summary: calls and mean time of each thing that ran on the device.
    """
    work = kernels.prepare(case)
    with jax.default_device(work.device):
        copies = copies or min(kernels.copies_for(work), _MAX_COPIES)
        run = kernels.build(work, copies, _LOOPS)
        run()
        with jax.profiler.trace(str(folder)):
            run()
    return summary(folder)


def summary(folder: Path) -> str:
    """Calls, total and mean microseconds of each event on the devices of the newest trace in a folder."""
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not traces:
        return f"no trace in {folder}"
    times: dict[str, list[float]] = collections.defaultdict(list)
    data = jax.profiler.ProfileData.from_file(str(traces[-1]))
    planes = [p for p in data.planes if p.name.startswith("/device:")]
    for plane in planes or [p for p in data.planes if p.name.startswith("/host:CPU")]:
        for line in plane.lines:
            # The lines of a device: streams hold kernels, the others sums of them; a host's threads
            # hold both XLA's work and Python's frames.
            if planes and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if planes or not event.name.startswith("$"):
                    times[event.name].append(event.duration_ns / 1e3)
    rows = sorted(times.items(), key=lambda item: -sum(item[1]))[:20]
    lines = [f"{'calls':>7}  {'total us':>10}  {'mean us':>9}  event"]
    for name, values in rows:
        total = sum(values)
        lines.append(f"{len(values):7d}  {total:10.1f}  {total / len(values):9.2f}  {name[:100]}")
    return "\n".join(lines)

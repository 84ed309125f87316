"""Assembles every kernel for every architecture with NVIDIA's `ptxas`, which needs no GPU.

    python tests/assemble.py                            all architectures, by every ptxas that there is
    python tests/assemble.py --architectures sm_80,sm_120 --quick
    python tests/assemble.py --candidates 48            what the search tries for 48 tokens, tuned or not
    python tests/assemble.py --part 0/2                 every second pair of assembler and architecture

prints for each family of kernels and architecture how many there are, their registers, their spilled bytes and
their shared memory, and fails if one does not assemble, spills, or has more shared memory than the architecture
gives. The assemblers are those of the packages nvidia-cuda-nvcc-cu12 and nvidia-cuda-nvcc, and the one on PATH.
"""

import argparse
import collections
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # from the project's root
    sys.path.insert(0, str(Path(__file__).parent.parent))

import golden
import jax.numpy as jnp

from pallas_kernels import (
    chain,
    choice,
    dequantise,
    layers,
    peer_sum,
    ring,
    ring_arithmetic,
    short_attention,
    split_attention,
    stream,
    tuning,
    xla_call,
)
from pallas_kernels.ptx import shared_bytes
from pallas_kernels.target import H200, Target

ARCHITECTURES = (
    *("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a"),
    *("sm_100", "sm_103", "sm_110", "sm_120", "sm_121"),
)
# Bytes that kernels spill: chains of 4 bits by 24 warps of 72 registers; layers, whose attention has as many
# warps as the products; products whose warps have just the registers that they need; sums of 16384 values over
# eight devices. Groups below 64, whose scales multiply weights, take registers too: `wgmma` at 1 bit and 32
# tokens (220 bytes), `matvec` at 2 bits and 16 (28); copies by lanes on sm_100 and
# sm_103 (4; 8 with a sum).
SPILLS = {
    "chain": 24,
    "integer+sum": 16,
    "integer by lanes": 4,
    "integer by lanes+sum": 8,
    "peer sum": 44,
    "wgmma": 220,
    "matvec": 28,
    "mma": 48,
    "stream": 8,
    "layers": 192,
}
_TOKENS = (1, 4, 16, 32, 64, 128, 256)
_ROW = 4096  # a group that is a row


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for one architecture.

    Attributes:
        family: "matvec", "chain", ...
        name: what it computes.
        entry: the whole kernel's PTX.
        shared_bytes: its dynamic shared memory.
    """

    family: str
    name: str
    entry: str
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `ptxas` says of a kernel; `error` is its message if it does not assemble."""

    kernel: Kernel
    registers: int = 0
    spilled: int = 0
    error: str = ""


def assemblers() -> dict[str, Path]:
    """The assemblers that there are, by their version, the oldest first."""
    folders = [Path(p) / "nvidia" / part for p in sys.path for part in ("cuda_nvcc", "cu13")]
    found = [folder / "bin" / "ptxas" for folder in folders]
    if (path := shutil.which("ptxas")) is not None:
        found.append(Path(path))
    versions = {}
    for file in found:
        if file.is_file():
            text = subprocess.run([file, "--version"], capture_output=True, text=True).stdout
            if version := re.search(r"V(\d+\.\d+\.\d+)", text):
                versions.setdefault(version[1], file)
    return dict(sorted(versions.items(), key=lambda item: [int(n) for n in item[0].split(".")]))


def target_of(architecture: str) -> Target:
    """The target whose kernels are assembled for an architecture; sm_90's are those without `wgmma`."""
    return H200 if architecture.startswith("sm_90") else Target.parse(architecture)


def kernels(
    architecture: str, quick: bool = False, candidates: int | None = None
) -> Iterator[Kernel]:
    """The different kernels that products and models take on an architecture.

    Args:
        architecture: one of `ARCHITECTURES`.
        quick: only one kernel of each family, decoder and number of tokens.
        candidates: instead, all that the search tries for so many tokens.
    """
    target, seen = target_of(architecture), set()
    sources = _sources(target, quick) if candidates is None else _candidates(target, candidates)
    for family, name, source, warps in sources:
        if source in seen or ("wgmma." in source and architecture == "sm_90"):
            continue
        seen.add(source)
        operands = max(int(number) for number in re.findall(r"\$(\d+)", source))
        entry = xla_call.entry(
            source, f"k{len(seen)}", target, operands=operands, threads=32 * warps
        )
        if architecture == "sm_90":
            entry = entry.replace(".target sm_90a", ".target sm_90")
        yield Kernel(family, name, entry, shared_bytes(source))


def _sources(target: Target, quick: bool) -> Iterator[tuple[str, str, str, int]]:
    """Families, names, PTX and warps of kernels."""
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float16")
    for bits, uniform in golden.DECODERS:
        for dtype in dtypes:
            half = jnp.dtype(dtype)
            case = golden.case(512, 4096, 4096, bits, uniform, dtype=dtype)
            yield "dequantise", f"{bits} {uniform=}", dequantise.source(case, target), 8
            groups = (64,) if quick else (64, 32, 128, 16, _ROW)
            for m, group_size in ((m, g) for m in _TOKENS for g in groups if g < _ROW or m < 16):
                case = golden.case(m, 4096, 4096, bits, uniform, dtype=dtype, group_size=group_size)
                plain = group_size == 64 and dtype == "bfloat16"
                yield from _products(case, target, quick or not plain)
            config = ring.Config(16, target.multiprocessors)
            case = golden.case(1, 4096, 4096, bits, uniform, dtype=half)
            reason = ring.unsupported_reason(case, config, target, stream.Product)
            if bits > 1 and reason is None:
                source = ring.source(case, config, target, stream.Product)
                yield "stream", f"{bits} {uniform=}", source, config.warps
        yield from _chains(bits, uniform, target, quick)
    yield from _peer_sums(target)
    for dim in (128,) if quick else (64, 128, 256):
        for eps in (None, 1e-6):
            for dtype in dtypes:
                case = short_attention.Case(16, 4, dim, 512, jnp.dtype(dtype), eps)
                source = short_attention.source(case, target)
                yield "attention", f"{dim} {eps}", source, short_attention._WARPS
                for window, splits in ((None, 8), (1000, 1)):
                    case = split_attention.Case(16, 4, dim, 4096, jnp.dtype(dtype), eps, window)
                    if case.unsupported_reason(target) is None:
                        source = split_attention.source(case, splits, target)
                        name = f"{dim} {eps} {window=} {splits=}"
                        yield "split attention", name, source, split_attention.WARPS


def _name(case) -> str:
    return f"{case.bits} m={case.m} groups of {case.group_size} {case.x_dtype}"


def _products(case, target, quick) -> Iterator[tuple[str, str, str, int]]:
    """The kernel that a product takes, else with all of the table's rows for it, also with a residual."""
    plan = choice.choose(case, target)
    found = [(plan.kernel, plan.config)] if plan.kernel in choice.KERNELS else []
    for row in choice.nearest_rows(case, target) if not quick else ():
        if row["kernel"] in choice.KERNELS:
            config = choice.fit(case, choice.configuration(row, target), target)
            found.append((row["kernel"], config))
    if target.has_bulk_copies:  # what a row may ask for
        rings = [row for row in found if isinstance(row[1], ring.Config)]
        found += [(name, dataclasses.replace(c, lane_copies=True)) for name, c in rings]
    for kernel, config in found:
        if choice.unsupported_reason(case, config, target) is not None:
            continue
        module, name = choice.KERNELS[kernel], f"{_name(case)} {config}"
        family = kernel + " by lanes" * getattr(config, "lane_copies", False)
        yield family, name, module.source(case, config, target), config.warps
        around = dataclasses.replace(case, squares=96, norm_eps=1e-5, residual=True)
        fits = case.m == 1 and config.cluster == 1 and case.x_dtype == jnp.bfloat16
        if fits and choice.unsupported_reason(around, config, target) is None:
            yield f"{family}+sum", name, module.source(around, config, target), config.warps


def _candidates(target: Target, m: int) -> Iterator[tuple[str, str, str, int]]:
    """What the search tries for so many tokens, whether it is in the table or not."""
    for bits, uniform in golden.DECODERS:
        case = golden.case(m, 4096, 4096, bits, uniform)
        for kernel, config in tuning.candidates(case, target):
            if kernel not in choice.KERNELS or choice.unsupported_reason(case, config, target):
                continue
            source = choice.KERNELS[kernel].source(case, config, target)
            yield kernel, f"{bits} {uniform=} {config}", source, config.warps


def _chains(bits, uniform, target, quick) -> Iterator[tuple[str, str, str, int]]:
    for hidden, inner, qkv in ((4096, 14336, 6144), (3072, 8192, 5120))[: 1 if quick else 2]:
        shapes = [(hidden, hidden), (2 * inner, hidden), (hidden, inner), (qkv, hidden)]
        products = [golden.case(1, n, k, bits, uniform) for n, k in shapes]
        config = ring_arithmetic.config(products, target, chain.GATED)
        if chain.unsupported_reason(products, config, target) is None:
            cases = chain.cases(products, (1e-5, 1e-5), config, target)
            source = chain.source(cases, config, target)
            yield "chain", f"{bits} {uniform=} {hidden}", source, config.warps
        for norms in () if bits > 1 else (False,) if quick else (False, True):
            plan = golden.plan_of_layers(hidden, inner, qkv, norms, target)
            if layers.unsupported_reason(plan) is None:
                yield "layers", str(hidden), layers.source(plan), plan.config.warps
        # Half of each matrix on each of two devices.
        shapes = [(hidden, hidden // 2), (inner, hidden), (hidden, inner // 2), (qkv // 2, hidden)]
        products = [golden.case(1, n, k, bits, uniform) for n, k in shapes]
        if chain.unsupported_reason(products, config, target) is None:
            cases = chain.cases(products, (1e-5, 1e-5), config, target, 2)
            source = chain.source(cases, config, target)
            yield "chain", f"{bits} {uniform=} {hidden} over 2", source, config.warps


def _peer_sums(target: Target) -> Iterator[tuple[str, str, str, int]]:
    for devices, rows, features, dtype in (
        *((2, 1, 4096, "bfloat16"), (2, 64, 4096, "float32"), (4, 1, 8192, "float16")),
        *((8, 1, 8192, "bfloat16"), (8, 1, 16384, "bfloat16")),
    ):
        kind = jnp.dtype(dtype)
        for normed in (True, False):
            case = peer_sum.PeerSum(devices, rows, features, kind, kind, normed, 1e-5 * normed)
            name = f"{devices} {features} {dtype} {normed=}"
            yield "peer sum", name, peer_sum.source(case, target), case.threads // 32


def assemble(ptxas: Path, architecture: str, found: list[Kernel]) -> list[Report]:
    """Assembles kernels, all in one module, or one by one if that fails."""
    header = found[0].entry[: found[0].entry.index(".visible")]
    heads = {kernel.entry[: kernel.entry.index(".visible")] for kernel in found}
    if len(heads) == 1:
        text = header + "\n".join(k.entry[k.entry.index(".visible") :] for k in found)
        done = _run(ptxas, architecture, text)
        if done.returncode == 0:
            by_name = _resources(done.stderr)
            return [Report(k, *by_name[re.search(r"\.entry (\w+)", k.entry)[1]]) for k in found]
    reports = []
    for kernel in found:
        done = _run(ptxas, architecture, kernel.entry)
        if done.returncode:
            reports.append(Report(kernel, error=done.stderr.strip().splitlines()[0]))
        else:
            [resources] = _resources(done.stderr).values()
            reports.append(Report(kernel, *resources))
    return reports


def _run(ptxas: Path, architecture: str, text: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.ptx"
        file.write_text(text, encoding="utf-8")
        command = [ptxas, "-v", f"-arch={architecture}", file, "-o", Path(folder) / "kernels.cubin"]
        return subprocess.run(command, capture_output=True, text=True)


def _resources(text: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes spilled) by the kernels' names."""
    found = {}
    for part in text.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)[1]
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)]
        found[name] = int(re.search(r"Used (\d+) registers", part)[1]), max(spilled, default=0)
    return found


def knows(ptxas: Path, architecture: str) -> bool:
    """Whether an assembler knows an architecture."""
    return architecture in subprocess.run([ptxas, "--help"], capture_output=True, text=True).stdout


def faults(report: Report, limit: int) -> list[str]:
    """What is wrong with a kernel on an architecture that gives a thread block `limit` bytes."""
    kernel, found = report.kernel, []
    if report.error:
        found.append(report.error)
    if report.spilled > SPILLS.get(kernel.family, 0):
        found.append(f"spills {report.spilled} bytes")
    if kernel.shared_bytes > limit:
        found.append(f"{kernel.shared_bytes} bytes of shared memory are more than {limit}")
    return [f"{kernel.family} {kernel.name}: {fault}" for fault in found]


def check(
    ptxas: Path, architecture: str, quick: bool, candidates: int | None = None
) -> tuple[list[str], list[str]]:
    """Lines of the table of an architecture, and what is wrong; see `kernels`."""
    found = list(kernels(architecture, quick, candidates))
    limit = target_of(architecture).shared_bytes
    families, wrong = collections.defaultdict(list), []
    for report in assemble(ptxas, architecture, found):
        families[report.kernel.family].append(report)
        wrong += [f"{architecture} {fault}" for fault in faults(report, limit)]
    lines = []
    for family, reports in families.items():
        registers = [r.registers for r in reports]
        shared = max(r.kernel.shared_bytes for r in reports)
        lines.append(
            f"{architecture:8} {family:20} {len(reports):4} kernels  registers {min(registers):3} to"
            f" {max(registers):3}  spilled {max(r.spilled for r in reports):3}  shared {shared:6}"
            f" of {limit}"
        )
    return lines, wrong


def main() -> int:
    """The command line; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--quick", action="store_true", help="one kernel of each kind")
    parser.add_argument(
        "--candidates", type=int, metavar="M", help="what the search tries for M tokens"
    )
    parser.add_argument("--part", default="0/1", help="K/N: the K-th of N parts, from 0 on")
    flags, failed = parser.parse_args(), []
    number, count = map(int, flags.part.split("/"))
    if not 0 <= number < count:
        parser.error(f"--part {flags.part}: K must be from 0 to N - 1")
    found = assemblers()
    if not found:
        print("no ptxas: pip install nvidia-cuda-nvcc-cu12 nvidia-cuda-nvcc")
        return 1
    pairs = itertools.product(enumerate(found), enumerate(flags.architectures.split(",")))
    # In turn, so that of two parts each has every architecture, by one of two assemblers.
    jobs = [(ptxas, name) for (i, ptxas), (j, name) in pairs if (i + j) % count == number]

    def look(job: tuple[str, str]) -> tuple[list[str], list[str]]:
        ptxas, architecture = found[job[0]], job[1]
        if not knows(ptxas, architecture):
            return [f"{architecture:8} is not known to it"], []
        return check(ptxas, architecture, flags.quick, flags.candidates)

    # Nearly all of the time is the assemblers', which are processes of their own.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (version, _), (lines, wrong) in zip(jobs, pool.map(look, jobs), strict=True):
            print(*(f"ptxas {version} {line}" for line in lines), *wrong, sep="\n", flush=True)
            failed += wrong
    print(f"{len(failed)} faults" if failed else "everything assembles")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

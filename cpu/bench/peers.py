"""Times the library beside other CPU kernels for low-bit weights, call by call in one process.

usage: peers.py [--k 4096,8192] [--m 1,128] [--threads 1] [--bits 8,4,2,1,16] [--rounds 15]
                [--output FILE.jsonl]

    python -m venv peers && peers/bin/pip install numpy torch onnx onnxruntime llama-cpp-python
    ninja -C cpu && peers/bin/python cpu/bench/peers.py --threads 2

Peers are optional: PyTorch (dense bfloat16 and int4), ONNX Runtime (MatMulNBits), ggml (as built by
llama-cpp-python). Those that are not installed become rows with status "skipped". For each number of
bits the cases take turns, this library's among them; at 16 bits those are dense products beside this
library's at 4 and 8 bits. Ratios compare neighbours in time. Weights rotate through copies of three
times the last-level cache. All memory is in pages of one size (4 KiB), which Linux would otherwise
choose by allocator.
"""

import argparse
import ctypes
import functools
import gc
import importlib.util
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

# A thread of one OpenMP runtime must not spin (200 ms by default) while another library is timed.
os.environ.setdefault("KMP_BLOCKTIME", "10")
_SETTLE_SECONDS = 0.03

import clock  # noqa: E402
import ggml_case  # noqa: E402
from peer_cases import (  # noqa: E402
    GROUP,
    LIBRARY,
    Product,
    fdk_case,
    onnxruntime_case,
    torch_case,
)

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "torch", "onnxruntime", "llama-cpp-python")
_SAMPLE_SECONDS = 0.01
_PR_SET_THP_DISABLE = 41


def _load_records() -> ModuleType:
    """fdk_jax/benchmark/records.py by itself: the environment of the peers lacks JAX."""
    spec = importlib.util.spec_from_file_location("records", ROOT / "fdk_jax/benchmark/records.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


records = _load_records()


def processor() -> str:
    """The name that Linux gives the processor; elsewhere Python's."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def copies(size: int) -> int:
    """Weights of `size` bytes that no cache holds, all together."""
    largest = 85 << 20
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()
        largest = max(largest, int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return 3 * largest // size + 2


def cases_of(bits: int):
    """(backend, name, bits, maker) of what is timed in turns."""
    ours = [
        ("cpu", f"codebook_{a}", b, fdk_case(b, a, copies))
        for b in ((bits,) if bits < 16 else (4, 8))
        for a in ("int8", "exact")
    ]
    torch = {4: ["int4"], 16: ["dense"]}.get(bits, [])
    levels = {8: [4], 4: [4, 1], 2: [4]}.get(bits, [])
    return [
        *ours,
        *(("torch", name, bits, torch_case(name, copies)) for name in torch),
        *(("onnxruntime", f"MatMulNBits_level{level}", bits, onnxruntime_case(bits, level, copies))
          for level in levels),
        *(("ggml", name, bits, ggml_case.ggml_case(name, copies))
          for name, (_, width) in ggml_case.TYPES.items() if width == bits),
    ]  # fmt: skip


def sample(product: Product, counter: list[int]) -> float:
    """Mean microseconds of as many calls as fill the time, after one that wakes the threads.

    On one processor no thread of another library spins, and a long call needs none before it.
    """
    if len(os.sched_getaffinity(0)) > 1:
        time.sleep(_SETTLE_SECONDS)
    start = clock.now()
    product.call(counter[0])
    if (passed := clock.now() - start) > 5 * _SAMPLE_SECONDS:
        counter[0] += 1
        return passed * 1e6
    calls, start = 0, clock.now()
    while (passed := clock.now() - start) < _SAMPLE_SECONDS or calls == 0:
        counter[0] += 1
        product.call(counter[0])
        calls += 1
    return passed / calls * 1e6


def source_digest() -> str:
    """The digest of this source; its module runs without JAX, which the environment of the peers lacks."""
    command = [sys.executable, str(ROOT / "fdk_jax/benchmark/source.py"), "--digest"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def use_small_pages() -> None:
    """Pages of 4 KiB for everybody from now on, where the system has a choice."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def shared_fields() -> dict:
    """What all rows of a run share."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    library = ctypes.CDLL(str(LIBRARY))
    library.fdk_isa.restype = ctypes.c_char_p

    return {
        "suite": "kernels",
        "device": processor(),
        "versions": versions,
        "digest": source_digest(),
        "isa": library.fdk_isa().decode(),
    }


def measure(
    cases: list, m: int, shape: tuple[int, int], threads: int, rounds: int, shared: dict
) -> list[dict]:
    """Rows of one shape (k, n) for the cases (see `cases_of`), which take turns."""
    k, n = shape
    rows, running = [], []
    for backend, name, width, make in cases:
        row = shared | {"backend": backend, "name": name, "bits": width, "m": m, "k": k, "n": n}
        row["kernel"] = None
        row |= {"threads": threads, "ops": 2 * m * k * n, "group_size": GROUP}
        if backend == "ggml" or width == 16:
            row["group_size"] = None  # of the type; none
        rows.append(row)
        try:
            product = make(m, k, n, threads)
            product.call(0)
        except Exception as error:  # of a peer, whose errors are its own
            if backend == "cpu":
                raise
            row |= {
                "status": "skipped",
                "reason": f"{type(error).__name__}: {error}".splitlines()[0],
            }
            continue
        row |= {"bytes_rw": product.bytes_rw, "kernel": product.kernel}
        row["rel_rms_error"] = product.error
        running.append((row, product, []))
    counter, order = [0], random.Random(0)
    for round_number in range(rounds + 1):
        # In another order each time: what a case leaves (caches, page tables) meets all of them.
        for _, product, samples in order.sample(running, len(running)):
            value = (product.sample or functools.partial(sample, product))(counter)
            if round_number:
                samples.append(value)
    for row, _, samples in running:
        row |= records.statistics(samples)
    return [records.make_row(row) for row in rows]


def show(rows: list[dict]) -> None:
    """A line a row: its time, and over that of ours with int8 and with exact arithmetic."""
    ours = {(r["bits"], r["name"]): r["samples_us"] for r in rows if r["backend"] == "cpu"}
    first = rows[0]
    print(
        f"\nm={first['m']} {first['k']}x{first['n']} threads={first['threads']} {first['device']}"
    )
    print(f"{'':44} {'us':>9}  over our int8  over our exact")
    for row in rows:
        label = f"{row['backend']:12} {row['name']:19} {row['bits']:3} bits {row['kernel'] or '':8}"
        if row["status"] != "ok":
            print(f"{label} skipped: {row['reason'][:90]}")
            continue
        bits = row["bits"] if row["bits"] < 16 else min(ours, key=lambda key: abs(key[0] - 4))[0]
        ratios = [
            statistics.median(
                p / o for p, o in zip(row["samples_us"], ours[bits, f"codebook_{a}"], strict=True)
            )
            for a in ("int8", "exact")
        ]
        print(f"{label} {row['median_us']:10.1f}  {ratios[0]:13.2f}  {ratios[1]:14.2f}")


def main() -> None:
    """Measures and prints; see the module's docstring."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=numbers, default=[4096])
    parser.add_argument("--m", type=numbers, default=[1])
    parser.add_argument("--bits", type=numbers, default=[8, 4, 2, 1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    use_small_pages()
    shared = shared_fields()
    for k in args.k:
        for m in args.m:
            for bits in args.bits:
                rows = measure(cases_of(bits), m, (k, k), args.threads, args.rounds, shared)
                show(rows)
                ggml_case.stop()
                gc.collect()
                if args.output:
                    records.append(args.output, rows)


if __name__ == "__main__":
    main()

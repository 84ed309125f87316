"""Times the library beside other CPU kernels from one token to many, and draws the figure.

usage: sweep.py [--m 1,2,...] [--shapes 4096,8192,14336x4096] [--bits 4] [--peers REGEX] [--threads 2]
                [--isa ISA] [--rounds 10] [--seconds LIMIT] [--rotate_mib MIB] [--processor_time]
                [--output FILE.jsonl] [--figure FILE.svg]
       sweep.py --from FILE.jsonl --figure FILE.svg [--isa ISA]    draws rows that are there

For each shape (k x n) and number of tokens the cases take turns as in peers.py: this library (`exact`,
`int8`) at each of the bits, dense bfloat16 of PyTorch and ggml, and the kernels of PyTorch, ONNX Runtime
and ggml for as many bits. --peers keeps those whose "backend name" the expression finds ("torch dense"
alone is quick). A peer that cannot run is a row with status "skipped" and the reason. --isa: this
library's instruction set, and the newest that PyTorch may use. --seconds: no measurement starts after
that time; the first ones are the first shape's. Pin it to as many processors as --threads
(`taskset -c 0,1`). The figure shows the time a token; it needs matplotlib.
"""

import argparse
import functools
import gc
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import clock
import ggml_case
from peer_cases import fdk_case, onnxruntime_case, torch_case
from peers import copies, measure, records, shared_fields, show, use_small_pages

TOKENS = (*range(1, 41), 64, 128, 256, 512)
GGML = {8: "q8_0", 4: "q4_0", 2: "q2_K", 1: "q1_0"}  # by bits
ONNXRUNTIME = (8, 4, 2)
# PyTorch's limits, by our ISA: of oneDNN and of its own kernels. Intel's processors with AVX-512 BF16 use our
# "avx512vnni" when AMX is off.
LIMITS = {
    "avx512bf16": ("AVX512_CORE_BF16", "avx512"),
    "avx512vnni": ("AVX512_CORE_BF16", "avx512"),
    "avx2": ("AVX2", "avx2"),
}


def cases(bits: list[int], peers: str, copies: Callable[[int], int]) -> list:
    """(backend, name, bits, maker) of what is timed in turns; each keeps its weights for all tokens."""
    found = [
        ("cpu", f"codebook_{a}", b, fdk_case(b, a, copies)) for b in bits for a in ("int8", "exact")
    ]
    others = [("torch", "dense", 16, torch_case("dense", copies))]
    if 4 in bits:
        others.append(("torch", "int4", 4, torch_case("int4", copies)))
    others += [
        ("onnxruntime", "MatMulNBits_level4", b, onnxruntime_case(b, 4, copies))
        for b in bits
        if b in ONNXRUNTIME
    ]
    others.append(("ggml", "bf16", 16, ggml_case.ggml_case("bf16", copies)))
    others += [("ggml", GGML[b], b, ggml_case.ggml_case(GGML[b], copies)) for b in bits]
    return found + [case for case in others if re.search(peers, f"{case[0]} {case[1]}")]


def rotate(mib: int, size: int) -> int:
    """How many weights of `size` bytes take `mib` MiB together, and two more."""
    return (mib << 20) // size + 2


def draw(rows: list[dict], path: Path) -> None:
    """Microseconds a token over tokens, a line a kernel.

    There is a row of panels for each number of bits and threads, a column for each shape. Of rows of the
    same case the newest is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["status"] == "ok"]
    columns = sorted({(row["k"] * row["n"], row["k"], row["n"]) for row in measured})
    ours = [row for row in measured if row["backend"] == "cpu"]
    lines = sorted({(row["bits"], row["threads"]) for row in ours}, key=lambda a: (-a[0], a[1]))
    figure, axes = pyplot.subplots(
        len(lines), len(columns), figsize=(6 * len(columns), 4.5 * len(lines)), squeeze=False
    )
    for line_of_axes, (bits, threads) in zip(axes, lines, strict=True):
        for axis, (_, k, n) in zip(line_of_axes, columns, strict=True):
            here = [
                row for row in measured
                if (row["threads"], row["k"], row["n"]) == (threads, k, n)
                and bits in row.get("beside", [4]) and row["bits"] in (bits, 16)
            ]  # fmt: skip
            axis.set_visible(bool(here))
            here.sort(key=lambda row: row["date"])
            for backend, name in dict.fromkeys((r["backend"], r["name"]) for r in here):
                newest = {r["m"]: r for r in here if (r["backend"], r["name"]) == (backend, name)}
                line = [newest[m] for m in sorted(newest)]
                axis.plot(
                    [row["m"] for row in line],
                    [row["median_us"] / row["m"] for row in line],
                    label=f"{backend} {name}, {line[0]['bits']} bits",
                    linewidth=2.2 if backend == "cpu" else 1.2,
                )
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a token")
            plural = "s" * (threads > 1)
            axis.set_title(f"{bits} bits, k x n = {k} x {n}, {threads} thread{plural}", fontsize=9)
            axis.grid(True, which="both", alpha=0.2)
            if here:
                axis.legend(fontsize=8)
    figure.suptitle(", ".join(sorted({row["device"] for row in measured})), fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


def shapes(text: str) -> list[tuple[int, int]]:
    """(k, n) of each of "4096,14336x4096"."""
    found = [[int(side) for side in part.split("x")] for part in text.split(",")]
    return [(sides[0], sides[-1]) for sides in found]


def main() -> None:
    """Measures and draws; see the module's docstring."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=numbers, default=list(TOKENS))
    parser.add_argument("--shapes", type=shapes, default=[(4096, 4096)])
    parser.add_argument("--bits", type=numbers, default=[4])
    parser.add_argument("--peers", default="", help="a regular expression of their names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=LIMITS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--rotate_mib", type=int, help="three times the last-level cache")
    parser.add_argument(
        "--processor_time",
        action="store_true",
        help="of one thread, on a machine that others use too",
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument(
        "--from", type=Path, dest="source", help="rows to draw instead of measuring"
    )
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor_time is for one thread: others wait on a processor's time")
    if args.source is not None:
        rows = [json.loads(line) for line in args.source.read_text().splitlines()]
        rows = [row for row in rows if row["suite"] == "sweep"]
        rows = [row for row in rows if row["isa"] == (args.isa or rows[0]["isa"])]
    else:
        rows = run(args)
    if args.figure:
        draw(rows, args.figure)


def run(args: argparse.Namespace) -> list[dict]:
    """The measured rows, which are printed and written as they come."""
    end = time.monotonic() + args.seconds
    use_small_pages()
    if args.isa is not None:
        os.environ["FDK_CPU_ISA"] = args.isa
        os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["ATEN_CPU_CAPABILITY"] = LIMITS[args.isa]
    if args.processor_time:
        clock.take_processor_time()
    rotated = copies if args.rotate_mib is None else functools.partial(rotate, args.rotate_mib)
    shared = shared_fields() | {"suite": "sweep", "clock": clock.name(), "beside": args.bits}
    rows = []
    for shape in args.shapes:
        chosen = cases(args.bits, args.peers, rotated)
        for m in args.m:
            if time.monotonic() > end:
                print(f"no time is left for m={m} at {shape[0]}x{shape[1]}")
                continue
            found = measure(chosen, m, shape, args.threads, args.rounds, shared)
            show(found)
            rows += found
            if args.output:
                records.append(args.output, found)
        del chosen  # its weights go before those of the next shape come
        ggml_case.stop()
        gc.collect()
    return rows


if __name__ == "__main__":
    main()

"""Times the library beside other CPU kernels from one token to many, and draws the figure.

usage: sweep.py [--m 1,2,...] [--k 4096] [--threads 2] [--rounds 10] [--rotate_mib MIB]
                [--processor_time] [--output FILE.jsonl] [--figure FILE.svg]
       sweep.py --from FILE.jsonl --figure FILE.svg    draws rows that are there

For each number of tokens the cases take turns as in peers.py: this library at 4 bits (`exact`, `int8`),
dense bfloat16 of PyTorch and ggml, and the 4-bit kernels of PyTorch, ONNX Runtime and ggml. A peer that
cannot run is a row with status "skipped" and the reason. The figure shows the time a token; it needs
matplotlib.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import clock
from ggml_case import ggml_case
from peer_cases import fdk_case, onnxruntime_case, torch_case
from peers import copies, facts, measure, show, use_small_pages

TOKENS = (*range(1, 41), 64, 128, 256, 512)


def cases(copies: Callable[[int], int]) -> list:
    """(backend, name, bits, maker) of what is timed in turns; each keeps its weights for all shapes."""
    return [
        ("cpu", "codebook_int8", 4, fdk_case(4, "int8", copies)),
        ("cpu", "codebook_exact", 4, fdk_case(4, "exact", copies)),
        ("torch", "dense", 16, torch_case("dense", copies)),
        ("torch", "int4", 4, torch_case("int4", copies)),
        ("onnxruntime", "MatMulNBits_level4", 4, onnxruntime_case(4, 4, copies)),
        ("ggml", "bf16", 16, ggml_case("bf16", copies)),
        ("ggml", "q4_0", 4, ggml_case("q4_0", copies)),
    ]


def rotate(mib: int, size: int) -> int:
    """How many weights of `size` bytes take `mib` MiB together, and two more."""
    return (mib << 20) // size + 2


def draw(rows: list[dict], path: Path) -> None:
    """Microseconds a token over tokens, a line a kernel; a panel for each shape and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row["status"] == "ok"]
    panels = sorted({(row["k"], row["threads"]) for row in measured})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False)
    for axis, (k, threads) in zip(axes[0], panels, strict=True):
        here = [row for row in measured if (row["k"], row["threads"]) == (k, threads)]
        for backend, name, bits in dict.fromkeys(
            (r["backend"], r["name"], r["bits"]) for r in here
        ):
            line = [r for r in here if (r["backend"], r["name"]) == (backend, name)]
            line.sort(key=lambda row: row["m"])
            axis.plot(
                [row["m"] for row in line],
                [row["median_us"] / row["m"] for row in line],
                label=f"{backend} {name}, {bits} bits",
                linewidth=2.2 if backend == "cpu" else 1.2,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a token")
        axis.set_title(f"k = n = {k}, {threads} threads, {here[0]['device']}", fontsize=9)
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measures and draws; see the module's docstring."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=numbers, default=list(TOKENS))
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
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
    if args.source is not None:
        rows = [json.loads(line) for line in args.source.read_text().splitlines()]
        rows = [row for row in rows if row["suite"] == "sweep"]
    else:
        use_small_pages()
        rotated = copies if args.rotate_mib is None else functools.partial(rotate, args.rotate_mib)
        if args.processor_time:
            if args.threads != 1:
                parser.error(
                    "--processor_time is for one thread: others wait on a processor's time"
                )
            clock.take_processor_time()
        shared = facts() | {"suite": "sweep", "clock": clock.name()}
        chosen, rows = cases(rotated), []
        for m in args.m:
            found = measure(chosen, m, args.k, args.threads, args.rounds, shared)
            show(found)
            rows += found
            if args.output:
                with args.output.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()

"""Times reading a prompt and decoding after it, beside llama.cpp, by the same weights from one GGUF file.

usage: prompt_peers.py [--shape 1B] [--type Q4_0|Q1_0|Q2_0] [--prompts 512,2048] [--steps 16] [--rounds 10]
                       [--cases exact,int8,llama.cpp] [--processor_time] [--site FOLDER]
                       [--output FILE.jsonl]

The file has the shape of Llama 3.2 1B or of Bonsai 1.7B and random codes. Each case is a process of its own
with all processors, and they take turns. A row is a case and a prompt: its samples are the time to the first
token, `decode_us` the time of a later one, `peak_bytes` the most memory that the process held, `base_bytes`
what it held before it loaded the model (Python, JAX), `read_gb_s` what reading memory alone reaches in the
same rounds, with all processors. When all samples are taken, each case of this package is
held against float32, as in the models suite; a row that is too far off has failed. --site: the packages of
the environment that llama-cpp-python was built in, if that is another one. --processor_time: what the
processes computed, for a machine that others use too; on one processor (`taskset -c 0`) nobody spins.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import clock
import llama_file
import numpy as np

from fdk_jax.models import ModelConfig, custom_llama

SHAPES = {
    "1B": custom_llama("1B"),
    "bonsai-1.7B": dataclasses.replace(
        custom_llama("1B"), vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
    ),
}  # fmt: skip
# Number, bits, weights and bytes of a block.
TYPES = {"Q4_0": (2, 4, 32, 18), "Q1_0": (41, 1, 128, 18), "Q2_0": (42, 2, 64, 18)}
CASES = {"exact": "cpu", "int8": "cpu", "llama.cpp": "llama.cpp"}  # their backends


def write_gguf(path: Path, config: ModelConfig, kind: str) -> None:
    """A model whose matrices repeat random blocks, which no speed depends on."""
    number, _, weights, size = TYPES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (1 << 16, size), np.uint8)
    blocks[:, :2] = np.full(1, 0.01, np.float16).view(np.uint8)
    llama_file.write(
        path,
        config,
        lambda rows, columns: (np.resize(blocks, (rows, columns // weights * size)), number),
    )


Run = Callable[[int, int], tuple[float, float]]  # tokens, steps -> seconds to the first, of a later
Check = Callable[[int], dict]  # tokens -> keys of a row


def memory(kind: str) -> int:
    """Bytes that this process holds ("VmRSS") or has held at most ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) << 10


def ours(path: Path, arithmetic: str) -> tuple[Run, Check, int]:
    """This package, its errors, and the memory before the model."""
    import jax

    from fdk_jax import models
    from fdk_jax.benchmark import model_errors
    from fdk_jax.product import cpu_backend

    if (reason := cpu_backend.unavailable_reason()) is not None:
        raise RuntimeError(reason)  # XLA would take over
    jax.devices()
    base = memory("VmRSS")
    model = models.load(path, backend="cpu", arithmetic=arithmetic)
    generator = models.Generator(model, backend="cpu")

    def run(tokens: int, steps: int) -> tuple[float, float]:
        if clock.is_processor():
            prompt, times = [list(range(1, tokens + 1))], [clock.now()]
            for new in (1, steps + 1):
                generator.generate(prompt, max_tokens=new)
                times.append(clock.now())
            first = times[1] - times[0]
            return first, (times[2] - times[1] - first) / steps
        found = generator.generate([list(range(1, tokens + 1))], max_tokens=steps + 1)
        return found.prefill_seconds, found.decode_seconds / found.decode_steps

    def check(tokens: int) -> dict:
        return model_errors.check(model, None, batch=1, prompt=tokens, arithmetic=arithmetic)

    return run, check, base


def llama_cpp(path: Path, context: int) -> tuple[Run, Check, int]:
    """llama.cpp as llama-cpp-python has it, no errors, and the memory before the model."""
    import llama_cpp

    base = memory("VmRSS")
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )  # fmt: skip

    def run(tokens: int, steps: int) -> tuple[float, float]:
        model.reset()
        begin = clock.now()
        model.eval(range(1, tokens + 1))
        first = clock.now()
        for i in range(steps):
            model.eval([i + 1])
        return first - begin, (clock.now() - first) / steps

    return run, lambda tokens: {}, base


def probe(pipe: Connection) -> None:
    """A process: GB/s of reading alone with all processors, for each message."""
    from fdk_jax.product import cpu_backend

    words = np.ones(1 << 28, np.int32)
    with contextlib.suppress(EOFError):  # the end of the other process
        while pipe.recv():
            begin = time.perf_counter()
            cpu_backend.library().reduce_sum(words)
            pipe.send(words.nbytes / (time.perf_counter() - begin) / 1e9)


def serve(pipe: Connection, name: str, path: Path, context: int) -> None:
    """A process: makes its case, then runs it once for each message; without steps it is checked."""
    try:
        run, check, base = llama_cpp(path, context) if name == "llama.cpp" else ours(path, name)
        pipe.send(base)
        while (wanted := pipe.recv()) is not None:
            tokens, steps = wanted
            pipe.send((*run(tokens, steps), memory("VmHWM")) if steps else check(tokens))
    except EOFError:  # the end of the other process
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def measure(args: argparse.Namespace, path: Path) -> list[dict]:
    """The rows of all cases."""
    from fdk_jax.benchmark import records

    size = path.stat().st_size
    context = multiprocessing.get_context("spawn")
    rows, running = [], []
    for name in args.cases:
        backend = CASES[name]
        pipe, other = context.Pipe()
        longest = max(args.prompts) + args.steps + 8
        process = context.Process(target=serve, args=(other, name, path, longest), daemon=True)
        process.start()
        other.close()
        try:
            loaded = pipe.recv()
        except EOFError:  # of an illegal instruction, say
            process.join()
            loaded = f"the process ended with exit code {process.exitcode}"
        print(f"{name}: {loaded if isinstance(loaded, str) else 'loaded'}", flush=True)
        for prompt in args.prompts:
            row = {
                "suite": "prompts", "name": f"{name}-{args.type}", "backend": backend, "m": prompt,
                "bits": TYPES[args.type][1], "type": args.type, "model": args.shape, "batch": 1,
                "prompt": prompt, "steps": args.steps, "bytes_rw": size, "arithmetic": name,
                "threads": len(os.sched_getaffinity(0)),
                "clock": clock.name(),
            }  # fmt: skip
            rows.append(row)
            if isinstance(loaded, str):
                row |= {"status": "skipped", "reason": loaded}
                continue
            row |= {"base_bytes": loaded}
            running.append((row, pipe, []))
    reader, other = context.Pipe()
    context.Process(target=probe, args=(other,), daemon=True).start()
    read = []
    for round_number in range(args.rounds + 1):
        reader.send(True)
        read.append(reader.recv())
        for case in list(running):
            row, pipe, samples = case
            try:
                pipe.send((row["prompt"], args.steps))
                found = pipe.recv()
            except (EOFError, OSError):
                found = f"the process ended after {len(samples)} samples"
            if isinstance(found, str):
                row |= {"status": "skipped", "reason": found}
                running.remove(case)
                continue
            if round_number:
                samples.append(found)
            print(row["name"], row["prompt"], found, flush=True)
    for row, pipe, samples in running:
        try:
            pipe.send((row["prompt"], 0))
            found = pipe.recv()
        except (EOFError, OSError):
            found = "the process ended before it was checked"
        first, later, peak = zip(*samples, strict=True)
        if min(later) <= 0:  # by processor time it is the difference of two generations
            found = "a later token took less than nothing: --steps are too few"
        row |= {"status": "failed", "reason": found} if isinstance(found, str) else found
        row |= records.statistics([s * 1e6 for s in first]) | {"peak_bytes": max(peak)}
        row |= {"decode_us": [round(s * 1e6, 1) for s in later]}
        row |= {"tokens_per_s": round(1 / float(np.median(later)), 2)}
        row |= {"read_gb_s": round(float(np.median(read[1:])), 2)}
    return rows


def main() -> None:
    """Measures and prints; see the module's docstring."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    parser.add_argument("--prompts", type=numbers, default=[512, 2048])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processor_time", action="store_true")
    parser.add_argument("--site", help="a folder of packages")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps} is not 1 or more")
    if args.processor_time:
        clock.take_processor_time()
    if args.site:
        sys.path.append(args.site)  # the processes get it, too
    import jax

    from fdk_jax.benchmark import environment, records

    here = environment.describe(jax.devices("cpu")[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, SHAPES[args.shape], args.type)
        rows = [records.make_row(here | row) for row in measure(args, path)]
    for row in rows:
        if row["status"] == "ok":
            held = (row["peak_bytes"] - row["base_bytes"]) / row["bytes_rw"]
            print(
                f"{row['name']:18} {row['prompt']:5} tokens: {row['median_us'] / 1e6:7.2f} s, then"
                f" {row['tokens_per_s']:6.1f} tokens/s, peak memory {held:.2f} files over the start"
            )
    if args.output:
        records.append(args.output, rows)


if __name__ == "__main__":
    main()

"""Times reading a prompt and decoding after it, beside llama.cpp, by the same weights from one GGUF file.

usage: prompt_peers.py [--shape 1B] [--type Q4_0|Q1_0] [--prompts 512,2048] [--steps 16] [--rounds 10]
                       [--processor_time] [--site FOLDER] [--output FILE.jsonl]

The file has the shape of Llama 3.2 1B or of Bonsai 1.7B and random codes. Each case is a process of its own
with all processors, and they take turns. A row is a case and a prompt: its samples are the time to the first
token, `decode_us` the time of a later one, `peak_bytes` the most memory that the process held. --site: the
packages of the environment that llama-cpp-python was built in, if that is another one. --processor_time: what
the processes computed, for a machine that others use too; on one processor (`taskset -c 0`) nobody spins.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fdk_jax.models import ModelConfig, custom_llama

SHAPES = {
    "1B": custom_llama("1B"),
    "bonsai-1.7B": dataclasses.replace(
        custom_llama("1B"), vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
    ),
}  # fmt: skip
TYPES = {"Q4_0": (2, 32, 18), "Q1_0": (41, 128, 18)}  # number, weights and bytes of a block
PROCESSOR_TIME = "FDK_BENCH_PROCESSOR_TIME"  # in the environment, which the processes inherit
CASES = (("cpu", "exact"), ("cpu", "int8"), ("llama.cpp", "llama.cpp"))


def write_gguf(path: Path, config: ModelConfig, kind: str) -> None:
    """A Llama model with tied embeddings whose matrices repeat random blocks, which no speed depends on."""
    import gguf

    number, weights, size = TYPES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (1 << 16, size), np.uint8)
    blocks[:, :2] = np.full(1, 0.01, np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: int, columns: int) -> None:
        data = np.resize(blocks, (rows, columns // weights * size))
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType(number))

    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrix("token_embd", config.vocab_size, config.hidden_size)
    writer.add_tensor("output_norm.weight", np.ones(config.hidden_size, np.float32))
    for layer in range(config.num_layers):
        base = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{base}.{norm}.weight", np.ones(config.hidden_size, np.float32))
        for name, rows in (("attn_q", heads), ("attn_k", kv), ("attn_v", kv)):
            matrix(f"{base}.{name}", rows, config.hidden_size)
        matrix(f"{base}.attn_output", config.hidden_size, heads)
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"{base}.{name}", config.intermediate_size, config.hidden_size)
        matrix(f"{base}.ffn_down", config.hidden_size, config.intermediate_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Run = Callable[[int, int], tuple[float, float]]  # tokens, steps -> seconds to the first, of a later


def ours(path: Path, arithmetic: str) -> Run:
    """This package."""
    from fdk_jax import models

    model = models.load(path, backend="cpu", arithmetic=arithmetic)
    generator = models.Generator(model, backend="cpu")

    def run(tokens: int, steps: int) -> tuple[float, float]:
        if PROCESSOR_TIME in os.environ:
            prompt, times = [list(range(1, tokens + 1))], [time.process_time()]
            for new in (1, steps + 1):
                generator.generate(prompt, max_tokens=new)
                times.append(time.process_time())
            first = times[1] - times[0]
            return first, (times[2] - times[1] - first) / steps
        found = generator.generate([list(range(1, tokens + 1))], max_tokens=steps + 1)
        return found.prefill_seconds, found.decode_seconds / found.decode_steps

    return run


def llama_cpp(path: Path, context: int) -> Run:
    """llama.cpp as llama-cpp-python has it."""
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    clock = time.process_time if PROCESSOR_TIME in os.environ else time.perf_counter
    model = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )  # fmt: skip

    def run(tokens: int, steps: int) -> tuple[float, float]:
        model.reset()
        begin = clock()
        model.eval(range(1, tokens + 1))
        first = clock()
        for i in range(steps):
            model.eval([i + 1])
        return first - begin, (clock() - first) / steps

    return run


def serve(pipe: Connection, name: str, path: Path, context: int) -> None:
    """A process: makes its case, then runs it once for each message."""
    try:
        run = llama_cpp(path, context) if name == "llama.cpp" else ours(path, name)
        pipe.send(None)
        while (wanted := pipe.recv()) is not None:
            seconds = run(*wanted)
            status = Path("/proc/self/status").read_text()
            peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
            pipe.send((*seconds, peak))
    except EOFError:  # the end of the other process
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def measure(args: argparse.Namespace, path: Path) -> list[dict]:
    """The rows of all cases."""
    from fdk_jax.benchmark import timing

    size = path.stat().st_size
    context = multiprocessing.get_context("spawn")
    rows, running = [], []
    for backend, name in CASES:
        pipe, other = context.Pipe()
        longest = max(args.prompts) + args.steps + 8
        context.Process(target=serve, args=(other, name, path, longest), daemon=True).start()
        reason = pipe.recv()
        print(f"{name}: {reason or 'loaded'}", flush=True)
        for prompt in args.prompts:
            row = {
                "suite": "prompts", "name": f"{name}-{args.type}", "backend": backend, "m": prompt,
                "bits": 4 if args.type == "Q4_0" else 1, "model": args.shape, "batch": 1,
                "prompt": prompt, "steps": args.steps, "bytes_rw": size, "arithmetic": name,
                "threads": len(os.sched_getaffinity(0)),
                "clock": "processor" if PROCESSOR_TIME in os.environ else "wall",
            }  # fmt: skip
            rows.append(row)
            if reason is not None:
                row |= {"status": "skipped", "reason": reason}
                continue
            running.append((row, pipe, []))
    for round_number in range(args.rounds + 1):
        for row, pipe, samples in running:
            pipe.send((row["prompt"], args.steps))
            found = pipe.recv()
            if isinstance(found, str):
                raise RuntimeError(found)
            if round_number:
                samples.append(found)
            print(row["name"], row["prompt"], found, flush=True)
    for row, _, samples in running:
        first, later, peak = zip(*samples, strict=True)
        row |= timing.statistics([s * 1e6 for s in first]) | {"peak_bytes": max(peak)}
        row |= {"decode_us": [round(s * 1e6, 1) for s in later]}
        row |= {"tokens_per_s": round(1 / float(np.median(later)), 2)}
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
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processor_time", action="store_true")
    parser.add_argument("--site", help="a folder of packages")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.processor_time:
        os.environ[PROCESSOR_TIME] = "1"
    if args.site:
        sys.path.append(args.site)  # the processes get it, too
    import jax

    from fdk_jax.benchmark import environment, records

    here = environment.facts(jax.devices("cpu")[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, SHAPES[args.shape], args.type)
        rows = [records.make_row(here | row) for row in measure(args, path)]
    for row in rows:
        if row["status"] == "ok":
            memory = row["peak_bytes"] / row["bytes_rw"]
            print(
                f"{row['name']:18} {row['prompt']:5} tokens: {row['median_us'] / 1e6:7.2f} s, then"
                f" {row['tokens_per_s']:6.1f} tokens/s, peak memory {memory:.2f} files"
            )
    if args.output:
        with records.Writer(args.output) as writer:
            for row in rows:
                writer.write(row)


if __name__ == "__main__":
    main()

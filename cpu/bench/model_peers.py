"""Times decoding with a whole model on a CPU beside other frameworks.

usage: model_peers.py [--rounds 7] [--steps 30] [--cases REGEX] [--pause] [--output FILE.jsonl]

The model has the shape of Llama 3.2 1B and random weights; a sample is the time of `steps` tokens, one
sequence, after a prompt of two. Each case is a process of its own and all of them are alive from the
start; they decode in turns, so the ratios compare neighbours in time. About 15 GB of memory.

Peers are optional; those that are not installed become rows with status "skipped":

    pip install torch transformers gguf llama-cpp-python
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_file
import numpy as np

from fdk_jax.models import ModelConfig, custom_llama

PROMPT = (3, 5)
GROUP = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures; `make` returns a function that decodes `steps` tokens and times it."""

    backend: str
    name: str
    bits: int
    dtype: str
    make: Callable[["Case", ModelConfig, int], tuple[Callable[[], float], dict[str, Any]]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def fdk_case(case: Case, config: ModelConfig, steps: int):
    """This package: quantised by the C++ library, or not quantised."""
    import jax

    from fdk_jax import models
    from fdk_jax.benchmark import environment, probes

    config = dataclasses.replace(config, dtype=case.dtype)
    options = dict(case.options)
    if case.bits < 16:
        options |= dict(bits=case.bits, group_size=GROUP, codebook="kmeans")
    generator = models.Generator(
        models.random_model(config, backend="cpu", **options), backend="cpu"
    )
    jax.block_until_ready(generator.leaves)

    def run() -> float:
        out = generator.generate([list(PROMPT)], max_tokens=steps + 1)
        return out.decode_seconds / out.decode_steps

    size = sum(leaf.nbytes for leaf in generator.leaves)
    if "head_bits" in case.options:  # the embedding is a table of rows then
        size -= (
            config.vocab_size * config.hidden_size * np.dtype(generator.leaves[0].dtype).itemsize
        )
    device = jax.devices("cpu")[0]
    read = probes.read_gb_s(device)
    fields = dict(group_size=GROUP, codebook="kmeans") if case.bits < 16 else {}
    return run, fields | environment.describe(device) | {
        "bytes_rw": size,
        "read_gb_s": round(read, 2),
        "bound_us": round(size / read / 1e3, 1),
    }


def torch_case(case: Case, config: ModelConfig, steps: int):
    """The model of transformers on PyTorch with a static cache, eager or compiled."""
    import torch
    import transformers

    from fdk_jax.benchmark import shapes

    torch.set_grad_enabled(False)
    shape = transformers.LlamaConfig(**shapes.of_hugging_face(config))
    torch.set_default_dtype(getattr(torch, case.dtype))
    model = transformers.LlamaForCausalLM(shape).eval()
    step = torch.compile(model, dynamic=False) if case.options.get("compiled") else model
    cache = transformers.StaticCache(config=shape, max_cache_len=128)
    keyword = "cache" if transformers.__version__ >= "5.2" else "past_key_values"

    def read(program: Any, tokens: Any, position: int) -> Any:
        at = torch.arange(position, position + tokens.shape[1])
        out = program(tokens, position_ids=at[None], use_cache=True, **{keyword: cache})
        return out.logits[:, -1:].argmax(-1)

    def run() -> float:
        cache.reset()
        token = read(model, torch.tensor([PROMPT]), 0)
        begin = time.perf_counter()
        for i in range(steps):
            token = read(step, token, len(PROMPT) + i)
        return (time.perf_counter() - begin) / steps

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return run, {"versions": versions, "bytes_rw": size}


def llama_cpp_case(case: Case, config: ModelConfig, steps: int):
    """llama.cpp on a GGUF file with random weights, as it is or quantised by llama.cpp."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, config)
        if case.bits < 16:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
            source, path = path, path.with_name("quantised.gguf")
            if llama_cpp.llama_model_quantize(bytes(source), bytes(path), params):
                raise RuntimeError("llama_model_quantize failed")
            source.unlink()
        threads = multiprocessing.cpu_count()
        model = llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=threads, use_mmap=False, verbose=False
        )
        size = path.stat().st_size

    def run() -> float:
        model.reset()
        model.eval(PROMPT)
        begin = time.perf_counter()
        for _ in range(steps):
            model.eval([int(np.argmax(model._scores[-1]))])
        return (time.perf_counter() - begin) / steps

    versions = {"llama-cpp-python": llama_cpp.__version__}
    return run, {"versions": versions, "bytes_rw": size}


def write_gguf(path: Path, config: ModelConfig) -> None:
    """A bfloat16 model; all matrices repeat one block of random values, which no speed depends on."""
    import gguf
    import ml_dtypes

    block = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32)

    def matrix(rows: int, columns: int) -> tuple[np.ndarray, int]:
        values = np.resize(block * columns**-0.5, (rows, columns)).astype(ml_dtypes.bfloat16)
        return values.view(np.uint8), gguf.GGMLQuantizationType.BF16

    llama_file.write(path, config, matrix)


CASES = (
    Case("cpu", "fdk-4bit-head8", 4, "bfloat16", fdk_case, dict(head_bits=8)),
    Case(
        "cpu", "fdk-4bit-head8-int8", 4, "bfloat16", fdk_case, dict(head_bits=8, arithmetic="int8")
    ),
    Case("cpu", "fdk-4bit", 4, "bfloat16", fdk_case),
    Case("xla", "fdk-16bit", 16, "bfloat16", fdk_case),
    Case("xla", "fdk-32bit", 32, "float32", fdk_case),
    Case("torch", "transformers-16bit", 16, "bfloat16", torch_case),
    Case("torch", "transformers-16bit-compiled", 16, "bfloat16", torch_case, dict(compiled=True)),
    Case("llama.cpp", "llama.cpp-16bit", 16, "bfloat16", llama_cpp_case),
    Case("llama.cpp", "llama.cpp-q4_0", 4, "bfloat16", llama_cpp_case),
)


def work(pipe: Any, index: int, config: ModelConfig, steps: int) -> None:
    """A process: makes its case, then decodes once for each message."""
    case = CASES[index]
    try:
        run, fields = case.make(case, config, steps)
        run()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(fields)
    with contextlib.suppress(EOFError):  # the end of the other process
        while pipe.recv():
            pipe.send(run())


def start(index: int, config: ModelConfig, steps: int) -> tuple[Any, Any]:
    """The pipe to a new process, and the fields of its case or the reason why there is none."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=work, args=(other, index, config, steps), daemon=True).start()
    other.close()
    try:
        return pipe, pipe.recv()
    except EOFError:
        return pipe, "its process ended"


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all cases."""
    from fdk_jax.benchmark import records

    config = dataclasses.replace(custom_llama("1B"), num_layers=args.layers)
    chosen = [i for i, case in enumerate(CASES) if re.search(args.cases, case.name)]
    started = {i: start(i, config, args.steps) for i in chosen}
    if args.pause:
        input("ready; Enter starts the measurement\n")
    samples: dict[int, list[float]] = {i: [] for i in chosen if isinstance(started[i][1], dict)}
    for _ in range(args.rounds):
        for i, seconds in list(samples.items()):
            pipe, _ = started[i]
            try:
                pipe.send(True)
                seconds.append(pipe.recv())
            except (EOFError, OSError):  # for want of memory, say; the others go on
                started[i] = pipe, f"its process ended after {len(seconds)} samples"
                del samples[i]
    for i in chosen:
        case, found = CASES[i], started[i][1]
        row = {
            "suite": "models", "name": case.name, "backend": case.backend, "bits": case.bits,
            "dtype": case.dtype, "m": 1, "batch": 1, "prompt": len(PROMPT), "steps": args.steps,
            "model": f"custom-llama-1B with {args.layers} layers" if args.layers != 16
            else "custom-llama-1B",
        }  # fmt: skip
        if isinstance(found, str):
            yield row | {"status": "skipped", "reason": found}
            continue
        row |= found | records.statistics([s * 1e6 for s in samples[i]])
        yield row | {"tokens_per_s": round(1e6 / row["median_us"], 2)}


def table(rows: list[dict[str, Any]]) -> str:
    """Tokens a second, and how many times those of the fastest 16-bit peer, sample by sample."""
    ok = [row for row in rows if row["status"] == "ok"]
    peers = [r for r in ok if r["bits"] == 16 and not r["name"].startswith("fdk")]
    best = min(peers, key=lambda r: r["median_us"], default=None)
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['name']:28} skipped: {row['reason'][:80]}")
            continue
        text = f"{row['name']:28} {row['tokens_per_s']:7.2f} tokens/s"
        if row["bound_us"]:
            text += f"  {row['bound_us'] / row['median_us']:4.0%} of the bound"
        if best is not None:
            pairs = zip(best["samples_us"], row["samples_us"], strict=True)
            text += f"  {statistics.median(a / b for a, b in pairs):5.2f} x {best['name']}"
        lines.append(text)
    return "\n".join(lines)


def main() -> None:
    """Measures and prints; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("rounds", 10), ("steps", 30), ("layers", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cases", default="", help="only names that this regular expression finds")
    parser.add_argument("--pause", action="store_true", help="wait for Enter when all are ready")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    import jax

    from fdk_jax.benchmark import environment, records

    here = environment.describe(jax.devices("cpu")[0])
    rows = []
    for row in measure(args):
        versions = here["versions"] | row.get("versions", {})
        rows.append(records.make_row(here | row | {"versions": versions}))
    print(table(rows))
    if args.output:
        records.append(args.output, rows)


if __name__ == "__main__":
    main()

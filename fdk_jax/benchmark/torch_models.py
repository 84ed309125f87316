"""Prompts and decoding with a model of transformers on PyTorch, in bfloat16: rows beside the models suite's.

    python -m fdk_jax.benchmark.torch_models --model custom-llama-12B --prompt 128,1024 --output rows.jsonl

The model has the shape of the name and random weights; attention is what transformers chooses. As in the
models suite, the time to the first token is that of reading the prompts and choosing a token for each. PyTorch
and transformers are no dependencies of this package: they must be there.
"""

import dataclasses
import importlib.metadata
import inspect
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fdk_jax import usage
from fdk_jax.benchmark import records, shapes
from fdk_jax.models import ModelConfig

_WARM_UPS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` tokens, and `steps` tokens after the first."""

    model: str
    batch: int
    prompt: int
    steps: int

    def fields(self) -> dict[str, Any]:
        """The keys of a row that say what is measured, as those of the models suite."""
        name = f"{self.model}-transformers-b16-batch{self.batch}-prompt{self.prompt}"
        fixed = dict(suite="models", name=name, backend="transformers", bits=16, m=self.batch)
        fixed |= dict(dtype="bfloat16", arithmetic="exact", devices=1, speculate=0)
        return fixed | dataclasses.asdict(self)


def make_model(config: ModelConfig, device: str) -> Any:
    """A model of transformers with random weights in bfloat16."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape = transformers.LlamaConfig(**shapes.of_hugging_face(config))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def runs(model: Any, case: Case, device: str) -> Callable[[], tuple[float, float]]:
    """A function that reads the prompts and decodes; it returns the seconds to the first token and a step's."""
    import torch  # pyright: ignore[reportMissingImports]

    known = inspect.signature(type(model).forward).parameters
    keyword = "cache" if "cache" in known else "past_key_values"  # its name depends on the version
    rng = np.random.default_rng(case.batch)
    vocabulary = model.config.vocab_size
    tokens = rng.integers(0, vocabulary, (case.batch, case.prompt))
    prompts = torch.from_numpy(tokens).to(device)

    def wait() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        begin = wait()
        out = model(prompts, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        held = keyword if hasattr(out, keyword) else "past_key_values"
        first = wait()
        for _ in range(case.steps):
            out = model(token, use_cache=True, **{keyword: getattr(out, held)})
            token = out.logits[:, -1:].argmax(-1)
        return first - begin, (wait() - first) / case.steps

    return run


def measure(model: Any, case: Case, device: str, repetitions: int) -> dict[str, Any]:
    """The keys of a row that say what came out."""
    import torch  # pyright: ignore[reportMissingImports]

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    run = runs(model, case, device)
    for _ in range(_WARM_UPS):
        run()
    firsts, steps = zip(*(run() for _ in range(repetitions)), strict=True)
    first = records.statistics([seconds * 1e6 for seconds in firsts])
    found = records.statistics([seconds * 1e6 for seconds in steps])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return found | {
        "bytes_rw": size,
        "tokens_per_s": round(case.batch / found["median_us"] * 1e6, 2),
        "first_token_us": first["median_us"],
        "first_token_stderr_us": first["stderr_us"],
        "first_token_samples_us": first["samples_us"],
        "peak_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else size,
    }


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = usage.Parser(
        prog="python -m fdk_jax.benchmark.torch_models",
        description="Times a model of transformers on PyTorch, in bfloat16.",
    )
    parser.add_argument("--model", default="custom-llama-12B", help="a shape of the models suite")
    parser.add_argument("--batch", default="1", help="sequences at once, comma-separated")
    parser.add_argument("--prompt", default="128", help="tokens of a prompt, comma-separated")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded after the first")
    parser.add_argument("--repetitions", type=int, default=records.MIN_SAMPLES, help="samples")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file, appended to")
    arguments = parser.parse_args(argv)
    # JAX only names the device here.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import torch  # pyright: ignore[reportMissingImports]

    from fdk_jax.benchmark import environment

    shape = shapes.Shape.of(arguments.model)
    if shape is None:
        parser.error(f"--model={arguments.model} is no shape of the models suite")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = environment.describe(jax.devices()[0])
    peers = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    where["versions"] = where["versions"] | peers
    model = make_model(shape.config, device)
    numbers = [[int(v) for v in text.split(",")] for text in (arguments.batch, arguments.prompt)]
    for batch, prompt in itertools.product(*numbers):
        case = Case(arguments.model, batch, prompt, arguments.steps)
        row = records.make_row(
            case.fields(), where, measure(model, case, device, arguments.repetitions)
        )
        records.append(arguments.output, [row])
        first, step = row["first_token_us"] / 1e3, row["median_us"] / 1e3
        print(f"{case.fields()['name']}: first token {first:.1f} ms, a step {step:.2f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

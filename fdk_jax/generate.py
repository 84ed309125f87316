"""Generates text from a checkpoint folder: `python -m fdk_jax.generate --model DIR --prompt TEXT`."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
import rich.progress

from fdk_jax import models
from fdk_jax.models.tokenizer import TextStream, Tokenizer
from fdk_jax.product import cpu_backend


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Errors are one line on stderr."""
    args = _parser().parse_args(arguments)
    console = rich.console.Console(stderr=True, quiet=args.quiet)
    try:
        _platform(args.platform)
        _check(args)
        tokenizer = Tokenizer(args.model)
        if args.chat:
            _chat(args, tokenizer, console)
        else:
            _complete(args, tokenizer, console)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fdk_jax.generate", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="repeat it for a batch")
    source.add_argument("--chat", action="store_true", help="talk; an empty line ends it")
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument("--max_tokens", type=int, default=128, help="new tokens (default 128)")
    parser.add_argument("--max_context", type=int, help="tokens of prompt and answer together")
    sampling = parser.add_argument_group("sampling (greedy unless a temperature is given)")
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--top_k", type=int)
    sampling.add_argument("--top_p", type=float, default=1.0)
    sampling.add_argument("--seed", type=int, default=0)
    weights = parser.add_argument_group("weights")
    weights.add_argument("--bits", type=int, choices=(1, 2, 4, 8), help="quantise while loading")
    weights.add_argument("--group_size", type=int, default=64)
    weights.add_argument("--codebook", default="uniform", choices=("uniform", "nf4", "kmeans"))
    weights.add_argument("--head_bits", type=int, choices=(1, 2, 4, 8), help="of the last layer")
    weights.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    where = parser.add_argument_group("where")
    where.add_argument("--backend", choices=("pallas", "cpu", "xla"), help="of quantised layers")
    where.add_argument(
        "--arithmetic",
        default="exact",
        choices=("exact", "int16", "int8"),
        help="of activations in quantised layers on a CPU (int8 is the fastest)",
    )
    where.add_argument("--platform", choices=("cpu", "cuda"), help="default: the best there is")
    where.add_argument("--devices", type=int, default=1, help="that share every matrix")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress, no speed")
    return parser


def _platform(name: str | None) -> None:
    if name is not None:
        jax.config.update("jax_platforms", name)


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is read."""
    if args.json and args.chat:
        raise ValueError("--json needs --prompt")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    if args.head_bits is not None and args.bits is None:
        raise ValueError("--head_bits needs --bits")
    if not 1 <= args.devices <= jax.device_count():
        raise ValueError(f"--devices {args.devices}: there are {jax.device_count()}")
    platform = jax.default_backend()
    if args.backend == "pallas" and platform != "gpu":
        raise ValueError(f"--backend pallas needs an NVIDIA GPU, JAX runs on {platform}")
    if args.backend == "cpu" and platform != "cpu":
        raise ValueError(f"--backend cpu needs --platform cpu, JAX runs on {platform}")
    if args.backend == "cpu" and (reason := cpu_backend.unavailable_reason()) is not None:
        raise ValueError(f"--backend cpu is not available: {reason}")


def _generator(args: argparse.Namespace, console: rich.console.Console) -> models.Generator:
    quantisation = None
    if args.bits is not None:
        quantisation = models.Quantisation(
            args.bits, args.group_size, args.codebook, head_bits=args.head_bits
        )
    parallel = None
    if args.devices > 1:
        parallel = models.Parallel(jax.make_mesh((args.devices,), ("model",)))
    begin = time.perf_counter()
    with rich.progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        model = models.load(
            args.model,
            quantisation=quantisation,
            dtype=args.dtype,
            parallel=parallel,
            backend=args.backend,
            arithmetic=args.arithmetic,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        generator = models.Generator(model, max_context=args.max_context, backend=args.backend)
    jax.block_until_ready(generator.leaves)
    size = sum(leaf.nbytes for leaf in generator.leaves) / 1e9
    console.print(f"loaded {size:.2f} GB in {time.perf_counter() - begin:.1f} s", highlight=False)
    return generator


def _options(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    sampling = models.Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    return dict(max_tokens=args.max_tokens, sampling=sampling, stop_tokens=tokenizer.stop_tokens)


def _complete(args, tokenizer: Tokenizer, console) -> None:
    prompts = [tokenizer.encode(text) for text in args.prompt]
    options = _options(args, tokenizer)
    models.check_prompts(models.read_config(args.model), prompts, args.max_tokens, args.max_context)
    generator = _generator(args, console)
    if args.json or len(prompts) > 1:
        with console.status("generating"):
            out = generator.generate(prompts, **options)
        texts = [tokenizer.decode(row) for row in out.tokens]
        if args.json:
            facts = dataclasses.asdict(out) | dict(tokens_per_second=out.tokens_per_second)
            print(json.dumps(dict(prompts=args.prompt, texts=texts) | facts))
        else:
            for prompt, text in zip(args.prompt, texts, strict=True):
                print(f"{prompt}{text}\n")
        console.print(
            f"prompt {out.prefill_seconds:.3f} s; {out.tokens_per_second:.1f} tokens/s",
            highlight=False,
        )
        return
    print(args.prompt[0], end="", flush=True)
    _speak(tokenizer, generator, prompts[0], options, console)
    print()


def _speak(tokenizer, generator, prompt: list[int], options: dict, console) -> list[int]:
    """Prints an answer as it comes; returns its tokens."""
    text, answer = TextStream(tokenizer), []
    with console.status("compiling"):
        generator.compile([prompt], streaming=True, **options)
    begin = first = time.perf_counter()
    for new in generator.stream([prompt], **options):
        if not answer:
            first = time.perf_counter()
        row = new[0].tolist()
        stop = next((i for i, t in enumerate(row) if t in options["stop_tokens"]), None)
        answer += row[:stop]
        print(text.add(row[:stop]), end="", flush=True)
        if stop is not None:
            break
    rate = (len(answer) - 1) / max(time.perf_counter() - first, 1e-9)
    console.print(
        f"\nprompt of {len(prompt)} tokens {first - begin:.3f} s; {len(answer)} tokens,"
        f" {rate:.1f} tokens/s",
        highlight=False,
    )
    return answer


def _chat(args, tokenizer: Tokenizer, console) -> None:
    if not tokenizer.can_chat:
        raise ValueError(f"{args.model} has no chat template; use --prompt")
    options = _options(args, tokenizer)
    generator = _generator(args, console)
    messages = [] if args.system is None else [dict(role="system", content=args.system)]
    while line := _line(console):
        messages.append(dict(role="user", content=line))
        answer = _speak(tokenizer, generator, tokenizer.chat(messages), options, console)
        messages.append(dict(role="assistant", content=tokenizer.decode(answer)))


def _line(console) -> str:
    console.print("> ", end="")
    try:
        return input()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())

"""Generates text from a checkpoint: `python -m fdk_jax.generate --model DIR --prompt TEXT`."""

import argparse
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.console

from fdk_jax import arguments, compilation_cache, models, usage
from fdk_jax.models import speculation
from fdk_jax.models.chat_template import read_text
from fdk_jax.models.hub import find_checkpoint
from fdk_jax.models.tokenizer import TextStream, Tokenizer
from fdk_jax.product import cpu_backend

_NEW_TOKENS = 128  # of an answer, unless it is said or the context is smaller


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Errors are one line on stderr."""
    args = _parser().parse_args(argv)
    console = rich.console.Console(stderr=True, quiet=args.quiet)
    _use_utf8()
    return usage.exit_status(lambda: _run(args, console), debug=args.debug)


def _run(args: argparse.Namespace, console: rich.console.Console) -> None:
    _check(args)
    args.model = find_checkpoint(args.model)
    tokenizer = Tokenizer(args.model)
    if args.chat:
        _chat(args, tokenizer, console)
    else:
        _complete(args, tokenizer, console)


def _use_utf8() -> None:
    """Reads and writes UTF-8 where the locale knows ASCII only."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        wanted = "utf" in (getattr(stream, "encoding", None) or "utf-8").lower()
        if not wanted and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _parser() -> argparse.ArgumentParser:
    parser = usage.Parser(prog="python -m fdk_jax.generate", description=__doc__)
    arguments.add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="repeat it for a batch")
    source.add_argument("--chat", action="store_true", help="talk; an empty line ends it")
    parser.add_argument("--system", help="system message of the chat")
    parser.add_argument(
        "--chat_template", metavar="NAME", help="one of several templates, or a file with another"
    )
    parser.add_argument(
        "--template_option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable of the template, such as enable_thinking=false; VALUE is JSON or text",
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        help=f"new tokens (default {_NEW_TOKENS}, or what the context has room for)",
    )
    parser.add_argument("--max_context", type=int, help="tokens of prompt and answer together")
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="guess N tokens a step from the text so far; the same text, sooner where it repeats itself",
    )
    sampling = parser.add_argument_group("sampling (greedy unless a temperature is given)")
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--top_k", type=int)
    sampling.add_argument("--top_p", type=float, default=1.0)
    sampling.add_argument("--seed", type=int, default=0)
    arguments.add_weights(parser)
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
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is read."""
    if args.json and args.chat:
        raise ValueError("--json needs --prompt")
    for name in ("system", "chat_template", "template_option"):
        if getattr(args, name) and not args.chat:
            raise ValueError(f"--{name} needs --chat")
    arguments.check_weights(args)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError(f"--max_tokens {args.max_tokens} must be at least 1")
    if not 0 <= args.speculate <= speculation.MOST:
        raise ValueError(f"--speculate {args.speculate} must be between 0 and {speculation.MOST}")
    if args.speculate and (args.devices > 1 or len(args.prompt or []) > 1):
        raise ValueError("--speculate is for one prompt on one device")
    if args.max_context is not None and args.max_context < 2:
        raise ValueError(f"--max_context {args.max_context} must be at least 2")
    args.prompt = [_text(prompt) for prompt in args.prompt or []]
    args.system = None if args.system is None else _text(args.system)
    args.sampling = models.Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    devices = _devices(args.platform)
    if not 1 <= args.devices <= devices:
        raise ValueError(f"--devices {args.devices}: there are {devices}")
    platform = jax.default_backend()
    if args.backend == "pallas" and platform != "gpu":
        raise ValueError(f"--backend pallas needs an NVIDIA GPU, JAX runs on {platform}")
    if args.backend == "cpu" and platform != "cpu":
        raise ValueError(f"--backend cpu needs --platform cpu, JAX runs on {platform}")
    if args.backend == "cpu" and (reason := cpu_backend.unavailable_reason()) is not None:
        raise ValueError(f"--backend cpu is not available: {reason}")


def _devices(platform: str | None) -> int:
    """How many devices JAX runs on, once it has been told the platform."""
    options: Any = jax.config  # has no types
    if platform is not None:
        options.update("jax_platforms", platform)
    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:
        wanted = f"--platform {platform}" if platform else f"JAX_PLATFORMS={options.jax_platforms}"
        reason = " ".join(str(error).split()) or "JAX finds no such device or no plugin for it"
        raise ValueError(f"{wanted} does not work here: {reason}") from error


def _text(argument: str) -> str:
    """A text from the command line, whatever the locale."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(f"the text {argument!a} is not UTF-8: {error}") from error


def _generator(args, tokenizer: Tokenizer, console: rich.console.Console) -> models.Generator:
    parallel = None
    if args.devices > 1:
        parallel = models.Parallel(jax.make_mesh((args.devices,), ("model",)))
    model = arguments.load(
        args,
        tokenizer,
        console,
        parallel=parallel,
        backend=args.backend,
        arithmetic=args.arithmetic,
    )
    return models.Generator(model, max_context=args.max_context, backend=args.backend)


def _options(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """How tokens are chosen, of every answer."""
    return dict(sampling=args.sampling, stop_tokens=tokenizer.stop_tokens, speculate=args.speculate)


def _complete(args, tokenizer: Tokenizer, console) -> None:
    prompts = [tokenizer.encode(text) for text in args.prompt]
    config = models.read_config(args.model)
    context = args.max_context or config.max_context
    longest = max(map(len, prompts))
    max_tokens = args.max_tokens or max(1, min(_NEW_TOKENS, context - longest))
    models.check_prompts(config, prompts, max_tokens, context)
    generator = _generator(args, tokenizer, console)
    options: dict[str, Any] = _options(args, tokenizer) | dict(max_tokens=max_tokens)
    if args.json or len(prompts) > 1:
        with console.status("generating"):
            out = generator.generate(prompts, **options)
        texts = [tokenizer.decode(row) for row in out.tokens]
        if args.json:
            fields = dataclasses.asdict(out) | dict(tokens_per_second=out.tokens_per_second)
            print(json.dumps(dict(prompts=args.prompt, texts=texts) | fields))
        else:
            for prompt, text in zip(args.prompt, texts, strict=True):
                print(f"{prompt}{text}\n")
        console.print(
            f"prompt {out.prefill_seconds:.3f} s; {out.tokens_per_second:.1f} tokens/s",
            highlight=False,
        )
        return
    print(args.prompt[0], end="", flush=True)
    for _ in _speak(tokenizer, generator, prompts[0], options, console):
        pass
    print()


def _speak(tokenizer, generator, prompt: list[int], options: dict, console) -> Iterator[list[int]]:
    """Prints an answer as it comes; yields its tokens, some at a time."""
    text, count = TextStream(tokenizer), 0
    with console.status("compiling"):
        generator.compile([prompt], streaming=True, **options)
    begin = first = time.perf_counter()
    for new in generator.stream([prompt], **options):
        if not count:
            first = time.perf_counter()
        row = new[0].tolist()
        stop = next((i for i, t in enumerate(row) if t in options["stop_tokens"]), None)
        count += len(row[:stop])
        print(text.add(row[:stop]), end="", flush=True)
        yield row[:stop]
        if stop is not None:
            break
    print(text.flush(), end="", flush=True)
    rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
    console.print(
        f"\nprompt of {len(prompt)} tokens {first - begin:.3f} s; {count} tokens, {rate:.1f} tokens/s",
        highlight=False,
    )


class _Talk:
    """A conversation that fits its context: the oldest turns go when it is full."""

    def __init__(self, args, tokenizer: Tokenizer, context: int):
        self._system = [] if args.system is None else [dict(role="system", content=args.system)]
        self._turns: list[dict[str, str]] = []
        self._tokenizer = tokenizer
        self._context = context
        self._wanted = args.max_tokens
        self._options = _template_options(args)

    def add(self, role: str, content: str) -> None:
        """Another message."""
        self._turns.append(dict(role=role, content=content))

    def take_back(self) -> None:
        """Forgets the newest message."""
        self._turns.pop()

    def prompt(self) -> tuple[list[int], int, int]:
        """(tokens of the prompt, how many new ones there is room for, messages that were forgotten).

        Raises:
            ValueError: the newest message alone is too long, or the template refuses it.
        """
        reserved = self._wanted or max(1, min(_NEW_TOKENS, self._context // 4))
        starts = [i for i, turn in enumerate(self._turns) if i == 0 or turn["role"] == "user"]
        for start in starts:
            kept = self._turns[start:]
            tokens = self._tokenizer.chat([*self._system, *kept], **self._options)
            if len(tokens) + reserved <= self._context:
                self._turns = kept
                new = self._wanted or min(_NEW_TOKENS, self._context - len(tokens))
                return tokens, new, start
        raise ValueError(
            f"this message makes a prompt of {len(tokens)} tokens, and {reserved} new ones do not fit a"
            f" context of {self._context} with it"
        )


def _template_options(args: argparse.Namespace) -> dict[str, Any]:
    """Which template, and its variables."""
    options: dict[str, Any] = {}
    for item in args.template_option:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template_option {item!r} must be KEY=VALUE")
        if name in ("self", "messages", "template"):
            raise ValueError(f"--template_option {item!r}: {name} is not a variable to be set")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    if args.chat_template is not None:
        path = Path(args.chat_template)
        options["template"] = read_text(path) if path.is_file() else args.chat_template
    return options


def _chat(args, tokenizer: Tokenizer, console) -> None:
    if not tokenizer.can_chat and args.chat_template is None:
        raise ValueError(f"{args.model} has no chat template; use --prompt")
    context = args.max_context or models.read_config(args.model).max_context
    talk = _Talk(args, tokenizer, context)
    talk.add("user", "hello")  # before the model is read: does the template work, is there room?
    talk.prompt()
    talk.take_back()
    generator = _generator(args, tokenizer, console)
    options = _options(args, tokenizer)
    while line := _line(console):
        talk.add("user", line)
        try:
            prompt, new, forgotten = talk.prompt()
        except ValueError as error:
            talk.take_back()
            usage.print_error(error)
            continue
        if forgotten:
            console.print(
                f"the context of {context} tokens is full: the oldest {forgotten} messages are forgotten",
                highlight=False,
            )
        answer: list[int] = []
        ended = False
        try:
            for part in _speak(
                tokenizer, generator, prompt, options | dict(max_tokens=new), console
            ):
                answer += part
            ended = True
        except KeyboardInterrupt:
            console.print("\n(the answer ends here: Ctrl-C)", highlight=False)
        if ended or answer:
            talk.add("assistant", tokenizer.decode(answer))
        else:
            talk.take_back()


def _line(console) -> str:
    """What the user says; "" to end the talk: an empty line, Ctrl-D, or Ctrl-C twice."""
    interrupted = False
    while True:
        try:
            console.print("> ", end="")
            return _text(input())
        except EOFError:
            return ""
        except ValueError as error:
            usage.print_error(error)
        except KeyboardInterrupt:
            if interrupted:
                return ""
            interrupted = True
            console.print(
                "\n(Ctrl-C again, Ctrl-D or an empty line ends the talk)", highlight=False
            )


if __name__ == "__main__":
    compilation_cache.keep()
    sys.exit(main())

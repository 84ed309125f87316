"""Measures kernels and models on this machine: cases -> rows of JSONL -> a table, and figures.

python bench.py --backend pallas --m 1,16 --bits 16,4,1 --output results/mine.jsonl
python bench.py --backend cpu,xla --bits 32,16,8,4,2,1 --plot
python bench.py --plot results/mine.jsonl            only draws the figures of a file
python bench.py --profile cpu-b4-m1-k4096-n4096-g64-uniform-bfloat16
python bench.py --suite models --backend pallas --bits 16,4,1
"""

import datetime
import importlib
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging

from fdk_jax import usage

if TYPE_CHECKING:  # it needs a POSIX system
    from fdk_jax.benchmark.turns import Turns

FLAGS = flags.FLAGS

_CHOICES = {
    "backend": ("pallas", "cpu", "xla"),
    "dtype": ("bfloat16", "float16", "float32"),
    "codebook": ("uniform", "nf4", "kmeans"),
    "arithmetic": ("exact", "int16", "int8"),
    "bits": ("1", "2", "4", "8", "16", "32"),
}


def _define_flags() -> None:
    flags.DEFINE_enum("suite", "kernels", ["kernels", "models", "attention"], "What to measure.")
    flags.DEFINE_list("backend", ["xla"], "Backends: pallas, cpu, xla.")
    flags.DEFINE_list("m", ["1", "4", "16", "64", "256"], "Tokens of a product.")
    flags.DEFINE_list("k", ["4096"], "Input features.")
    flags.DEFINE_list("n", ["k"], 'Output features; "k" is the same as k.')
    flags.DEFINE_list("group_size", ["64"], "Weights that share a scale.")
    flags.DEFINE_list(
        "bits", ["16", "4", "1"], "Widths of a weight: 1, 2, 4, 8; 16 and 32 are not quantised."
    )
    flags.DEFINE_list("dtype", ["bfloat16"], "Activations: bfloat16, float16, float32.")
    flags.DEFINE_list("codebook", ["uniform"], "Codebooks: uniform, nf4 (4 bits only), kmeans.")
    flags.DEFINE_list(
        "arithmetic", ["exact"], "Activation arithmetic of the cpu backend: exact, int16, int8."
    )
    flags.DEFINE_integer(
        "copies", None, "Weights that the calls rotate over; by default more than caches hold.", 1
    )
    flags.DEFINE_integer(
        "checked_rows",
        None,
        "Rows of a weight whose results are checked, about; by default all.",
        1,
    )
    flags.DEFINE_integer("repetitions", 20, "Samples of each case.", 1)
    flags.DEFINE_float("max_seconds", 20.0, "A case takes 10 samples at least and stops here.", 0.0)
    flags.DEFINE_float("sample_seconds", None, "About how long a sample takes.", 1e-3)
    flags.DEFINE_string(
        "turns",
        None,
        "File that runs on one GPU share: they make cases side by side, and each measures alone.",
    )
    flags.DEFINE_integer("threads", None, "Processors to run on (Linux); by default all.", 1)
    flags.DEFINE_string("include", "", "Regular expression: only cases whose name it finds.")
    flags.DEFINE_string("exclude", "", "Regular expression: no case whose name it finds.")
    flags.DEFINE_string("profile", None, "Run this one case under the profiler and say where.")
    flags.DEFINE_string("output", None, "JSONL file that rows are appended to; default in .bench/.")
    flags.DEFINE_bool("plot", False, "Draw figures of the rows, or of the JSONL files given.")
    flags.DEFINE_bool("list", False, "List the cases and measure nothing.")
    flags.DEFINE_list(
        "model",
        ["custom-llama-4B", "custom-llama-12B", "custom-llama-31B"],
        "Models suite: shapes with random weights, or folders of checkpoints.",
    )
    flags.DEFINE_list("batch", ["1", "4", "16", "64", "256"], "Models suite: sequences at once.")
    flags.DEFINE_list("prompt", ["2"], "Models suite: tokens of a prompt.")
    flags.DEFINE_list("slots", ["1024", "8192", "32768"], "Attention suite: tokens of a cache.")
    flags.DEFINE_list(
        "speculate", ["0"], "Models suite: tokens guessed a step, in a text that repeats itself."
    )
    flags.DEFINE_integer("steps", 30, "Models suite: tokens generated after it.", 1)

    flags.DEFINE_list("devices", ["1"], "Models suite: devices that share a model.")

    for name in ("m", "k", "group_size", "batch", "prompt", "slots", "devices"):
        flags.register_validator(name, _all(_is_size), "must list positive integers")
    flags.register_validator(
        "speculate", _all(lambda v: v == "0" or _is_size(v)), "must list integers of at least 0"
    )
    flags.register_validator(
        "n", _all(lambda v: v == "k" or _is_size(v)), 'must list positive integers or "k"'
    )
    for name, choices in _CHOICES.items():
        flags.register_validator(
            name, _all(choices.__contains__), f"must list some of {', '.join(choices)}"
        )
    for name in ("include", "exclude"):
        flags.register_validator(name, _is_expression, "must be a regular expression")


def _all(accepts: Callable[[str], bool]) -> Callable[[Sequence[str]], bool]:
    return lambda values: bool(values) and all(map(accepts, values))


def _is_size(value: str) -> bool:
    return value.isascii() and value.isdigit() and int(value) > 0


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _fail(message: object) -> NoReturn:
    usage.fail("bench.py", message)


def _integers(name: str) -> list[int]:
    return [int(v) for v in FLAGS[name].value or ()]


def _limit_threads(count: int) -> None:
    """Binds this process to its first processors, before anything counts them."""
    if not hasattr(os, "sched_setaffinity"):
        _fail("--threads needs Linux")
    available = sorted(os.sched_getaffinity(0))
    if count > len(available):
        _fail(f"--threads={count} is more than the {len(available)} processors of this process")
    os.sched_setaffinity(0, available[:count])


def _load_suite() -> tuple[Any, list[Any]]:
    """The module of the suite and its cases."""
    try:
        suite = importlib.import_module(f"fdk_jax.benchmark.{FLAGS.suite}")
    except ModuleNotFoundError as error:
        _fail(f"--suite={FLAGS.suite} cannot be loaded: {error}")
    if FLAGS.suite == "models":
        return suite, suite.make_cases(
            models=FLAGS.model,
            backends=FLAGS.backend,
            bits=_integers("bits"),
            batches=_integers("batch"),
            group_sizes=_integers("group_size"),
            codebooks=FLAGS.codebook,
            arithmetics=FLAGS.arithmetic,
            prompts=_integers("prompt"),
            steps=FLAGS.steps,
            devices=_integers("devices"),
            speculates=_integers("speculate"),
        )
    if FLAGS.suite == "attention":
        return suite, suite.make_cases(
            batches=_integers("batch"), slots=_integers("slots"), dtypes=FLAGS.dtype
        )
    return suite, suite.make_cases(
        backends=FLAGS.backend,
        m=_integers("m"),
        k=_integers("k"),
        n=[v if v == "k" else int(v) for v in FLAGS.n],
        bits=_integers("bits"),
        group_sizes=_integers("group_size"),
        codebooks=FLAGS.codebook,
        dtypes=FLAGS.dtype,
        arithmetics=FLAGS.arithmetic,
    )


def _profile(name: str) -> None:
    from fdk_jax.benchmark import cases, profiling

    folder = Path(".bench/profiles") / name
    try:
        print(profiling.profile(cases.KernelCase.parse(name), folder, FLAGS.copies))
    except (NotImplementedError, ValueError) as error:
        _fail(error)
    print(f"trace in {folder} (open it with xprof or TensorBoard)")


def _plot(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    from fdk_jax.benchmark import plots

    try:
        for path in plots.draw(rows, stem):
            print(f"figure {path}")
    except (ModuleNotFoundError, ValueError, OSError) as error:
        _fail(error)


def _turns() -> "Turns | None":
    if not FLAGS.turns:
        return None
    try:
        from fdk_jax.benchmark.turns import Turns

        return Turns(Path(FLAGS.turns))
    except (ImportError, OSError) as error:
        _fail(f"--turns={FLAGS.turns}: {error}")


def _measure(suite: Any, cases: Sequence[Any]) -> int:
    """Measures the cases, prints the table and returns the exit status."""
    from fdk_jax.benchmark import records, runner, source, table, timing

    now = datetime.datetime.now(datetime.UTC)
    path = Path(FLAGS.output or f".bench/{FLAGS.suite}-{now:%Y%m%d-%H%M%S}.jsonl")
    try:
        source.require_commit(path)
    except source.NotACommit as error:
        _fail(f"--output={path}: {error}")
    session = timing.Session(
        FLAGS.repetitions,
        FLAGS.copies,
        FLAGS.max_seconds,
        FLAGS.checked_rows,
        FLAGS.sample_seconds,
        _turns(),
    )
    rows: list[dict[str, Any]] = []
    try:
        with records.Writer(path) as writer:

            def write(row: dict[str, Any]) -> None:
                writer.write(row)
                rows.append(row)

            signum = runner.run(suite, cases, session, write)
    except OSError as error:
        _fail(f"--output={path}: {error}")
    if rows:
        print(table.render(rows))
    print(f"{len(rows)} of {len(cases)} rows in {path}")
    if signum is not None:
        return 128 + signum
    if FLAGS.plot:
        _plot(rows, path.with_suffix(""))
    return int(any(row["status"] == "failed" for row in rows))


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    # The default; JAX informs of each platform it did not find.
    if FLAGS.verbosity == logging.INFO:
        logging.set_verbosity(logging.WARNING)
    files = argv[1:]
    if files and not FLAGS.plot:
        _fail(f"unexpected arguments {' '.join(files)}; lists are separated by commas")
    if files:
        from fdk_jax.benchmark import records

        try:
            rows = records.read(files)
        except (OSError, ValueError) as error:
            _fail(error)
        _plot(rows, Path(files[0]).with_suffix(""))
        return 0
    if FLAGS.threads is not None:
        _limit_threads(FLAGS.threads)
    if FLAGS.profile is not None:
        _profile(FLAGS.profile)
        return 0
    from fdk_jax.benchmark.cases import select

    suite, cases = _load_suite()
    cases = select(cases, FLAGS.include, FLAGS.exclude)
    if not cases:
        _fail("no case is left by --include and --exclude")
    if FLAGS.list:
        print("\n".join(case.name for case in cases))
        return 0
    return _measure(suite, cases)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `bench.py --list | head` ends quietly.
    _define_flags()
    app.run(main, flags_parser=usage.flags_parser("bench.py"))

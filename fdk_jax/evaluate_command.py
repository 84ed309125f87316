"""Says what quantisation costs a checkpoint: `fdk-jax evaluate --model DIR --text FILE --bits 4`."""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence

import rich.console

from fdk_jax import arguments, compilation_cache, usage
from fdk_jax.learning.evaluation import evaluate
from fdk_jax.learning.statistics import CalibrationWarning
from fdk_jax.models import calibrating
from fdk_jax.models.hub import find_checkpoint
from fdk_jax.models.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Errors are one line on stderr."""
    args = _parser().parse_args(argv)
    console = rich.console.Console(stderr=True, quiet=args.quiet)
    return usage.exit_status(lambda: print(_evaluate(args, console)), debug=args.debug)


def _parser() -> argparse.ArgumentParser:
    parser = usage.Parser(prog="fdk-jax evaluate", description=__doc__)
    arguments.add_model(parser)
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="text, or .npy or .bin of tokens"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, spread over it")
    arguments.add_weights(parser)
    parser.add_argument("--backend", choices=("pallas", "cpu", "xla"), help="of quantised layers")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def _evaluate(args: argparse.Namespace, console: rich.console.Console) -> str:
    """The report: with --bits against the model as it is, otherwise of the model alone."""
    arguments.check_weights(args)
    args.model = find_checkpoint(args.model)
    tokenizer = Tokenizer(args.model)
    rows = calibrating.token_windows(args.text, tokenizer, context=args.context, tokens=args.tokens)
    model = arguments.load(args, tokenizer, console, backend=args.backend)
    reference = None
    if args.bits is not None:
        plain = argparse.Namespace(
            **vars(args)
            | dict(bits=None, calibrate=None, head_bits=None, rotate=False, learn=False)
        )
        reference = arguments.load(plain, tokenizer, console, backend=args.backend)
    with warnings.catch_warnings():  # a few tokens are enough to measure with
        warnings.simplefilter("ignore", CalibrationWarning)
        report = evaluate(model, reference, rows, batch_size=1)
    return json.dumps(dataclasses.asdict(report)) if args.json else str(report)


if __name__ == "__main__":
    compilation_cache.keep()
    sys.exit(main())

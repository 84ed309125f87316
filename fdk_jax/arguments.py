"""What commands share: the arguments that say which model is loaded, and with which weights."""

import argparse
import time
import warnings
from typing import Any

import jax
import rich.console
import rich.progress
from flax import nnx

from fdk_jax import models
from fdk_jax.format.packing import BITS
from fdk_jax.models import calibrating
from fdk_jax.models.tokenizer import Tokenizer

CODEBOOKS = ("auto", "uniform", "nf4", "kmeans")
SCALES = ("auto", "absmax", "absmean", "rms", "search")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="checkpoint folder or file, or a name in the hub's cache",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds how weights are quantised."""
    weights = parser.add_argument_group("weights")
    weights.add_argument("--bits", type=int, choices=BITS, help="quantise while loading")
    weights.add_argument("--group_size", type=int, default=64)
    weights.add_argument(
        "--codebook", default="auto", choices=CODEBOOKS, help="default: the best for the bits"
    )
    weights.add_argument(
        "--scale",
        default="auto",
        choices=SCALES,
        help="of each group; search: that of least error, much slower to load and better at 4 bits",
    )
    weights.add_argument("--head_bits", type=int, choices=BITS, help="of the last layer")
    weights.add_argument(
        "--calibrate",
        metavar="FILE",
        help="fit the weights to this text (or .npy, .bin of tokens): slower to load, and far better",
    )
    weights.add_argument(
        "--rotate",
        action="store_true",
        help="with --calibrate: fold rotations into the weights first, which helps at 2 and 1 bits",
    )
    weights.add_argument(
        "--learn",
        action="store_true",
        help="with --calibrate: learn scales and levels for the error of the layers' outputs",
    )
    weights.add_argument(
        "--requantise",
        type=int,
        choices=(4, 8, 16),
        help="bits for weights of a kind that has no exact form here (K-quants of GGUF); 16: as floats",
    )
    weights.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))


def check_weights(args: argparse.Namespace) -> None:
    """Refuses combinations that say nothing.

    Raises:
        ValueError: with the argument that is missing.
    """
    for name in ("head_bits", "calibrate"):
        if getattr(args, name) is not None and args.bits is None:
            raise ValueError(f"--{name} needs --bits")
    for name in ("rotate", "learn"):
        if getattr(args, name) and args.calibrate is None:
            raise ValueError(f"--{name} needs --calibrate")


def load(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    console: rich.console.Console,
    *,
    parallel: models.Parallel | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
) -> models.Transformer:
    """The model that the arguments describe; says what is to be said of it."""
    quantisation = None
    if args.bits is not None:
        quantisation = models.Quantisation(
            args.bits, args.group_size, args.codebook, args.scale, head_bits=args.head_bits
        )
    options: dict[str, Any] = dict(
        requantise=args.requantise, dtype=args.dtype, backend=backend, arithmetic=arithmetic
    )
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as notes:
        if args.calibrate is not None and quantisation is not None:
            if parallel is not None:
                raise ValueError("--calibrate needs one device")
            rows = calibrating.token_windows(args.calibrate, tokenizer)
            model = calibrating.load_calibrated(
                args.model,
                quantisation,
                rows,
                progress=False if console.quiet else None,
                rotate=args.rotate,
                learn=args.learn,
                **options,
            )
        else:
            with rich.progress.Progress(console=console, transient=True) as bar:
                task = bar.add_task("loading", total=None)
                model = models.load(
                    args.model,
                    quantisation=quantisation,
                    parallel=parallel,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                    **options,
                )
    for note in notes:
        console.print(f"note: {note.message}", highlight=False, soft_wrap=True)
    leaves = jax.tree.leaves(nnx.state(model))
    jax.block_until_ready(leaves)
    size = sum(leaf.nbytes for leaf in leaves) / 1e9
    console.print(f"loaded {size:.2f} GB in {time.perf_counter() - begin:.1f} s", highlight=False)
    return model

"""Prints what each format costs a network: a small language model that is trained for it, or real ones.

python -m fdk_jax.quality                                          trains the small one
python -m fdk_jax.quality --network smollm2 --text FOLDER --out results/quality_networks.jsonl

A run on a real network goes on where it was stopped.
"""

import math
import os
import sys
from pathlib import Path

import jax
from absl import app, flags, logging

from fdk_jax import compilation_cache, usage
from fdk_jax.benchmark import environment, records
from fdk_jax.quality import curves, language_model, table
from fdk_jax.quality.measure import measure as measure_network

_PROGRAM = "fdk-jax quality"
_OUT = flags.DEFINE_string("out", "results/quality.jsonl", "JSONL file of the rows")
_FIGURE = flags.DEFINE_string("figure", "results/quality.svg", "figure of the training curves")
_SMALL = flags.DEFINE_bool("small", False, "the model of the tests: two minutes instead of ten")
_NETWORK = flags.DEFINE_enum(
    "network",
    None,
    [
        "smollm2",
        "smollm2-rotated",
        "minilm",
        "trained",
        "trained-1",
        "trained-huge",
        "trained-tiny",
    ],
    "a network of a package instead of the one that is trained; or a larger one, trained on --text",
)
_TEXT = flags.DEFINE_string("text", None, "file or folder of prose, for --network")
_INCLUDE = flags.DEFINE_string(
    "include", "", "with --network: formats that this finds, as 4 uniform"
)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "that --network trained-... is trained on; None for 40 million", lower_bound=1
)
_FROM = flags.DEFINE_bool("from_rows", False, "print the table of --out as it is; train nothing")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(path: Path, recipe: language_model.Recipe) -> None:
    """Writes the rows of all formats to a new file."""
    data = language_model.make_data(recipe)
    curve: list[float] = []

    def watch(step: int, loss: float) -> None:
        curve.append(round(loss, 4))
        if step % 50 == 0:
            _note(f"step {step} of {recipe.steps}: loss {loss:.3f} nats a character")

    model = language_model.train(recipe, data, watch=watch)
    shared = {
        "suite": "quality",
        "dtype": "bfloat16",
        "parameters": recipe.config.num_parameters,
        "entropy": data.entropy,
        "training_steps": recipe.steps,
        "tuning_steps": recipe.tuning_steps,
    }
    where = environment.describe(jax.devices()[0])
    unfinished = path.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)
    with records.Writer(unfinished) as writer:
        for row in table.rows(model, recipe, data, _note):
            extra = {"curve": curve} if row["method"] == "reference" else {}
            writer.write(records.make_row(where, shared, row, extra))
    os.replace(unfinished, path)


def main(argv: list[str]) -> None:
    """Measures (unless --from_rows) and prints."""
    if len(argv) > 1:
        usage.fail(_PROGRAM, f"unexpected arguments: {argv[1:]}")
    path = Path(_OUT.value)
    logging.set_verbosity(logging.WARNING)  # of the writer of checkpoints
    compilation_cache.keep()
    if _NETWORK.value:
        if not _TEXT.value or not Path(_TEXT.value).exists():
            usage.fail(_PROGRAM, f"--network needs a text that exists, got --text={_TEXT.value}")
        measure_network(
            _NETWORK.value, Path(_TEXT.value), path, _note, _INCLUDE.value, tokens=_TOKENS.value
        )
        return
    if not _FROM.value:
        measure(path, language_model.SMALL if _SMALL.value else language_model.Recipe())
    found = records.read([path])
    reference = next(row for row in found if row["method"] == "reference")
    print(
        f"Perplexity a character (KL divergence in nats) of {reference['parameters']:,} parameters;"
        f" bfloat16 {reference['perplexity']:.3f},"
        f" the language itself {math.exp(reference['entropy']):.3f}\n"
    )
    print(table.markdown(found, table.METHODS))
    print("\nVariants of error-corrected calibration\n")
    print(table.markdown(found, table.VARIANTS))
    curves.draw(found, Path(_FIGURE.value))


if __name__ == "__main__":
    app.run(main, flags_parser=usage.flags_parser(_PROGRAM))

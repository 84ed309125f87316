"""What a step of quantisation-aware training takes beside a step of the float model.

    python -m fdk_jax.quality.step_times --sizes large,medium --out results/training_steps.jsonl

The models of the scaling table at 16, 4, 2 and 1 bits, on random tokens, interleaved: a sample of each is one
program of 25 steps, in which codebooks are refreshed once. Time that something else takes from the device is
shared by all of them.
"""

import concurrent.futures
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from fdk_jax import compilation_cache
from fdk_jax.benchmark import environment, records
from fdk_jax.quality import scaling_runs
from fdk_jax.quality.scaling_model import best_attention

SUITE = "training"
WIDTHS = (16, 4, 2, 1)

_SIZES = flags.DEFINE_list("sizes", ["large", "medium", "small"], "of the scaling table")
_OUT = flags.DEFINE_string("out", "results/training_steps.jsonl", "JSONL file of the rows")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 12, "samples of each width", lower_bound=records.MIN_SAMPLES
)


def measure(plan: scaling_runs.Plan, size: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size: microseconds a step of each width, and of the float model beside it.

    Args:
        plan: its chunk is the number of steps in a sample.
        size: of `fdk_jax.quality.scaling_runs.SIZES`.
        rounds: samples of each width, after one that is dropped.
    """
    shape = scaling_runs.SIZES[size]
    plan = dataclasses.replace(
        plan, tokens=plan.context * plan.batch * plan.chunk * (rounds + 1), test_batches=1
    )
    rng = np.random.default_rng(plan.seed)
    windows = rng.integers(0, shape.vocabulary, (4 * plan.batch, plan.context), np.uint16)
    test = jnp.asarray(windows[None, : plan.batch])
    data = scaling_runs.Data(jnp.asarray(windows), test, 1.0, "random", shape.vocabulary)
    attention = best_attention(plan.batch, plan.context)

    def made(bits: int) -> scaling_runs.Run:
        return scaling_runs.Run(plan, shape, bits, data, attention, None)

    # Each is compiled for most of a minute, on a GPU.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = dict(zip(WIDTHS, pool.map(made, WIDTHS), strict=True))
    for _ in range(rounds + 1):
        for run in runs.values():
            run.advance()
    samples = {bits: [1e6 * s / plan.chunk for s in run.seconds[1:]] for bits, run in runs.items()}
    return [
        {
            "suite": SUITE, "name": f"{size} {bits}", "size": size, "bits": bits, "codebook": "kmeans",
            "group_size": scaling_runs.GROUP, "dtype": "bfloat16", "parameters": shape.parameters,
            "batch": plan.batch, "context": plan.context, "refresh_every": plan.refresh_every,
            "steps_a_sample": plan.chunk, "embedding_bits": plan.embedding_bits, "attention": attention,
            "float_samples_us": samples[16],
            "of_float": statistics.median(a / b for a, b in zip(taken, samples[16], strict=True)),
        } | records.statistics(taken)
        for bits, taken in samples.items()
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    """Writes the rows and prints the ratios."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if unknown := set(_SIZES.value) - set(scaling_runs.SIZES):
        raise app.UsageError(f"{sorted(unknown)} are no sizes ({', '.join(scaling_runs.SIZES)})")
    compilation_cache.keep()
    where = environment.describe(jax.devices()[0])
    plan = scaling_runs.Plan(chunk=25)
    with records.Writer(Path(_OUT.value)) as writer:
        for size in _SIZES.value:
            for row in measure(plan, size, _ROUNDS.value):
                writer.write(records.make_row(where, row))
                print(
                    f"{row['name']}: {row['median_us'] / 1000:.2f} ms a step,"
                    f" {row['of_float']:.3f} of the float step",
                    file=sys.stderr,
                    flush=True,
                )


if __name__ == "__main__":
    app.run(main)

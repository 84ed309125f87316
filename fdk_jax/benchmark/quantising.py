"""How long quantising a weight takes, by format: seconds for a billion weights.

    python -m fdk_jax.benchmark.quantising --n 4096 --k 4096 --out results/quantising.jsonl

on the default device, weights of a normal distribution in bfloat16. The first call of a format compiles, and
has a figure of its own; what is timed are the calls after it. Where the processors
are the device, their seconds are what counts, all of them together: other programs do not change these.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fdk_jax import usage
from fdk_jax.benchmark import environment, records
from fdk_jax.format.quantisation import quantise_array
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.learning.fitting import calibrate_array

SUITE = "quantising"
# What `quantise` does when nothing is said, and what is beside it in docs/quality.md.
FORMATS = (
    (8, "uniform", "absmax"),
    (4, "uniform", "absmax"),
    (4, "nf4", "absmax"),
    (4, "kmeans", "absmax"),
    (4, "nf4", "search"),
    (4, "kmeans", "search"),
    (2, "normal", "rms"),
    (2, "kmeans", "absmean"),
    (2, "kmeans", "search"),
    (1, "uniform", "absmean"),
)


def quantised(weight: Array, bits: int, codebook: str, scale: str) -> QuantisedTensor:
    """A weight [N, K] in a format, without a text."""
    make: Callable[..., QuantisedTensor] = calibrate_array if scale == "search" else quantise_array
    return jax.block_until_ready(make(weight, bits, codebook=codebook, scale=scale))


def measure(weight: Array, bits: int, codebook: str, scale: str, samples: int) -> dict[str, Any]:
    """The fields of a row.

    Args:
        weight: float [N, K].
        bits: 1, 2, 4 or 8.
        codebook: of `fdk_jax.quantise`.
        scale: of `fdk_jax.quantise`, or "search".
        samples: how many calls are timed.
    """
    start = time.perf_counter()
    made = quantised(weight, bits, codebook, scale)
    first = time.perf_counter() - start
    taken, processors = [], time.process_time()
    for _ in range(samples):
        start = time.perf_counter()
        quantised(weight, bits, codebook, scale)
        taken.append(1e6 * (time.perf_counter() - start))
    processors = (time.process_time() - processors) / samples
    wide = weight.astype(jnp.float32)
    error = jnp.linalg.norm(made.dequantise(jnp.float32) - wide) / jnp.linalg.norm(wide)
    found = records.statistics(taken)
    return {
        "suite": SUITE, "name": f"{bits} {codebook} {scale}", "bits": bits, "codebook": codebook,
        "scale": scale, "group_size": made.group_size, "dtype": str(weight.dtype), "n": weight.shape[0],
        "k": weight.shape[1], "first_seconds": first, "weight_rms_error": float(error),
        "seconds_per_billion": found["median_us"] * 1e3 / weight.size,
        "processor_seconds_per_billion": processors * 1e9 / weight.size,
    } | found  # fmt: skip


def main() -> None:
    """Writes the rows and prints them."""
    parser = usage.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=4096, help="rows of the weight")
    parser.add_argument("--k", type=int, default=4096, help="its columns")
    parser.add_argument("--samples", type=int, default=records.MIN_SAMPLES, help="calls timed")
    parser.add_argument("--out", type=Path, default=Path("results/quantising.jsonl"))
    arguments = parser.parse_args()
    where = environment.describe(jax.devices()[0])
    shape = arguments.n, arguments.k
    weight = (jax.random.normal(jax.random.key(0), shape) * 0.02).astype(jnp.bfloat16)
    with records.Writer(arguments.out) as writer:
        for form in FORMATS:
            row = records.make_row(where, measure(weight, *form, arguments.samples))
            writer.write(row)
            print(
                f"{row['name']}: {row['seconds_per_billion']:.2f} s a billion weights, first call"
                f" {row['first_seconds']:.2f} s, error of the weights {row['weight_rms_error']:.4f}",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()

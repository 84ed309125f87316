"""The table on real networks: a row for each format, on the disk before the next is measured."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fdk_jax.benchmark import environment, records
from fdk_jax.learning import compiling
from fdk_jax.quality.formats import FORMATS
from fdk_jax.quality.networks import NETWORKS, SEEDS, Network

SUITE = "networks"


def measure(
    name: str,
    text: Path,
    out: Path,
    note: Callable[[str], None],
    include: str = "",
    tokens: int | None = None,
) -> None:
    """Appends the rows of a network that `out` does not have yet.

    Args:
        name: of `NETWORKS`.
        text: file or folder of prose, see `fdk_jax.quality.prose`.
        out: a JSONL file.
        note: called with a word on what comes next.
        include: regular expression, searched in the names of formats.
        tokens: that a network is trained on, where it is trained here; None for as many as in the table.

    Raises:
        ValueError: `tokens` of a network that is not trained here.
    """
    if tokens is not None and not name.startswith("trained"):
        raise ValueError(f"{tokens=} is of networks that are trained here, not of {name!r}")
    known = records.read([out]) if out.exists() and out.stat().st_size else []
    done = {row["name"] for row in known if row["suite"] == SUITE}
    network = NETWORKS[name](text, **({} if tokens is None else {"tokens": tokens}))
    shared = {
        "suite": SUITE,
        "network": name,
        "dtype": "bfloat16",
        "text": network.text,
        "weights": int(sum(m.size for m in network.matrices().values())),
    }
    where = environment.describe(jax.devices()[0])
    # A GPU would round the operands of float32 products to 11 bits otherwise.
    with records.Writer(out) as writer, jax.default_matmul_precision("highest"):
        for row in rows(name, network, done, note, include):
            writer.write(records.make_row(where, shared, row))


def rows(
    name: str, network: Network, done: set[str], note: Callable[[str], None], include: str = ""
) -> Iterator[dict[str, Any]]:
    """One row for each format that is not `done`, by its measures on the test text of each seed."""
    if (reference := f"{name} reference") not in done:
        scores = [network.score(network.model, seed) for seed in SEEDS]
        yield {"name": reference, "bits": 16, "bytes_per_weight": 2.0} | _fields(network, scores)
    matrices = network.matrices()
    for form in FORMATS:
        trained = form.rounding == "trained"
        if (title := f"{name} {form.name}") in done or not re.search(include, form.name):
            continue
        note(title)
        moments = network.moments(form.seed) if form.needs_data else {}
        if trained:
            made = network.trained(form.width, form.trained_codebook)
        else:
            made = {key: form.apply(m, moments.get(key)) for key, m in matrices.items()}
        scores = [network.score(network.with_matrices(made), seed) for seed in SEEDS]
        size = sum(form.bytes_per_weight(m.shape) * m.size for m in matrices.values())
        yield {
            "name": title,
            "bits": form.bits,
            "group_size": form.group_size,
            "codebook": form.levels,
            "scale": form.scale,
            "rounding": form.rounding,
            "calibration_seed": form.seed if form.needs_data else None,
            "bytes_per_weight": size / sum(m.size for m in matrices.values()),
            "weight_error": _weight_error(matrices, made),
            "output_error": _output_error(matrices, made, network.moments(0)),
            **_fields(network, scores),
        }


def _fields(network: Network, scores: list[tuple[float, ...]]) -> dict[str, Any]:
    """Means over seeds, and each seed's."""
    fields: dict[str, Any] = {}
    for index, measure_ in enumerate(network.measures):
        values = [score[index] for score in scores]
        fields[measure_], fields[f"{measure_}_by_seed"] = float(np.mean(values)), values
    return fields


def _weight_error(matrices: dict[str, Array], made: dict[str, Array]) -> float:
    """Relative RMS error of all weights together."""
    parts = [
        jnp.stack([jnp.sum(jnp.square(made[key] - m)), jnp.sum(jnp.square(m))])
        for key, m in matrices.items()
    ]
    error, size = np.sum(np.asarray(parts, np.float64), axis=0)
    return math.sqrt(error / size)


def _output_error(
    matrices: dict[str, Array], made: dict[str, Array], moments: dict[str, Array]
) -> float:
    """Relative RMS error of the outputs for the float network's inputs, each layer given the same share."""
    ratios = []
    for key, m in matrices.items():
        error, size = np.asarray(_mean_squares(made[key] - m, m, moments[key]), np.float64)
        ratios.append(error / size)
    return math.sqrt(float(np.mean(ratios)))


@functools.partial(jax.jit, compiler_options=compiling.OPTIONS)
def _mean_squares(error: Array, matrix: Array, second: Array) -> Array:
    def mean_square(a: Array) -> Array:
        return jnp.sum(jnp.matmul(a, second) * a)

    return jnp.stack([mean_square(error), mean_square(matrix)])

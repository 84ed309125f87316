"""Which kernel a product takes, with which launch configuration, by the measured table; and its launch.

The table holds the fastest choice for each (bits, m, n, k) that was measured, with any codebook or with
evenly spaced values; a product takes the row of the next larger m and the nearest shape, rather of the same
device and kind of codebook. Tokens come before shapes, as the fastest kernel differs by tokens more than by
shapes: so a kernel that is better from some number of tokens on needs a row for the tokens below it, too
(`tests/test_table.py`). Rows are of a class of architectures, those with the same instructions; numbers of
programs are multiples of the multiprocessors. Nothing is measured on import or on a first call: rows come with
the package, and `tuning` measures more. A row without "us" follows a neighbour that was measured.
"""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import (
    dequantise,
    integer,
    integer_tokens,
    matvec,
    mma,
    mosaic_integers,
    mosaic_matmul,
    plain,
    ring,
    wgmma,
)
from pallas_kernels.case import Arrays, Case
from pallas_kernels.target import H200, Target, current

# In PTX. The configurations of `integer_tokens` are also ones of `integer`: it comes first.
KERNELS = {
    "matvec": matvec,
    "integer_tokens": integer_tokens,
    "integer": integer,
    "mma": mma,
    "wgmma": wgmma,
}
_CONFIGURED = KERNELS | {"mosaic": mosaic_matmul}
Config = matvec.Config | integer.Config | mma.Config | wgmma.Config | mosaic_matmul.Config
_SHIPPED = Path(__file__).with_name("tuned.json")
FEW = 16  # rows of x that a program of `matvec` takes at most
_MAX_DECODED_AGAIN = 128  # rows of x for which a kernel may decode the weight again and again
# A row of another device, or of another kind of codebook, counts like one of a shape twice as large.
ANOTHER = math.log(2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The choice for one product.

    Attributes:
        kernel: a key of `KERNELS`; "mosaic" or "mosaic_integers"; "dequantise" (then dot); "plain"; "xla" where
            no kernel runs.
        config: launch configuration of a kernel of `KERNELS` or of a "mosaic" one, else None.
        reason: why, in words.
    """

    kernel: str
    config: Config | None
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}{'' if self.config is None else f' {self.config}'}: {self.reason}"


def cache_file() -> Path:
    """Where the search writes and a process looks for rows of its own; FDK_JAX_TUNED overrides."""
    default = Path.home() / ".cache" / "fdk_jax" / "tuned.json"
    return Path(os.environ.get("FDK_JAX_TUNED", default))


def plan(
    m: int,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    uniform: bool,
    dtype: Any,
    target: Target | None = None,
) -> Plan:
    """The kernel and configuration that a product takes, and why. Runs nothing.

    Args:
        m: rows of x.
        bits: width of a code.
        group_size: weights a scale.
        out_features: N.
        in_features: K.
        uniform: whether the values of the codebook are evenly spaced.
        dtype: of x.
        target: the GPU; None for the one at hand.
    """
    dtype = jnp.dtype(dtype)
    case = Case(
        *(max(m, 1), out_features, in_features, bits, group_size, 1),
        *(dtype, dtype, None, dtype, uniform),
    )
    return choose(case, target or current())


def choose(case: Case, target: Target) -> Plan:
    """As `plan`, from everything that is static about a product."""
    if case.arithmetic != "exact":
        config, reason = mosaic_integers.choose(case, target)
        if config is not None:
            return Plan("mosaic_integers", config, f"8-bit integers, for {target.architecture}")
        exact = choose(dataclasses.replace(case, arithmetic="exact"), target)
        return dataclasses.replace(exact, reason=f"{exact.reason}; no integers, since {reason}")
    reason = matvec.unsupported_reason(case, matvec.Config(tiles=1, warps=8), target)
    if reason is not None and target.has_pallas:
        return Plan("plain", None, f"ordinary Pallas operations, because {reason}")
    if reason is not None:
        without = "" if target.triton else ", and Pallas has no Triton lowering"
        return Plan("xla", None, f"dequantises, then dots, because {reason}{without}")
    rows = nearest_rows(case, target)
    if all(row["bits"] != case.bits for row in table()):
        why = f"untuned for {target.architecture}: no product of {case.bits} bits has been measured"
        if case.m > _MAX_DECODED_AGAIN:
            return Plan("dequantise", None, f"then dot, {why}")
        config = portable(case, target)
        return Plan(kernel_of(config), config, why)
    if not rows:
        why = "then dot: more tokens than any for which decoding again paid"
        return Plan("dequantise", None, f"{why}, for {target.architecture}")
    reason = "no kernel of the table runs it"
    for row in rows:
        why = (
            f"fastest of those measured at {row['m']} x {row['n']} x {row['k']} on {row['device']},"
            f" for {target.architecture}"
        )
        if row["kernel"] == "dequantise":
            return Plan("dequantise", None, f"then dot, {why}")
        config = fit(case, configuration(row, target), target)
        if config is None:
            continue
        reason = unsupported_reason(case, config, target)
        if reason is None:
            return Plan(row["kernel"], config, why)
    if target.has_wgmma and case.m > _MAX_DECODED_AGAIN:
        return Plan("dequantise", None, f"then dot, since {reason}")
    config = portable(case, target)
    return Plan(kernel_of(config), config, f"untuned for {target.architecture}, since {reason}")


def portable(case: Case, target: Target) -> matvec.Config | mma.Config:
    """What runs on every GPU, as good a guess as there is."""
    smallest = fit(case, matvec.Config(tiles=1, warps=8), target)
    if target.has_wgmma:
        return smallest
    if case.m > FEW:
        config = mma.Config(next((t for t in (32, 48) if case.m <= t), 64), 2, 2, 4, 2, 2)
        config = config.for_groups(case)
        return smallest if unsupported_reason(case, config, target) else config
    diagonal = case.bits < 4 and case.m == 1
    config = matvec.Config(
        tiles=1,
        warps=8 if case.bits < 4 else 16,
        stages=8 // case.planes if diagonal else 1,
        diagonal=diagonal,
    )
    config = fit(case, config, target)
    return smallest if unsupported_reason(case, config, target) else config


def configuration(row: dict, target: Target) -> Any:
    """The launch configuration of a row of the table on a GPU.

    Programs are multiples of the multiprocessors; in rows of older files of 132, and consumers are workers.
    """
    values: dict[str, Any] = dict(row["config"])
    if "workers" in values:
        values["consumers"] = values.pop("workers")
    if "programs_each" in values:
        values["programs"] = values.pop("programs_each") * target.multiprocessors
    elif values.get("programs"):
        values["programs"] = values["programs"] * target.multiprocessors // H200.multiprocessors
    return _CONFIGURED[row["kernel"]].Config(**values)


def fit(case: Case, config: Any, target: Target) -> Any:
    """A configuration with what follows from the case; None if no configuration of its kernel runs it."""
    if isinstance(config, mosaic_matmul.Config):
        return mosaic_matmul.fit(case, config, target)
    if isinstance(config, matvec.Config):
        columns = 1 if case.m <= FEW // 2 else FEW // 8
        diagonal, programs = (config.diagonal, config.programs) if case.m == 1 else (False, 0)
        cluster = config.cluster if target.has_clusters else 1
        return dataclasses.replace(
            config, columns=columns, diagonal=diagonal, programs=programs, cluster=cluster
        )
    if isinstance(config, ring.Config):
        return integer.for_groups(case, config, target)
    return config.for_groups(case) if isinstance(config, mma.Config) else config


def unsupported_reason(case: Case, config: Any, target: Target) -> str | None:
    """Why a configuration does not run a case, or None."""
    return _CONFIGURED[kernel_of(config)].unsupported_reason(case, config, target)


def kernel_of(config: Any) -> str:
    """The kernel to which a configuration belongs."""
    return next(name for name, module in _CONFIGURED.items() if isinstance(config, module.Config))


def class_of(architecture: str) -> str:
    """Architectures whose kernels have the same instructions."""
    number = int(architecture.removeprefix("sm_"))
    return "wgmma" if number == 90 else "bulk copies" if number > 90 else "mma"


def nearest_rows(case: Case, target: Target) -> list[dict]:
    """The rows to follow, best first; none if the product has more tokens than all rows."""
    own = class_of(target.architecture)
    classes = {"wgmma": ("wgmma",), "mma": ("mma",), "bulk copies": ("bulk copies", "mma")}[own]
    rows = [row for row in table() if row["bits"] == case.bits]
    rows = [row for row in rows if class_of(architecture_of(row)) in classes] or rows
    m = min((row["m"] for row in rows if row["m"] >= case.m), default=None)

    def distance(row: dict) -> float:
        shape = abs(math.log(row["n"] / case.n)) + abs(math.log(row["k"] / case.k))
        others = (row["device"] != target.kind) + (is_uniform(row) != case.uniform)
        others += 2 * (class_of(architecture_of(row)) != own)
        return shape + ANOTHER * others

    return sorted((row for row in rows if row["m"] == m), key=distance)


@functools.cache
def table() -> list[dict]:
    rows = {}
    for path in (_SHIPPED, cache_file()):
        if path.is_file():
            for row in json.loads(path.read_text(encoding="utf-8")):
                rows[row_key(row)] = row
    return list(rows.values())


def row_key(row: dict) -> tuple:
    return (*(row[name] for name in ("device", "bits", "m", "n", "k")), is_uniform(row))


def is_uniform(row: dict) -> bool:
    return row.get("uniform", False)


def architecture_of(row: dict) -> str:
    return row.get("architecture", H200.architecture)


def launch(
    case: Case,
    kernel: str,
    config: Any,
    arrays: Arrays,
    target: Target,
    others: tuple[Array, ...] = (),
) -> tuple[Array, ...]:
    """Runs a product with a kernel and configuration of a `Plan` (not "xla"); see `Case.launch`."""
    if kernel == "plain":
        return (plain.matmul(case, arrays, interpret=False),)
    if kernel == "dequantise":
        return (dequantise.matmul(case, arrays, target),)
    if kernel == "mosaic":
        return (mosaic_matmul.matmul(case, config, arrays),)
    if kernel == "mosaic_integers":
        return (mosaic_integers.matmul(case, config, arrays),)
    module = KERNELS[kernel]
    return case.launch(
        module.source(case, config, target),
        arrays,
        target,
        grid=module.grid(case, config),
        warps=config.warps,
        cluster=config.cluster,
        name=f"fdk_{kernel}",
        others=others,
        squares=module.squares(case, config, target) if case.residual else 0,
    )

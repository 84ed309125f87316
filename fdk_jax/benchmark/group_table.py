"""The table of speeds by group size: a byte's time over that of a weight with groups of 64."""

from collections.abc import Iterable
from typing import Any

from fdk_jax.benchmark import table

_BASE = 64
_LEAST = 4  # sizes of one product in one run, for a line

Row = dict[str, Any]


def group_sizes(found: Iterable[Row]) -> str:
    """Microseconds of one-token products, and in brackets a byte's time over that in groups of 64."""
    chosen = [
        r
        for r in found
        if r["suite"] == "kernels" and r["m"] == 1 and r["bits"] < 16 and r["codebook"] == "kmeans"
    ]
    runs: dict[tuple, dict[int, Row]] = {}
    for r in chosen:
        # Products of a shape that are sampled in turn have one date.
        key = r["device"], r["commit"], r["k"], r["n"], r["bits"], r.get("date")
        runs.setdefault(key, {})[r["group_size"]] = r
    runs = {key: by for key, by in runs.items() if len(by) >= _LEAST and _BASE in by}
    sizes = sorted({size for by in runs.values() for size in by})
    lines = []
    for (_, _, k, n, bits, _), by in sorted(
        runs.items(), key=lambda item: (-item[0][2], -item[0][4])
    ):
        cells = [f"{k} x {n}", str(bits)]
        for size in sizes:
            row = by.get(size)
            cells.append(
                "" if row is None else f"{row['median_us']:.1f} ({_relative(row, by[_BASE]):.2f})"
            )
        lines.append(cells)
    if not lines:
        return "(No rows yet.)"
    rows = [row for by in runs.values() for row in by.values()]
    head = ["k x n", "bits", *(f"groups of {size}" for size in sizes)]
    return f"{rows[0]['device']}, {table.commits(rows)}:\n\n{table.markdown(head, lines)}"


def _relative(row: Row, base: Row) -> float:
    return row["median_us"] / row["bytes_rw"] / (base["median_us"] / base["bytes_rw"])

"""The table of a sweep over tokens and shapes: how many times as long as a quantised product bfloat16 takes.

Both are of one commit.
"""

from collections.abc import Iterable
from typing import Any

from fdk_jax.benchmark import table

_DENSE = 16
_GROUP = 64
# Microseconds that the start of a sample's program takes, alone and for each copy of the weight, and how much
# of the two samples of a ratio they may differ by: samples of 5 ms beside those of 60 (H200, 2026-12-01).
_START_US, _START_A_COPY_US, _APART = 450, 12, 0.03

Row = dict[str, Any]


def speed_ups(found: Iterable[Row]) -> str:
    """bfloat16's time over each width's, by tokens and shape, of GPUs' own kernels and fitted codebooks."""
    chosen = [r for r in found if r["suite"] == "kernels" and r.get("dtype") == "bfloat16"]
    chosen = [r for r in chosen if r.get("driver") and " as " not in r["device"]]
    texts = []
    for device in sorted({r["device"] for r in chosen}):
        here = [r for r in chosen if r["device"] == device]
        here.sort(key=lambda r: r["date"])  # of several the newest
        of_run = {(*_shape(r), r["commit"]): r for r in here if r["bits"] == _DENSE}
        ours: dict[tuple, Row] = {}
        dense: dict[tuple, Row] = {}
        for r in here:
            if _counts(r) and (base := of_run.get((*_shape(r), r["commit"]))):
                ours[*_shape(r), r["bits"]], dense[*_shape(r), r["bits"]] = r, base
        widths = sorted({key[-1] for key in ours}, reverse=True)
        sizes = sorted({key[:2] for key in ours}, key=lambda s: (-s[0] * s[1], -s[0]))
        lines = []
        for m in sorted({key[2] for key in ours}):
            cells = [str(m)]
            for size in sizes:
                keys = [(*size, m, bits) for bits in widths]
                ratios = [_ratio(dense[key], ours[key]) if key in ours else "-" for key in keys]
                cells.append(" / ".join(ratios) if any(key in ours for key in keys) else "")
            lines.append(cells)
        if lines:
            rows = [*ours.values(), *dense.values()]
            head = ["tokens", *(f"{k} x {n}" for k, n in sizes)]
            names = " / ".join(map(str, widths))
            title = f"{device}, {table.commits(rows)}, for {names} bits"
            texts.append(f"{title}:\n\n{table.markdown(head, lines)}")
    return "\n\n".join(texts) or "(No rows yet.)"


def _shape(row: Row) -> tuple[int, int, int]:
    return row["k"], row["n"], row["m"]


def _counts(row: Row) -> bool:
    fitted = row.get("codebook") == "kmeans" and row["group_size"] == _GROUP
    return fitted and row["backend"] == "pallas" and row["arithmetic"] == "exact"


def _ratio(base: Row, row: Row) -> str:
    mark = "~" if abs(_start(base) - _start(row)) > _APART else ""
    return f"{base['median_us'] / row['median_us']:.2f}{mark}"


def _start(row: Row) -> float:
    """The share of a row's samples that the start of their programs takes."""
    if not row.get("calls"):
        return 0.0
    return (_START_US + _START_A_COPY_US * row["copies"]) / (row["calls"] * row["median_us"])

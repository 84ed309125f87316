"""Rows as a table for people."""

import math
from collections.abc import Iterable, Sequence
from string import ascii_lowercase
from typing import Any

_DENSE = (16, 32)


def speed_up(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """How much faster a row is than the fastest unquantised product of its shape and device."""
    if not row.get("median_us"):
        return None
    key = ("m", "k", "n", "device", "threads")
    dense = [
        r["median_us"]
        for r in rows
        if r["bits"] in _DENSE and r["median_us"] and all(r[k] == row[k] for k in key)
    ]
    return min(dense) / row["median_us"] if dense else None


def share_of_bound(row: dict[str, Any]) -> float | None:
    """What the device could attain at best as a share of the measured time."""
    if not row.get("median_us") or not row.get("bound_us"):
        return None
    return row["bound_us"] / row["median_us"]


def bandwidth(row: dict[str, Any]) -> float | None:
    """GB/s that the bound of a row stands on; see `probes.bound`. A row with threads is a CPU's."""
    measured = [row["read_gb_s"]] if row["threads"] else [row["read_gb_s"], row["copy_gb_s"]]
    return max((v for v in measured if v), default=None)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a run: kernels or models, whatever the rows are of."""
    blocks = []
    kernels = [r for r in rows if r["suite"] == "kernels"]
    models = [r for r in rows if r["suite"] == "models"]
    if kernels:
        blocks.append(_kernels(kernels))
    if models:
        blocks.append(_models(models))
    return "\n\n".join(blocks)


def _kernels(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "case", "median us", "p95 us", "GB/s", "GFLOP/s", "of bound", "vs dense", "rel. error", ""
    )  # fmt: skip
    body = []
    for row in rows:
        median = row["median_us"]
        body.append(
            (
                row["name"],
                _number(median, ".2f"),
                _number(row["p95_us"], ".2f"),
                _number(median and row["bytes_rw"] / median / 1e3, ".1f"),
                _number(median and row["ops"] / median / 1e3, ".1f"),
                _number(share_of_bound(row), ".0%"),
                _number(speed_up(row, rows), ".2f") + "x" * (speed_up(row, rows) is not None),
                _number(row["rel_rms_error"], ".1e"),
                "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}",
            )
        )
    lines = [_aligned(head, body), *_devices(rows)]
    lines.append(
        "vs dense: against the fastest unquantised product of the same shape in these rows"
    )
    return "\n".join(lines)


def _models(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "case", "tokens/s", "ms a step", "GB/s", "of bound", "first token ms", "of bound", "peak GB", ""
    )  # fmt: skip
    body = []
    for row in rows:
        median = row["median_us"]
        peak, first = row.get("peak_bytes"), row.get("first_token_us")
        bound = row.get("first_token_bound_us")
        body.append(
            (
                row["name"],
                _number(row.get("tokens_per_s"), ".1f"),
                _number(median and median / 1e3, ".3f"),
                _number(median and row["bytes_rw"] and row["bytes_rw"] / median / 1e3, ".0f"),
                _number(share_of_bound(row), ".0%"),
                _number(first and first / 1e3, ".2f"),
                _number(first and bound and bound / first, ".0%"),
                _number(peak and peak / 1e9, ".1f"),
                "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}",
            )
        )
    return "\n".join([_aligned(head, body), *_devices(rows)])


def _devices(rows: Sequence[dict[str, Any]]) -> list[str]:
    seen = {}
    for row in rows:
        if row["read_gb_s"]:
            text = row["device"]
            text += f", {row['threads']} threads" if row["threads"] else ""
            text += f": measured read {row['read_gb_s']:.0f} GB/s, copy {row['copy_gb_s']:.0f} GB/s"
            if rate := row.get("matmul_gflop_s"):
                text += f", {row['dtype']} matmul {rate:.0f} GFLOP/s"
            seen[text] = None
    return list(seen)


def _number(value: float | None, spec: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, spec)


def _aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    last = len(head) - 1

    def text(line: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i in (0, last) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([text(head), "-" * len(text(head)), *map(text, body)])


def commits(found: Iterable[dict[str, Any]]) -> str:
    """The commits that rows name, by their first characters."""
    names = sorted({str(r["commit"])[:7] for r in found})
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


class Lettered:
    """The commits of the rows of one table: with several of them each row shows a letter."""

    def __init__(self, shown: Iterable[dict[str, Any]]) -> None:
        """Of the rows that the table shows, in their order."""
        names = list(dict.fromkeys(str(r["commit"])[:7] for r in shown))
        self._letters = {} if len(names) < 2 else dict(zip(names, ascii_lowercase, strict=False))
        self._only = ", ".join(names)

    def __str__(self) -> str:
        """What stands above the table."""
        if not self._letters:
            return f"commit {self._only}"
        return "commits " + ", ".join(f"{name} ({at})" for name, at in self._letters.items())

    def of(self, row: dict[str, Any]) -> str:
        """What follows a row's figures."""
        letter = self._letters.get(str(row["commit"])[:7])
        return f" {letter}" if letter else ""


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])

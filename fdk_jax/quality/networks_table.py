"""The table on real networks, from its rows."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

# Columns: (scale, rounding) and their headings, in the order of the table.
_COLUMNS = {
    ("absmax", "nearest"): "absmax",
    ("absmean", "nearest"): "absmean",
    ("rms", "nearest"): "rms",
    ("signed", "nearest"): "signed",
    ("search", "nearest"): "search",
    ("search", "weighted"): "search, weighted",
    ("search", "nearest-learned"): "search, weighted, learned",
    ("absmax", "corrected"): "absmax, corrected",
    ("search", "corrected"): "search, corrected",
    ("search", "descended"): "search, corrected, swept",
    ("search", "learned"): "search, corrected, swept, learned",
    ("auto", "trained"): "trained",
}
_TRAININGS = {"trained": ("trained", "trained-1")}  # of one recipe, by seed: one table
_PUBLISHED_GROUP = 128
_PUBLISHED = {"absmax": "`sym`, `actorder`", "search": "`sym`, `actorder`, `mse`"}


def markdown(found: Iterable[Row], network: str) -> str:
    """A line for each width and levels, a column for each way to scale and round.

    Args:
        found: rows of `fdk_jax.quality.measure`.
        network: of `fdk_jax.quality.networks.NETWORKS`. Language models: perplexity (divergence in nats a
            token); "minilm": thousandths of dissimilarity. "trained" is the mean over its two seeds.
    """
    names = _TRAININGS.get(network, (network,))
    here = [r for r in found if r["suite"] == "networks" and r["network"] in names]
    formats = [r for r in here if r["bits"] < 16 and not r["calibration_seed"]]
    formats = [r for r in formats if r["group_size"] != _PUBLISHED_GROUP]
    if not formats:
        return "(No rows yet.)"
    cells: dict[tuple, dict[str, Row]] = {}
    for r in formats:
        scale = "auto" if r["rounding"] == "trained" else r["scale"]
        key = (r["bits"], _levels(r), scale, r["rounding"])
        cells.setdefault(key, {})[r["network"]] = r
    count = len({r["network"] for r in formats})
    used = [c for c in _COLUMNS if any(key[2:] == c for key in cells)]
    lines = [
        f"| bits | levels | bytes a weight | {' | '.join(_COLUMNS[c] for c in used)} |",
        "|---" * (len(used) + 3) + "|",
    ]
    for bits, levels in sorted(dict.fromkeys(key[:2] for key in cells), key=lambda k: -k[0]):
        columns = [[*cells.get((bits, levels, *c), {}).values()] for c in used]
        size = next(rows[0]["bytes_per_weight"] for rows in columns if rows)
        texts = [_cell(rows, count) if rows else "" for rows in columns]
        lines.append(f"| {bits} | {levels} | {size:.3f} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", _caption(here, formats, [*cells.values()])])


def published(found: Iterable[Row]) -> str:
    """Error correction and a published GPTQ, in groups of 128: a line for each of both, a column a network."""
    rows = [r for r in found if r["suite"] == "networks" and r["group_size"] == _PUBLISHED_GROUP]
    if not rows:
        return "(No rows yet.)"
    networks = list(dict.fromkeys(r["network"] for r in rows))
    lines = [
        f"| levels | | bytes a weight | {' | '.join(networks)} |",
        "|---" * (len(networks) + 3) + "|",
    ]
    cells = {(r["codebook"], r["scale"], r["rounding"], r["network"]): r for r in rows}
    for levels, scale, rounding in dict.fromkeys(key[:3] for key in cells):
        here = [cells.get((levels, scale, rounding, n)) for n in networks]
        size = next(r["bytes_per_weight"] for r in here if r)
        what = _PUBLISHED[scale] if levels == "published" else _COLUMNS[scale, rounding]
        name = "auto-gptq's integers" if levels == "published" else levels
        texts = [_cell([r]) if r else "" for r in here]
        lines.append(f"| {name} | {what} | {size:.3f} | {' | '.join(texts)} |")
    commits = sorted({str(r["commit"])[:7] for r in rows})
    return "\n".join([*lines, "", f"(commit{'s' * (len(commits) > 1)} {', '.join(commits)})"])


def _levels(row: Row) -> str:
    """The name of a row's levels in the library: those fitted to quotients had "kmeans" to themselves once."""
    if row["codebook"] == "kmeans-weights":
        return "kmeans"
    if row["codebook"] == "kmeans" and row["scale"] != "search":
        return "kmeans-quotients"
    return row["codebook"]


def _cell(rows: list[Row], count: int = 1) -> str:
    """The mean over networks; marked if these are fewer than `count`."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    mark = "\\*" * (len(rows) < count)
    if "kl" in rows[0]:
        return f"{math.exp(mean('loss')):.4g} ({mean('kl'):.3g}){mark}"
    thousandths = 1000 * mean("dissimilarity")
    return f"{thousandths:.0f}" if thousandths >= 100 else f"{thousandths:.3g}"


def _spread(pairs: Iterable[Sequence[float]]) -> float:
    return max((abs(a - b) / (a + b) for a, b in pairs if a + b), default=0.0)


def _caption(here: list[Row], formats: list[Row], cells: list[dict[str, Row]]) -> str:
    key = "kl" if "kl" in formats[0] else "dissimilarity"
    texts = _spread(r[f"{key}_by_seed"] for r in formats)
    text = f"The two texts differ from their mean by at most {texts:.0%} ({key})"
    pairs = [[r[key] for r in rows.values()] for rows in cells if len(rows) == 2]
    if pairs:
        text += f", the two trainings by {_spread(pairs):.0%}"
    references = [r["loss"] for r in here if r["bits"] == 16 and "loss" in r]
    if references:
        values = " and ".join(f"{math.exp(loss):.4g}" for loss in references)
        text += f"; bfloat16 has a perplexity of {values}"
    if pairs and len(pairs) < len(cells):
        text += ". \\* one training only"
    commits = sorted({str(r["commit"])[:7] for r in formats})
    return f"{text}. Commit{'s' * (len(commits) > 1)} {', '.join(commits)}."

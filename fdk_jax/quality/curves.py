"""The figure of training curves."""

import os
from pathlib import Path
from typing import Any

import numpy as np

_SMOOTH = 8  # steps


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draws loss against step: training, then tuning at each width. Needs matplotlib (extra "plot").

    Args:
        found: rows of `fdk_jax.quality.table`.
        path: of the figure; its suffix is the format.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "fdk-jax[plot]"') from error
    cells = {(row["bits"], row["method"]): row for row in found}
    reference = cells[16, "reference"]
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = len(reference["curve"])
    axes.plot(
        range(steps), _smooth(reference["curve"]), color="black", label="training, not quantised"
    )
    for (bits, method), row in sorted(cells.items(), key=lambda cell: -cell[0][0]):
        if method != "qat":
            continue
        name = f"{bits} bits" if bits < 16 else "not quantised, as many steps more"
        curve = _smooth(row["curve"])
        (line,) = axes.plot(np.arange(steps, steps + len(curve)), curve, label=name)
        for other, marker in (("kmeans", "x"), ("corrected", "o")):
            if (bits, other) in cells:
                loss = float(np.log(cells[bits, other]["perplexity"]))
                axes.plot([steps], [loss], marker, color=line.get_color())
    axes.axhline(reference["entropy"], color="grey", linestyle=":", label="entropy of the language")
    axes.set(
        xlabel="step", ylabel="loss (nats a character)", ylim=(0.25, 3.0),
        title="Quantisation-aware training after training (x: k-means, o: with error correction)",
    )  # fmt: skip
    axes.legend(fontsize=8)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format=path.suffix.lstrip("."))
    os.replace(unfinished, path)


def _smooth(curve: list[float]) -> np.ndarray:
    """Running means over at most `_SMOOTH` steps."""
    sums = np.cumsum([0.0, *curve])
    ends = np.arange(1, len(curve) + 1)
    starts = np.maximum(0, ends - _SMOOTH)
    return (sums[ends] - sums[starts]) / (ends - starts)

"""Figures from rows: speed-up and roofline of kernels, tokens a second of models."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdk_jax.benchmark import table

_COLOURS = {1: "#7b3294", 2: "#0571b0", 4: "#1a9850", 8: "#e08214", 16: "#555555", 32: "#aaaaaa"}
_MARKERS = {"pallas": "o", "cpu": "s", "xla": "^"}

Rows = Sequence[dict[str, Any]]


def draw(rows: Rows, stem: Path) -> list[Path]:
    """Draws every figure that the rows have data for, as PNG files whose names start with `stem`.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: no row was measured.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the figures need matplotlib: pip install 'fdk-jax[plot]'"
        ) from error
    matplotlib.use("Agg")
    measured = [r for r in rows if r["status"] == "ok" and r["median_us"]]
    kernels = [r for r in measured if r["suite"] == "kernels"]
    models = [r for r in measured if r["suite"] == "models" and r.get("tokens_per_s")]
    if not kernels and not models:
        raise ValueError("there is no measured row to draw")
    figures = {}
    if kernels:
        figures["speedup"] = _speed_up(kernels)
        figures["roofline"] = _roofline(kernels)
    if models:
        figures["models"] = _models(models)
    paths = []
    for name, figure in figures.items():
        path = stem.with_name(f"{stem.name}-{name}.png")
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, dpi=150, bbox_inches="tight", format="png")
        partial.replace(path)
        paths.append(path)
    return paths


def _grid(count: int, width: float = 5.0, height: float = 3.8):
    from matplotlib.figure import Figure

    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes


def _groups(rows: Rows, *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row.get(k) for k in keys)].append(row)
    return dict(groups)


def _where(device: str, threads: int | None) -> str:
    return f"{device}, {threads} threads" if threads else device


def _speed_up(rows: Rows):
    """Time of the fastest unquantised product over the time of each, by the number of tokens."""
    panels = _groups(rows, "device", "threads", "k", "n")
    # Where a GPU runs the kernels of another there is no unquantised product to compare with.
    compared = {at: panel for at, panel in panels.items() if any(r["bits"] >= 16 for r in panel)}
    figure, axes = _grid(max(1, len(compared)))
    for ax, ((device, threads, k, n), panel) in zip(axes, compared.items(), strict=False):
        lines = _groups(panel, "bits", "backend", "codebook", "dtype", "group_size", "arithmetic")
        for (bits, backend, codebook, dtype, group, arithmetic), line in lines.items():
            points = sorted((r["m"], s) for r in line if (s := table.speed_up(r, panel)))
            if not points or bits in (16, 32):
                continue
            label = f"{bits} bit {backend} {codebook} g{group} {dtype}"
            label += "" if arithmetic in (None, "exact") else f" {arithmetic}"
            style = "-" if codebook == "uniform" else "--"
            ax.plot(
                *zip(*points, strict=True), style, label=label, color=_COLOURS.get(bits),
                marker=_MARKERS.get(backend, "x"), markersize=4,
            )  # fmt: skip
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="tokens m", ylabel="speed-up over dense")
        ticks = _apart({r["m"] for r in panel})
        ax.set_xticks(ticks, [str(t) for t in ticks], minor=False)
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_formatter("{x:g}x")
        ax.yaxis.set_minor_formatter("{x:g}x")
        ax.set_title(f"{_where(device, threads)}: k = {k}, n = {n}", fontsize=9)
        ax.grid(alpha=0.3, which="both")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6)
    return figure


def _apart(numbers: set[int]) -> list[int]:
    """Those whose names do not overlap on a logarithmic axis, ascending."""
    kept: list[int] = []
    for number in sorted(numbers):
        if not kept or number >= 1.3 * kept[-1]:
            kept.append(number)
    return kept


def _roofline(rows: Rows):
    """Attained operations a second against operations a byte, under the measured roof."""
    panels = _groups(rows, "device", "threads", "dtype")
    figure, axes = _grid(len(panels))
    for ax, ((device, threads, dtype), panel) in zip(axes, panels.items(), strict=False):
        for (bits, backend), points in sorted(_groups(panel, "bits", "backend").items()):
            ax.scatter(
                [r["ops"] / r["bytes_rw"] for r in points],
                [r["ops"] / r["median_us"] / 1e3 for r in points],
                s=14, label=f"{bits} bit {backend}", color=_COLOURS.get(bits),
                marker=_MARKERS.get(backend, "x"),
            )  # fmt: skip
        bandwidth = max(table.bandwidth(r) or 0 for r in panel)
        rate = max(r.get("matmul_gflop_s") or 0 for r in panel)
        if bandwidth and rate:
            low, high = (f(r["ops"] / r["bytes_rw"] for r in panel) for f in (min, max))
            corner = rate / bandwidth
            xs = sorted({min(low, corner) / 2, corner, max(high, corner) * 2})
            ax.plot(xs, [min(x * bandwidth, rate) for x in xs], color="black", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
        ax.set_title(f"{_where(device, threads)}: {dtype}", fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=6)
    return figure


def _models(rows: Rows):
    """Tokens a second by the size of the model, a panel a batch size, the width as colour."""
    panels = _groups(rows, "device", "threads", "batch")
    figure, axes = _grid(len(panels), width=3.6)
    for ax, ((device, threads, batch), panel) in zip(axes, panels.items(), strict=False):
        sizes = list(dict.fromkeys(r["model"] for r in panel))
        lines = _groups([{"devices": 1} | r for r in panel], "bits", "backend", "devices")
        width = 0.8 / len(lines)
        for i, ((bits, backend, count), line) in enumerate(sorted(lines.items(), reverse=True)):
            several = f" on {count}" if count > 1 else ""
            ax.bar(
                [sizes.index(r["model"]) + (i + 0.5) * width - 0.4 for r in line],
                [r["tokens_per_s"] for r in line],
                width, label=f"{bits} bit {backend}{several}", color=_COLOURS.get(bits),
            )  # fmt: skip
        # Long names stand side by side.
        names = [Path(size.removeprefix("custom-")).name.replace("-", "\n") for size in sizes]
        ax.set_xticks(range(len(sizes)), names, fontsize=7)
        ax.set_ylabel("tokens/s")
        ax.set_title(f"{_where(device, threads)}: batch {batch}", fontsize=9)
        ax.legend(fontsize=6)
    return figure

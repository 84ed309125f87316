"""The scaling table, the curves fitted to it, and their figure, from rows."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fdk_jax.benchmark import records

Row = dict[str, Any]
_WIDTHS = (16, 8, 4, 2, 1)
_MEGABYTE = 1e6


def chosen(rows: Iterable[Row]) -> list[Row]:
    """The rows of the table, the larger models first; the last row of each name counts."""
    return [row for row in _all(rows) if row["name"] == f"{row['size']} {row['bits']}"]


def _all(rows: Iterable[Row]) -> list[Row]:
    found = {r["name"]: r for r in rows if r["suite"] == "scaling" and r["loss"] is not None}
    return sorted(found.values(), key=lambda row: (-row["parameters"], -row["bits"], row["name"]))


def variants(rows: Iterable[Row]) -> str:
    """Rows of other seeds and other refreshes, beside those of the table."""
    found = _all(rows)
    plain = {row["name"]: row for row in chosen(found)}
    lines = [
        "| weights of the layers | bits | | loss (nats a token) | more than in the table |",
        "|---" * 5 + "|",
    ]
    for row in found:
        base = plain.get(name := f"{row['size']} {row['bits']}")
        if base is not None and base is not row:
            what = row["name"].removeprefix(name).strip().replace("_", " ")
            size, change = f"{row['parameters'] / 1e6:.1f}M", row["loss"] - base["loss"]
            lines.append(f"| {size} | {row['bits']} | {what} | {row['loss']:.4f} | {change:+.4f} |")
    return "\n".join(lines) if len(lines) > 2 else "(No rows yet.)"


def fit(found: list[Row]) -> dict[int, tuple[float, float, float]]:
    """(a, b, c) of loss = a + b * megabytes**-c by width.

    What no model can know of the text, a, is the same for all widths; b and c are each width's own. Least
    squares of the loss, over all rows; a width of a single size has none.
    """
    points = {
        bits: (np.asarray(sizes) / _MEGABYTE, np.asarray(losses))
        for bits, sizes, losses in _by_bits(found)
        if len(sizes) > 1
    }
    if not points:
        return {}
    least = min(losses.min() for _, losses in points.values())
    best: tuple[float, float, dict[int, Any]] = (np.inf, 0.0, {})
    for a in np.linspace(0, 0.98 * least, 500):
        error, lines = 0.0, {}
        for bits, (sizes, losses) in points.items():
            x, over = np.log(sizes), losses - a
            # An error of a logarithm times what it is the logarithm of is one of the loss.
            lines[bits] = np.polyfit(x, np.log(over), 1, w=over)
            error += float(np.sum(np.square(over - np.exp(np.polyval(lines[bits], x)))))
        if error < best[0]:
            best = (error, float(a), lines)
    return {b: (best[1], float(np.exp(line[1])), -float(line[0])) for b, line in best[2].items()}


def worth(found: list[Row]) -> dict[int, float]:
    """How many weights of 16 bits one of each width replaces: f of loss = a + b (f weights)**-c.

    a, b and c are the same for all widths, the weights those of the layers; least squares of the loss.
    """
    sizes = np.asarray([row["parameters"] for row in found], np.float64)
    losses = np.asarray([row["loss"] for row in found], np.float64)
    widths = [bits for bits, *_ in _by_bits(found)]
    if len(set(sizes)) < 2 or 16 not in widths:
        return {}
    lower = [bits for bits in widths if bits != 16]
    is_of = np.asarray([[row["bits"] == bits for bits in lower] for row in found], np.float64)
    terms = np.column_stack([np.ones_like(sizes), np.log(sizes), is_of])
    best, values = np.inf, {}
    for a in np.linspace(0, 0.98 * losses.min(), 500):
        over = losses - a
        line = np.linalg.lstsq(terms * over[:, None], np.log(over) * over, rcond=None)[0]
        error = float(np.sum(np.square(over - np.exp(terms @ line))))
        if error < best:
            best = error
            values = {b: float(np.exp(v / line[1])) for b, v in zip(lower, line[2:], strict=True)}
    return {16: 1.0} | values


# Fitted by Maskey et al., 1-Bit Wonder (arXiv 2602.15563): (alpha, gamma) of the law below.
_PUBLISHED = {"1-Bit-Wonder, k-means": (0.63, 3.32), "1-Bit-Wonder, uniform": (0.55, 3.71)}
_SCALE_BITS = 16 / 64  # of a weight's share in the scale of its group


def law(found: list[Row]) -> tuple[float, float, float] | None:
    """(a, alpha, gamma) of loss = a + b (N (1 - exp(-P / gamma)))**-alpha, or None for too few rows.

    N are the weights of the layers, P their bits with those of their scales; least squares of the loss. The
    form is that of Kumar et al. (arXiv 2411.04330), for one number of tokens.
    """
    sizes = np.asarray([row["parameters"] for row in found], np.float64)
    losses = np.asarray([row["loss"] for row in found], np.float64)
    bits = np.asarray([_with_scales(row["bits"]) for row in found])
    if len(set(sizes)) < 2 or len(set(bits)) < 2:
        return None
    best, values = np.inf, (0.0, 0.0, 0.0)
    for gamma in np.geomspace(1, 10, 100):
        x = np.log(sizes * _kept(bits, gamma))
        for a in np.linspace(0, 0.98 * losses.min(), 80):
            over = losses - a
            line = np.polyfit(x, np.log(over), 1, w=over)
            error = float(np.sum(np.square(over - np.exp(np.polyval(line, x)))))
            if error < best:
                best, values = error, (float(a), -float(line[0]), float(gamma))
    return values


def _with_scales(bits: int) -> float:
    return bits + _SCALE_BITS if bits < 16 else 16.0


def _kept(bits: Any, gamma: float) -> Any:
    """The part of its weights that a model of these bits is worth."""
    return 1 - np.exp(-bits / gamma)


def exponents(found: list[Row]) -> str:
    """The law fitted to these rows beside those that were published."""
    fitted = law(found)
    if fitted is None:
        return "(Not enough rows for a fit.)"
    widths = [bits for bits, *_ in _by_bits(found) if bits < 16]
    lines = [
        f"| | alpha | gamma | {' | '.join(f'a weight of {_name(b)} is worth' for b in widths)} |",
        "|---" * (len(widths) + 3) + "|",
    ]
    for name, (alpha, gamma) in ({"these models": fitted[1:]} | _PUBLISHED).items():
        parts = (f"{_kept(_with_scales(b), gamma) / _kept(16.0, gamma):.2f}" for b in widths)
        lines.append(f"| {name} | {alpha:.2f} | {gamma:.2f} | {' | '.join(parts)} |")
    return "\n".join(lines)


def _name(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


def _by_bits(found: list[Row]) -> list[tuple[int, list[int], list[float]]]:
    groups = [(bits, [row for row in found if row["bits"] == bits]) for bits in _WIDTHS]
    return [
        (b, [r["bytes"] for r in rows], [r["loss"] for r in rows]) for b, rows in groups if rows
    ]


def table(found: list[Row]) -> str:
    """Every model: what it takes, what it loses, and what its training cost beside the float one's.

    Steps on a device that something else used, too (`shared_device` in a row), are left out.
    """
    steps = {(row["size"], row["device"]): row["step_ms"] for row in found if row["bits"] == 16}
    lines = [
        "| weights of the layers | bits | MB | loss (nats a token) | bits a byte | packed loss"
        " | ms a step | of float |",
        "|---" * 8 + "|",
    ]
    for row in found:
        packed, timed = row.get("packed_loss"), not row.get("shared_device")
        float_step = steps.get((row["size"], row["device"])) if timed else None
        cells = (
            f"{row['parameters'] / 1e6:.1f}M",
            str(row["bits"]),
            f"{row['bytes'] / _MEGABYTE:.2f}",
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            "" if packed is None else f"{packed:.4f}",
            f"{row['step_ms']:.2f}" if timed else "",
            "" if float_step is None else f"{row['step_ms'] / float_step:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_equal_memory(found: list[Row]) -> str:
    """The best model of each width that takes no more memory than each 16-bit one."""
    floats = [row for row in found if row["bits"] == 16]
    widths = [bits for bits, *_ in _by_bits(found) if bits < 16]
    lines = [
        f"| within | 16 bits | {' | '.join(_name(b) for b in widths)} |",
        "|---" * (len(widths) + 2) + "|",
    ]
    for row in floats:
        cells = []
        for bits in widths:
            small = [r for r in found if r["bits"] == bits and r["bytes"] <= row["bytes"]]
            best = min(small, key=lambda r: r["loss"], default=None)
            cells.append(f"{best['loss']:.4f} ({best['parameters'] / 1e6:.1f}M)" if best else "")
        reference = f"{row['loss']:.4f} ({row['parameters'] / 1e6:.1f}M)"
        lines.append(f"| {row['bytes'] / _MEGABYTE:.1f} MB | {reference} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sentence(found: list[Row]) -> str:
    """The best model of one bit, beside the float one that takes the least memory more."""
    best = min((row for row in found if row["bits"] == 1), key=lambda row: row["loss"])
    larger = (row for row in found if row["bits"] == 16 and row["bytes"] >= best["bytes"])
    other = min(larger, key=lambda row: row["bytes"], default=None)
    text = f"The best 1-bit model of {best['bytes'] / _MEGABYTE:.1f} MB"
    text += f" has a loss of {best['loss']:.2f} nats a token"
    if other is not None:
        text += f", 16 bits in {other['bytes'] / _MEGABYTE:.1f} MB {other['loss']:.2f}"
    return text + f" ({best['tokens'] / 1e6:.0f} million tokens)."


def fits(found: list[Row]) -> str:
    """The fitted curves, and how many of a 16-bit model's bytes each width needs for the same loss."""
    curves = fit(found)
    floats = [row for row in found if row["bits"] == 16]
    if not curves or not floats:
        return "(Not enough rows for a fit.)"
    middle = sorted(floats, key=lambda row: row["bytes"])[len(floats) // 2]
    lines = [
        "| bits | loss = a + b MB^-c: a | b | c"
        f" | MB for the loss of 16 bits and {middle['bytes'] / _MEGABYTE:.1f} MB | a weight is worth |",
        "|---" * 6 + "|",
    ]
    factors = worth(found)
    for bits, (a, b, c) in curves.items():
        size = (b / (middle["loss"] - a)) ** (1 / c)
        cells = f"{a:.3f} | {b:.3f} | {c:.3f} | {size:.1f} | {factors[bits]:.2f}"
        lines.append(f"| {bits} | {cells} |")
    return "\n".join(lines)


def draw(found: list[Row], path: Path) -> None:
    """Draws loss over bytes, a curve for each width. Needs matplotlib (extra "plot")."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('the figure needs matplotlib: pip install "fdk-jax[plot]"') from error
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curves = fit(found)
    for bits, sizes, losses in _by_bits(found):
        sizes = np.asarray(sizes) / _MEGABYTE
        (dots,) = axes.plot(sizes, losses, "o", label=_name(bits))
        if bits in curves:
            a, b, c = curves[bits]
            x = np.geomspace(sizes.min() / 1.1, sizes.max() * 1.1, 60)
            axes.plot(x, a + b * x**-c, color=dots.get_color(), linewidth=1)
    tokens = found[0]["tokens"] / 1e6
    axes.set(
        xscale="log", xlabel="megabytes in memory, embedding included",
        ylabel="held-out loss (nats a token)", title=f"Language models trained on {tokens:.0f} million tokens",
    )  # fmt: skip
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend()
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format=path.suffix.lstrip("."))
    os.replace(unfinished, path)


def report(paths: list[Path], figure: Path) -> str:
    """Draws the figure, and returns the tables in Markdown."""
    rows = records.read(paths)
    found = chosen(rows)
    draw(found, figure)
    parts = (table(found), at_equal_memory(found), fits(found), exponents(found), variants(rows))
    return "\n\n".join(parts)

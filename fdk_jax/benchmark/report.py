"""The tables of README.md and of pages of docs, written from the rows in results/.

    python -m fdk_jax.benchmark.report            writes them between their marks
    python -m fdk_jax.benchmark.report --check    exit status 1 if a table is not that of the rows

A table stands between `<!-- report: NAME -->` and `<!-- end -->`. Each shows the commits of its rows, those
of speeds which figure is of which.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fdk_jax import usage
from fdk_jax.benchmark import cpu_tables, records, source, table
from fdk_jax.benchmark.group_table import group_sizes
from fdk_jax.benchmark.many_table import speed_ups
from fdk_jax.benchmark.model_table import equal_memory, models
from fdk_jax.files.atomic import atomic_path

FILES = (
    "README.md",
    "docs/performance.md",
    "docs/cpu.md",
    "docs/quality.md",
    "docs/gpu/many.md",
    "docs/gpu/support.md",
)
_MARK = re.compile(r"(<!-- report: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DENSE = 16
_GROUP = 64  # weights that share a scale, in tables that do not name it
_PRETENDS = " as "  # in the name of a GPU that runs another one's kernels

Row = dict[str, Any]


def rows(folder: Path = source.RESULTS) -> list[Row]:
    """Every measured row of results/; those of a model of a machine are not measured."""
    found = []
    for path in sorted(set(folder.glob("*.jsonl")) - {folder / "arm_model.jsonl"}):
        found += [row for row in records.read([path]) if row["status"] == "ok"]
    return found


def kernels(found: Iterable[Row], *, spread: bool = False) -> str:
    """Microseconds a product, a line for each shape and number of tokens; one table a device.

    With the spread of all rows, or the shares of the bound of a few.
    """
    chosen = [
        r
        for r in _products(found)
        if r["group_size"] in (None, _GROUP) and _PRETENDS not in r["device"]
        # A GPU's evenly spaced values have a table of their own.
        if r.get("backend") != "pallas" or r.get("codebook") != "uniform"
    ]
    texts = []
    for device in dict.fromkeys(r["device"] for r in chosen):
        here = [r for r in chosen if r["device"] == device]
        widths = sorted({r["bits"] for r in here}, reverse=True)
        head = ["k x n", "tokens", *(f"{b} bit" if b != _DENSE else "bf16 (XLA)" for b in widths)]
        shapes = {(r["k"], r["n"], r["m"]) for r in here if spread or r["m"] in cpu_tables.FEW}
        shown: dict[tuple, Row] = {}
        for shape in sorted(shapes, key=lambda s: (-s[0], -s[1], s[2])):
            for bits in widths:
                same = [r for r in here if (r["k"], r["n"], r["m"], r["bits"]) == (*shape, bits)]
                if same:
                    shown[*shape, bits] = min(same, key=lambda r: r["median_us"])
        sources = table.Lettered(shown.values())
        lines = []
        for k, n, m in dict.fromkeys(key[:3] for key in shown):
            cells = [f"{k} x {n}", str(m)]
            for bits in widths:
                row = shown.get((k, n, m, bits))
                cells.append("" if row is None else _time(row, spread) + sources.of(row))
            lines.append(cells)
        texts.append(f"{device}, {sources}:\n\n{table.markdown(head, lines)}")
    return "\n\n".join(texts) or "(No rows yet.)"


def _of_one_shape(found: Iterable[Row]) -> list[Row]:
    """The rows of the shape that the README shows."""
    return [r for r in found if (r.get("k"), r.get("n")) == cpu_tables.SHAPE]


def portable(found: Iterable[Row]) -> str:
    """Microseconds a product by the kernels that other GPUs get, on one that pretends to be them."""
    found = _products(found)
    pretended = [r for r in found if _PRETENDS in r["device"]]
    texts = []
    for own in sorted({r["device"].partition(_PRETENDS)[0] for r in pretended}):
        devices = [own, *sorted({r["device"] for r in pretended if r["device"].startswith(own)})]
        times = {(*_of_product(r), r["device"]): r for r in found if r["device"] in devices}
        products = {_of_product(r) for r in pretended}
        sources = table.Lettered(r for key, r in sorted(times.items()) if key[:-1] in products)
        lines = []
        for product in sorted(products):
            k, n, group_size, minus_bits, m = product
            base = times.get((*product, own))
            cells = [f"{k} x {n}", str(group_size), str(-minus_bits), str(m)]
            for device in devices:
                row = times.get((*product, device))
                text = "" if row is None else f"{row['median_us']:.1f}"
                if row is not None and base is not None and device != own:
                    text += f" ({row['median_us'] / base['median_us']:.2f})"
                cells.append(text if row is None else text + sources.of(row))
            lines.append(cells)
        head = [
            "k x n",
            "group",
            "bits",
            "tokens",
            own,
            *(d.removeprefix(own).strip() for d in devices[1:]),
        ]
        texts.append(f"{own}, {sources}:\n\n{table.markdown(head, lines)}")
    return "\n\n".join(texts) or "(No rows yet.)"


def integers(found: Iterable[Row]) -> str:
    """Products of 8-bit integers on a GPU beside exact ones and bfloat16, with what they lose."""
    rows = [r for r in found if r["suite"] == "kernels" and r.get("dtype") == "bfloat16"]
    rounded = [r for r in rows if r["backend"] == "pallas" and r["arithmetic"] == "int8"]
    texts = []
    for device in sorted({r["device"] for r in rounded}):
        here = sorted((r for r in rounded if r["device"] == device), key=_of_product)
        exact = {_of_product(r): r for r in _products(rows) if r["device"] == device}
        lines = []
        for row in here:
            k, n, group, minus_bits, m = _of_product(row)
            own, dense = exact.get((k, n, group, minus_bits, m)), exact.get((k, n, 0, -_DENSE, m))
            cells = [f"{k} x {n}", str(-minus_bits), str(m)]
            cells += ["" if r is None else f"{r['median_us']:.1f}" for r in (dense, own)]
            ratio = "" if dense is None else f" ({dense['median_us'] / row['median_us']:.2f})"
            cells.append(f"{row['median_us']:.1f}{ratio}")
            cells += ["" if r is None else f"{r['rel_rms_error']:.4f}" for r in (own, row)]
            lines.append(cells)
        head = ["k x n", "bits", "tokens", "bf16 (XLA)", "exact", "int8 (bf16 over it)"]
        head += ["error, exact", "int8"]
        texts.append(f"{device}, {table.Lettered(here)}:\n\n{table.markdown(head, lines)}")
    return "\n\n".join(texts) or "(No rows yet.)"


def tuned(folder: Path = source.ROOT / "pallas_kernels") -> str:
    """Microseconds by the tuning search of the kernels that older GPUs take, from the table that ships."""
    found = json.loads((folder / "tuned.json").read_text(encoding="utf-8"))
    found = [
        r
        for r in found
        if _PRETENDS in r["device"]
        and (r["n"], r["k"], r.get("uniform", False)) == (8192, 8192, False)
    ]
    tokens = sorted({r["m"] for r in found})
    lines = []
    for bits in sorted({r["bits"] for r in found}, reverse=True):
        times = {r["m"]: r for r in found if r["bits"] == bits}
        cells = [str(bits)]
        for m in tokens:
            row = times.get(m)
            text = f"{row['us']:.1f}" if row and "us" in row else ""
            cells.append(text + "*" * bool(text and row and row["kernel"] == "dequantise"))
        lines.append(cells)
    return table.markdown(["bits", *(f"m = {m}" for m in tokens)], lines)


def _products(found: Iterable[Row]) -> list[Row]:
    kernels = (r for r in found if r["suite"] == "kernels" and r.get("k"))
    # What is rounded to integers on a GPU is not the product that the tables compare.
    same = (
        r
        for r in kernels
        if r.get("backend") != "pallas" or r.get("arithmetic", "exact") == "exact"
    )
    return [r for r in same if r["dtype"] == "bfloat16"]


def _of_product(row: Row) -> tuple[int, ...]:
    """What rows of one product share, in the order of a table: wide groups and codes first."""
    return row["k"], row["n"], row["group_size"] or 0, -row["bits"], row["m"]


def _time(row: Row, spread: bool) -> str:
    text = f"{row['median_us']:.1f}"
    if spread:
        low, high = min(row["samples_us"]), max(row["samples_us"])
        text += f" ({low:.1f} to {high:.1f}, error {row['rel_rms_error']:.1e})"
    elif row["bound_us"] and row["bits"] != _DENSE:
        text += f" ({row['bound_us'] / row['median_us']:.0%})"
    return text


def attention(found: Iterable[Row]) -> str:
    """Microseconds of one token's attention over a cache."""
    rows = [r for r in found if r["suite"] == "attention"]
    texts = []
    for device in sorted({r["device"] for r in rows}):
        here = sorted(
            (r for r in rows if r["device"] == device), key=lambda r: (r["batch"], r["slots"])
        )
        sources = table.Lettered(here)
        lines = []
        for r in here:
            time = f"{r['median_us']:.1f}{sources.of(r)}"
            share = f"{r['bound_us'] / r['median_us']:.0%}"
            error = f"{r['rel_rms_error']:.4f}"
            lines.append([str(r["batch"]), str(r["slots"]), time, share, error])
        head = ["sequences", "tokens in the cache", "us a layer", "of the bound", "error"]
        texts.append(f"{device}, {sources}:\n\n{table.markdown(head, lines)}")
    return "\n\n".join(texts) or "(No rows yet.)"


def quality(found: Iterable[Row], *, variants: bool = False) -> str:
    """Perplexity a character of the small language model, by bits and method."""
    from fdk_jax.quality import table as quality_table

    here = [r for r in found if r["suite"] == "quality"]
    methods = quality_table.VARIANTS if variants else quality_table.METHODS
    return (
        f"{quality_table.markdown(here, methods)}\n\n({table.commits(here)})"
        if here
        else "(No rows yet.)"
    )


def networks(found: Iterable[Row], network: str) -> str:
    """What formats cost a real network."""
    from fdk_jax.quality import networks_table

    return networks_table.markdown(found, network)


def networks_published(found: Iterable[Row]) -> str:
    """Error correction beside a published GPTQ."""
    from fdk_jax.quality import networks_table

    return networks_table.published(found)


def calibration(found: Iterable[Row]) -> str:
    """How long `load_calibrated` takes."""
    rows = [row for row in found if row["suite"] == "calibration"]
    head = [
        "model",
        "weights",
        "bits",
        "seconds",
        "of them reading",
        "the first layer",
        "each further one",
    ]
    head += ["GB at most on the device", "of them the model", "on the host"]
    lines = []
    for row in rows:
        turned = " rotated" * row["name"].endswith("rotated")
        whole = row["layers"] >= row["layers_of_model"]
        some = "" if whole else f", {row['layers']} of {row['layers_of_model']} layers"
        lines.append(
            [
                row["model"].removeprefix("custom-llama-") + turned + some,
                f"{row['parameters'] / 1e9:.2f} billion",
                str(row["bits"]),
                f"{row['seconds']:.0f}",
                f"{row['read_seconds']:.0f}",
                f"{row['first_layer_seconds']:.0f}",
                f"{row['further_layer_seconds']:.1f}" if row["further_layer_seconds"] else "",
                f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else "",
                f"{row['model_bytes'] / 1e9:.1f}" if row["model_bytes"] else "",
                f"{row['host_peak_bytes'] / 1e9:.1f}",
            ]
        )
    return _of_one_device(head, lines, rows)


def quantising(found: Iterable[Row]) -> str:
    """How long each format takes to quantise to, on each device."""
    rows = [row for row in found if row["suite"] == "quantising"]
    if not rows:
        return "(No rows yet.)"
    # The processors of a CPU are counted: what else they did would be in the time.
    kinds = {True: "processor_seconds_per_billion", False: "seconds_per_billion"}
    devices = {row["device"]: row["threads"] is not None for row in rows}
    cells = {(row["name"], row["device"]): row for row in rows}
    head = ["bits", "levels", "scales", "error of the weights"]
    head += [f"{device}, processor seconds" * cpu or device for device, cpu in devices.items()]
    lines = []
    for row in {row["name"]: row for row in rows}.values():
        here = [(cells.get((row["name"], device)), cpu) for device, cpu in devices.items()]
        times = [one[kinds[cpu]] if one else None for one, cpu in here]
        times = ["" if t is None else f"{t:.0f}" if t >= 10 else f"{t:.2g}" for t in times]
        error = f"{row['weight_rms_error']:.4f}"
        lines.append([str(row["bits"]), row["codebook"], row["scale"], error, *times])
    return f"{table.markdown(head, lines)}\n\n({table.commits(rows)})"


def training_steps(found: Iterable[Row]) -> str:
    """A step of training through the quantisation beside the float step, sample by sample."""
    rows = [row for row in found if row["suite"] == "training"]
    head = ["weights of the layers", "bits", "ms a step", "of float"]
    lines = [
        [
            f"{row['parameters'] / 1e6:.1f}M",
            str(row["bits"]),
            f"{row['median_us'] / 1000:.2f}",
            f"{row['of_float']:.3f}",
        ]
        for row in sorted(rows, key=lambda row: (-row["parameters"], -row["bits"]))
    ]
    return _of_one_device(head, lines, rows)


def _of_one_device(head: list[str], lines: list[list[str]], rows: list[Row]) -> str:
    """A table, and where its rows were measured."""
    if not rows:
        return "(No rows yet.)"
    return f"{table.markdown(head, lines)}\n\n({rows[0]['device']}, {table.commits(rows)})"


def scaling(found: Iterable[Row], part: str) -> str:
    """What memory buys at each width: "table", "at_equal_memory", "fits", "exponents" or "sentence"."""
    from fdk_jax.quality import scaling_report

    here = scaling_report.chosen(found)
    return (
        f"{getattr(scaling_report, part)(here)}\n\n({table.commits(here)})"
        if here
        else "(No rows yet.)"
    )


def scaling_variants(found: Iterable[Row]) -> str:
    """Other seeds and refreshes of the scaling table."""
    from fdk_jax.quality import scaling_report

    return scaling_report.variants(found)


def resumption(found: Iterable[Row]) -> str:
    """Trainings that were killed and went on, beside those that were not."""
    rows = [row for row in found if row["suite"] == "resumption"]
    head = [
        "weights of the layers",
        "bits",
        "steps",
        "killed after",
        "loss",
        "loss of the killed one",
    ]
    lines = [
        [
            f"{row['parameters'] / 1e6:.1f}M",
            str(row["bits"]),
            str(row["steps"]),
            str(row["killed_after_step"]),
            f"{row['loss']:.7f}",
            f"{row['loss_resumed']:.7f}",
        ]
        for row in rows
    ]
    return _of_one_device(head, lines, rows)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "kernels": lambda found: kernels(_of_one_shape(found)),
    "portable": portable,
    "groups": group_sizes,
    "integers": integers,
    "attention": attention,
    "speed-ups": speed_ups,
    "tuned": lambda _: tuned(),
    "kernels-spread": lambda found: kernels(found, spread=True),
    "models": models,
    "equal-memory": equal_memory,
    "quality": quality,
    "sweep": cpu_tables.sweep,
    "dense": cpu_tables.dense,
    "dense-ggml": lambda found: cpu_tables.dense(found, "ggml", without="amx"),
    "cpu": cpu_tables.few,
    "read-shares": cpu_tables.read_shares,
    "prompts": cpu_tables.prompts,
    "scaling": lambda found: scaling(found, "table"),
    "scaling-sentence": lambda found: scaling(found, "sentence"),
    "scaling-memory": lambda found: scaling(found, "at_equal_memory"),
    "scaling-variants": scaling_variants,
    "scaling-fit": lambda found: scaling(found, "fits"),
    "scaling-exponents": lambda found: scaling(found, "exponents"),
    "quality-variants": lambda found: quality(found, variants=True),
    "networks-minilm": lambda found: networks(found, "minilm"),
    "networks-trained": lambda found: networks(found, "trained"),
    "networks-trained-huge": lambda found: networks(found, "trained-huge"),
    "networks-smollm2": lambda found: networks(found, "smollm2"),
    "networks-smollm2-rotated": lambda found: networks(found, "smollm2-rotated"),
    "networks-published": networks_published,
    "calibration": calibration,
    "quantising": quantising,
    "resumption": resumption,
    "training-steps": training_steps,
}


def filled(text: str, found: list[Row]) -> str:
    """A document with its tables written anew.

    Raises:
        ValueError: it asks for a table that is unknown.
    """

    def written(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table {match[2]!r}: there are {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](found)}\n{match[3]}"

    return _MARK.sub(written, text)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = usage.Parser(
        prog="python -m fdk_jax.benchmark.report", description="Writes the tables."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a table is not the rows'"
    )
    check = parser.parse_args(argv).check
    found, wrong = rows(), []
    for name in FILES:
        path = source.ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, found)
        if after != before:
            wrong.append(name)
            if not check:
                with atomic_path(path) as temporary:
                    Path(temporary).write_text(after, encoding="utf-8")
    print(f"{'not from the rows' if check else 'written'}: {', '.join(wrong) or 'nothing'}")
    return int(check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

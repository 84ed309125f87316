"""The tables of docs/cpu.md: the library beside other kernels and llama.cpp, shares of the bandwidth."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from fdk_jax.benchmark.table import commits, markdown

NO_ROWS = "(No rows yet.)"
FEW = (1, 16, 64, 128, 512)  # tokens in the README's tables
SHAPE = (8192, 8192)  # k, n of the README's table
_DENSE = {"torch": "dense", "ggml": "bf16"}  # names of their dense products of bfloat16
_PLACE = ("device", "isa", "clock", "threads")  # of a run whose cases took turns
_SHOWN = frozenset(1 << i for i in range(10))  # tokens with a line of a table; the figure has all

Row = dict[str, Any]


def sweep(found: Iterable[Row]) -> str:
    """Microseconds of 4-bit products and of their peers, whose time over ours follows, sample by sample."""
    chosen = [r for r in _of(found, "sweep") if 4 in _beside(r)]
    texts = []
    for here, k, n in _by_shape(chosen):
        kinds = list(
            dict.fromkeys(
                (r["backend"], r["name"], r["bits"]) for r in here if r["bits"] in (4, 16)
            )
        )
        if all(backend == "cpu" or bits > 4 for backend, _, bits in kinds):
            continue  # beside dense products alone: `dense` has it
        lines = []
        for m in sorted({r["m"] for r in here} & _SHOWN):
            rows_of = {(r["backend"], r["name"], r["bits"]): r for r in here if r["m"] == m}
            ours = [rows_of["cpu", f"codebook_{a}", 4] for a in ("int8", "exact")]
            cells = [str(m)]
            for kind in kinds:
                row = rows_of.get(kind)
                text = "" if row is None else f"{row['median_us']:.0f}"
                if row is not None and kind[0] != "cpu":
                    text += f" ({' / '.join(_ratio(row, own) for own in ours)})"
                cells.append(text)
            lines.append(cells)
        head = ["tokens", *(f"{b} {n}, {bits} bits" for b, n, bits in kinds)]
        texts.append(
            f"{_title(here)}, k x n = {k} x {n}, {commits(here)}:\n\n{markdown(head, lines)}"
        )
    return "\n\n".join(texts) or NO_ROWS


def dense(found: Iterable[Row], peer: str = "torch", without: str | None = None) -> str:
    """A peer's dense bfloat16 time over that of `int8` / of `exact`, sample by sample.

    Args:
        found: rows.
        peer: "torch" or "ggml".
        without: an ISA whose rows are left out.

    Returns:
        A table for each run; its last line has the least of all numbers of tokens that were measured.
    """
    texts = []
    chosen = [r for r in _of(found, "sweep") if r["backend"] in ("cpu", peer)]
    chosen = [r for r in chosen if r["backend"] == "cpu" or r["name"] == _DENSE[peer]]
    chosen = [r for r in chosen if without is None or r["isa"] != without]
    for here in _by(chosen, lambda r: tuple(r.get(key) for key in _PLACE)):
        if all(r["backend"] == "cpu" for r in here):
            continue  # its peers are others
        columns = sorted(
            {(r["k"] * r["n"], r["k"], r["n"], r["bits"]) for r in here if r["backend"] == "cpu"},
            key=lambda c: (c[:3], -c[3]),
        )
        lines = [
            [str(m), *(" / ".join(_beside_dense(here, column, m)) for column in columns)]
            for m in sorted({r["m"] for r in here} & _SHOWN)
        ]
        lines.append(["least of all", *(_least_beside_dense(here, column) for column in columns)])
        head = ["tokens", *(f"{k} x {n}, {bits} bits" for _, k, n, bits in columns)]
        texts.append(f"{_title(here)}, {commits(here)}:\n\n{markdown(head, lines)}")
    return "\n\n".join(texts) or NO_ROWS


def few(found: Iterable[Row]) -> str:
    """Microseconds of a few numbers of tokens, and PyTorch's dense time over them; one table a device."""
    texts = []
    chosen = [r for r in _of(found, "sweep") if (r["k"], r["n"]) == SHAPE and r["m"] in FEW]
    chosen = [r for r in chosen if r["backend"] == "cpu" or r["name"] == "dense"]
    chosen = [r for r in chosen if r.get("clock") != "processor"]
    for of_device in _by(chosen, lambda r: r["device"]):
        threads = max(r["threads"] for r in of_device)
        here = [r for r in of_device if r["threads"] == threads]
        kinds = sorted({(-r["bits"], r["name"]) for r in here if r["backend"] == "cpu"})
        lines = []
        for m in sorted({r["m"] for r in here}):
            same = [r for r in here if r["m"] == m]
            plain = [r for r in same if r["name"] == "dense"]
            cells = [f"{SHAPE[0]} x {SHAPE[1]}", str(m)]
            cells.append(f"{min(r['median_us'] for r in plain):.0f}" if plain else "")
            for bits, name in kinds:
                kept = [r for r in same if (-r["bits"], r["name"]) == (bits, name)]
                if not kept:
                    cells.append("")
                    continue
                own = max(kept, key=lambda r: r["date"])
                run = own["digest"], _beside(own)  # samples are compared with those of the same run
                peer = next((r for r in plain if (r["digest"], _beside(r)) == run), None)
                ratio = "" if peer is None else f" ({_ratio(peer, own)})"
                cells.append(f"{own['median_us']:.0f}{ratio}")
            lines.append(cells)
        names = (f"{-bits} bit, `{name.removeprefix('codebook_')}`" for bits, name in kinds)
        head = ["k x n", "tokens", "bf16 (PyTorch)", *names]
        texts.append(f"{_title(here)}, {commits(here)}:\n\n{markdown(head, lines)}")
    return "\n\n".join(texts) or NO_ROWS


def _beside_dense(here: list[Row], column: tuple, m: int) -> list[str]:
    """The ratios of `int8` and of `exact` at (size, k, n, bits); none where a row is missing."""
    _, k, n, bits = column
    same = [r for r in here if (r["m"], r["k"], r["n"]) == (m, k, n) and r["status"] == "ok"]
    own = [r for r in same if r["backend"] == "cpu" and r["bits"] == bits]
    if not own:
        return []
    newest = max(own, key=lambda r: r["date"])
    run = [r for r in same if (r["digest"], _beside(r)) == (newest["digest"], _beside(newest))]
    peer = next((r for r in run if r["backend"] != "cpu"), None)
    ours = {r["name"]: r for r in run if r["backend"] == "cpu" and r["bits"] == bits}
    if peer is None:
        return []
    return [_ratio(peer, ours[f"codebook_{a}"]) for a in ("int8", "exact")]


def _least_beside_dense(here: list[Row], column: tuple) -> str:
    """The least ratio of `int8` and of `exact`, and its number of tokens."""
    found = {m: _beside_dense(here, column, m) for m in sorted({r["m"] for r in here})}
    texts = []
    for i in range(2):
        of = {m: float(pair[i]) for m, pair in found.items() if pair}
        least = min(of, key=of.__getitem__, default=None)
        texts += [] if least is None else [f"{of[least]:.2f} at {least}"]
    return " / ".join(texts)


def read_shares(found: Iterable[Row]) -> str:
    """Bytes a second of one-token products over those of the probe that only reads, sample by sample.

    The probe reads the product's own copies of its weights; in older rows, which have no such
    probe, other memory. A table for each device and commit, whose probes belong to its products.
    """
    chosen = _of(found, "cpu_threads")
    texts = []
    for here in _by(chosen, lambda r: (r["device"], r["commit"])):
        kinds = sorted(
            {(r["arithmetic"], r["k"], r["bits"]) for r in here if r.get("arithmetic")},
            key=lambda c: (c[:2], -c[2]),
        )
        threads = sorted({r["threads"] for r in here})
        lines = []
        for count in threads:
            same = [r for r in here if r["threads"] == count]
            probes = {(r["name"], r["k"], r["bits"]): r for r in same if not r.get("arithmetic")}
            whole = [probes[name, None, None] for name in ("probe_reduce_sum", "probe_copy")]
            cells = [str(count)] + [f"{r['bytes_rw'] / r['median_us'] / 1e3:.1f}" for r in whole]
            for arithmetic, k, bits in kinds:
                row = [
                    r
                    for r in same
                    if r["bits"] == bits and (r.get("arithmetic"), r["k"]) == (arithmetic, k)
                ]
                read = probes.get(("probe_reduce_sum", k, bits), whole[0])
                cells.append(_share(row[0], read) if row else "")
            lines.append(cells)
        head = [
            "threads",
            "read GB/s",
            "copy GB/s",
            *(f"`{a}`, {k}, {b} bits" for a, k, b in kinds),
        ]
        texts.append(f"{here[0]['device']}, {commits(here)}:\n\n{markdown(head, lines)}")
    return "\n\n".join(texts) or NO_ROWS


def prompts(found: Iterable[Row]) -> str:
    """Whole models beside llama.cpp: time to the first token, of a later one, and memory.

    A later token reads the file once: that rate over what reading alone reached. Memory is the peak over what
    the process held before it loaded the model, in sizes of the file.
    """
    chosen = _of(found, "prompts")
    texts = []
    for here in _by(chosen, lambda r: tuple(r.get(key) for key in ("device", "clock", "threads"))):
        lines = []
        for same in _by(here, lambda r: (r["model"], r["type"], r["prompt"])):
            peer = next((r for r in same if r["backend"] == "llama.cpp"), None)
            for row in same:
                cells = [
                    row["model"],
                    row["type"],
                    str(row["prompt"]),
                    f"{row['backend']} {row['arithmetic']}",
                ]
                cells.append(f"{row['median_us'] / 1e6:.2f}")
                cells.append("" if peer is None else _ratio(peer, row))
                cells.append(f"{row['tokens_per_s']:.1f}")
                pairs = (
                    [] if peer is None else zip(peer["decode_us"], row["decode_us"], strict=True)
                )
                ratios = [a / b for a, b in pairs]
                cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
                moved = row["bytes_rw"] * row["tokens_per_s"] / 1e9
                alone = row.get("read_gb_s") and row.get("clock") != "processor"
                cells.append(f"{moved / row['read_gb_s']:.0%}" if alone else "")
                cells.append(f"{(row['peak_bytes'] - row['base_bytes']) / row['bytes_rw']:.2f}")
                lines.append(cells)
        head = ["model", "type", "prompt", "by", "first token, s", "llama.cpp's time over it"]
        head += ["tokens/s", "over llama.cpp's", "of reading", "peak memory, files"]
        texts.append(f"{_title(here)}, {commits(here)}:\n\n{markdown(head, lines)}")
    return "\n\n".join(texts) or NO_ROWS


def _of(found: Iterable[Row], suite: str) -> list[Row]:
    return [r for r in found if r["suite"] == suite]


def _by(found: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in found:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _by_shape(found: Iterable[Row]) -> list[tuple[list[Row], int, int]]:
    groups = _by(found, lambda r: (*(r.get(key) for key in _PLACE), r["k"], r["n"]))
    return [(rows, rows[0]["k"], rows[0]["n"]) for rows in groups]


def _beside(row: Row) -> list[int]:
    """The bits of our products that a row took turns with."""
    return row.get("beside") or [4]


def _ratio(row: Row, own: Row) -> str:
    pairs = zip(row["samples_us"], own["samples_us"], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def _share(row: Row, read: Row) -> str:
    pairs = zip(row["samples_us"], read["samples_us"], strict=True)
    scale = row["bytes_rw"] / read["bytes_rw"]
    return f"{statistics.median(scale * b / a for a, b in pairs):.0%}"


def _title(here: list[Row]) -> str:
    first = here[0]
    text = f"{first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}"
    if first.get("isa"):
        text += f", {first['isa']}"
    return text + ", processor time" * (first.get("clock") == "processor")

"""The tables of whole models' speeds."""

import statistics
from collections.abc import Iterable
from typing import Any

from fdk_jax.benchmark import table

# The shapes that 1-Bit-Wonder compares: at these bits their weights take about the same memory.
_EQUAL = {"custom-llama-4B": 16, "custom-llama-12B": 4, "custom-llama-31B": 1}
_HEAD = ["model", "bits", "codebook", "GB", "prompt", "batch", "first token, ms", "tokens/s"]
_HEAD += ["of the bound", "spread"]

Row = dict[str, Any]


def models(found: Iterable[Row]) -> str:
    """Tokens a second of whole models, and the memory that each needs of a device; one table a device."""
    chosen = [r for r in found if r["suite"] == "models"]
    texts = []
    for device in dict.fromkeys(r["device"] for r in chosen):
        here = [r for r in chosen if r["device"] == device]
        here.sort(
            key=lambda r: (
                *(r["model"], -r["bits"], r["codebook"] or "", r.get("devices", 1), r["m"]),
                *(r["prompt"], r["backend"]),
            )
        )
        sources = table.Lettered(here)
        lines = [_cells(r, sources) for r in here]
        texts.append(f"{device}, {sources}:\n\n{table.markdown(_HEAD, lines)}")
    return "\n\n".join(texts) or "(No rows yet.)"


def equal_memory(found: Iterable[Row]) -> str:
    """One sequence on one GPU, by models of about the same memory: those of a run that has all of them."""
    chosen = [
        r
        for r in found
        if r["suite"] == "models"
        and _EQUAL.get(r["model"]) == r["bits"]
        and (r["m"], r["prompt"], r.get("devices", 1), r.get("speculate", 0)) == (1, 2, 1, 0)
    ]
    runs = [[r for r in chosen if r["commit"] == commit] for commit in _newest(chosen)]
    whole = [run for run in runs if {r["model"] for r in run} == set(_EQUAL)]
    if not whole:
        return "(No rows yet.)"
    here = sorted(whole[0], key=lambda r: (-r["bits"], r["codebook"] or ""))
    sources = table.Lettered(here)
    kept = [i for i, name in enumerate(_HEAD) if name not in ("prompt", "batch")]
    lines = [[cells[i] for i in kept] for cells in (_cells(r, sources) for r in here)]
    head = [_HEAD[i] for i in kept]
    return f"{here[0]['device']}, {sources}:\n\n{table.markdown(head, lines)}"


def _newest(found: Iterable[Row]) -> list[str]:
    """The commits of rows, the newest one first."""
    newest: dict[str, str] = {}
    for r in found:
        newest[r["commit"]] = max(newest.get(r["commit"], ""), r["date"])
    return sorted(newest, key=lambda commit: newest[commit], reverse=True)


def _cells(r: Row, sources: table.Lettered) -> list[str]:
    low, high = min(r["samples_us"]), max(r["samples_us"])
    share = f"{r['bound_us'] / r['median_us']:.0%}" if r["bound_us"] else ""
    name = r["model"].removeprefix("custom-llama-")
    if r["backend"] == "transformers":
        name += ", transformers"
    if r.get("devices", 1) > 1:
        name += f" on {r['devices']}"
    if guesses := r.get("speculate"):
        name += f", {guesses} guesses a step, all right"
    width = f"{(high - low) / statistics.median(r['samples_us']):.1%}"
    size, first = f"{r['peak_bytes'] / 1e9:.2f}", f"{r['first_token_us'] / 1e3:.1f}"
    speed = f"{r['tokens_per_s']:.0f}{sources.of(r)}"
    cells = name, r["bits"], r["codebook"] or "", size, r["prompt"], r["m"], first, speed, share
    return [*map(str, cells), width]

"""What the runner knows of a device: probes read, cores chosen, rows completed, tables printed.

A helper of cpu/run_on_device.sh. A probe is the output of android/probe.sh.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def _load_records() -> ModuleType:
    """fdk_jax/benchmark/records.py by itself: the package needs JAX, which not every host has."""
    spec = importlib.util.spec_from_file_location("records", ROOT / "fdk_jax/benchmark/records.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


records = _load_records()

_MISSING = "-"
# custom-llama-4B, 12B, 31B: hidden, layers, heads, intermediate; 8 key-value heads of 128 each.
_MODELS = {
    "custom-llama-4B": (3072, 24, 24, 11264),
    "custom-llama-12B": (4096, 48, 32, 14336),
    "custom-llama-31B": (6144, 60, 48, 21504),
}
_VOCABULARY = 128256


def parse_probe(text: str) -> dict[str, Any]:
    """The lines of a probe as a dictionary; unknown lines are left out."""
    found: dict[str, Any] = {"cores": [], "thermal_c": {}}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        rest = " ".join(rest.split())
        if key == "core":
            fields = [*rest.split(), *[_MISSING] * 4][:5]
            index, *numbers = (int(v) if v.isdigit() else None for v in fields[:4])
            if index is not None:
                names = ("capacity", "max_khz", "now_khz")
                core = {"core": index, **dict(zip(names, numbers, strict=True))}
                found["cores"].append(core | {"governor": fields[4]})
        elif key == "thermal" and len(rest.split()) == 2:
            zone, value = rest.split()
            if re.fullmatch(r"-?\d+", value):
                found["thermal_c"][zone] = int(value) / (1000 if abs(int(value)) > 500 else 1)
        elif key in ("machine", "kernel", "model", "soc", "android", "thermal_status"):
            found[key] = rest
        elif key == "features":
            found["cpu_features"] = rest.split()
    found["cores"].sort(key=lambda core: core["core"])
    return found


def choose_cores(probe: dict[str, Any], wanted: str) -> list[int]:
    """The numbers of the cores that "big", "little", "all" or a list such as 4-6,7 names.

    Raises:
        ValueError: a core that the device lacks, or text that is no list.
    """
    cores = probe["cores"]
    numbers = [core["core"] for core in cores]
    if wanted in ("big", "little", "all"):
        # By capacity where the kernel says it, else by the highest clock.
        rank = {c["core"]: c["capacity"] or c["max_khz"] or 0 for c in cores}
        if wanted == "all" or not rank:
            return numbers
        extreme = (max if wanted == "big" else min)(rank.values())
        return [number for number in numbers if rank[number] == extreme]
    chosen: set[int] = set()
    for part in wanted.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"--cores is big, little, all or a list such as 4-6,7, not {wanted!r}")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if missing := sorted(chosen - set(numbers)):
        raise ValueError(f"the device has no core {missing}, it has {numbers}")
    return sorted(chosen)


def hottest(probe: dict[str, Any]) -> float | None:
    """The highest temperature of the processor's zones, or of all when none has a known name."""
    zones = probe["thermal_c"]
    named = [v for k, v in zones.items() if re.search("cpu|soc|big|little|mid", k, re.IGNORECASE)]
    values = [v for v in named or zones.values() if -40 < v < 150]
    return max(values, default=None)


def complete(
    found: dict[str, Any], before: dict, after: dict, run: dict[str, Any]
) -> dict[str, Any]:
    """The row of a measurement of `fdk_bench`, with the device's state before and after it."""
    row = records.from_measurement(found)
    device = {k: before.get(k) for k in ("machine", "kernel", "model", "soc", "android")}
    device["cpu_features"] = before.get("cpu_features", [])
    state = {
        name: {
            "cores": probe["cores"],
            "thermal_c": probe["thermal_c"],
            "thermal_status": probe.get("thermal_status"),
        }
        for name, probe in (("before", before), ("after", after))
    }
    name = before.get("model") or row["device"]
    return row | {"device": name, "phone": device, "state": state, **run}


def estimate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens/s of whole models from the time a weight takes at m = 1: an estimate, not measured.

    Attention over the context, norms and the embedding are left out. The last product is taken at
    the speed of 8 bits where rows have it, else of the same bits.
    """
    per_weight: dict[tuple, float] = {}
    for row in rows:
        if row.get("m") == 1 and row.get("bits") in (1, 2, 4, 8) and row.get("median_us"):
            key = (row["bits"], row["name"].split()[0], row["threads"])
            value = row["median_us"] / (row["k"] * row["n"])
            per_weight[key] = min(per_weight.get(key, value), value)
    estimates = []
    for (bits, name, threads), us in sorted(per_weight.items()):
        for model, (hidden, layers, heads, inner) in _MODELS.items():
            attention = hidden * 128 * (2 * heads + 2 * 8)
            weights = layers * (attention + 3 * hidden * inner)
            last = min(
                (v for k, v in per_weight.items() if k[0] == 8 and k[2] == threads), default=us
            )
            total = weights * us + _VOCABULARY * hidden * last
            estimates.append(
                {"model": model, "bits": bits, "kernel": name, "threads": threads}
                | {"estimated": True, "tokens_per_s": 1e6 / total}
            )
    return estimates


def render(path: Path) -> str:
    """The table of a file of rows, as everywhere else, and the estimates."""
    from fdk_jax.benchmark import table

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        return "no rows"
    lines = [
        table.render(rows),
        "",
        "whole models, ESTIMATED from the products above (not measured):",
    ]
    for e in estimate(rows):
        lines.append(
            f"  {e['model']:18} {e['bits']} bit  {e['kernel']:22} {e['threads']} threads"
            f"  {e['tokens_per_s']:8.2f} tokens/s"
        )
    return "\n".join(lines)


def _load(path: str) -> dict[str, Any]:
    return parse_probe(Path(path).read_text(errors="replace"))


def main() -> None:
    """One subcommand for each step of the runner."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cores = commands.add_parser("cores", help="prints the chosen cores as a hexadecimal mask")
    cores.add_argument("probe")
    cores.add_argument("wanted")
    commands.add_parser("hottest", help="prints the highest temperature").add_argument("probe")
    commands.add_parser("name", help="prints a file name for the device").add_argument("probe")
    rows = commands.add_parser("complete", help="appends completed rows to a file")
    for name in ("raw", "before", "after", "output", "run"):
        rows.add_argument(name)
    commands.add_parser("table", help="prints the table of a file").add_argument("rows", type=Path)
    options = parser.parse_args()
    if options.command == "cores":
        try:
            chosen = choose_cores(_load(options.probe), options.wanted)
        except ValueError as error:
            sys.exit(str(error))
        print(f"{sum(1 << core for core in chosen):x}")
    elif options.command == "hottest":
        value = hottest(_load(options.probe))
        print("" if value is None else f"{value:.1f}")
    elif options.command == "name":
        probe = _load(options.probe)
        name = probe.get("model") or probe.get("machine") or "device"
        print(re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower() or "device")
    elif options.command == "complete":
        before, after = _load(options.before), _load(options.after)
        with records.Writer(options.output) as output:
            for line in Path(options.raw).read_text(errors="replace").splitlines():
                try:
                    found = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut off by a lost connection
                output.write(complete(found, before, after, json.loads(options.run)))
    else:
        print(render(options.rows))


if __name__ == "__main__":
    main()

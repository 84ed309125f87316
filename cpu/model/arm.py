"""Cycles per weight of the ARM kernels as llvm-mca models them, and a check against the table kept.

    python cpu/model/arm.py            compares with results/arm_model.jsonl: exit 1 when 10% worse
    python cpu/model/arm.py --write    replaces the table

A model, not a measurement: every load hits the first-level cache, and branches are free. What is
modelled is the hot loop as compiled (64 columns of one or two tiles of 16 rows, scales in
bfloat16, a step of y included), found in the assembly as the block of code with most of the
kernel's characteristic instruction. Of many tokens (`m`) it is the decoding of a block, and for each
eight tokens the function that multiplies it, with its loop over a group of 64 columns unrolled.
Needs `cpu/toolchain/install.sh model`.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CPU = Path(__file__).resolve().parent.parent
TABLE = CPU.parent / "results" / "arm_model.jsonl"
SYSROOT = CPU / "build" / "sysroot-arm64"
ITERATIONS = 1000
WORSE = 1.10

MACHINES = {
    "neoverse-v2": "Neoverse V2, Cortex-X3",
    "cortex-x4": "Cortex-X4, X925",
    "neoverse-n2": "Neoverse N2, Cortex-A710",
    "cortex-a510": "Cortex-A510",
}


class Kernel(NamedTuple):
    name: str
    bits: int
    source: str
    march: str
    function: str  # pattern of the mangled name
    instruction: str
    weights: int  # that the block handles
    target: tuple[float, float, float, float] | None = None  # at most, for MACHINES


KERNELS = (
    Kernel(
        "dotprod.matvec_table4",
        4,
        "dotprod",
        "armv8-a+dotprod",
        r"MatvecINS0_6Table4.*run_tileIL9fdk_dtype2E",
        "sdot",
        1024,
        (0.052, 0.050, 0.10, 0.16),
    ),
    Kernel(
        "dotprod.matvec_uniform4",
        4,
        "dotprod",
        "armv8-a+dotprod",
        r"MatvecINS0_8Uniform4.*run_tileIL9fdk_dtype2E",
        "sdot",
        1024,
    ),
    Kernel(
        "dotprod.matvec_table2",
        2,
        "dotprod",
        "armv8-a+dotprod",
        r"MatvecINS0_6Table2ILb0.*run_tileIL9fdk_dtype2E",
        "sdot",
        1024,
    ),
    Kernel(
        "dotprod.matvec_uniform8",
        8,
        "dotprod",
        "armv8-a+dotprod",
        r"MatvecINS0_8Uniform8.*run_tileIL9fdk_dtype2E",
        "sdot",
        1024,
    ),
    Kernel(
        "neon.tables_1bit",
        1,
        "neon",
        "armv8-a",
        r"Tables1.*run_tilesILi2EL9fdk_dtype2E",
        "tbl",
        2048,
        (0.025, 0.025, 0.05, 0.06),
    ),
)


class Panel(NamedTuple):
    """A kernel of many tokens: weights are decoded once, then multiplied by eight tokens at a time."""

    name: str
    bits: int
    source: str
    march: str
    decoding: str  # pattern of the mangled name
    lookups: int  # "tbl" of the block that decodes `decoded` weights
    decoded: int
    multiplying: str  # of half a tile by eight tokens
    instruction: str
    repeated: int  # times that its loop runs in a group of 64 columns


PANELS = (
    Panel(
        "i8mm.panel_int8", 4, "i8mm", "armv8.2-a+dotprod+i8mm",
        r"MmlaINS0_9Int8PairsEE3run", 8, 128, r"MmlaINS0_9Int8PairsEE8add_halfILi4E", "smmla", 8,
    ),
)  # fmt: skip
TOKENS = (16, 64)
HALF = 8 * 64  # weights that one call multiplies


def assemble(kernel: Kernel | Panel) -> str:
    """The assembly of a kernel's translation unit, with the options of arm64_rules.ninja."""
    llvm = SYSROOT / "usr/lib/llvm-19"
    command = ["clang++-19", "--target=aarch64-linux-gnu", f"--sysroot={SYSROOT}"]
    command += ["-stdlib=libc++", "-isystem", str(llvm / "lib/clang/19/include")]
    command += ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
    command += ["-Iinclude", "-Isrc", f"-march={kernel.march}", "-S", "-o", "-"]
    command += [f"src/arm/{kernel.source}.cpp"]
    return subprocess.run(command, cwd=CPU, check=True, capture_output=True, text=True).stdout


def blocks(assembly: str, function: str) -> list[list[str]]:
    """The basic blocks of the functions whose mangled names match, each a list of instructions."""
    found: list[list[str]] = []
    inside = False
    for line in assembly.splitlines():
        label = re.match(r"([\w.$]+):", line)
        text = line.split("//")[0].strip()
        if label:
            if not label[1].startswith(".L"):
                inside = re.search(function, label[1]) is not None
            found.append([])
        elif inside and text and not text.startswith("."):
            found[-1].append(text)
            if re.match(r"(b|b\.\w+|cbn?z|tbn?z|ret|br)\s", text + " "):
                found.append([])
    return [block for block in found if block]


def count(block: list[str], instruction: str) -> int:
    """How many lines begin with it."""
    return sum(line.startswith(instruction) for line in block)


def hot_block(assembly: str, kernel: Kernel) -> list[str]:
    """The basic block of the kernel's function that has most of the instruction."""
    found = blocks(assembly, kernel.function)
    if not found:
        sys.exit(f"{kernel.name}: no function matches {kernel.function}")
    return max(found, key=lambda block: count(block, kernel.instruction))


def panel_blocks(assembly: str, panel: Panel) -> tuple[list[str], list[str]]:
    """The block that decodes, and the function that multiplies, its loop as often as it runs."""
    found = blocks(assembly, panel.decoding)
    decoding = next((block for block in found if count(block, "tbl") == panel.lookups), None)
    found = blocks(assembly, panel.multiplying)
    if decoding is None or not found:
        sys.exit(f"{panel.name}: no loops match {panel.decoding} and {panel.multiplying}")
    loop = max(found, key=lambda block: count(block, panel.instruction))
    whole = [line for block in found for line in block * (panel.repeated if block is loop else 1)]
    return decoding, [line for line in whole if not line.startswith("ret")]


def cycles(block: list[str], machine: str, tool: str) -> float:
    """Cycles of one run through the block in the steady state."""
    command = [tool, "-mtriple=aarch64", f"-mcpu={machine}", f"-iterations={ITERATIONS}"]
    found = subprocess.run(
        command, input="\n".join(block) + "\n", capture_output=True, text=True, check=True
    )
    total = re.search(r"Total Cycles:\s+(\d+)", found.stdout)
    if total is None:
        sys.exit(f"{tool} printed no cycles: {found.stderr}")
    return int(total[1]) / ITERATIONS


def model(tool: str) -> list[dict]:
    """A row for every kernel and machine."""
    rows = []
    assembly: dict[str, str] = {}
    version = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    version = (re.search(r"LLVM version (\S+)", version) or [None, "?"])[1]
    for kernel in KERNELS:
        if kernel.source not in assembly:
            assembly[kernel.source] = assemble(kernel)
        block = hot_block(assembly[kernel.source], kernel)
        for place, machine in enumerate(MACHINES):
            value = cycles(block, machine, tool) / kernel.weights
            row = {"suite": "arm_model", "modelled": True, "kernel": kernel.name}
            row |= {"bits": kernel.bits, "arithmetic": "int8", "machine": machine}
            row |= {"cycles_per_weight": round(value, 4), "instructions": len(block)}
            row |= {"group_size": 64, "tool": f"llvm-mca {version}", "compiler": "clang 19"}
            if kernel.target:
                row["target"] = kernel.target[place]
            rows.append(row)
    for panel in PANELS:
        decoding, multiplying = panel_blocks(assemble(panel), panel)
        for machine in MACHINES:
            once = cycles(decoding, machine, tool) / panel.decoded
            each = cycles(multiplying, machine, tool) / HALF
            for m in TOKENS:
                row = {"suite": "arm_model", "modelled": True, "kernel": panel.name, "m": m}
                row |= {"bits": panel.bits, "arithmetic": "int8", "machine": machine}
                row |= {"cycles_per_weight": round(once + m / 8 * each, 4)}
                row |= {"instructions": len(decoding) + len(multiplying), "group_size": 64}
                row |= {"tool": f"llvm-mca {version}", "compiler": "clang 19"}
                rows.append(row)
    return rows


def label(row: dict) -> str:
    """A kernel, and its number of tokens if that is not one."""
    return f"{row['kernel']}, m={row['m']}" if "m" in row else row["kernel"]


def print_table(rows: list[dict]) -> None:
    """Kernels down, machines across."""
    print("modelled cycles per weight (llvm-mca, cache hits), not measured")
    print(f"{'kernel':26}" + "".join(f"{m:>14}" for m in MACHINES))
    for name in dict.fromkeys(map(label, rows)):
        values = [row for row in rows if label(row) == name]
        print(f"{name:26}" + "".join(f"{row['cycles_per_weight']:14.4f}" for row in values))
    for row in rows:
        if row["cycles_per_weight"] > row.get("target", math.inf):
            print(f"above its target of {row['target']}: {row['kernel']} on {row['machine']}")


def regressions(rows: list[dict], kept: list[dict]) -> list[str]:
    """What became more than a tenth slower than the table says, or is missing from either."""
    before = {(label(row), row["machine"]): row["cycles_per_weight"] for row in kept}
    now = {(label(row), row["machine"]): row["cycles_per_weight"] for row in rows}
    wrong = [f"{k} on {m}: not in both tables" for k, m in before.keys() ^ now.keys()]
    for key in before.keys() & now.keys():
        if now[key] > before[key] * WORSE:
            wrong.append(f"{key[0]} on {key[1]}: {now[key]:.4f} cycles, was {before[key]:.4f}")
    return sorted(wrong)


def main() -> None:
    """Models, prints, and compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the table that is kept")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table that is kept")
    options = parser.parse_args()
    tool = shutil.which("llvm-mca-22")
    if tool is None or not SYSROOT.exists():
        sys.exit("needs llvm-mca-22 and the sysroot: run cpu/toolchain/install.sh model")
    rows = model(tool)
    print_table(rows)
    if options.write:
        partial = options.table.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(options.table)
        return
    kept = [json.loads(line) for line in options.table.read_text().splitlines()]
    wrong = regressions(rows, kept)
    if wrong:
        sys.exit("\n".join(["slower than the table:", *wrong]))


if __name__ == "__main__":
    main()

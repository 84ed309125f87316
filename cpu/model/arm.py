"""Cycles per weight of the ARM kernels as llvm-mca models them, and a check against the table kept.

    python cpu/model/arm.py            compares with results/arm_model.jsonl: exit 1 when 10% worse
    python cpu/model/arm.py --write    replaces the table

A model, not a measurement: every load hits the first-level cache, and branches are free. What is
modelled is the hot loop as compiled (64 columns of one or two tiles of 16 rows, scales in
bfloat16, a step of y included), found in the assembly as the block of code with most of the
kernel's characteristic instruction. Needs `cpu/toolchain/install.sh model`.
"""

import argparse
import json
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


def assemble(kernel: Kernel) -> str:
    """The assembly of a kernel's translation unit, with the options of arm64_rules.ninja."""
    llvm = SYSROOT / "usr/lib/llvm-19"
    command = ["clang++-19", "--target=aarch64-linux-gnu", f"--sysroot={SYSROOT}"]
    command += ["-stdlib=libc++", "-isystem", str(llvm / "lib/clang/19/include")]
    command += ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fopenmp"]
    command += ["-Iinclude", "-Isrc", f"-march={kernel.march}", "-S", "-o", "-"]
    command += [f"src/arm/{kernel.source}.cpp"]
    return subprocess.run(command, cwd=CPU, check=True, capture_output=True, text=True).stdout


def hot_block(assembly: str, kernel: Kernel) -> list[str]:
    """The basic block of the kernel's function that has most of the instruction."""
    best: list[str] = []
    block: list[str] = []
    inside = False

    def count(lines: list[str]) -> int:
        return sum(line.startswith(kernel.instruction) for line in lines)

    for line in assembly.splitlines():
        label = re.match(r"([\w.$]+):", line)
        text = line.split("//")[0].strip()
        if label:
            if not label[1].startswith(".L"):
                inside = re.search(kernel.function, label[1]) is not None
            block = []
        elif inside and text and not text.startswith("."):
            block.append(text)
            if count(block) > count(best):
                best = block
            if re.match(r"(b|b\.\w+|cbn?z|tbn?z|ret|br)\s", text + " "):
                block = []
    if not best:
        sys.exit(f"{kernel.name}: no function matches {kernel.function}")
    return best


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
    return rows


def print_table(rows: list[dict]) -> None:
    """Kernels down, machines across."""
    print("modelled cycles per weight (llvm-mca, cache hits), not measured")
    print(f"{'kernel':26}" + "".join(f"{m:>14}" for m in MACHINES))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        values = [row for row in rows if row["kernel"] == kernel]
        print(f"{kernel:26}" + "".join(f"{row['cycles_per_weight']:14.4f}" for row in values))
    for row in rows:
        if row["cycles_per_weight"] > row.get("target", 1.0):
            print(f"above its target of {row['target']}: {row['kernel']} on {row['machine']}")


def regressions(rows: list[dict], kept: list[dict]) -> list[str]:
    """What became more than a tenth slower than the table says, or is missing from either."""
    before = {(row["kernel"], row["machine"]): row["cycles_per_weight"] for row in kept}
    now = {(row["kernel"], row["machine"]): row["cycles_per_weight"] for row in rows}
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

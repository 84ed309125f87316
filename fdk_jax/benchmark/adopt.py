"""Rows that were measured elsewhere, taken into results/ with the commit of their source.

    python -m fdk_jax.benchmark.adopt FROM.jsonl results/TO.jsonl

A machine without git writes rows with a digest (see `fdk_jax.benchmark.source`) and no commit. This command
finds the commit in the history, and refuses rows whose source is in no commit, that failed or that have too few
samples.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdk_jax import usage
from fdk_jax.benchmark import records, source


def check_row(row: Mapping[str, Any]) -> None:
    """Refuses a measured row that results/ does not take.

    Raises:
        ValueError: it names no source, has too few samples or one of no time at all, or was not measured.
    """
    name = row.get("name")
    if row.get("status") == "failed":
        raise ValueError(f"{name} failed: {row.get('reason')}")
    if not row.get("digest"):
        raise ValueError(f"{name} has no digest of its source")
    samples = row.get("samples_us")
    if row.get("status") == "ok" and samples is not None and len(samples) < records.MIN_SAMPLES:
        raise ValueError(f"{name} has {len(samples)} samples, not {records.MIN_SAMPLES} or more")
    for times in (samples, row.get("decode_us")):
        if times and min(times) <= 0:  # a difference of two times that were not long enough
            raise ValueError(f"{name} has a sample of {min(times)} us")


def adopt(rows: list[dict[str, Any]], target: Path) -> int:
    """Writes rows into a file of results, each with its commit; rows of the same case are replaced.

    Args:
        rows: as `records.read` gives them.
        target: a JSONL file, made if it is missing.

    Returns:
        How many rows of the file were replaced.

    Raises:
        source.NotACommit: the history has no commit with the digest of a row.
        ValueError: a row has too few samples, or failed.
    """
    for row in rows:
        check_row(row)
    commits = source.find({row["digest"] for row in rows})
    for row in rows:
        if row["digest"] not in commits:
            raise source.NotACommit(f"{row['name']}: no commit has the digest {row['digest']}")
    made = {_identity(row): row | {"commit": commits[row["digest"]]} for row in rows}
    kept = records.read([target]) if target.exists() and target.stat().st_size else []
    replaced = [row for row in kept if _identity(row) in made]
    kept = [row for row in kept if _identity(row) not in made]
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    records.append(partial, (*kept, *made.values()))
    partial.replace(target)
    return len(replaced)


def _identity(row: Mapping[str, Any]) -> str:
    """What two rows of the same measurement share."""
    values = [
        row.get(key) for key in ("suite", "backend", "name", "m", "k", "n", "bits", "group_size")
    ]
    values += [
        row.get(key) for key in ("dtype", "threads", "device", "arithmetic", "isa", "busy_cores")
    ]
    values += [row.get(key) for key in ("beside", "clock", "model", "type", "prompt")]
    return json.dumps(values)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = usage.Parser(
        prog="python -m fdk_jax.benchmark.adopt",
        description="Takes rows that were measured elsewhere into results/, with the commit of their source.",
    )
    parser.add_argument("given", metavar="FROM.jsonl", type=Path)
    parser.add_argument("target", metavar="results/TO.jsonl", type=Path)
    arguments = parser.parse_args(argv)
    try:
        rows = records.read([arguments.given])
        replaced = adopt(rows, arguments.target)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(rows)} rows in {arguments.target}, {replaced} of them in place of older ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())

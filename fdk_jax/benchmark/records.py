"""Rows of results: their keys, what follows from their samples, and the JSONL file that holds them.

Of the standard library alone, so that programs beside the package may load this file where there is no JAX.
"""

import datetime
import json
import math
import os
import statistics as stdlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SCHEMA = 2
MIN_SAMPLES = 10  # of a measurement that is worth keeping
KEYS = (
    "schema", "suite", "name", "backend", "m", "k", "n", "bits", "group_size", "codebook", "dtype",
    "threads", "bytes_rw", "ops", "samples_us", "median_us", "p95_us", "mean_us", "stderr_us",
    "rel_rms_error", "plain_rel_rms_error", "copy_gb_s", "read_gb_s", "bound_us", "device",
    "driver", "versions", "digest", "commit", "date", "status", "reason",
)  # fmt: skip
STATUSES = ("ok", "skipped", "failed")


def make_row(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """A row with every key of the schema, None where no part gives a value; extra keys come last.

    Args:
        *parts: keys and values; later parts win.

    Raises:
        ValueError: the status is not one of `STATUSES`, or is not "ok" and has no reason.
    """
    given: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "status": "ok",
    }
    for part in parts:
        given.update(part)
    if given["status"] not in STATUSES:
        raise ValueError(f"status={given['status']!r} is not one of {STATUSES}")
    if given["status"] != "ok" and not given.get("reason"):
        raise ValueError(f"a row that is {given['status']} must say why: {given.get('name')}")
    return {key: given.get(key) for key in KEYS} | given


def statistics(samples_us: Sequence[float]) -> dict[str, Any]:
    """The keys of a row that hold the samples and what follows from them, in microseconds a call."""
    ordered = sorted(map(float, samples_us))
    at = 0.95 * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    spread = stdlib.stdev(ordered) / math.sqrt(len(ordered)) if len(ordered) > 1 else None
    return {
        "samples_us": [round(float(v), 4) for v in samples_us],
        "median_us": round(stdlib.median(ordered), 4),
        "p95_us": round(low + (at - math.floor(at)) * (high - low), 4),
        "mean_us": round(stdlib.fmean(ordered), 4),
        "stderr_us": None if spread is None else round(spread, 4),
    }


def from_measurement(found: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a line of `fdk_bench`: what a case was and its samples, nothing that follows from them.

    Args:
        found: keys and values of a row, `samples_us` among them; the bound of a product is that of its bytes.
    """
    row = make_row(found, statistics(found["samples_us"]))
    if row["bits"] and row["read_gb_s"]:
        row["bound_us"] = round(row["bytes_rw"] / row["read_gb_s"] / 1e3, 4)
    return row


class Writer:
    """Appends rows to a JSONL file, each on the disk before the next is measured.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab+")  # noqa: SIM115 (closed by __exit__)
        if self._file.tell() and self._last_byte() != b"\n":
            self._file.write(b"\n")  # An earlier run was killed within a row.

    def _last_byte(self) -> bytes:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        line = json.dumps(_finite(row), allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()


def append(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to a JSONL file; see `Writer`."""
    with Writer(path) as writer:
        for row in rows:
            writer.write(row)


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def read(paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The rows of JSONL files, measurements of `fdk_bench` among them; a torn line is left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file holds no rows of this schema.
    """
    rows = []
    for path in paths:
        found = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict):
                continue
            if "schema" not in row and "samples_us" in row:
                row = from_measurement(row)
            if row.get("schema") == SCHEMA:
                found.append(row)
        if not found:
            raise ValueError(f"{path} holds no rows of schema {SCHEMA}")
        rows += found
    return rows

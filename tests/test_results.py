"""Committed rows name a source that the history has, and the tables in the documents are those of the rows."""

import json
import re
from pathlib import Path

import pytest

from fdk_jax.benchmark import adopt, records, report, source

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "results").rglob("*.jsonl"))
MEASURED = [path for path in FILES if "modelled" not in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.name)
def test_rows_follow_the_schema_and_have_samples(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert not set(records.KEYS) - row.keys() and row["schema"] == records.SCHEMA
        assert row["commit"] and row["device"]
        adopt.check_row(row)


def test_every_row_names_a_source_in_the_history():
    shallow = source.git(ROOT, "rev-parse", "--is-shallow-repository")
    if shallow is None or shallow.strip() == "true":
        pytest.skip("there is no git here, or a history that was cut")
    named = {(row["digest"], row["commit"]) for path in MEASURED for row in records.read([path])}
    present = source.find({digest for digest, _ in named})
    for digest, commit in named:
        assert digest in present, f"no commit has the source {digest}"
        assert source.digest_of(commit) == digest


@pytest.mark.parametrize("name", report.FILES)
def test_tables_are_those_of_the_rows(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- report: " in text
    assert report.filled(text, report.rows()) == text, "run python -m fdk_jax.benchmark.report"


def test_no_figure_outside_of_the_tables():
    """Words about speed in the README have a row: numbers with such units stand in written tables only."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rest = re.sub(r"<!-- report: .*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not re.findall(r"\d+(?:\.\d+)? ?(?:us|ms|GB/s|TB/s|tokens a second|tokens/s)\b", rest)


def test_a_table_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="no table 'speed'"):
        report.filled("<!-- report: speed -->\n<!-- end -->", [])


def test_the_sweep_compares_sample_by_sample():
    def row(backend, name, bits, samples):
        facts = {
            "suite": "sweep",
            "device": "d",
            "k": 64,
            "threads": 2,
            "m": 3,
            "commit": "abcdefgh",
        }
        found = {"backend": backend, "name": name, "bits": bits, "samples_us": samples}
        return facts | found | {"median_us": sorted(samples)[1]}

    rows = [
        row("cpu", "codebook_int8", 4, [1.0, 2.0, 4.0]),
        row("cpu", "codebook_exact", 4, [2.0, 2.0, 2.0]),
        row("torch", "dense", 16, [3.0, 4.0, 12.0]),
    ]
    text = report.sweep(rows)
    assert "| 3 | 2 | 2 | 4 (3.00 / 2.00) |" in text and "commit abcdefg" in text
    assert report.sweep(rows[:0]) == "(No rows yet.)"

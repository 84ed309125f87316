"""The digest of a source, the commits that have it, and rows that are taken into results/."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fdk_jax.benchmark import adopt, records, source

ROOT = Path(__file__).resolve().parents[1]
CODE = {
    "fdk_jax/a.py": "1\n",
    "pallas_kernels/b/c.json": "{}\n",
    "cpu/src/d.cpp": "",
    "bench.py": "2\n",
}
REST = {"fdk_jax/_cpu.so": "x", "tests/e.py": "3\n", "README.md": "4\n"}


def _git(root: Path, *command: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with two commits of which the second changes a kernel."""
    root = tmp_path / "repository"
    for name, text in (CODE | REST).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    _git(tmp_path, "init", "-q", str(root))
    for key, value in (("user.name", "A"), ("user.email", "a@b"), ("commit.gpgsign", "false")):
        _git(root, "config", key, value)
    _git(root, "add", ".")
    _git(root, "commit", "-qm", "first")
    (root / "pallas_kernels/b/c.json").write_text('{"m": 1}\n')
    _git(root, "commit", "-qam", "second")
    return root


def test_a_copy_without_git_has_the_digest_of_its_commit(repository, tmp_path):
    head = source.digest_of("HEAD", repository)
    assert source.digest(repository) == head
    assert source.digest_of("HEAD~1", repository) != head
    copy = tmp_path / "copy"
    copy.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(repository), "archive", "HEAD"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(copy)], input=archive.stdout, check=True)
    assert source.digest(copy) == head
    (copy / "README.md").write_text("new words\n")
    (copy / "fdk_jax/_cpu.so").write_text("built anew")
    assert source.digest(copy) == head
    for change in ("fdk_jax/a.py", "fdk_jax/new/module.py", "cpu/src/d.cpp", "bench.py"):
        path = copy / change
        before = path.read_text() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text("changed\n")
        assert source.digest(copy) != head, change
        path.unlink() if before is None else path.write_text(before)
    assert source.digest(copy) == head


def test_the_history_tells_the_commit_of_a_digest(repository):
    first, second = _git(repository, "rev-parse", "HEAD~1", "HEAD").split()
    old, new = (source.digest_of(commit, repository) for commit in (first, second))
    (repository / "README.md").write_text("only words\n")
    _git(repository, "commit", "-qam", "third")
    # The oldest commit of a digest: words do not make a new source.
    assert source.find({old, new, "0123456789abcdef"}, repository) == {old: first, new: second}
    with pytest.raises(source.NotACommit, match="no commit 'absent'"):
        source.digest_of("absent", repository)


def test_the_module_runs_as_a_file_without_the_package():
    command = [sys.executable, "-S", str(ROOT / "fdk_jax/benchmark/source.py"), "--digest"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == source.digest()


def test_results_are_refused_from_a_tree_that_is_no_commits(monkeypatch):
    monkeypatch.setattr(source, "identity", lambda: ("0123456789abcdef", None))
    with pytest.raises(source.NotACommit, match="commit first"):
        source.require_commit(source.RESULTS / "new" / "rows.jsonl")
    source.require_commit(ROOT / ".bench" / "rows.jsonl")
    monkeypatch.setattr(source, "identity", lambda: ("0123456789abcdef", "1" * 40))
    source.require_commit(source.RESULTS / "rows.jsonl")


def _row(**values) -> dict:
    fields = dict(
        suite="kernels", name="a", samples_us=[1.0] * records.MIN_SAMPLES, digest="d" * 16
    )
    return records.make_row(fields, values)


def test_rows_are_adopted_with_their_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "find", lambda wanted: {"d" * 16: "c" * 40})
    given, target = tmp_path / "given.jsonl", tmp_path / "target.jsonl"
    with records.Writer(target) as writer:
        writer.write(_row(median_us=5.0))
        writer.write(_row(name="b", median_us=6.0))
    with records.Writer(given) as writer:
        writer.write(_row(median_us=4.0))
        writer.write(_row(name="c", status="skipped", reason="no GPU", samples_us=None))
    assert adopt.main([str(given), str(target)]) == 0
    rows = {row["name"]: row for row in records.read([target])}
    assert [row["median_us"] for row in rows.values()] == [6.0, 4.0, None]
    assert rows["a"]["commit"] == rows["c"]["commit"] == "c" * 40 and rows["b"]["commit"] is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(digest=None), "no digest"),
        (dict(digest="e" * 16), "no commit has the digest eeee"),
        (dict(samples_us=[1.0] * 9), "9 samples"),
        (dict(samples_us=[1.0] * 9 + [0.0]), "a sample of 0.0 us"),
        (dict(decode_us=[2.0, -1.0]), "a sample of -1.0 us"),
        (dict(status="failed", reason="wrong"), "a failed: wrong"),
    ],
)
def test_rows_that_prove_nothing_are_refused(values, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(source, "find", lambda wanted: {"d" * 16: "c" * 40})
    given, target = tmp_path / "given.jsonl", tmp_path / "target.jsonl"
    given.write_text(json.dumps(_row(**values)) + "\n")
    assert adopt.main([str(given), str(target)]) == 2
    assert message in capsys.readouterr().err and not target.exists()


def test_a_row_names_the_present_source():
    from fdk_jax.benchmark import environment

    fields = environment.describe(types.SimpleNamespace(platform="cpu", device_kind="cpu"))
    assert fields["digest"] == source.digest() and len(fields["digest"]) == 16
    assert fields["commit"] is None or source.digest_of(fields["commit"]) == fields["digest"]

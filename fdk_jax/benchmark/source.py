"""Which source a row was measured from: a digest that any machine computes, and the commit that has it.

    python fdk_jax/benchmark/source.py            prints the digest and the commit of this tree
    python fdk_jax/benchmark/source.py --digest   the digest alone

The digest is SHA-256 over the git object names and the paths of the files that a measurement depends on.
Object names are hashes of contents, so a plain copy of the tree (`git archive`, an rsync to a device) has the
digest of the commit that it was made from, and `fdk_jax.benchmark.adopt` finds that commit in the history.
This module needs nothing but Python: a machine without JAX can run it as a file.
"""

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
FOLDERS = (
    "fdk_jax", "pallas_kernels", "cpu/bench", "cpu/bindings", "cpu/include", "cpu/model", "cpu/src",
)  # fmt: skip
FILES = ("bench.py", "cpu/build.ninja", "cpu/objects.ninja")
SUFFIXES = frozenset({".py", ".json", ".cpp", ".h"})
_LENGTH = 16  # hexadecimal digits that are kept


class NotACommit(ValueError):
    """The tree, or the digest of a row, is not one of a commit."""


def counts(path: str) -> bool:
    """Whether the digest is over the file at this path, relative to the root and with slashes."""
    if path in FILES:
        return True
    name = PurePosixPath(path)
    return name.suffix in SUFFIXES and any(path.startswith(f"{folder}/") for folder in FOLDERS)


def _combine(objects: Iterable[tuple[str, str]]) -> str:
    """The digest of (path, git object name) pairs."""
    text = "".join(f"{name} {path}\n" for path, name in sorted(objects))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _object_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def digest(root: Path = ROOT) -> str:
    """The digest of a tree as it lies on the disk: 16 hexadecimal digits."""
    found = [root / file for file in FILES if (root / file).is_file()]
    for folder in FOLDERS:
        for parent, _, names in os.walk(root / folder):
            found += [Path(parent) / name for name in names]
    paths = {path.relative_to(root).as_posix(): path for path in found}
    return _combine((p, _object_name(f.read_bytes())) for p, f in paths.items() if counts(p))


def digest_of(commit: str, root: Path = ROOT) -> str:
    """The digest of a commit.

    Raises:
        NotACommit: git is missing or knows no such commit.
    """
    listing = git(root, "ls-tree", "-r", "-z", commit)
    if listing is None:
        raise NotACommit(f"git knows no commit {commit!r} in {root}")
    objects = []
    for line in filter(None, listing.split("\0")):
        mode, path = line.split("\t", 1)
        if counts(path):
            objects.append((path, mode.split()[2]))
    return _combine(objects)


def history(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """(digest, commit) of every commit that HEAD follows from, the newest first; nothing without git."""
    for commit in (git(root, "rev-list", "HEAD") or "").split():
        yield digest_of(commit, root), commit


def find(wanted: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """The oldest commit of each digest that the history has; others are left out."""
    wanted = set(wanted)
    return {found: commit for found, commit in history(root) if found in wanted}


@functools.cache
def identity() -> tuple[str, str | None]:
    """The digest of this tree, and HEAD if that has the same; computed once a process."""
    present = digest()
    head = git(ROOT, "rev-parse", "HEAD") if _is_top_ofgit() else None
    if head is None or digest_of(head.strip()) != present:
        return present, None
    return present, head.strip()


def _is_top_ofgit() -> bool:
    top = git(ROOT, "rev-parse", "--show-toplevel")
    return top is not None and Path(top.strip()).resolve() == ROOT


def require_commit(output: Path) -> None:
    """Refuses to write rows into results/ from a tree that is not a commit's.

    Raises:
        NotACommit: with what to do.
    """
    if not output.resolve().is_relative_to(RESULTS):
        return
    present, commit = identity()
    if commit is None:
        raise NotACommit(
            f"rows in results/ name the commit that they measured, and HEAD does not have the source of this"
            f" tree (digest {present}): commit first, or write elsewhere and adopt the rows with"
            f" `python -m fdk_jax.benchmark.adopt FROM TO`"
        )


def git(root: Path, *command: str) -> str | None:
    """What git prints for a repository; None where it fails or is missing."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    present, commit = identity()
    print(
        present if sys.argv[1:] == ["--digest"] else f"{present} {commit or '(no commit has it)'}"
    )

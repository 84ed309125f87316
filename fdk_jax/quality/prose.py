"""Prose of files that packages ship: paragraphs, sentences, windows of tokens."""

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

_BLOCKS = frozenset(
    (
        "address", "article", "blockquote", "body", "br", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4",
        "h5", "h6", "hr", "li", "main", "ol", "p", "pre", "section", "table", "td", "th", "tr", "ul",
    )
)  # fmt: skip
_HIDDEN = frozenset(("head", "nav", "pre", "script", "style", "table"))
_SHORTEST = 20  # words of a paragraph: shorter ones are headings, captions and menus
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class _Paragraphs(HTMLParser):
    """Collects the text between the edges of blocks, and leaves out what is not prose."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = [""]
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        self._edge(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN
        self._edge(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.found[-1] += data

    def _edge(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.found.append("")


def paragraphs(path: str | Path) -> list[str]:
    """The paragraphs of a text file, an HTML file or a folder of them (in the order of their names).

    Paragraphs of fewer than 20 words, code and tables are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing that reads as prose.
    """
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found: list[str] = []
    for file in files:
        if file.suffix in (".html", ".htm", ".xhtml"):
            reader = _Paragraphs()
            reader.feed(file.read_text("utf-8"))
            found += reader.found
        elif not path.is_dir() or file.suffix in (".txt", ".md", ".rst"):
            found += file.read_text("utf-8").split("\n\n")
    joined = [" ".join(text.split()) for text in found]
    prose = [text for text in dict.fromkeys(joined) if len(text.split()) >= _SHORTEST]
    if not prose:
        raise ValueError(f"{path} holds no paragraph of {_SHORTEST} words or more")
    return prose


def name_and_digest(path: str | Path) -> str:
    """What rows say of a text: its name, and a digest of its paragraphs."""
    whole = "\n".join(paragraphs(path)).encode()
    return f"{Path(path).name} {hashlib.sha256(whole).hexdigest()[:12]}"


def sentences(path: str | Path, *, shortest: int = 6, longest: int = 40) -> list[str]:
    """The sentences of `paragraphs(path)` with that many words, each once."""
    found = (s for text in paragraphs(path) for s in _END.split(text))
    return [s for s in dict.fromkeys(found) if shortest <= len(s.split()) <= longest]


def shuffled_windows(tokens: list[int] | np.ndarray, length: int, seed: int) -> np.ndarray:
    """int32 [windows, length] of a text in a random order, the same for the same seed."""
    tokens = np.asarray(tokens, np.int32)
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return rows[np.random.default_rng(seed).permutation(len(rows))]

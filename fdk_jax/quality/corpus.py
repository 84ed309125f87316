"""A large text of packages as one file, and that text as tokens.

python -m fdk_jax.quality.corpus FOLDER corpus.xz [BYTES]
python -m fdk_jax.quality.corpus corpus.xz tokens.npz VOCABULARY

The first reads the RFCs (rfc*.txt or rfc*.txt.gz) below FOLDER and writes BYTES of them (190 million unless
given). The second writes its tokens, which stand for the text wherever one is asked for.
"""

import dataclasses
import gzip
import hashlib
import itertools
import lzma
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_SEPARATOR = "\f"  # between documents
_BYTES = 190_000_000
_TEST_BYTES = 4_000_000  # of whole documents, the first ones
_TOKENIZER_BYTES = 24_000_000  # that the vocabulary is made from
_BATCH_BYTES = 8_000_000  # tokenised at a time: an encoding takes far more memory than its text
_END = "<end>"
_PAGE = re.compile(r"\n[^\n]*\[Page +\w+\]\s*\n?\f?\s*\n?(RFC \d+ [^\n]*\d{4}\n)?")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text in tokens; the end of a document is a token too.

    Attributes:
        train: uint16 [tokens].
        test: uint16 [tokens], of other documents.
        vocabulary: number of different tokens.
        test_bytes: of the test text in UTF-8.
        digest: of the whole text, however it was compressed; hexadecimal.
        name: of the text's file.
    """

    train: np.ndarray
    test: np.ndarray
    vocabulary: int
    test_bytes: int
    digest: str
    name: str


def clean(text: str) -> str:
    """An RFC without its page breaks, margins and runs of empty lines."""
    text = _PAGE.sub("\n", text.replace("\r", "")).replace(_SEPARATOR, "")
    text = re.sub(r"(?m)^ {1,3}|[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write(folder: Path, out: Path, size: int = _BYTES) -> int:
    """Writes RFCs below a folder to one compressed file, in an order that only their names decide.

    Args:
        folder: searched for rfc*.txt and rfc*.txt.gz.
        out: an xz file.
        size: bytes of text; whole documents up to there.

    Returns:
        The number of documents.

    Raises:
        ValueError: no such files.
    """
    files = {p.name.removesuffix(".gz"): p for p in sorted(folder.rglob("rfc[0-9]*.txt*"))}
    if not files:
        raise ValueError(
            f"{folder} holds no rfc*.txt or rfc*.txt.gz: unpack doc-rfc-* packages there"
        )
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = written = 0
    with lzma.open(out, "wb", preset=7) as sink:
        for name in order:
            raw = files[name].read_bytes()
            raw = gzip.decompress(raw) if files[name].suffix == ".gz" else raw
            encoded = (clean(raw.decode("utf-8", "replace")) + _SEPARATOR).encode()
            if written + len(encoded) > size:
                break
            sink.write(encoded)
            count, written = count + 1, written + len(encoded)
    return count


def documents(path: Path) -> list[str]:
    """The documents of a file that `write` made, or of any UTF-8 text (xz or not) with form feeds between them.

    Raises:
        ValueError: fewer than two documents.
    """
    return _parted(_text(path), path)


def _text(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _parted(text: bytes, path: Path) -> list[str]:
    found = [one for one in text.decode("utf-8").split(_SEPARATOR) if one]
    if len(found) < 2:
        raise ValueError(
            f"{path} holds {len(found)} documents (form feeds part them): 2 are needed"
        )
    return found


def tokenise(path: Path, vocabulary: int, cache: Path | None = None) -> Tokens:
    """The text of a file in tokens of byte-pair encoding, whose vocabulary is made from its training part.

    Args:
        path: see `documents`; or its tokens, a file `.npz` of `keep`.
        vocabulary: number of tokens, at most 65536.
        cache: a folder that keeps the tokens; None for none.

    Returns:
        The same tokens for the same text and version of `tokenizers`.

    Raises:
        ValueError: fewer than two documents; or kept tokens of another vocabulary.
    """
    if path.suffix == ".npz":
        found = kept_tokens(path)
        if found.vocabulary > vocabulary:
            raise ValueError(
                f"{path} has {found.vocabulary} tokens, more than {vocabulary}: tokenise its text again"
            )
        return found
    text = _text(path)
    digest = hashlib.sha256(text).hexdigest()[:16]
    kept = None if cache is None else cache / f"text-{digest}-{vocabulary}.npz"
    if kept is not None and kept.exists():
        return dataclasses.replace(kept_tokens(kept), name=path.name)
    texts = _parted(text, path)
    lengths = np.cumsum([len(text.encode()) for text in texts])
    # A small text gives a tenth of itself.
    limit = min(_TEST_BYTES, lengths[-1] // 10)
    held = min(max(1, int(np.searchsorted(lengths, limit, side="right"))), len(texts) - 1)
    model = _trained(texts[held:], vocabulary)
    test, train = (_encode(model, part) for part in (texts[:held], texts[held:]))
    size = int(model.get_vocab_size())
    made = Tokens(train, test, size, int(lengths[held - 1]), digest, path.name)
    if kept is not None:
        keep(made, kept)
    return made


def keep(tokens: Tokens, path: Path) -> None:
    """Writes tokens to a file `.npz`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(tokens).items()}
    np.savez(unfinished, **arrays)
    os.replace(unfinished, path)


def kept_tokens(path: Path) -> Tokens:
    """What `keep` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    with np.load(path) as found:
        if missing := {field.name for field in dataclasses.fields(Tokens)} - set(found.files):
            raise ValueError(f"{path} holds no tokens of a text: it lacks {sorted(missing)}")
        sizes = int(found["vocabulary"]), int(found["test_bytes"])
        return Tokens(
            found["train"], found["test"], *sizes, str(found["digest"]), str(found["name"])
        )


def _trained(texts: list[str], vocabulary: int):
    """A tokenizer of bytes (as GPT-2's) from the first texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sizes = itertools.accumulate(len(text) for text in texts)
    few = [text for text, size in zip(texts, sizes, strict=True) if size <= _TOKENIZER_BYTES]
    model.train_from_iterator(few or texts[:1], trainer)
    return model


def _encode(model, texts: list[str]) -> np.ndarray:
    end = model.token_to_id(_END)
    parts = []
    for batch in _batches(texts):
        for encoding in model.encode_batch_fast(batch):
            parts.append(np.asarray([*encoding.ids, end], np.uint16))
    return np.concatenate(parts)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if target.suffix == ".npz":
        tokens = tokenise(source, int(sys.argv[3]) if len(sys.argv) == 4 else sys.exit(__doc__))
        keep(tokens, target)
        print(f"{len(tokens.train) + len(tokens.test):,} tokens", file=sys.stderr)
    else:
        total = write(source, target, *map(int, sys.argv[3:]))
        print(f"{total} documents, {target.stat().st_size:,} bytes", file=sys.stderr)

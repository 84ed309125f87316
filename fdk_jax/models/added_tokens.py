"""Tokens that a tokenizer's configuration names beside `tokenizer.json`, added as `transformers` adds them.

A token that is only named, and not added, would be cut into pieces like any text: a prompt would silently have
other tokens than the model was trained with.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fdk_jax.files.json_files import read_json

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def complete(
    backend: Any, folder: Path, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Makes a tokenizer of `tokenizer.json` what its folder says.

    Args:
        backend: The `tokenizers.Tokenizer`; it is changed.
        folder: May have `added_tokens.json`, where the configuration has no `added_tokens_decoder`.
        config: `tokenizer_config.json`, with what older folders have in `special_tokens_map.json`.
        named: Text of the special tokens by name: "bos_token", ...

    Raises:
        ValueError: entries that are no tokens.
    """
    import tokenizers

    # These belong to a training that the file was saved in: a prompt is neither cut nor filled up.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    own = {token.content for token in backend.get_added_tokens_decoder().values()}
    found: dict[str, Any] = {}
    for text, flags in _entries(folder, config):
        special = flags.pop("special", False) or text in named.values()
        found[text] = tokenizers.AddedToken(text, special=special, **flags)
    for text in (*named.values(), *_others(folder, config)):
        if text not in own and text not in found:
            found[text] = tokenizers.AddedToken(text, special=True)
    if found:
        backend.add_tokens(list(found.values()))


def _entries(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, bool]]]:
    """Texts and flags of `added_tokens_decoder`, or of `added_tokens.json`, by their numbers."""
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        older = read_json(folder / "added_tokens.json", optional=True)
        decoder = {number: dict(content=text) for text, number in older.items()}
    try:
        entries = [entry for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))]
        found = [
            (entry["content"], {f: bool(entry[f]) for f in (*_FLAGS, "special") if f in entry})
            for entry in entries
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: entries of added_tokens_decoder are no tokens: {error!r}"
        ) from None
    for text, flags in found:
        yield _text(folder, text), flags


def _others(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Texts of special tokens without a name of their own."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
            yield _text(folder, token.get("content") if isinstance(token, Mapping) else token)


def _text(folder: Path, token: Any) -> str:
    if not isinstance(token, str) or not token:
        raise ValueError(
            f"{folder}: the tokenizer's configuration has the token {token!r}, no text"
        )
    return token

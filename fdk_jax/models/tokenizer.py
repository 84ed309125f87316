"""Text to token numbers and back, with the files of a Hugging Face checkpoint folder."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdk_jax import files
from fdk_jax.files.json_files import read_json
from fdk_jax.models import added_tokens, chat_template
from fdk_jax.models.chat_template import ChatTemplates, Message

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclasses.dataclass(frozen=True)
class TokenizerParts:
    """What a tokenizer is made of, whatever files it was read from.

    Attributes:
        backend: The `tokenizers.Tokenizer`.
        special: Text of the special tokens by name: "bos_token", "eos_token", ...
        templates: Chat templates.
        stop_tokens: Token numbers that end a text, that of "eos_token" aside.
    """

    backend: Any
    special: Mapping[str, str]
    templates: ChatTemplates
    stop_tokens: Sequence[int]


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        stop_tokens: Token numbers that end a text, of `generation_config.json`, `config.json` and the
            end-of-text token.
        begin_token: Text of the token that begins every text, or "".

    Args:
        source: A folder with `tokenizer.json`; `tokenizer_config.json`, `special_tokens_map.json`,
            `generation_config.json` and the files of chat templates are read where they exist. Or a `.gguf`
            file, or the parts.

    Raises:
        FileNotFoundError: no `tokenizer.json`, and nothing that stands for it.
        ValueError: a broken file, with its name.
        ImportError: the `tokenizers` package is missing.
    """

    def __init__(self, source: str | Path | TokenizerParts):
        parts = source if isinstance(source, TokenizerParts) else _read_parts(Path(source))
        self._tokenizer = parts.backend
        self._special = dict(parts.special)
        self._templates = parts.templates
        self.begin_token = self._special.get("bos_token", "")
        end = self._tokenizer.token_to_id(self._special.get("eos_token", ""))
        stops = [*parts.stop_tokens, *([] if end is None else [end])]
        self.stop_tokens = tuple(dict.fromkeys(stops))
        added = self._tokenizer.get_added_tokens_decoder()
        self._hidden = {number for number, token in added.items() if token.special}
        self._bytes = _byte_tokens(self._tokenizer)
        self._byte_of = {token: byte for byte, token in enumerate(self._bytes)}

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._templates.named)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token numbers of a text; `special` adds those that the tokenizer puts around one.

        Raises:
            ValueError: the text holds half a character (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate, {text[error.start]!r} at index {error.start}, which is"
                " no character"
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers, without special tokens.

        Bytes that are no character become U+FFFD each by itself, whatever stands beside them.
        """
        return self._tokenizer.decode(self._whole(tokens), skip_special_tokens=True)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token numbers of a conversation, up to where the assistant's answer begins.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} each.
            tools: JSON schemas of functions that the model may call.
            template: Name of one of several templates, or the source of one; None for the default.
            **variables: More that the template reads: `documents`, `enable_thinking`, ...

        Raises:
            ValueError: no chat template, or one that refuses these messages.
            ImportError: the `jinja2` package is missing.
        """
        if template is not None and "{" in template:
            source = template
        else:
            source = self._templates.choose(template, tools)
        variables = self._special | variables
        text = chat_template.render(source, messages, tools=tools, **variables)
        return self.encode(text, special=False)

    def _whole(self, tokens: Sequence[int]) -> list[int]:
        """Tokens with every byte that is part of no character replaced by U+FFFD.

        The decoder of tokens that stand for single bytes gives up a whole run of them, good characters
        and all, for one byte that is wrong or missing.
        """
        if not self._bytes:
            return list(tokens)
        shown = [token for token in tokens if token not in self._hidden]
        out: list[int] = []
        for is_byte, run in itertools.groupby(shown, self._byte_of.__contains__):
            if not is_byte:
                out += run
                continue
            raw = bytes(self._byte_of[token] for token in run)
            out += (self._bytes[byte] for byte in raw.decode("utf-8", "replace").encode())
        return out


class TextStream:
    """Turns tokens into text as they come, holding back a character that is not complete.

    All texts of `add` and the last one of `flush` make `tokenizer.decode` of all tokens.

    Args:
        tokenizer: Of the tokens.
    """

    _WINDOW = 64  # tokens that are decoded again for each new one, at most
    _CONTEXT = 8  # of them that stay when others come: a decoder may look at the token before

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the window
        self._shown = 0  # characters of the window's text that were handed out
        self._limit = self._WINDOW

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        new = self._take(text.removesuffix("\N{REPLACEMENT CHARACTER}"))
        if len(self._tokens) > self._limit and self._shown == len(text):
            self._forget()
        return new

    def flush(self) -> str:
        """What was held back; the stream begins anew."""
        new = self._take(self._tokenizer.decode(self._tokens))
        self._tokens, self._shown, self._limit = [], 0, self._WINDOW
        return new

    def _take(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new

    def _forget(self) -> None:
        """Drops the window's oldest tokens, at the border of a character."""
        last = len(self._tokens) - self._CONTEXT
        for cut in range(last, last - self._CONTEXT, -1):
            before = self._tokenizer.decode(self._tokens[:cut])
            context = self._tokenizer.decode(self._tokens[cut:])
            if context and not before.endswith("\N{REPLACEMENT CHARACTER}"):
                self._tokens = self._tokens[cut:]
                self._shown = len(context)
                break
        self._limit = len(self._tokens) + self._WINDOW


def _read_parts(path: Path) -> TokenizerParts:
    """The tokenizer of a folder, or that which a GGUF file holds itself."""
    if (path / "tokenizer.json").is_file():
        return _read_folder(path)
    made = files.read_tokenizer(path)
    if made is None:
        return _read_folder(path)
    import tokenizers

    return TokenizerParts(
        backend=tokenizers.Tokenizer.from_str(made.tokenizer),
        special={name: made.config[name] for name in _NAMED if name in made.config},
        templates=ChatTemplates.from_value(made.config.get("chat_template")),
        stop_tokens=made.stop_tokens,
    )


def _read_folder(folder: Path) -> TokenizerParts:
    config = read_json(folder / "tokenizer_config.json", optional=True)
    # An older folder: its special tokens are in another file.
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / "special_tokens_map.json", optional=True)
    special = {name: _text(folder, name, config.get(name)) for name in _NAMED}
    special = {name: text for name, text in special.items() if text}
    backend = _read_backend(folder)
    added_tokens.complete(backend, folder, config, special)
    return TokenizerParts(
        backend=backend,
        special=special,
        templates=ChatTemplates.read(folder, config),
        stop_tokens=_stop_tokens(folder),
    )


def _read_backend(folder: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "text needs the tokenizers package: pip install fdk-jax[models]"
        ) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _converted(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def _converted(folder: Path) -> Any:
    """The tokenizer of a folder that has one in an older form, read by `transformers`."""
    older = (("tokenizer.model",), ("vocab.json", "merges.txt"))
    found = next((n for n in older if all((folder / name).is_file() for name in n)), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; copy it from the model's own folder"
        )
    words = " and ".join(found)
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise FileNotFoundError(
            f"{folder} has {words} but no tokenizer.json; make it with: pip install transformers"
            ' sentencepiece; python -c "from transformers import AutoTokenizer as A;'
            f" A.from_pretrained('{folder}').save_pretrained('{folder}')\""
        ) from None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:
        raise ValueError(f"transformers cannot read {words} of {folder}: {error}") from error


def _text(folder: Path, name: str, token: Any) -> str:
    """A special token is written as text, or as an object with its content.

    Raises:
        ValueError: it is neither.
    """
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{folder}: the tokenizer's configuration has {name}={token!r}, no text")
    return text or ""


def _stop_tokens(folder: Path) -> list[int]:
    stops: list[int] = []
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name, optional=True)
        inner = config.get("text_config")
        inner = inner if isinstance(inner, Mapping) else {}
        ends = config.get("eos_token_id", inner.get("eos_token_id"))
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if any(type(end) is not int for end in ends):
            raise ValueError(
                f"{folder / name} has eos_token_id={ends!r}; numbers of tokens are needed"
            )
        stops += ends
    return stops


def _byte_tokens(backend: Any) -> list[int]:
    """The tokens of the 256 bytes, where the decoder joins such tokens to characters; else none."""
    decoder = backend.decoder
    if decoder is None or b"ByteFallback" not in decoder.__getstate__():
        return []
    tokens = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    return [] if None in tokens else tokens

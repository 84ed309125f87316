"""Text to token numbers and back, with the files of a Hugging Face checkpoint folder."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, str]


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
        stop_tokens: Token numbers that end a text, of `generation_config.json`, `config.json` and the
            end-of-text token.
        begin_token: Text of the token that begins every text, or "".

    Args:
        folder: With `tokenizer.json`; `tokenizer_config.json`, `generation_config.json` and
            `chat_template.jinja` are read where they exist.

    Raises:
        FileNotFoundError: no `tokenizer.json`.
        ImportError: the `tokenizers` package is missing.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; a Hugging Face checkpoint is one")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json; copy it from the model's own folder (a tokenizer.model"
                " of sentencepiece has to be converted to it first)"
            )
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "text needs the tokenizers package: pip install fdk-jax[models]"
            ) from error
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        facts = _read_json(folder / "tokenizer_config.json")
        self._template = _template(folder, facts)
        self._special = {
            name: _text(facts.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        }
        self.begin_token = self._special["bos_token"]
        self.stop_tokens = self._stop_tokens(folder)

    @property
    def can_chat(self) -> bool:
        """Whether the folder has a chat template."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token numbers of a text; `special` adds those that the tokenizer puts around one."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token numbers of a conversation, up to where the assistant's answer begins.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} each.

        Raises:
            ValueError: no chat template, or one that refuses these messages.
            ImportError: the `jinja2` package is missing.
        """
        if self._template is None:
            raise ValueError("this tokenizer has no chat template; give it a plain prompt")
        text = _render(
            self._template, messages=list(messages), add_generation_prompt=True, **self._special
        )
        return self.encode(text, special=False)

    def _stop_tokens(self, folder: Path) -> tuple[int, ...]:
        stops: list[int] = []
        for name in ("generation_config.json", "config.json"):
            ends = _read_json(folder / name).get("eos_token_id")
            stops += ends if isinstance(ends, list) else [] if ends is None else [ends]
        end = self._tokenizer.token_to_id(self._special["eos_token"])
        return tuple(dict.fromkeys(stops if end is None else [*stops, end]))


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not complete.

    Args:
        tokenizer: Of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one are not looked at any more
        self._shown = 0  # characters of the text since `_context` that were handed out

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens[self._context :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new = text[self._shown :]
        self._shown = len(text)
        if len(self._tokens) - self._context > 64:
            # A decoder may look at the token before; so some stay as context.
            self._context = len(self._tokens) - 8
            self._shown = len(self._tokenizer.decode(self._tokens[self._context :]))
        return new


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _text(token: str | Mapping[str, Any] | None) -> str:
    """A special token is written as text, or as an object with its content."""
    if isinstance(token, Mapping):
        return token.get("content", "")
    return token or ""


def _template(folder: Path, facts: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = facts.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _render(template: str, **values: Any) -> str:
    """A Jinja template in a sandbox, with the helpers that chat templates expect."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install fdk-jax[models]") from error

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(**values)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error

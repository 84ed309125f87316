"""Chat templates: Jinja programs of a checkpoint that turn messages into a prompt.

Rendered in a sandbox, with the variables, filters and tags that `transformers` gives to them, so that a
template says the same here as there.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fdk_jax.files.json_files import read_json

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The templates of a checkpoint.

    Attributes:
        named: Name to source; a single template is called "default".
    """

    named: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> "ChatTemplates":
        """Those of a folder: of files of their own where there are any, else of the configuration.

        Args:
            folder: May have `chat_template.jinja`, `additional_chat_templates/*.jinja` or
                `chat_template.json`.
            tokenizer_config: May have `chat_template`: a text, or a list or an object of named ones.

        Raises:
            ValueError: a file that is no template.
        """
        files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
        single = folder / "chat_template.jinja"
        if single.is_file():
            files["default"] = single
        if files:
            return cls({name: read_text(path) for name, path in files.items()})
        value = read_json(folder / "chat_template.json", optional=True).get("chat_template")
        return cls.from_value(tokenizer_config.get("chat_template") if value is None else value)

    @classmethod
    def from_value(cls, value: Any) -> "ChatTemplates":
        """Templates as configurations hold them: None, a text, or a list or an object of named ones."""
        if value is None:
            return cls({})
        if isinstance(value, str):
            return cls({"default": value})
        try:
            if not isinstance(value, Mapping):
                value = {entry["name"]: entry["template"] for entry in value}
        except (TypeError, KeyError) as error:
            raise ValueError(
                "chat_template must be a text or a list of {name, template}, got"
                f" {type(value).__name__}"
            ) from error
        return cls(dict(value))

    def choose(self, name: str | None, tools: Any) -> str:
        """The source of one template: the named one, or the default for a talk with these tools.

        Raises:
            ValueError: there is none, with the names that there are.
        """
        if name is None and tools is not None and "tool_use" in self.named:
            name = "tool_use"
        template = self.named.get(name or "default")
        if template is not None:
            return template
        if not self.named:
            raise ValueError("this tokenizer has no chat template; give it a plain prompt")
        wanted = "has no default" if name is None else f"has none called {name!r}"
        raise ValueError(
            f"this tokenizer {wanted} among its chat templates; choose one of {sorted(self.named)}"
        )


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt that a template makes of messages, up to where the answer begins.

    Args:
        template: Its source.
        messages: {"role": ..., "content": ...} each.
        tools: JSON schemas of functions that the model may call.
        documents: What an answer may rely on.
        **variables: Special tokens, and what else this template reads (`enable_thinking`, say).

    Raises:
        ValueError: the template is broken, or refuses these messages.
        ImportError: the `jinja2` package is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install fdk-jax[models]") from error
    values = dict(add_generation_prompt=True) | variables
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[_normalised(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None if documents is None else list(documents),
                **values,
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken at line {error.lineno}: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error


def _environment() -> Any:
    """A sandbox with the helpers that chat templates expect."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks the assistant's words for training; here it prints them."""

        tags: ClassVar = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_print")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _print(self, caller: Any) -> str:
            return caller()

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _normalised(message: Message) -> dict[str, Any]:
    """Without keys that have no value; reasoning under every name that templates read it by."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be an object with role and content, got {message!r}")
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    if reasoning is None:
        return found
    return {"thinking": reasoning, **found, "reasoning_content": reasoning}


def read_text(path: Path) -> str:
    """A template's source.

    Raises:
        ValueError: the file is no text.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error

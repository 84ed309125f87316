"""Text to tokens and back: streaming, chat templates, the files of folders."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models

from fdk_jax.files.json_files import read_json
from fdk_jax.models.chat_template import ChatTemplates, render
from fdk_jax.models.tokenizer import TextStream, Tokenizer, TokenizerParts

CHATTY = Path(__file__).parent / "data" / "models" / "llama3"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
HELLO = [dict(role="user", content="hi")]
WITH_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs torch and transformers: see docs/models.md",
)


@pytest.fixture
def folder(writable):
    return writable(CHATTY)


# --- kinds of tokenizers ----------------------------------------------------------------------


def _with_bytes(spaces_at_the_start: bool) -> tokenizers.Tokenizer:
    """Characters outside the vocabulary are tokens of bytes: as of Llama 2 or, without spaces, Gemma."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz.", "日", "th", "the", "▁the", "▁▁"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(
        tokenizer_models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    )
    replace = normalizers.Replace(" ", "▁")
    last = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces_at_the_start:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        backend.decoder = decoders.Sequence([*last, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = replace
        backend.decoder = decoders.Sequence(last)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def _of_bytes() -> tokenizers.Tokenizer:
    """All text is tokens of bytes: as of GPT-2, Llama 3 and Qwen; one token is added to them."""
    backend = tokenizers.Tokenizer.from_file(str(CHATTY / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>")])
    return backend


def _of_pieces() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "▁", "▁the", "▁fox", "es", "日本", "."]
    backend = tokenizers.Tokenizer(tokenizer_models.Unigram([(p, -1.0) for p in pieces], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _of_words() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "the", "fox", "##es", "##y", ".", "do", "n't", "日"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizer_models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


KINDS = {
    "byte-level": _of_bytes,
    "byte-fallback": lambda: _with_bytes(True),
    "byte-fallback, no space": lambda: _with_bytes(False),
    "metaspace": _of_pieces,
    "wordpiece": _of_words,
}


def make(backend: tokenizers.Tokenizer, template: str | None = None) -> Tokenizer:
    return Tokenizer(TokenizerParts(backend, {}, ChatTemplates.from_value(template), []))


TEXTS = [
    "日本語の文章です。" * 12,
    "日本語の文章です。" * 8 + " the end",
    "🎉" * 40,
    "x" + "é" * 90,
    "the " * 150,
    "the  quick   brown " * 20,
    "Привет, мир! " * 20,
    "the\n" * 100,
    "👩‍👩‍👧 family 🇯🇵 and é" * 9,
]


def random_texts(backend, kind: str, seed: int) -> list[list[int]]:
    """Tokens of ordinary text, of text in pieces, and tokens that make no text at all."""
    source = random.Random(seed)
    size = backend.get_vocab_size()
    whole = source.choice(TEXTS)
    if kind in ("metaspace", "wordpiece"):
        return [[source.randrange(size) for _ in range(200)]]
    tokens = backend.encode(whole).ids
    spoilt = [source.randrange(size) if source.random() < 0.1 else token for token in tokens]
    return [tokens, spoilt, [source.randrange(size) for _ in range(200)]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_streaming_equals_decoding_the_whole_at_every_length(kind, seed):
    tokenizer = make(KINDS[kind]())
    for tokens in random_texts(tokenizer._tokenizer, kind, seed):
        source = random.Random(seed)
        stream, shown, at = TextStream(tokenizer), "", 0
        while at < len(tokens):
            step = source.choice([1, 1, 1, 2, 8, 70])
            shown += stream.add(tokens[at : at + step])
            at += step
            whole = tokenizer.decode(tokens[:at])
            assert whole.startswith(shown)
            assert whole[len(shown) :] in ("", REPLACEMENT), "only half a character is held back"
        assert shown + stream.flush() == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "byte-fallback, no space"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(kind, text):
    tokenizer = make(KINDS[kind]())
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    parts = [stream.add([token]) for token in tokens]
    assert "".join(parts) + stream.flush() == text
    assert not any(REPLACEMENT in part for part in parts)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "byte-fallback, no space"])
def test_a_bad_byte_spoils_itself_alone(kind):
    tokenizer = make(KINDS[kind]())
    good = tokenizer.encode("é語")
    half = tokenizer.encode("语")[-3:-1]  # two of its three bytes
    assert tokenizer.decode(good + half) == "é語" + REPLACEMENT
    assert tokenizer.decode(good + half + good).replace(" ", "") == f"é語{REPLACEMENT}é語"
    stream = TextStream(tokenizer)
    assert stream.add(good + half) == "é語"
    assert stream.flush() == REPLACEMENT
    assert stream.add(good) + stream.flush() == "é語", "a stream begins anew"


def test_decoding_whole_text_is_the_librarys():
    for kind, build in KINDS.items():
        tokenizer, backend = make(build()), build()
        for text in TEXTS:
            tokens = backend.encode(text).ids
            assert tokenizer.decode(tokens) == backend.decode(tokens), kind


def test_round_trip_and_stops():
    tokenizer = Tokenizer(CHATTY)
    text = "the quick brown fox, äöü 日本 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop_tokens == (1, 2)
    assert tokenizer.begin_token == "<|begin|>"


@pytest.mark.parametrize("text", ["\ud800", "good \udc80 bad"])
def test_half_a_character_is_refused(text):
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer(CHATTY).encode(text)


# --- chat templates ---------------------------------------------------------------------------

SPECIAL = dict(bos_token="<s>", unk_token="<unk>")
RENDERED = {
    "{% if tools is not none %}T{{ tools | length }}{% endif %}x": "x",
    "{{ tools is defined }}{{ documents is none }}": "TrueTrue",
    "{{ bos_token }}{{ unk_token }}{{ sep_token }}{{ sep_token is defined }}": "<s><unk>False",
    "a{% generation %}{{ messages[0].content }}{% endgeneration %}b": "ahib",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}": "1",
    "{{ {'b': '<é>', 'a': 1} | tojson }}": '{"b": "<é>", "a": 1}',
    "{{ {'b': 2, 'a': 1} | tojson(sort_keys=true, separators=(',', ':')) }}": '{"a":1,"b":2}',
    "{{ ['é'] | tojson(ensure_ascii=true, indent=1) }}": '[\n "\\u00e9"\n]',
    "{{ strftime_now('%%') }}": "%",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}": (
        "user"
    ),
    "{% if enable_thinking is defined and not enable_thinking %}off{% endif %}": "off",
    "{{ add_generation_prompt }}": "True",
    "{% if true %}\n  x\n  {% endif %}\ny": "  x\ny",
    "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}": "",
    "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}": "2",
}


@pytest.mark.parametrize("template", RENDERED)
def test_templates_get_what_transformers_gives_them(template):
    assert render(template, HELLO, enable_thinking=False, **SPECIAL) == RENDERED[template]


@WITH_TRANSFORMERS
@pytest.mark.parametrize("template", RENDERED)
def test_templates_render_as_in_transformers(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    (wanted,), _ = render_jinja_template(
        conversations=[HELLO],
        chat_template=template,
        add_generation_prompt=True,
        enable_thinking=False,
        **SPECIAL,
    )
    assert render(template, HELLO, enable_thinking=False, **SPECIAL) == wanted


def test_messages_are_normalised():
    message = dict(role="assistant", content=None, reasoning="why")
    template = "{{ messages[0].reasoning_content }} {{ messages[0].content is defined }}"
    assert render(template, [message]) == "why False"
    with pytest.raises(ValueError, match="role and content"):
        render(template, ["hi"])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "no user"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "broken at line 1"),
        ("\n{% unheard_of %}", "broken at line 2"),
    ],
)
def test_a_template_that_fails_is_a_value_error(template, words):
    with pytest.raises(ValueError, match=words):
        render(template, HELLO)


def test_chat():
    tokenizer = Tokenizer(CHATTY)
    messages = [dict(role="system", content="the fox"), dict(role="user", content=" quick ")]
    text = "<|system|>the fox<|end|><|user|>quick<|end|><|assistant|>"
    assert tokenizer.can_chat
    assert tokenizer.chat(messages) == tokenizer.encode(text)
    assert (
        tokenizer.decode(tokenizer.chat(HELLO, template="{{ bos_token }}the {{ x }}", x=3))
        == "the 3"
    )


def test_templates_of_their_own_files(folder):
    def said(**options) -> str:
        return Tokenizer(folder).decode(Tokenizer(folder).chat(HELLO, **options))

    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [dict(name="default", template="one"), dict(name="tool_use", template="two")]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | dict(chat_template=named)))
    assert said() == "one"
    assert said(tools=[{}]) == "two"
    assert said(template="tool_use") == "two"
    with pytest.raises(ValueError, match=r"none called 'three'.*\['default', 'tool_use'\]"):
        said(template="three")
    named = [dict(name="rag", template="three")]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | dict(chat_template=named)))
    with pytest.raises(ValueError, match=r"no default.*\['rag'\]"):
        said()
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template="four")))
    assert said() == "four"
    (folder / "chat_template.jinja").write_text("\ufefffive", encoding="utf-8")
    assert said() == "five"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("six")
    assert said() == "five" and said(template="rag") == "six"


def test_a_template_that_is_none():
    with pytest.raises(ValueError, match="chat_template must be"):
        ChatTemplates.from_value(7)
    assert not make(_of_bytes()).can_chat
    with pytest.raises(ValueError, match="no chat template"):
        make(_of_bytes()).chat(HELLO)


# --- files ------------------------------------------------------------------------------------


ADDED = dict(content="<|system|>", special=True, normalized=False)
CUT = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
FILLED = dict(
    strategy=dict(Fixed=64), direction="Right", pad_id=0, pad_type_id=0, pad_token="<|end|>"
)
# Changes of tokenizer_config.json and of tokenizer.json, without an added token or two; and how a text is cut.
TEXT = "<|begin|>he<|system|>he<|end|>"
WHOLE = ["<|begin|>", "he", "<|system|>", "he", "<|end|>"]
CONFIGURED = {
    "a limit and a width of the training": (
        {},
        dict(truncation=CUT, padding=FILLED),
        (),
        TEXT,
        WHOLE,
    ),
    "named": ({}, {}, ["<|end|>"], TEXT, WHOLE),
    "in the decoder": (dict(added_tokens_decoder={"3": ADDED}), {}, ["<|system|>"], TEXT, WHOLE),
    "additional": (dict(additional_special_tokens=["<|system|>"]), {}, ["<|system|>"], TEXT, WHOLE),
    "extra": (dict(extra_special_tokens=dict(a="<|system|>")), {}, ["<|system|>"], TEXT, WHOLE),
    "with the space before it": (
        dict(added_tokens_decoder={"3": dict(ADDED, lstrip=True)}),
        {},
        (),
        "he <|system|>he",
        ["he", "<|system|>", "he"],
    ),
    "split like any text": (
        dict(split_special_tokens=True),
        {},
        (),
        "<|end|>",
        None,
    ),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_tokens_that_the_configuration_names(folder, name):
    config, file, without, text, wanted = CONFIGURED[name]
    for path, changes in (("tokenizer_config.json", config), ("tokenizer.json", file)):
        values = json.loads((folder / path).read_text()) | changes
        if "added_tokens" in values:
            added = [one for one in values["added_tokens"] if one["content"] not in without]
            values["added_tokens"] = added
        (folder / path).write_text(json.dumps(values))
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(text, special=False)
    shown = [tokenizer._tokenizer.id_to_token(number) for number in ids]
    if wanted is None:
        assert "<|end|>" not in shown and "".join(shown) == text
    else:
        assert shown == wanted
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(text, add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize(
    "config",
    [
        dict(added_tokens_decoder={"x": ADDED}),
        dict(added_tokens_decoder={"3": "text"}),
        dict(additional_special_tokens=[7]),
    ],
)
def test_tokens_that_are_none(folder, config):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match="token"):
        Tokenizer(folder)


def test_special_tokens_of_an_older_folder(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    assert Tokenizer(folder).stop_tokens == ()
    special = dict(eos_token=dict(content="<|stop|>", lstrip=False), bos_token="<|begin|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert Tokenizer(folder).stop_tokens == (2,)
    assert Tokenizer(folder).begin_token == "<|begin|>"


def test_all_stop_tokens_of_all_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    config = json.loads((folder / "config.json").read_text())
    for settings in (dict(eos_token_id=9), dict(text_config=dict(eos_token_id=9))):
        config.pop("eos_token_id", None)
        (folder / "config.json").write_text(json.dumps(config | settings))
        assert Tokenizer(folder).stop_tokens == (7, 8, 9, 1)


def test_json_files_are_named_in_errors(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(path) == dict(a="é")
    for broken in (b"{", b"", b"\xff\xfe", b'{"a": "\xe9"}'):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
            read_json(path)
    path.write_bytes(b"[1]")
    with pytest.raises(ValueError, match=r"x\.json must hold a JSON object, got a list"):
        read_json(path)
    assert read_json(tmp_path / "none.json", optional=True) == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer(folder)


@pytest.mark.parametrize("names", [("tokenizer.model",), ("vocab.json", "merges.txt")])
def test_older_files_without_transformers(folder, monkeypatch, names):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; copy it"):
        Tokenizer(folder)
    for name in names:
        (folder / name).write_text("x")
    with pytest.raises(
        FileNotFoundError, match=f"{names[0]}.*make it with: pip install transformers"
    ):
        Tokenizer(folder)


@WITH_TRANSFORMERS
def test_vocabulary_and_merges_are_read_by_transformers(folder):
    wanted = Tokenizer(folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    vocabulary = backend["model"]["vocab"] | {
        t["content"]: t["id"] for t in backend["added_tokens"]
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | dict(tokenizer_class="GPT2Tokenizer"))
    )
    text = "the quick brown fox, 日本"
    assert Tokenizer(folder).encode(text) == wanted.encode(text)
    assert Tokenizer(folder).stop_tokens == wanted.stop_tokens
    (folder / "merges.txt").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"transformers cannot read vocab\.json"):
        Tokenizer(folder)

"""The tokenizer in a GGUF file's metadata as Hugging Face's files, built with the `tokenizers` package."""

from collections.abc import Mapping
from typing import Any

from fdk_jax.files.contents import TokenizerFiles

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _ENDS
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _ENDS
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level vocabularies cut a text into words, by `tokenizer.ggml.pre`: a regular expression, "gpt2" for
# that of GPT-2, "digits" for the same with single digits.
_WORDS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "olmo": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT_4O,
}
# Whose words that are tokens are not built from merges, and whose texts begin with a token by default.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_CONTROL, _USER_DEFINED = 3, 4
_WITHOUT_SPACE = ("<unk>", "<s>", "<|endoftext|>")  # of Phi 3
_ENDS_OF_TURNS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def files(metadata: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer of a GGUF file.

    Raises:
        ValueError: a kind of tokenizer that is not supported, by its name.
        ImportError: the `tokenizers` package is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "text needs the tokenizers package: pip install fdk-jax[models]"
        ) from error
    kind, tokens = _entry(metadata, "model"), _entry(metadata, "tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("the GGUF file has no tokens: give the model's own tokenizer folder")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise ValueError(f"GGUF with tokenizer.ggml.model={kind!r} is not supported")
    try:
        tokenizer, begins = builders[kind](metadata, tokens)
    except ValueError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"the GGUF file's tokenizer is damaged: {error}") from error
    types = _entry(metadata, "token_type") or []
    added = [(t, k) for t, k in zip(tokens, types, strict=False) if k in (_CONTROL, _USER_DEFINED)]
    # Phi 3 has the white space after them taken along; no file says so, and llama.cpp goes by the name, too.
    name = str(metadata.get("general.name", "")).lower()
    takes_space = kind == "llama" and ("phi-3" in name or "phi3" in name)
    for special in (True, False):
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(
                    text,
                    normalized=False,
                    special=special,
                    rstrip=takes_space and text not in _WITHOUT_SPACE,
                )
                for text, number in added
                if (number == _CONTROL) == special
            ]
        )
    config = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if _is_token(number := _entry(metadata, f"{key}_token_id"), tokens)
    }
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    _put_around(tokenizer, metadata, config, begins)
    stops = [_entry(metadata, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    stops += [tokens.index(text) for text, k in added if k == _CONTROL and text in _ENDS_OF_TURNS]
    return TokenizerFiles(
        tokenizer.to_str(), config, tuple(dict.fromkeys(s for s in stops if _is_token(s, tokens)))
    )


def _is_token(number: Any, tokens: list[str]) -> bool:
    return type(number) is int and 0 <= number < len(tokens)


def _entry(metadata: Mapping[str, Any], name: str) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}")


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Any, bool]:
    """(tokenizer, whether its texts begin with a token by default) of a byte-level BPE vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _entry(metadata, "pre") or "default"
    if pre not in _WORDS:
        raise ValueError(f"GGUF with tokenizer.ggml.pre={pre!r} is not supported")
    merges = [tuple(merge.split(" ", 1)) for merge in _entry(metadata, "merges") or []]
    whole = pre in _WHOLE_WORDS
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    if _WORDS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    if _WORDS[pre] == "gpt2":
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif _WORDS[pre] == "digits":
        words = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        words = [
            pre_tokenizers.Split(Regex(_WORDS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole and pre != "tekken"


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Any, bool]:
    """(tokenizer, True) of a sentencepiece BPE vocabulary, whose merges follow from its scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    gemma = str(metadata.get("general.architecture")).startswith("gemma")
    scores = _entry(metadata, "scores")
    if gemma:
        # Runs of spaces are spelled with spaces, and merges come in the order of the tokens.
        tokens = [text if text.strip(" ") else "▁" * len(text) for text in tokens]
        scores = [-float(number) for number in range(len(tokens))]
    if not scores or len(scores) != len(tokens):
        raise ValueError("the GGUF file has no scores of its tokens")
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = _entry(metadata, "unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores),
            unk_token=tokens[unknown] if _is_token(unknown, tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *spaces] if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer, True


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, best score of the result first."""
    found = []
    for token, number in vocab.items():
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(-scores[number], pair) for pair in pairs]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def _put_around(tokenizer, metadata, config: Mapping[str, Any], begins: bool) -> None:
    """The tokens that a text begins and ends with."""
    from tokenizers import processors

    first = bool(metadata.get("tokenizer.ggml.add_bos_token", begins)) and "bos_token" in config
    last = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in config
    if not first and not last:
        return
    around = [config["bos_token"]] if first else []
    around += ["$A", config["eos_token"]] if last else ["$A"]
    special = {text: tokenizer.token_to_id(text) for text in around if text != "$A"}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(around), special_tokens=list(special.items())
    )

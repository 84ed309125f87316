"""Models with random weights for the models suite, by their names."""

import dataclasses
import re
from typing import Any

from fdk_jax.format.packing import BITS
from fdk_jax.models import ModelConfig, custom_llama, qwen3

# After a name bits of the head ("-head1") or of it and the embedding ("-tables1").
_SHAPES = {"custom-llama-": custom_llama, "qwen3-": qwen3}
_SUFFIX = re.compile(r"-(head|tables)(\w*)$")


def of_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The sizes of a Llama by the keys of Hugging Face's config.json."""
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context,
        tie_word_embeddings=config.tie_embeddings,
    )


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of random weights, as its name says it; tables without bits are not quantised."""

    config: ModelConfig
    head_bits: int | None
    embedding_bits: int | None

    @classmethod
    def of(cls, model: str) -> "Shape | None":
        """None for the folder of a checkpoint.

        Raises:
            NotImplementedError: a name that is like those of the shapes, but none of them.
        """
        for prefix, make in _SHAPES.items():
            if not model.startswith(prefix):
                continue
            size, found = model.removeprefix(prefix), _SUFFIX.search(model)
            kind, bits = found.groups() if found else ("", None)
            if bits is not None and bits not in map(str, BITS):
                raise NotImplementedError(f"{model}: {kind} have a width of {BITS}")
            try:
                config = make(_SUFFIX.sub("", size))
            except ValueError as error:
                raise NotImplementedError(f"{model}: {error}") from None
            head = None if bits is None else int(bits)
            return cls(config, head, head if kind == "tables" else None)
        return None

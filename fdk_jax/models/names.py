"""Which checkpoint arrays make up which parameters: the one table of names.

A `Part` is one matrix of the checkpoint, under its Hugging Face name; a parameter of ours joins one or
several of them along the outputs.
"""

import dataclasses

from fdk_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """One matrix [N, K] of the checkpoint, without ".weight", and whether it has a bias [N]."""

    name: str
    shape: tuple[int, int]
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Projection:
    """A linear layer of ours: `path` in the module, the parts joined along N, and how it is cut.

    `cut` says along which side several devices share it: "n" (outputs) or "k" (inputs).
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    cut: str


def layer_projections(config: ModelConfig, index: int) -> tuple[Projection, ...]:
    """The linear layers of layer `index`, paths relative to the layer."""
    c, base = config, f"model.layers.{index}"
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attn, mlp = f"{base}.self_attn", f"{base}.mlp"
    qkv = tuple(
        Part(f"{attn}.{name}_proj", (rows, c.hidden_size), c.qkv_bias)
        for name, rows in (("q", heads), ("k", kv), ("v", kv))
    )
    gate_up = tuple(
        Part(f"{mlp}.{name}_proj", (c.intermediate_size, c.hidden_size), c.mlp_bias)
        for name in ("gate", "up")
    )
    out = Part(f"{attn}.o_proj", (c.hidden_size, heads), c.output_bias)
    down = Part(f"{mlp}.down_proj", (c.hidden_size, c.intermediate_size), c.mlp_bias)
    return (
        Projection(("attention", "qkv"), qkv, "n"),
        Projection(("attention", "out"), (out,), "k"),
        Projection(("mlp", "gate_up"), gate_up, "n"),
        Projection(("mlp", "down"), (down,), "k"),
    )


def layer_norms(config: ModelConfig, index: int) -> dict[str, tuple[tuple[str, ...], int]]:
    """{checkpoint name: (path relative to the layer, size)} of the norms of layer `index`."""
    base = f"model.layers.{index}"
    norms: dict[str, tuple[tuple[str, ...], int]] = {
        f"{base}.input_layernorm.weight": (("attention_norm",), config.hidden_size),
        f"{base}.post_attention_layernorm.weight": (("mlp_norm",), config.hidden_size),
    }
    if config.qk_norm:
        attn = f"{base}.self_attn"
        norms |= {
            f"{attn}.q_norm.weight": (("attention", "q_norm"), config.head_dim),
            f"{attn}.k_norm.weight": (("attention", "k_norm"), config.head_dim),
        }
    return norms


def head(config: ModelConfig) -> Projection:
    """The final projection; a tied one has the weights of the embedding."""
    name = EMBEDDING.removesuffix(".weight") if config.tie_embeddings else "lm_head"
    part = Part(name, (config.vocab_size, config.hidden_size))
    return Projection(("lm_head",), (part,), "n")


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


def ignored(name: str, config: ModelConfig) -> bool:
    """Arrays that some files hold and nothing needs: RoPE tables, a copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_embeddings and name == "lm_head.weight"
    )

"""Which checkpoint arrays make up which parameters: the one table of names.

A `Part` is one matrix of the checkpoint, under its Hugging Face name; a parameter of ours joins one or
several of them along the outputs.
"""

import dataclasses
from collections.abc import Iterable

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

    `cut` says along which side several devices share it: "n" (outputs), "k" (inputs), or "" for none. `plain`
    ones are never quantised while they are read.
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    cut: str
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class Stack:
    """The stacked linear layers of a mixture of experts: `path` in the layer, and where they come from.

    Attributes:
        path: In the module.
        shape: (E, N, K).
        experts: The parts of each expert, joined along N; empty where the file has all in one array.
        array: That array, [E, K, N] of floats, or quantised [E, N, K]; else "".
        bias: An array [E, N], or "".
        alternating: Whether rows of gate and up alternate in the array and the bias.
    """

    path: tuple[str, ...]
    shape: tuple[int, int, int]
    experts: tuple[tuple[Part, ...], ...] = ()
    array: str = ""
    bias: str = ""
    alternating: bool = False


# Families whose checkpoints hold joined matrices: queries, keys and values; gate and up.
_JOINED = ("phi3",)
# Names of the router, and of the gate, up and down projection of an expert.
_EXPERTS = {
    "qwen3_moe": ("mlp.gate", "mlp.experts.{}", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}", ("w1", "w3", "w2")),
}
_STACKED = ("mlp.router", "mlp.experts")  # of other families, in one array a projection


def layer_projections(config: ModelConfig, index: int) -> tuple[Projection, ...]:
    """The linear layers of layer `index`, paths relative to the layer."""
    c, base = config, f"model.layers.{index}"
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attn, mlp = f"{base}.self_attn", f"{base}.mlp"
    if c.family in _JOINED:
        qkv = (Part(f"{attn}.qkv_proj", (c.qkv_features, c.hidden_size), c.qkv_bias),)
        gate_up = (Part(f"{mlp}.gate_up_proj", (2 * c.intermediate_size, c.hidden_size)),)
    else:
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
    attention = (
        Projection(("attention", "qkv"), qkv, "n"),
        Projection(("attention", "out"), (out,), "k"),
    )
    experts = c.layer(index).experts
    if experts is not None:
        name, *_ = _EXPERTS.get(c.family, _STACKED)
        router = Part(f"{base}.{name}", (experts.count, c.hidden_size), experts.bias)
        return (*attention, Projection(("mlp", "router"), (router,), "", plain=True))
    return (
        *attention,
        Projection(("mlp", "gate_up"), gate_up, "n"),
        Projection(("mlp", "down"), (down,), "k"),
    )


def layer_stacks(config: ModelConfig, index: int) -> tuple[Stack, ...]:
    """The stacked linear layers of layer `index`: none, but in a mixture of experts."""
    experts, hidden, base = config.layer(index).experts, config.hidden_size, f"model.layers.{index}"
    if experts is None:
        return ()
    count, inner = experts.count, experts.size
    shapes = {"gate_up": (count, 2 * inner, hidden), "down": (count, hidden, inner)}
    if config.family not in _EXPERTS:
        _, name = _STACKED
        return tuple(
            Stack(
                ("mlp", path),
                shape,
                array=f"{base}.{name}.{path}_proj",
                bias=f"{base}.{name}.{path}_proj_bias" if experts.bias else "",
                alternating=path == "gate_up",
            )
            for path, shape in shapes.items()
        )
    _, name, (gate, up, down) = _EXPERTS[config.family]
    made = []
    for path, parts in (("gate_up", (gate, up)), ("down", (down,))):
        _, rows, k = shapes[path]
        each = tuple(
            tuple(
                Part(f"{base}.{name.format(expert)}.{part}", (rows // len(parts), k))
                for part in parts
            )
            for expert in range(count)
        )
        made.append(Stack(("mlp", path), shapes[path], each))
    return tuple(made)


def check_cut(config: ModelConfig) -> None:
    """Refuses checkpoints that cannot be cut over several devices.

    Raises:
        NotImplementedError: matrices that are joined in the file.
    """
    if config.family in _JOINED:
        raise NotImplementedError(
            f"several devices with model_type={config.family!r}: its matrices are joined in the file"
        )


def layer_vectors(config: ModelConfig, index: int) -> dict[str, tuple[tuple[str, ...], int]]:
    """{checkpoint name: (path of a parameter relative to the layer, size)} of the vectors of layer `index`.

    Biases of linear layers are parts of these.
    """
    c, base = config, f"model.layers.{index}"
    if c.post_norms:  # "post_attention" is then what it says, and not the norm before the block
        own = {
            "post_attention_layernorm": "attention_post_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
        if c.pre_norms:
            own |= {
                "input_layernorm": "attention_norm",
                "pre_feedforward_layernorm": "mlp_norm",
            }
    else:
        own = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    vectors: dict[str, tuple[tuple[str, ...], int]] = {
        f"{base}.{name}.weight": ((path, "scale"), c.hidden_size) for name, path in own.items()
    }
    if c.qk_norm:
        heads = (c.num_heads, c.num_kv_heads) if c.qk_norm_of == "all" else (1, 1)
        vectors |= {
            f"{base}.self_attn.{name}_norm.weight": (
                ("attention", f"{name}_norm", "scale"),
                count * c.head_dim,
            )
            for name, count in zip("qk", heads, strict=True)
        }
    if c.attention_sinks:
        vectors[f"{base}.self_attn.sinks"] = (("attention", "sinks"), c.num_heads)
    return vectors


def text_part(names: Iterable[str]) -> dict[str, str]:
    """{name in a checkpoint that reads images as well: name in its text part}, without all others."""
    found = {}
    for name in names:
        short = name.removeprefix("model.")
        if short.startswith("language_model."):
            rest = short.removeprefix("language_model.").removeprefix("model.")
            found[name] = rest if rest.startswith("lm_head.") else f"model.{rest}"
        elif name.startswith("lm_head."):
            found[name] = name
    return found


def head(config: ModelConfig) -> Projection:
    """The final projection; a tied one has the weights of the embedding."""
    name = EMBEDDING.removesuffix(".weight") if config.tie_embeddings else "lm_head"
    part = Part(name, (config.vocab_size, config.hidden_size))
    return Projection(("lm_head",), (part,), "n")


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


def ignored(name: str, config: ModelConfig) -> bool:
    """Arrays that some files hold and nothing needs: RoPE tables, a copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == HEAD)

"""Shapes and constants of a model, read from a Hugging Face `config.json` or from a name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")  # to compute with
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of RoPE are changed for contexts longer than those of the first training.

    Attributes:
        kind: "linear": all are divided by `factor`. "dynamic": the base grows with the tokens that a sequence
            has beyond `original_context`. "llama3": wavelengths under `original_context / high_freq_factor`
            stay, those over `original_context / low_freq_factor` have their frequencies divided by `factor`,
            with a blend between. "yarn": the same by pairs, from those with `beta_fast` rotations in
            `original_context` tokens to those with `beta_slow`. "longrope": each is divided by a factor of its
            own, `short_factors` or, in sequences longer than `original_context`, `long_factors`.
        factor: See `kind`.
        low_freq_factor: Of "llama3".
        high_freq_factor: Of "llama3".
        original_context: Tokens that the frequencies were made for.
        beta_fast: Of "yarn".
        beta_slow: Of "yarn".
        truncate: Whether the ends of the blend of "yarn" are rounded to whole pairs.
        short_factors: Of "longrope", one a pair.
        long_factors: Like `short_factors`.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in SCALINGS:
            raise ValueError(f"RoPE scaling {self.kind!r} is not one of {SCALINGS}")
        if not self.factor > 0 or self.original_context < 1:
            raise ValueError(
                f"factor={self.factor} and original_context={self.original_context} of RoPE must be positive"
            )

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on how long a sequence is."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer.

    Attributes:
        theta: Base of the frequencies.
        scaling: Of the frequencies, or None.
        rotary_dim: Leading elements of a head that are rotated, the others carry no position; None for all.
        interleaved: Whether pairs are neighbours (2i, 2i + 1) instead of halves (i, i + rotary_dim / 2).
        factor: Multiplies cosines and sines (YaRN's attention factor).
        query_growth: (b, c): a query at position p is multiplied by 1 + b log(1 + floor(p / c)); None for not.
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    interleaved: bool = False
    factor: float = 1.0
    query_growth: tuple[float, int] | None = None


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: several feed-forward blocks, of which each token takes a few.

    Attributes:
        count: Experts of a layer, E.
        per_token: Of them that a token takes, those with the highest scores.
        size: Width of one.
        normalised: Whether the weights of the chosen ones are the softmax of their scores alone; otherwise
            of the scores of all, so that they add up to less than 1.
        bias: Biases of the router and of both projections.
        clamp: Bounds the gate from above and the other half on both sides, and adds 1 to that half; None
            leaves them.
        gate_slope: The gate is z * sigmoid(gate_slope * z) where there is a `clamp`.
    """

    count: int
    per_token: int
    size: int
    normalised: bool = True
    bias: bool = False
    clamp: float | None = None
    gate_slope: float = 1.0

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"per_token={self.per_token} must be 1 to count={self.count} experts")


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """What may differ between the layers of one model.

    Attributes:
        window: Keys that a query sees, its own included (sliding-window attention); None for all.
        rope: Its rotary embedding; None for a layer without positions.
        experts: A mixture of experts in the place of the feed-forward block; None for the block.
    """

    window: int | None = None
    rope: Rope | None = Rope()
    experts: Experts | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention and a gated feed-forward block.

    Every field is static: two models with equal configurations share their compiled programs.

    Attributes:
        vocab_size: Tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward block.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; divides `num_heads`.
        head_dim: Width of a head.
        rope_theta: Base of RoPE's frequencies.
        rope_scaling: Of RoPE's frequencies.
        norm_eps: Added to the mean square in every norm.
        max_context: Most tokens of a sequence.
        tie_embeddings: Whether the head is the embedding.
        qk_norm: RMS norms of queries and keys before RoPE.
        qk_norm_of: Over what these norms take their mean: each "head", or "all" heads together.
        qkv_bias: Biases of the query, key and value projections.
        output_bias: Bias of attention's output projection.
        mlp_bias: Biases of the feed-forward block.
        layers: What sets the layers apart, one entry each; empty where all are alike.
        query_scale: Scores are queries times keys times this; None for head_dim**-0.5.
        attention_soft_cap: Scores s become cap * tanh(s / cap) before the softmax.
        attention_sinks: A learned score of each head that only takes part in the softmax.
        activation: Of the gate: "silu", "gelu" or "gelu_tanh".
        norm_offset: Added to every norm's scale, and the product is then in float32 (1 for Gemma).
        pre_norms: Norms before attention and the feed-forward block.
        post_norms: Norms after them, before the residual sum.
        embedding_scale: Multiplies the embedding's rows, rounded to the model's dtype.
        residual_scale: Multiplies what attention and the feed-forward block add to the residual stream.
        logit_divisor: Divides the logits.
        logit_soft_cap: Like `attention_soft_cap`, for the logits.
        dtype: Of activations.
        family: `model_type` of the checkpoint.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_context: int = 4096
    tie_embeddings: bool = False
    qk_norm: bool = False
    qk_norm_of: str = "head"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    layers: tuple[LayerOptions, ...] = ()
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_soft_cap: float | None = None
    dtype: str = "bfloat16"
    family: str = "llama"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        if self.layers and len(self.layers) != self.num_layers:
            raise ValueError(f"options of {len(self.layers)} layers, num_layers={self.num_layers}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {ACTIVATIONS}")
        if self.qk_norm_of not in ("head", "all"):
            raise ValueError(f'qk_norm_of={self.qk_norm_of!r} must be "head" or "all"')
        if not (self.pre_norms or self.post_norms):
            raise ValueError("a layer needs norms before or after its blocks")
        for layer in {self.layer(index) for index in range(self.num_layers)}:
            rotary = (layer.rope and layer.rope.rotary_dim) or self.head_dim
            if rotary % 2 or not 0 < rotary <= self.head_dim:
                raise ValueError(f"{rotary=} must be even and at most {self.head_dim=}")
            if layer.window is not None and layer.window < 1:
                raise ValueError(f"window={layer.window} must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {DTYPES}")

    def layer(self, index: int) -> LayerOptions:
        """The options of one layer."""
        if self.layers:
            return self.layers[index]
        return LayerOptions(rope=Rope(self.rope_theta, self.rope_scaling))

    @property
    def qkv_features(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices, embedding included (norms and biases are left out)."""
        heads = self.qkv_features + self.num_heads * self.head_dim
        tables = 1 if self.tie_embeddings else 2
        rows = tables * self.vocab_size
        for index in range(self.num_layers):
            experts = self.layer(index).experts
            if experts is None:
                rows += heads + 3 * self.intermediate_size
            else:
                rows += heads + experts.count * (3 * experts.size + 1)  # and the router
        return rows * self.hidden_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, dtype: str | None = None) -> "ModelConfig":
        """Reads the dictionary of a Hugging Face `config.json`.

        Args:
            config: The parsed file.
            dtype: Compute dtype; None takes the file's own.

        Raises:
            ValueError: an architecture or a variant of one that is not implemented, with its name.
        """
        from fdk_jax.models.families import model_config  # it makes these objects

        return model_config(config, dtype)


def custom_llama(size: str) -> ModelConfig:
    """The model shapes of the 1-Bit-Wonder paper's model benchmark (arXiv 2602.15563).

    Args:
        size: "4B", "12B" or "31B": equal memory at 16, 4 and 1 bits; "1B", the shape of Llama 3.2 1B, for
            machines without an accelerator; or "8B" and "70B", those of Llama 3.1 8B and 70B.
    """
    shapes = {"4B": (3072, 24, 24), "12B": (4096, 48, 32), "31B": (6144, 60, 48)}
    if size == "1B":
        return ModelConfig(
            128256, 2048, 8192, 16, 32, 8, 64, 500000.0, max_context=8192, tie_embeddings=True
        )
    if size == "8B":
        return ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 500000.0, max_context=8192)
    if size == "70B":
        return ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 500000.0, max_context=8192)
    if size not in shapes:
        raise ValueError(f"{size=} is not one of {['1B', '8B', *shapes, '70B']}")
    hidden, layers, heads = shapes[size]
    return ModelConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=1024 * math.ceil(int(4 * 2 / 3 * hidden * 1.3) / 1024),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        max_context=8192,
    )


def qwen3(size: str) -> ModelConfig:
    """The shapes of the dense Qwen3 models (arXiv 2505.09388), as their published configurations have them.

    Args:
        size: "0.6B", "1.7B", "4B" or "8B".
    """
    shapes = {
        "0.6B": (1024, 3072, 28, 16),
        "1.7B": (2048, 6144, 28, 16),
        "4B": (2560, 9728, 36, 32),
        "8B": (4096, 12288, 36, 32),
    }
    if size not in shapes:
        raise ValueError(f"{size=} is not one of {list(shapes)}")
    hidden, inner, layers, heads = shapes[size]
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_context=40960,
        tie_embeddings=size != "8B",
        qk_norm=True,
        family="qwen3",
    )

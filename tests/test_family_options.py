"""What `config.json` says of a model: read, or refused by the name of the key; nothing is ignored."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fdk_jax.models import rope
from fdk_jax.models.config import Experts, LayerOptions, ModelConfig, Rope, RopeScaling
from fdk_jax.models.families import FAMILIES

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


def read(family: str, **settings) -> ModelConfig:
    return ModelConfig.from_hf(SMALL | dict(model_type=family) | settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_shapes_alone_has_the_defaults_of_the_family(family):
    config = read(family)
    assert config.family == family and config.dtype == "bfloat16"
    assert len({config.layer(i) for i in range(4)}) >= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", [*SMALL][:5])
def test_a_missing_shape_is_named(family, key):
    settings = {k: v for k, v in SMALL.items() if k != key}
    with pytest.raises(ValueError, match=f"config.json lacks '{key}'"):
        ModelConfig.from_hf(settings | dict(model_type=family))


def test_an_unknown_family_is_named():
    for value in ("rwkv", None, "LLAMA"):
        with pytest.raises(ValueError, match=f"model_type={value!r} is not implemented; one of"):
            read(value)


REFUSED = [
    ("llama", dict(sliding_window=64), "sliding_window=64"),
    ("llama", dict(layer_types=["sliding_attention"] * 4), "layer_types"),
    ("llama", dict(use_sliding_window=True), "use_sliding_window"),
    ("llama", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    ("llama", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ("llama", dict(query_pre_attn_scalar=256), "query_pre_attn_scalar"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    ("llama", dict(num_local_experts=8), "num_local_experts"),
    ("llama", dict(residual_multiplier=0.5), "residual_multiplier"),
    ("llama", dict(online_had=True), "transformed weights"),
    ("llama", dict(hadamard_dim=64), "transformed weights"),
    ("llama", dict(weightRotation=dict(kind="random")), "transformed weights"),
    ("llama", dict(hidden_act="relu"), "hidden_act='relu'"),
    ("llama", dict(num_attention_heads=3, num_key_value_heads=2), "num_kv_heads=2"),
    ("llama", dict(rope_scaling=dict(rope_type="spiral")), "rope_type='spiral'"),
    ("llama", dict(rope_scaling=dict(type="linear")), "'linear' needs 'factor'"),
    ("llama", dict(rope_scaling=dict(type="llama3", factor=2.0)), "'low_freq_factor'"),
    ("llama", dict(rope_scaling=YARN | dict(mrope_section=[1, 2])), r"mrope_section=\[1, 2\]"),
    (
        "mistral",
        dict(rope_parameters=YARN | dict(llama_4_scaling_beta=0.1)),
        "llama_4_scaling_beta",
    ),
    ("llama", dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "'long_factor'"),
    (
        "llama",
        dict(rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[1.0])),
        "have 1 and 1 values, not 4",
    ),
    ("llama", dict(rope_scaling=dict(type="linear", factor=0.0)), "factor=0.0"),
    ("llama", dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    ("qwen2", dict(layer_types=["sliding_attention"] * 4), "layer_types has windows"),
    ("qwen3", dict(use_sliding_window=True, layer_types=["linear_attention"] * 4), "layer_types"),
    ("qwen3", dict(use_sliding_window=True, layer_types=["full_attention"] * 3), "layer_types"),
    ("mistral", dict(layer_types=["full_attention"] * 3 + ["sliding_attention"]), "layer_types"),
    ("ministral", dict(sliding_window=None, layer_types=["sliding_attention"] * 4), "layer_types"),
    ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers has 2 entries"),
    ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("smollm3", dict(layer_types=["sliding_attention"] * 4), "layer_types has windows"),
    ("qwen3_moe", dict(layer_types=["sliding_attention"] * 4), "layer_types has windows"),
    ("olmo3", dict(sliding_window=None), "sliding_window is not set"),
    ("olmo3", dict(rope_parameters=dict(rope_type="default")), "rope_parameters has 'rope_type'"),
    ("mixtral", dict(num_experts_per_tok=9), "per_token=9"),
    ("qwen3_moe", dict(shared_expert_intermediate_size=64), "shared_expert_intermediate_size"),
]


@pytest.mark.parametrize(("family", "settings", "words"), REFUSED)
def test_what_is_not_done_is_refused_by_its_name(family, settings, words):
    with pytest.raises(ValueError, match=words):
        read(family, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(sliding_window=None),
        dict(sliding_window=128),
        dict(layer_types=["full_attention"] * 4),
        dict(use_sliding_window=False, attention_bias=False, rope_scaling=None),
        dict(partial_rotary_factor=1.0, residual_multiplier=1, num_experts=0),
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        dict(online_had=False),
        dict(rotated={}, hadamard_dim=0),
    ],
)
def test_what_changes_nothing_is_no_error(settings):
    assert read("llama", **settings) == read("llama")


def test_rope_scaling_goes_before_rope_parameters():
    both = dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), rope_scaling=YARN)
    config = read("llama", **both)
    assert config.layer(0).rope.scaling.kind == "yarn" and config.layer(0).rope.theta == 10000.0


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (dict(dtype="auto"), "bfloat16"),
        (dict(torch_dtype="torch.float32"), "float32"),
        (dict(dtype="float16", torch_dtype="float32"), "float16"),
        (dict(dtype="float64"), "float32"),
        ({}, "bfloat16"),
    ],
)
def test_dtypes(settings, dtype):
    assert read("llama", **settings).dtype == dtype
    assert ModelConfig.from_hf(
        SMALL | dict(model_type="llama") | settings, dtype="float16"
    ).dtype == ("float16")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "float7"])
def test_a_dtype_that_cannot_be_computed_with_is_named(dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}'"):
        read("llama", dtype=dtype)


def test_parameters_of_a_mixture_of_experts_are_counted():
    """Mixtral 8x7B has 46.7 billion (arXiv 2401.04088), Qwen3-30B-A3B 30.5."""
    mixtral = read(
        "mixtral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert mixtral.num_parameters / 1e9 == pytest.approx(46.7, abs=0.05)
    qwen = read(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    )
    assert qwen.num_parameters / 1e9 == pytest.approx(30.5, abs=0.05)


def test_layers_of_families():
    def windows(config):
        return [config.layer(i).window for i in range(4)]

    assert windows(read("mistral")) == [4096] * 4
    assert windows(read("mistral", sliding_window=None)) == [None] * 4
    assert windows(read("gemma2", sliding_window=8)) == [8, None, 8, None]
    assert windows(read("gpt_oss")) == [128, None, 128, None]
    assert windows(read("olmo3", sliding_window=8)) == [8, 8, 8, None]
    assert windows(read("gemma3_text", sliding_window=8)) == [8, 8, 8, 8]
    assert windows(read("qwen2", use_sliding_window=True, max_window_layers=3)) == [
        None,
        None,
        None,
        4096,
    ]
    assert [read("smollm3").layer(i).rope is None for i in range(4)] == [False] * 3 + [True]
    local = read("gemma3_text", num_hidden_layers=6, rope_scaling=dict(type="linear", factor=8.0))
    assert local.layer(0).rope == Rope(10000.0)
    assert local.layer(5).rope == Rope(1000000.0, RopeScaling("linear", 8.0))
    assert read("mixtral").layer(3).experts == Experts(8, 2, 64)
    dense = read("qwen3_moe", mlp_only_layers=[0], decoder_sparse_step=2)
    assert [dense.layer(i).experts is None for i in range(4)] == [True, False, True, False]


def test_text_parts():
    """As published: what the text part does not say are the defaults of its class."""
    sparse = dict(model_type="gemma3_text", hidden_size=2560, num_hidden_layers=34)
    scaled = dict(rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=1024)
    config = ModelConfig.from_hf(
        dict(model_type="gemma3", text_config=sparse | scaled, dtype="float16")
    )
    assert (config.vocab_size, config.num_heads, config.head_dim) == (262208, 8, 256)
    assert config.dtype == "float16" and config.tie_embeddings and config.family == "gemma3_text"
    assert config.layer(5).rope.scaling.factor == 8 and config.layer(0).window == 1024
    text = SMALL | dict(model_type="ministral3", tie_word_embeddings=True)
    config = ModelConfig.from_hf(dict(model_type="mistral3", text_config=text))
    assert config.tie_embeddings and config.layer(0).rope.query_growth == (0.1, 16384)


def test_null_is_none_where_that_means_something():
    caps = dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=None)
    config = read("gemma2", **caps)
    assert config.attention_soft_cap is None and config.logit_soft_cap is None
    assert {config.layer(i).window for i in range(4)} == {None}
    config = read("gemma2")
    assert (config.attention_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert read("qwen3", head_dim=None).head_dim == 8 and read("qwen3").head_dim == 128
    assert read("gpt_oss", rope_parameters=None).layer(0).rope.scaling.factor == 32


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "smollm3"])
def test_a_window_that_is_not_used_is_none(family):
    assert read(family, sliding_window=16) == read(family)


def test_experts_have_one_window_for_all_layers():
    used = dict(use_sliding_window=True, sliding_window=16, max_window_layers=4)
    assert [read("qwen3_moe", **used).layer(i).window for i in range(4)] == [16] * 4
    assert [read("qwen3", **used).layer(i).window for i in range(4)] == [None] * 4


def test_a_config_that_contradicts_itself_is_refused():
    good = dict(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    for settings, words in (
        (dict(layers=(LayerOptions(),)), "options of 1 layers"),
        (dict(layers=(LayerOptions(window=0),) * 2), "window=0"),
        (dict(layers=(LayerOptions(rope=Rope(rotary_dim=3)),) * 2), "rotary"),
        (dict(activation="relu"), "activation='relu'"),
        (dict(pre_norms=False), "norms"),
        (dict(dtype="int8"), "dtype='int8'"),
    ):
        with pytest.raises(ValueError, match=words):
            ModelConfig(**(good | settings))
    for kind in ("default", "spiral"):
        with pytest.raises(ValueError, match=kind):
            RopeScaling(kind)


# --- frequencies ------------------------------------------------------------------------------

SCALED = {
    "default": {},
    "linear": dict(factor=3.0),
    "dynamic": dict(factor=3.0),
    "llama3": dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=48
    ),
    "yarn": dict(factor=5.0, original_max_position_embeddings=48),
    "yarn, mscale": dict(
        factor=5.0, original_max_position_embeddings=48, mscale=0.7, mscale_all_dim=1.4
    ),
    "yarn, not truncated": dict(
        factor=5.0,
        original_max_position_embeddings=48,
        beta_fast=20,
        beta_slow=2,
        truncate=False,
        attention_factor=1.25,
    ),
    "longrope": dict(
        short_factor=[1.0 + 0.1 * i for i in range(16)],
        long_factor=[1.0 + i for i in range(16)],
        original_max_position_embeddings=48,
    ),
}
LENGTHS = (10, 48, 49, 128, 129, 400)


@pytest.mark.parametrize("name", SCALED)
def test_frequencies_equal_transformers_at_every_length(name):
    pytest.importorskip("torch", reason="needs torch and transformers: see docs/models.md")
    transformers = pytest.importorskip(
        "transformers", reason="needs torch and transformers: see docs/models.md"
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.split(",")[0]
    settings = SMALL | dict(
        hidden_size=128, rope_parameters=dict(SCALED[name], rope_type=kind, rope_theta=5000.0)
    )
    ours = ModelConfig.from_hf(dict(settings, model_type="llama"))
    found = ours.layer(0).rope
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(settings)))
    for length in LENGTHS:
        if kind == "default":
            wanted, factor = 5000.0 ** (-np.arange(0, 32, 2) / 32), 1.0
        else:
            wanted, factor = ROPE_INIT_FUNCTIONS[kind](theirs, None, seq_len=length)
        cos, sin = rope.cos_sin(ours, found, jnp.asarray([1]), jnp.asarray([length]))
        angles = np.asarray(wanted, np.float64)
        np.testing.assert_allclose(cos[0], np.cos(angles) * factor, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(sin[0], np.sin(angles) * factor, rtol=2e-6, atol=1e-7)


def test_part_of_a_head_is_rotated(rng):
    """Against the definition, in float64: the first `rotary` elements are rotated, the others stay."""
    config = read(
        "phi3", hidden_size=64, partial_rotary_factor=0.75, original_max_position_embeddings=128
    )
    layer = config.layer(0).rope
    assert config.head_dim == 16 and layer.rotary_dim == 12
    x, position = rng.normal(size=16), 7
    angles = position * 10000.0 ** (-np.arange(0, 12, 2) / 12)
    first, second, rest = x[:6], x[6:12], x[12:]
    wanted = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
            rest,
        ]
    )
    order = rope.order(layer, 16)
    cos, sin = rope.cos_sin(config, layer, jnp.asarray([position]), jnp.asarray([8]))
    found = rope.rotate(jnp.asarray(x[order], jnp.float32)[None], cos, sin)[0]
    np.testing.assert_allclose(found, wanted[order], rtol=1e-5, atol=1e-5)

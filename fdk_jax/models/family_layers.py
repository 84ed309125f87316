"""What sets the layers of a model apart, read from the keys of a Hugging Face `config.json`.

Each function of the second part takes the keys and the width of a head, and returns the options of all layers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fdk_jax.models.config import Experts, LayerOptions, Rope
from fdk_jax.models.rope_files import read_rope

# Null in a file is none of these, and not their default.
_NULLABLE = {
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
}


class Keys(Mapping[str, Any]):
    """A dictionary that knows which keys were asked for; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        given = {key: value for key, value in values.items() if value is not None}
        nulls = {key for key, value in values.items() if value is None} & _NULLABLE
        self._values = {k: v for k, v in defaults.items() if k not in nulls} | given
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def need(self, key: str) -> Any:
        """A value that a file must have.

        Raises:
            ValueError: it does not.
        """
        value = self.get(key)
        if value is None:
            raise ValueError(f"config.json lacks {key!r}")
        return value


Layers = Callable[[Keys, int], "list[LayerOptions]"]


def plain(c: Keys, head_dim: int) -> list[LayerOptions]:
    """All layers alike, all keys seen."""
    return _of_windows(c, head_dim, [None] * c.need("num_hidden_layers"))


def one_window(c: Keys, head_dim: int) -> list[LayerOptions]:
    """One window, if any, for all layers."""
    return _of_windows(c, head_dim, [c.get("sliding_window")] * c.need("num_hidden_layers"))


def grown_queries(c: Keys, head_dim: int) -> list[LayerOptions]:
    """Ministral 3: queries far into a sequence are longer."""
    parameters = c.get("rope_scaling") or c["rope_parameters"]
    rope = read_rope(parameters, c, theta=c["rope_theta"], head_dim=head_dim, grows=True)
    return [LayerOptions(c.get("sliding_window"), rope)] * c.need("num_hidden_layers")


def typed(usual: Callable[[Keys, int], bool]) -> Layers:
    """Layers of two types; `usual` tells, where the file does not, whether one has the window."""

    def layers(c: Keys, head_dim: int) -> list[LayerOptions]:
        return _of_windows(c, head_dim, _windows(c, usual))

    return layers


def _windows(c: Keys, usual: Callable[[Keys, int], bool]) -> list[int | None]:
    """The window of each layer, by `layer_types` or as usual in the family."""
    count, window, types = (
        c.need("num_hidden_layers"),
        c.get("sliding_window"),
        c.get("layer_types"),
    )
    if types is None:
        sliding = [usual(c, index) for index in range(count)]
    else:
        other = sorted(set(types) - {"sliding_attention", "full_attention"})
        if other or len(types) != count:
            raise ValueError(
                f"layer_types must name {count} layers, each sliding_attention or full_attention; got"
                f" {len(types)} of {sorted(set(types))}"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and window is None:
            raise ValueError("layer_types has sliding_attention, and sliding_window is not set")
    return [window if slides else None for slides in sliding]


def _of_windows(c: Keys, head_dim: int, windows: list[int | None]) -> list[LayerOptions]:
    rope = _rope(c, head_dim)
    return [LayerOptions(window, rope) for window in windows]


def _rope(c: Keys, head_dim: int) -> Rope:
    """The same for all layers."""
    parameters = c.get("rope_scaling") or c.get("rope_parameters") or {}
    return read_rope(parameters, c, theta=c["rope_theta"], head_dim=head_dim)


def two_ropes(key_of_local: str | None, usual: Callable[[Keys, int], bool]) -> Layers:
    """Layers with a window have a rotary embedding of their own, without scaling."""

    def layers(c: Keys, head_dim: int) -> list[LayerOptions]:
        if c.get("sliding_window") is None:
            raise ValueError("sliding_window is not set, and layers with one have their own RoPE")
        theta = c["rope_theta"]
        local = theta if key_of_local is None else c[key_of_local]
        nested = c.get("rope_parameters") or {}
        if other := sorted(set(nested) - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"rope_parameters has {other[0]!r}; here it must have entries of its own for"
                " full_attention and sliding_attention"
            )
        full = dict(nested.get("full_attention") or {}) | dict(c.get("rope_scaling") or {})
        ropes = {
            False: read_rope(full, c, theta=theta, head_dim=head_dim),
            True: read_rope(
                nested.get("sliding_attention") or {}, c, theta=local, head_dim=head_dim
            ),
        }
        return [LayerOptions(w, ropes[w is not None]) for w in _windows(c, usual)]

    return layers


def partly_rotated(c: Keys, head_dim: int) -> list[LayerOptions]:
    """Phi: a share of each head is rotated; older files have other names for one scaling."""
    parameters = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    kind = parameters.pop("type", None) or parameters.get("rope_type")
    parameters["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    rope = read_rope(
        parameters,
        c,
        theta=c["rope_theta"],
        head_dim=head_dim,
        partial=c["partial_rotary_factor"],
    )
    return [LayerOptions(c.get("sliding_window"), rope)] * c.need("num_hidden_layers")


def some_without_positions(c: Keys, head_dim: int) -> list[LayerOptions]:
    """SmolLM3: every fourth layer has no rotary embedding, and may have a window."""
    count, every = c.need("num_hidden_layers"), c["no_rope_layer_interval"]
    has_rope = c.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(count)]
    if len(has_rope) != count:
        raise ValueError(f"no_rope_layers has {len(has_rope)} entries for {count} layers")
    windows: list[int | None] = [None] * count
    if c["use_sliding_window"]:
        windows = _windows(c, lambda c, i: c.get("sliding_window") is not None and not has_rope[i])
    else:
        _check_unused(c)
    rope = _rope(c, head_dim)
    return [
        LayerOptions(window, rope if turned else None)
        for window, turned in zip(windows, has_rope, strict=True)
    ]


def qwen_windows(c: Keys, head_dim: int) -> list[LayerOptions]:
    """Qwen: windows, where they are used, from some layer on."""
    first = c.get("max_window_layers", 0)
    if not c["use_sliding_window"]:
        _check_unused(c)
        return plain(c, head_dim)
    return _of_windows(c, head_dim, _windows(c, lambda _, i: i >= first))


def used_window(c: Keys, head_dim: int) -> list[LayerOptions]:
    """Qwen3-MoE: one window for all layers, where it is used."""
    if c["use_sliding_window"]:
        return one_window(c, head_dim)
    _check_unused(c)
    return plain(c, head_dim)


def _check_unused(c: Keys) -> None:
    """A window that is not used may be named, but no layer may ask for it.

    Raises:
        ValueError: one does.
    """
    c.get("sliding_window")
    if set(c.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("layer_types has windows, and use_sliding_window is false")


def with_experts(layers: Layers, experts: Callable[[Keys, int], Experts | None]) -> Layers:
    """The same layers, some of which are mixtures of experts."""

    def mixed(c: Keys, head_dim: int) -> list[LayerOptions]:
        return [
            dataclasses.replace(layer, experts=experts(c, index))
            for index, layer in enumerate(layers(c, head_dim))
        ]

    return mixed


def mixtral_experts(c: Keys, _: int) -> Experts:
    return Experts(c["num_local_experts"], c["num_experts_per_tok"], c.need("intermediate_size"))


def qwen_experts(c: Keys, index: int) -> Experts | None:
    count = c.get("num_experts", c.get("num_local_experts", 128))
    if index in c["mlp_only_layers"] or not count or (index + 1) % c["decoder_sparse_step"]:
        return None
    return Experts(
        count,
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        normalised=bool(c["norm_topk_prob"]),
    )


def gpt_oss_experts(c: Keys, _: int) -> Experts:
    return Experts(
        c["num_local_experts"],
        c["num_experts_per_tok"],
        c.need("intermediate_size"),
        bias=True,
        clamp=float(c["swiglu_limit"]),
        gate_slope=float(c["swiglu_alpha"]),
    )

"""Names and shapes of what a checkpoint of a model has, in the order in which it is read."""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import numpy as np

from fdk_jax.files.contents import Stored
from fdk_jax.models import names
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.expert_weights import stack_arrays

_SHOWN = 20  # names of each kind that an error lists


def check_names(config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    """Compares what a checkpoint holds with what the model needs.

    Raises:
        ValueError: lists every missing, unexpected and mis-shaped name.
    """
    wanted = expected(config)
    found = {name: one for name, one in tensors.items() if not names.ignored(name, config)}
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and not _fits(found[name], shape)
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "mis-shaped": wrong,
    }
    lines = []
    for kind, listed in problems.items():
        if listed:
            more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
            lines.append(f"{len(listed)} {kind}: {', '.join(listed[:_SHOWN])}{more}")
    if lines:
        raise ValueError("the checkpoint does not fit its config.json: " + "; ".join(lines))


def with_own_head(config: ModelConfig, tensors: Mapping[str, Stored]) -> ModelConfig:
    """The configuration without a tied head, if the head has values of its own; as in transformers."""
    table, head = tensors.get(names.EMBEDDING), tensors.get(names.HEAD)
    if not config.tie_embeddings or table is None or head is None or _equal(table, head):
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two matrices hold the same values in the same way, read some rows at a time."""
    if one.shape != other.shape or one.quantised != other.quantised or one.kind != other.kind:
        return False
    if one.quantised:
        pairs = zip(*(jax.tree.leaves(stored.read()) for stored in (one, other)), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)
    return all(np.array_equal(one.some(*run), other.some(*run)) for run in one.runs())


def _fits(found: Stored, wanted: tuple[int, ...]) -> bool:
    """Stacked matrices are [E, K, N] of floats and [E, N, K] where they are quantised."""
    if found.quantised and len(wanted) == 3:
        wanted = (wanted[0], wanted[2], wanted[1])
    return found.shape == wanted


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a checkpoint of this model has."""
    return dict(itertools.chain.from_iterable(stage.items() for stage in stages(config)))


def stages(config: ModelConfig) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of what is read at a time: the embedding, each layer, the head."""
    found: list[dict[str, tuple[int, ...]]] = [
        {names.EMBEDDING: (config.vocab_size, config.hidden_size)}
    ]
    for index in range(config.num_layers):
        vectors = names.layer_vectors(config, index).items()
        layer: dict[str, tuple[int, ...]] = {name: (size,) for name, (_, size) in vectors}
        for stack in names.layer_stacks(config, index):
            layer |= stack_arrays(stack)
        for projection in names.layer_projections(config, index):
            for part in projection.parts:
                layer[f"{part.name}.weight"] = part.shape
                if part.bias:
                    layer[f"{part.name}.bias"] = part.shape[:1]
        found.append(layer)
    last: dict[str, tuple[int, ...]] = {names.FINAL_NORM: (config.hidden_size,)}
    if not config.tie_embeddings:
        (head,) = names.head(config).parts
        last[f"{head.name}.weight"] = head.shape
    return [*found, last]

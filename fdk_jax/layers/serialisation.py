"""`flax.serialization` and `jax.export` of quantised tensors."""

import dataclasses
import json
from typing import Any

import jax
from flax import serialization

from fdk_jax.format.quantised_tensor import QuantisedTensor

_ARRAYS = ("packed", "scales", "codebook")
_META = ("bits", "group_size", "shape", "axes", "layout", "uniform")


def _metadata(w: QuantisedTensor) -> str:
    return json.dumps({name: getattr(w, name) for name in _META})


def _to_state(w: QuantisedTensor) -> dict[str, Any]:
    return {**{name: getattr(w, name) for name in _ARRAYS}, "metadata": _metadata(w)}


def _from_state(w: QuantisedTensor, state: dict[str, Any]) -> QuantisedTensor:
    """The tensor of a state dictionary; its metadata must be those of the target."""
    missing = {*_ARRAYS, "metadata"} - set(state)
    if missing:
        raise ValueError(f"the state of a QuantisedTensor lacks {sorted(missing)}")
    if state["metadata"] != _metadata(w):
        raise ValueError(
            f"the state is {state['metadata']}, the target {_metadata(w)}: quantise it alike"
        )
    new = dataclasses.replace(w, **{name: jax.numpy.asarray(state[name]) for name in _ARRAYS})
    new.validate()
    return new


def _aux_to_bytes(aux: Any) -> bytes:
    return json.dumps(aux).encode()


def _aux_from_bytes(data: bytes) -> tuple:
    bits, group_size, shape, *rest = json.loads(bytes(data))
    return (bits, group_size, tuple(shape), *rest)


serialization.register_serialization_state(QuantisedTensor, _to_state, _from_state)
jax.export.register_pytree_node_serialization(
    QuantisedTensor,
    serialized_name="fdk_jax.QuantisedTensor",
    serialize_auxdata=_aux_to_bytes,
    deserialize_auxdata=_aux_from_bytes,
)

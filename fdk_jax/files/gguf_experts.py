"""The experts of gpt-oss in GGUF: stacks of gates and of what they let through, which Hugging Face joins.

Rows of both alternate in the joined array; float arrays are [E, K, N] there, quantised ones [E, N, K].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files.contents import Stored
from fdk_jax.format.quantised_tensor import QuantisedTensor

_EXPERTS = ".mlp.experts."


def joined(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names of Hugging Face's file, from those by the names of `gguf_config.name_of`.

    Raises:
        ValueError: a gate without its other half, or halves of two kinds.
    """
    made = {}
    for name, one in tensors.items():
        base, _, part = name.partition(_EXPERTS)
        if not part:
            made[name] = one
            continue
        kind = part.removeprefix("gate").removeprefix("up").removeprefix("down")
        if part.startswith("down"):
            made[name] = _as_hugging(one)
            continue
        gate, up = (tensors.get(f"{base}{_EXPERTS}{half}{kind}") for half in ("gate", "up"))
        if gate is None or up is None or (gate.kind, gate.shape) != (up.kind, up.shape):
            raise ValueError(
                f"{name}: gates and what they let through must be of one kind and shape"
            )
        made[f"{base}{_EXPERTS}gate_up{kind}"] = _as_hugging(_alternating(gate, up))
    return made


def _alternating(gate: Stored, up: Stored) -> Stored:
    count, rows, *rest = gate.shape

    def read() -> np.ndarray | QuantisedTensor:
        first, second = gate.read(), up.read()
        if isinstance(first, QuantisedTensor) and isinstance(second, QuantisedTensor):
            arrays: dict[str, Any] = {
                name: _in_turn(getattr(first, name), getattr(second, name))
                for name in ("packed", "scales")
            }
            return QuantisedTensor(
                **arrays,
                codebook=first.codebook,
                bits=first.bits,
                group_size=first.group_size,
                shape=(2 * rows, *rest),
                uniform=first.uniform,
            )
        return _in_turn(first, second)

    return Stored((count, 2 * rows, *rest), gate.kind, read, quantised=gate.quantised)


def _in_turn(first: Any, second: Any) -> np.ndarray:
    """Rows [E, 2 N, ...] of both, one of each in turn."""
    both = np.stack([np.asarray(first), np.asarray(second)], axis=2)
    return both.reshape(both.shape[0], -1, *both.shape[3:])


def _as_hugging(one: Stored) -> Stored:
    """A stack as Hugging Face's file has it; biases [E, N] and quantised ones as they are."""
    if one.quantised or len(one.shape) < 3:
        return one
    count, rows, k = one.shape
    return Stored((count, k, rows), one.kind, lambda: one.array().swapaxes(1, 2))

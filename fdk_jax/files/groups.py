"""Arrays that together make one weight: `P.qweight`, `P.scales`, ... of every module P."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdk_jax.files.contents import Stored
from fdk_jax.format.quantised_tensor import QuantisedTensor

_OF_CACHE = re.compile(r"\.self_attn\.(q_|k_|v_)?(proj\.)?[qkv]_(scale|zero_point)$")


@dataclasses.dataclass(frozen=True)
class Group:
    """The arrays of one module by the last part of their names."""

    module: str
    parts: Mapping[str, Stored]

    def __getitem__(self, name: str) -> Stored:
        if name not in self.parts:
            raise ValueError(f"{self.module} lacks {name}: the checkpoint is not complete")
        return self.parts[name]

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def dtype(self, name: str, *kinds: str) -> Stored:
        """The part `name`, which must have one of these safetensors dtypes."""
        stored = self[name]
        if stored.kind not in kinds:
            raise ValueError(f"{self.module}.{name} is {stored.kind}, must be {' or '.join(kinds)}")
        return stored

    def weight(
        self,
        shape: tuple[int, ...],
        kind: str,
        read: Callable[[], QuantisedTensor],
        rows: Callable[..., QuantisedTensor] | None = None,
    ) -> Stored:
        """The weight that the parts make; errors of `read` and `rows` name the module."""

        def named(function: Callable[..., QuantisedTensor]) -> Callable[..., QuantisedTensor]:
            def reader(*run: Any) -> QuantisedTensor:
                try:
                    return function(*run)
                except ValueError as error:
                    raise ValueError(f"{self.module}: {error}") from None

            return reader

        some = None if rows is None else named(rows)
        return Stored(shape, kind, named(read), quantised=True, rows=some)


def split(
    stored: Mapping[str, Stored], mark: str, others: Sequence[str]
) -> tuple[list[Group], dict[str, Stored]]:
    """(groups of the modules that have the array `mark`, all arrays that are in none).

    Args:
        stored: every array of the checkpoint.
        mark: the last part of a name by which a quantised module is known.
        others: further parts that belong to such a module.
    """
    end = f".{mark}"
    modules = [name.removesuffix(end) for name in stored if name.endswith(end)]
    rest, groups = dict(stored), []
    for module in modules:
        parts = {}
        for part in (mark, *others):
            if (found := rest.pop(f"{module}.{part}", None)) is not None:
                parts[part] = found
        groups.append(Group(module, parts))
    return groups, rest


def without_cache_scales(stored: Mapping[str, Stored], notes: list[str]) -> dict[str, Stored]:
    """The arrays without the scales of a quantised key-value cache, which is exact here, and a note of that."""
    notes.append("the key-value cache is exact here; the checkpoint was made for a quantised one")
    return {name: one for name, one in stored.items() if not _OF_CACHE.search(name)}


def size_of(module: str, inputs: int, count: int, said: Any) -> int:
    """G of rows of `inputs` weights with `count` scales each.

    Args:
        module: for messages.
        inputs: K.
        count: scales of a row.
        said: G where the settings name it; None, or anything but a positive integer, where they do not.

    Raises:
        ValueError: G and the scales contradict each other, or K weights do not make so many groups alike.
    """
    if type(said) is int and said > 0:
        if count != -(-inputs // said):
            raise ValueError(
                f"{module}: {count} scales for rows of {inputs} weights are not one for every {said}, which"
                " group_size says"
            )
        return min(said, inputs)
    if not count or inputs % count:
        raise ValueError(f"{module}: {count} scales do not divide rows of {inputs} weights")
    return inputs // count

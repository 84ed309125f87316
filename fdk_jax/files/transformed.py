"""Weights under a transform (rotated ones): their activations would have to be transformed as well."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

_TRANSFORMED = re.compile(
    r"hadamard|quarot|spinquant|online_had|rotat(ed|ion)|(^|\.)transform_config$", re.IGNORECASE
)


def check_untransformed(settings: Any, path: str = "config.json has ") -> None:
    """Refuses what says, at any depth of a configuration or of GGUF's metadata, that weights were rotated.

    Raises:
        ValueError: names the key and its value.
    """
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        named = _TRANSFORMED.search(str(key)) and _says_something(value)
        # compressed-tensors writes an empty one, too.
        if key == "transform_config" and isinstance(value, Mapping):
            named = value.get("config_groups")
        if named:
            raise ValueError(
                f"{path}{key}={reprlib.repr(value)} (transformed weights, such as Hadamard-rotated ones),"
                " which is not implemented"
            )
        check_untransformed(value, f"{path}{key}.")


def _says_something(value: Any) -> bool:
    """Whether a value switches something on: none, false, 0 and what is empty do not."""
    return len(value) > 0 if hasattr(value, "__len__") else bool(value)

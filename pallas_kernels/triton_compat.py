"""Every use of Pallas' Triton module: the one file to change when JAX moves it."""

import warnings
from typing import Any

with warnings.catch_warnings():
    # The Triton lowering is deprecated in favour of others but is still what runs on every GPU.
    warnings.filterwarnings("ignore", message=".*[Tt]riton.*", category=DeprecationWarning)
    from jax.experimental.pallas import triton as _triton

load = _triton.load
store = _triton.store


def compiler_params(*, num_warps: int, num_stages: int) -> Any:
    """Launch parameters; always given, because without them the choice of a lowering is JAX's."""
    return _triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)

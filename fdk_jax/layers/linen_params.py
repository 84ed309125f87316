"""A `QuantisedTensor` among the parameters of a linen module that was not wrapped in `quantised_apply`.

linen opens boxes of metadata before it compares the shape of a parameter with the one that it expects. A
quantised weight is such a box: it opens as the float array, with a warning that names the way around it.
Otherwise linen would compare the shape of the codes, and its error names no remedy.
"""

from typing import Any

from flax.core import meta
from jax import Array

from fdk_jax.format.array_like import ArrayLike, warn_unfused
from fdk_jax.format.quantised_tensor import QuantisedTensor


def _unbox(w: QuantisedTensor) -> Array:
    warn_unfused(
        f"{w} is unpacked for a linen module: fdk_jax.quantised_apply(model.apply)(params, ...) multiplies"
        " by the packed codes; fdk_jax.dequantise(params) unpacks on purpose"
    )
    return w.dequantise()


def _replace_boxed(w: QuantisedTensor, value: Any) -> Any:
    """The value itself: it is no longer quantised."""
    return value


def _same_axes(w: QuantisedTensor, index: int, params: dict[Any, Any]) -> QuantisedTensor:
    """Layers that are stacked or taken apart: the arrays have leading axes for that, the metadata have none."""
    return w


# The tensor is of a floor that knows no Flax: what Flax asks of a box is put in here.
ArrayLike.unbox = _unbox  # type: ignore[attr-defined]
ArrayLike.replace_boxed = _replace_boxed  # type: ignore[attr-defined]
ArrayLike.add_axis = ArrayLike.remove_axis = _same_axes  # type: ignore[attr-defined]
meta.AxisMetadata.register(QuantisedTensor)

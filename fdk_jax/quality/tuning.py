"""Networks trained through their quantisation, for the table: where rounding alone keeps little."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.learning import training

STEPS = 300
_RATE, _WARM_UP = 3e-4, 15
_GROUP, _REFRESH = 64, 25


def tuned(
    model: nnx.Module,
    bits: int,
    loss: Callable[[nnx.Module, Any], Array],
    batch: Callable[[int], Any],
    *,
    codebook: Any = "kmeans",
    steps: int = STEPS,
) -> dict[tuple[str, tuple[int, ...]], Array]:
    """The matrices of a float model after training; all else stays as it is.

    Args:
        model: its linear layers have float weights; it is not changed.
        bits: of the codes, in groups of 64 with scales in bfloat16.
        loss: maps (model, batch) to a scalar.
        batch: gives that of a step.
        codebook: see `fdk_jax.training.quantisation_aware`; the levels of "kmeans" follow the weights.
        steps: of training.

    Returns:
        float32 [N, K] by the layer's dotted name and the number of a stacked matrix.
    """
    model = training.quantisation_aware(
        nnx.clone(model), bits, group_size=_GROUP, codebook=codebook, dtype=jnp.bfloat16
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, _RATE, min(_WARM_UP, steps // 2), steps)
    parts: dict[Any, Any] = {"kernels": optax.adamw(rate, b2=0.95), "rest": optax.set_to_zero()}
    transform = optax.multi_transform(parts, _kernels_or_rest)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    step = training.make_train_step(loss, refresh_every=_REFRESH)
    for index in range(steps):
        step(model, optimizer, batch(index))
    made = {}
    for path, layer in nnx.iter_modules(training.export(model)):
        if isinstance(layer, QuantisedLinear):
            weight = layer.weight.get_value().dequantise(jnp.float32)
            for at in np.ndindex(*weight.shape[:-2]):
                made[".".join(map(str, path)), at] = weight[at].T
    return made


def _kernels_or_rest(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernels" if "kernel" in jax.tree_util.keystr(path) else "rest", params
    )

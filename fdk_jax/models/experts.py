"""Mixtures of experts: a router, and stacked feed-forward blocks of which each token takes a few.

Glossary: M tokens, D hidden size, E experts, I width of one, k that a token takes.

Of several devices each has a run of the experts: it computes what they give for all tokens, and the sum over
devices is the block's result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedWeight
from fdk_jax.models.config import Experts
from fdk_jax.models.parallel import Parallel
from fdk_jax.product.grouped import grouped_matmul


class StackedLinear(nnx.Module):
    """E linear layers, of which each row of the input takes one.

    Args:
        count: E.
        inputs: K.
        outputs: N.
        dtype: Of the parameters.
        bias: Whether each has a bias.
        rngs: Random weights.
    """

    def __init__(self, count: int, inputs: int, outputs: int, dtype, bias: bool, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), (count, inputs, outputs), jnp.dtype(dtype))
        self.kernel = nnx.Param(kernel * jnp.asarray(inputs**-0.5, kernel.dtype))
        self.bias = nnx.Param(jnp.zeros((count, outputs), kernel.dtype)) if bias else None

    def __call__(self, x: Array, sizes: Array) -> Array:
        """Maps rows [M, K], sorted by layer, `sizes` int32 [E] of them a layer, to [M, N]."""
        y = jax.lax.ragged_dot(x, self.kernel[...], sizes, preferred_element_type=jnp.float32)
        if self.bias is not None:
            of_row = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=x.shape[0])
            y += self.bias[...].astype(jnp.float32)[of_row]
        return y.astype(x.dtype)


class QuantisedStack(nnx.Module):
    """`StackedLinear` with quantised weights.

    Args:
        weight: Stacked [E] matrices [N, K].
        bias: [E, N] or None.
    """

    def __init__(self, weight: QuantisedTensor, bias: Array | None = None):
        self.weight = QuantisedWeight(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Array, sizes: Array) -> Array:
        """See `StackedLinear`."""
        bias = None if self.bias is None else self.bias.get_value()
        return grouped_matmul(x, self.weight.get_value(), sizes, bias=bias)


class MixtureOfExperts(nnx.Module):
    """The sum of the feed-forward blocks that a router chooses for a token, weighted by its scores.

    Args:
        router: Maps [..., D] to E scores.
        experts: Their number and size.
        hidden: D.
        dtype: Of the parameters.
        activation: Of the gate.
        rngs: Random weights.
        parallel: Devices that share the experts, or None.
    """

    def __init__(
        self,
        router: nnx.Module,
        experts: Experts,
        hidden: int,
        dtype: str,
        activation: Callable[[Array], Array],
        rngs: nnx.Rngs,
        parallel: Parallel | None = None,
    ):
        self.router, self.experts, self.activation = router, experts, activation
        self.axis = parallel.axis if parallel else None
        count, inner, bias = experts.count, experts.size, experts.bias
        count //= parallel.shards if parallel else 1
        self.gate_up = StackedLinear(count, hidden, 2 * inner, dtype, bias, rngs)
        self.down = StackedLinear(count, inner, hidden, dtype, bias, rngs)

    def __call__(self, x: Array) -> Array:
        """Maps x [..., D] to [..., D], summed over devices."""
        y = self.partial(x)
        return y if self.axis is None else jax.lax.psum(y, self.axis)

    def partial(self, x: Array) -> Array:
        """What this device's experts give: [..., D] to [..., D]."""
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = self.choose(rows)
        count = self.experts.count
        if self.axis is not None:
            count //= jax.lax.axis_size(self.axis)
            chosen = chosen - jax.lax.axis_index(self.axis) * count
            here = (chosen >= 0) & (chosen < count)
            # Rows of other devices' experts come last, where no matrix is theirs.
            chosen, weights = jnp.where(here, chosen, count), jnp.where(here, weights, 0.0)
        # Rows are sorted by expert, so that each matrix is read once.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=count).astype(jnp.int32)
        y = self.gate_up(rows[order // self.experts.per_token], sizes)
        y = self.down(self.gate(y), sizes)
        y = y[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
        y = jnp.where((chosen < count)[..., None], y, 0.0) if self.axis is not None else y
        mixed = (y * weights[..., None]).sum(axis=1)
        return mixed.astype(x.dtype).reshape(x.shape)

    def choose(self, rows: Array) -> tuple[Array, Array]:
        """The experts of rows [M, D] and their weights: int32 [M, k] and float32 [M, k]."""
        scores = self.router(rows).astype(jnp.float32)
        best, chosen = jax.lax.top_k(scores, self.experts.per_token)
        if self.experts.normalised:
            return chosen, jax.nn.softmax(best, axis=-1)
        total = jax.scipy.special.logsumexp(scores, axis=-1, keepdims=True)
        return chosen, jnp.exp(best - total)

    def gate(self, gate_up: Array) -> Array:
        """What is between the projections: [M, 2 I] to [M, I]."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        limit = self.experts.clamp
        if limit is None:
            return self.activation(gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        slope = jnp.asarray(self.experts.gate_slope, gate.dtype)
        return gate * jax.nn.sigmoid(slope * gate) * (up + 1)

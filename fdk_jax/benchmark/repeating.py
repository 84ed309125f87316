"""A text that repeats itself, for models of random weights: where guesses from the text so far are right.

Without what attention and the feed-forward blocks add, the next token depends on the newest one alone. So a
text that the model has written once, it writes again after the tokens that it began with. A step computes what
it always does: how long it takes does not depend on values.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.models import Generator, Transformer


def without_context(model: Transformer) -> Transformer:
    """A copy whose two projections back to the residual stream give zeros; the other arrays are the same."""
    copy = nnx.clone(model)
    for layer in copy.layers:
        for linear in (layer.attention.out, layer.mlp.down):
            if isinstance(linear, QuantisedLinear):
                weight = linear.weight.get_value()
                zeros = jnp.zeros_like(weight.scales)
                linear.weight.set_value(dataclasses.replace(weight, scales=zeros))
            else:
                linear.kernel.set_value(jnp.zeros_like(linear.kernel.get_value()))
    return copy


def prompt(generator: Generator, begin: list[int], tokens: int) -> list[int]:
    """A prompt after which such a model writes so many tokens that the prompt has already."""
    written = generator.generate([begin], max_tokens=tokens).tokens[0]
    return [*begin, *written, *begin]

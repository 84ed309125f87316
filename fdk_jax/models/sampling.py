"""The next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Below it quotients may leave float32; long before, no token but the best has any chance.
_COLDEST = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; in this order: temperature, the best k, the nucleus.

    Attributes:
        temperature: Logits are divided by it; 0 takes the best token (greedy).
        top_k: Only the best k tokens are drawn from; None for all.
        top_p: Only the fewest best tokens whose probabilities reach this sum are drawn from.
        seed: Of the draws; two runs with the same seed and batch agree.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("temperature", "top_p"):
            if not isinstance(value := getattr(self, name), (int, float, np.number, Array)):
                raise TypeError(f"{name}={value!r} must be a number")
        for name in ("seed",) if self.top_k is None else ("seed", "top_k"):
            if not hasattr(value := getattr(self, name), "__index__"):
                raise TypeError(f"{name}={value!r} must be an integer")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; None takes all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be an integer of 64 bits")

    @property
    def key(self) -> Array:
        """The random key of the draws, of all bits of the seed, of which JAX itself looks at 32."""
        high, low = (int(self.seed) >> 32) & 0xFFFFFFFF, int(self.seed) & 0xFFFFFFFF
        key = jax.random.key(low)
        return jax.random.fold_in(key, high) if high else key

    @property
    def method(self) -> "Method":
        """What a compiled program depends on; the numbers are its inputs."""
        if self.temperature < _COLDEST:
            return Method(greedy=True)
        return Method(greedy=False, top_k=self.top_k, nucleus=self.top_p < 1)


@dataclasses.dataclass(frozen=True)
class Method:
    """The static side of `Sampling`."""

    greedy: bool
    top_k: int | None = None
    nucleus: bool = False


def choose(logits: Array, keys: Array, temperature: Array, top_p: Array, method: Method) -> Array:
    """One token a sequence.

    Args:
        logits: float32 [B, V].
        keys: A random key for each sequence at this position, [B]; not read if greedy.
        temperature: float32 scalar above 0, unless greedy.
        top_p: float32 scalar.
        method: Static choices.

    Returns:
        int32 [B].
    """
    if method.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    logits = logits / temperature
    if method.top_k is None and not method.nucleus:
        return draw(keys, logits).astype(jnp.int32)
    count = min(method.top_k or logits.shape[-1], logits.shape[-1])
    best, tokens = jax.lax.top_k(logits, count)
    if method.nucleus:
        probabilities = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        best = jnp.where(before < top_p, best, -jnp.inf)
    drawn = draw(keys, best)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)

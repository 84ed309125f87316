"""Which leaves of a tree are weights of linear layers, and with which axes; and why the others are not."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdk_jax.format.orientation import check_axes
from fdk_jax.format.quantised_tensor import FLOAT_DTYPES

SKIP = r"(^|\.)lm_head$"
_KERNELS = ("kernel", "weight", "w")
_TABLE = re.compile(
    r"(^|[._])(embed(ding)?s?(_tokens|_positions)?|\w*embeddings?|embedder|wte|wpe|tok)([._]|$)",
    re.I,
)
_TAPS = re.compile(r"(^|[._])conv\w*([._]|$)", re.I)
_NORM = re.compile(
    r"(^|\.)(ln\w*|(\w*_)?(batch|layer|rms|group|instance)?_?norm(_?\d+)?)(\.|$)", re.I
)
_ROUTER = re.compile(r"(^|[._])(router\w*|(\w*(moe|experts?)\w*\.)gate)(\.|$)", re.I)
_STATE = re.compile(
    r"(^|\.)(opt_state|optimizer_state|mu|nu|trace|momentum|acc_grads|grads?|ema_params?|v_row|v_col"
    r"|sum_of_squares|batch_stats)(\.|$)"
)
_PROJECTS_OUT = ("out", "o_proj", "out_proj", "attn_vec_einsum")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The choices of one call of `quantise`.

    Attributes:
        bits: of the codes.
        group_size: weights that share a scale.
        skip: regular expression on the dotted name of a layer, or None.
        axes: {regular expression on the dotted name of a leaf: axes, or None to leave it out}.
        dtype: compute dtype, or None.
    """

    bits: int = 4
    group_size: int = 64
    skip: str | None = SKIP
    axes: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    dtype: Any = None

    def rule(self, name: str) -> tuple[str, str | None] | None:
        """(pattern, axes) of the first rule for a leaf."""
        for pattern, orientation in self.axes.items():
            if re.search(pattern, name):
                return pattern, orientation
        return None

    def skipped(self, layer: str) -> str | None:
        """Why a layer of this name is left out, or None."""
        if self.skip is not None and re.search(self.skip, layer):
            return f"skip={self.skip!r}"
        return None

    def fits(self, name: str, leaf: Any, axes: str) -> str | None:
        """Why a weight cannot be quantised with these axes, or None."""
        if (reason := unfit(leaf, self.dtype)) is not None:
            return reason
        if leaf.ndim < len(axes):
            return f"shape {leaf.shape} has too few axes for {axes!r}"
        sizes = leaf.shape[leaf.ndim - len(axes) :]
        n, k = (math.prod(d for d, a in zip(sizes, axes, strict=True) if a == c) for c in "nk")
        matrices = leaf.size // max(1, n * k)
        itemsize = jnp.dtype(leaf.dtype if self.dtype is None else self.dtype).itemsize
        before = leaf.size * itemsize
        rows = -(-k * self.bits // 8) + -(-k // self.group_size) * itemsize
        after = matrices * (n * rows + 4 * 2**self.bits)
        if after >= before:
            return f"it would grow from {before:,} to {after:,} bytes at {self.bits} bits"
        return None


def unfit(leaf: Any, dtype: Any = None) -> str | None:
    """Why a leaf is no weight matrix of a dtype that can be quantised, or None."""
    if not is_array(leaf):
        return f"a {type(leaf).__name__}, not an array"
    if leaf.ndim < 2:
        return "fewer than two axes"
    # A numpy float64 is a float32 for JAX, unless 64 bits are switched on.
    own = leaf.dtype.newbyteorder("=") if isinstance(leaf, np.ndarray) else leaf.dtype
    if jax.dtypes.canonicalize_dtype(own) not in FLOAT_DTYPES:
        return f"{leaf.dtype} is not bfloat16, float16 or float32: cast it first"
    return None


def is_array(leaf: Any) -> bool:
    """Whether a leaf holds numbers."""
    return isinstance(leaf, (jax.Array, np.ndarray))


def layer_of(name: str) -> str:
    """The layer that a leaf belongs to: "params.block.q_proj.kernel" is of "block.q_proj"."""
    parts = name.split(".")
    return ".".join(parts[parts[0] == "params" : -1])


def not_linear(name: str, kinds: tuple[str, ...] = (), ndim: int = 0) -> str | None:
    """Why a name says that a weight is not a linear layer's, or None.

    Args:
        name: dotted name of a leaf.
        kinds: names of the classes that hold it, where they are known.
        ndim: its number of axes, where it is known: a "kernel" or "w" with two is a linear layer's, whatever
            the layer is called.
    """
    layer = layer_of(name)
    if name.rpartition(".")[2] in ("bias", "b"):
        return "a bias"
    if _STATE.search(name):
        return "state of an optimiser or running statistics"
    if _ROUTER.search(layer):
        return "a router: small, and its choices are sensitive"
    if ndim == 2 and name.rpartition(".")[2] in ("kernel", "w"):
        return None
    if _TABLE.search(layer) or any("embed" in kind.lower() for kind in kinds[-1:]):
        return "a table of embeddings"
    if _TAPS.search(layer) or any("conv" in kind.lower() for kind in kinds[-1:]):
        return "taps of a convolution"
    if _NORM.search(layer):
        return "a normalisation"
    return None


def orientation_of(name: str, leaf: Any, bias: Any = None) -> tuple[str | None, str]:
    """(axes, "") that a leaf's name and shape stand for, or (None, why they are unknown)."""
    parts = name.split(".")
    kind, layer = parts[-1], parts[-2] if len(parts) > 1 else ""
    if kind not in _KERNELS:
        return None, f"no known name ({', '.join(_KERNELS)})"
    if kind == "weight":
        if leaf.ndim == 2:
            return "nk", ""
        return (
            None,
            f'a "weight" with {leaf.ndim} axes may be stacked matrices or the taps of a convolution',
        )
    if leaf.ndim == 2:
        return "kn", ""
    if kind == "w":
        return None, f'a "w" with {leaf.ndim} axes has no known orientation'
    if layer in ("query", "key", "value"):
        return "knn", ""
    if layer == "out":
        return "kkn", ""
    if is_array(bias):
        return _by_bias(leaf.shape, bias.shape, layer)
    if leaf.ndim == 3:
        return "kn", ""
    return None, f'a "kernel" with {leaf.ndim} axes has no known orientation'


def _by_bias(shape: tuple[int, ...], bias: tuple[int, ...], layer: str) -> tuple[str | None, str]:
    """Axes of a kernel with three or more axes from the shape of its bias: the output and stacked axes."""
    found = []
    if len(bias) == len(shape) - 1:
        if bias == (shape[0], *shape[2:]):  # stacked layers in front
            found.append("kn" if len(shape) == 3 else "k" + "n" * (len(shape) - 2))
        if len(shape) == 3 and bias == shape[1:]:  # one input axis, two output axes
            found.append("knn")
        if len(shape) == 3 and bias == (shape[2], shape[1]):  # stacked layers second
            found.append("kbn")
    if len(shape) == 3 and bias == shape[2:] and layer in _PROJECTS_OUT:
        found.append("kkn")
    if len(found) == 1:
        return found[0], ""
    why = "several orientations" if found else "no orientation of a linear layer"
    return None, f'a "kernel" {list(shape)} with a bias {list(bias)} fits {why}'


def check_rules(axes: Mapping[str, str | None]) -> None:
    """Raises ValueError for a rule that is no orientation, naming it."""
    for pattern, orientation in axes.items():
        if orientation is None:
            continue
        try:
            re.compile(pattern)
            check_axes(orientation)
        except (ValueError, re.error) as error:
            raise ValueError(f"the rule {pattern!r}: {orientation!r} of axes: {error}") from error

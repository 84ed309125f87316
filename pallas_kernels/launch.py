"""Checks the arrays of a product and launches the kernel that its plan names."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels import chain, choice, gather, layout, matvec, ring, ring_arithmetic, target
from pallas_kernels.case import Arrays, Case


def matmul(
    x: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    uniform: bool,
    bias: Array | None = None,
    out_dtype: Any = None,
    arithmetic: str = "exact",
    config: choice.Config | None = None,
    interpret: bool = False,
) -> Array:
    """Multiplies x by the transpose of a quantised weight in the planar layout, on an NVIDIA GPU.

        y[m, n] = sum_k x[m, k] * scales[n, k // G] * codebook[codes[n, k]] + bias[n]

    Args:
        x: bfloat16, float16 or float32 [M, K], M >= 1.
        packed: uint16, the codes as `fdk_jax.format.packing.to_planar` orders them.
        scales: the scales as `to_planar` orders them, in the weight's compute dtype.
        codebook: float32 [2**bits], or [C, 2**bits] with C dividing N.
        bits: 1, 2, 4 or 8.
        group_size: G, weights a scale.
        out_features: N.
        uniform: whether the values of the codebook are evenly spaced, see `fdk_jax.QuantisedTensor`.
        bias: [N] or None, added in float32.
        out_dtype: dtype of y; None for the dtype of x.
        arithmetic: "exact" or "int8", see `Case`.
        config: a launch configuration instead of the tuned one.
        interpret: run the plain kernel in Pallas' interpreter, which refuses the PTX of the others.

    Returns:
        y [M, N].

    Raises:
        ValueError: arrays that are not a planar weight of the given width, groups and shape.
        NotImplementedError: a configuration that the kernel cannot run, or a GPU for which there is none.
    """
    _check(x, packed, scales, codebook, bits, group_size, out_features)
    arrays = Arrays(x, packed, scales, codebook, bias)
    case = Case.of(
        arrays,
        bits=bits,
        group_size=group_size,
        out_features=out_features,
        uniform=uniform,
        out_dtype=out_dtype,
        arithmetic=arithmetic,
    )
    gpu = target.current()
    chosen = choice.choose(case, gpu) if config is None else _given(case, config, gpu)
    if interpret:
        return gather.matmul(case, arrays)
    if chosen.kernel == "xla":
        raise NotImplementedError(
            f"no kernel multiplies on this GPU: {chosen.reason}; use backend='xla' or None"
        )
    return choice.launch(case, chosen.kernel, chosen.config, arrays, gpu)[0]


def plan_of(arrays: Arrays, **weight: Any) -> choice.Plan:
    """The kernel that `matmul` takes for a product on the GPU at hand; "xla" where it has none.

    Args:
        arrays: of the product, or their shapes and dtypes.
        weight: bits, group_size, out_features, uniform, out_dtype and arithmetic, see `matmul`.
    """
    return choice.choose(Case.of(arrays, **weight), target.current())


class Scaled(NamedTuple):
    """A residual sum with a deferred normalisation.

    Attributes:
        total: [1, D], the sum.
        scaled: [1, D], the sum times the norm's scale, not yet divided by the root of the mean square.
        squares: float32 [P], parts of the sum of the squares of `total`.
    """

    total: Array
    scaled: Array
    squares: Array


def residual_plan(w: Arrays, **weight: Any) -> tuple[Case, choice.Plan] | None:
    """The product of `residual_matmul` without what is around it, and its kernel; None without one.

    Args:
        w: the arrays of the product, or their shapes and dtypes; `x` stands for `scaled` or x.
        weight: bits, group_size, out_features and uniform, see `matmul`.
    """
    # A sum times a scale, not yet divided, may be too large for float16.
    if w.x.dtype != jnp.bfloat16:
        return None
    case = Case.of(w, **weight)
    gpu = target.current()
    plan = choice.choose(case, gpu)
    config, around = plan.config, dataclasses.replace(case, squares=1, residual=True)
    if case.m > 1 or not isinstance(config, ring.Config | matvec.Config) or config.cluster > 1:
        return None
    return None if choice.unsupported_reason(around, config, gpu) else (case, plan)


def residual_matmul(
    x: Array | Scaled,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    uniform: bool,
    bias: Array | None = None,
    eps: float = 0.0,
    residual: Array | None = None,
    norm_scale: Array | None = None,
) -> Array | Scaled:
    """A product with the norm before it, or with the residual sum after it and half of the next norm.

    A norm needs the mean over all of a sum, which no program of the launch that adds it knows; so the launch
    leaves the parts of that mean, and the next one divides its outputs by the root.

    Args:
        x: bfloat16 [1, K]; or a `Scaled`, whose norm is multiplied.
        packed: See `matmul`.
        scales: See `matmul`.
        codebook: See `matmul`.
        bits: See `matmul`.
        group_size: See `matmul`.
        out_features: N.
        uniform: See `matmul`.
        bias: See `matmul`.
        eps: Added to the mean square, if x is a `Scaled`.
        residual: bfloat16 [1, N], to which the product is added; or None.
        norm_scale: bfloat16 [N], the scale of the norm after the sum, if there is a residual.

    Returns:
        bfloat16 [1, N]; with a residual a `Scaled` of the sum.

    Raises:
        ValueError: see `matmul`; or arrays that do not fit the product.
        NotImplementedError: a case for which `residual_plan` has nothing.
    """
    rows, squares = (x.scaled, x.squares) if isinstance(x, Scaled) else (x, None)
    _check(rows, packed, scales, codebook, bits, group_size, out_features)
    others = ()
    if squares is not None:
        if squares.ndim != 1 or squares.size < 1 or squares.dtype != jnp.float32:
            raise ValueError(f"squares is {squares.dtype}{squares.shape}, must be float32 [P]")
        others += (squares,)
    if residual is not None:
        shapes = {"residual": (1, out_features), "norm_scale": (out_features,)}
        for (name, shape), array in zip(shapes.items(), (residual, norm_scale), strict=True):
            if array is None or array.shape != shape or array.dtype != rows.dtype:
                found = None if array is None else f"{array.dtype}{array.shape}"
                raise ValueError(f"{name} is {found}, must be {rows.dtype}{shape}")
            others += (array,)
    weight: dict[str, Any] = dict(
        bits=bits, group_size=group_size, out_features=out_features, uniform=uniform
    )
    arrays = Arrays(rows, packed, scales, codebook, bias)
    found = residual_plan(arrays, **weight)
    if found is None:
        raise NotImplementedError(
            f"no kernel adds or normalises around this product: {rows.dtype}{rows.shape}, {weight};"
            " do so apart, and call matmul"
        )
    case, plan = found
    if squares is not None:
        case = dataclasses.replace(case, squares=squares.size, norm_eps=eps)
    case = dataclasses.replace(case, residual=residual is not None)
    outputs = choice.launch(case, plan.kernel, plan.config, arrays, target.current(), others)
    return outputs[0] if residual is None else Scaled(*outputs)


def chain_plan(
    weights: Sequence[tuple[Arrays, dict[str, Any]]], devices: int = 1
) -> tuple[list[Case], ring.Config] | None:
    """The products of `chain_matmul` without what is around them, and its launch; None without a kernel.

    Args:
        weights: of each product its arrays, or their shapes and dtypes, with `x` for what it multiplies, and
            the keywords of `residual_plan`.
        devices: over which the two sums are.
    """
    gpu = target.current()
    if any(arrays.x.shape[0] > 1 for arrays, _ in weights):
        return None
    products = [Case.of(arrays, **weight) for arrays, weight in weights]
    config = ring_arithmetic.config(products, gpu, chain.GATED)
    reason = chain.unsupported_reason(products, config, gpu, devices)
    return None if reason else (products, config)


def chain_matmul(
    x: Array,
    residual: Array,
    weights: Sequence[tuple[Arrays, dict[str, Any]]],
    norm_scales: Sequence[Array],
    eps: Sequence[float],
    devices: int = 1,
    peers: tuple[Array, Array] | None = None,
) -> tuple[Scaled, Array | None]:
    """The products from a token's attention to the next layer's queries in one launch; see `chain`.

    Args:
        x: bfloat16 [1, K].
        residual: bfloat16 [1, D].
        weights: of the output projection, of gate and up in one, of the down projection and,
            if there is a next layer, of its queries, keys and values; see `chain_plan`.
        norm_scales: bfloat16 [D], of the norms after the two residual sums.
        eps: Of these norms.
        devices: over which the two sums are: each calls this with its slices of the weights.
        peers: the mailbox and the addresses of `peer_sum.peer_sum`, if there are several.

    Returns:
        The residual stream with the deferred second norm; the last product or None.

    Raises:
        ValueError: arrays that are not planar weights as described, or that do not fit each other.
        NotImplementedError: products for which `chain_plan` has nothing.
    """
    _check_chain(x, residual, weights, norm_scales)
    if (peers is None) != (devices == 1):
        raise ValueError(f"{devices=} need peers, and one has none")
    found = chain_plan(weights, devices)
    if found is None:
        raise NotImplementedError("no kernel runs these products one after another; run them apart")
    products, config = found
    arrays = [arrays for arrays, _ in weights]
    gpu = target.current()
    around = chain.cases(products, eps, config, gpu, devices)
    *scaled, y = chain.matmul(around, arrays, x, residual, norm_scales, config, gpu, peers)
    return Scaled(*scaled), y


def _given(case: Case, config: choice.Config, gpu: target.Target) -> choice.Plan:
    reason = choice.unsupported_reason(case, config, gpu)
    if reason is not None:
        raise NotImplementedError(f"{config} does not run this product: {reason}")
    return choice.Plan(choice.kernel_of(config), config, "given by the caller")


def _check_chain(x, residual, weights, norm_scales) -> None:
    if len(weights) not in (3, 4) or len(norm_scales) != 2:
        raise ValueError(
            f"{len(weights)} weights and {len(norm_scales)} norms, must be 3 or 4, and 2"
        )
    for arrays, weight in weights:
        weight = [weight[name] for name in ("bits", "group_size", "out_features")]
        _check(arrays.x, arrays.packed, arrays.scales, arrays.codebook, *weight)
    sizes = [(weight["out_features"], arrays.x.shape[1]) for arrays, weight in weights]
    (hidden, width), (twice, _), *_ = sizes
    wanted = [(hidden, width), (twice, hidden), (hidden, twice // 2), (sizes[-1][0], hidden)]
    if sizes != wanted[: len(sizes)] or twice % 2:
        raise ValueError(f"weights of {sizes} (N, K) do not follow one another; must be {wanted}")
    rows = {"x": (x, (1, width)), "residual": (residual, (1, hidden))}
    rows |= {f"norm_scales[{i}]": (scale, (hidden,)) for i, scale in enumerate(norm_scales)}
    for name, (array, shape) in rows.items():
        if array.shape != shape or array.dtype != jnp.bfloat16:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, must be bfloat16{shape}")


def _check(x, packed, scales, codebook, bits, group_size, out_features) -> None:
    span = layout.planes(bits) * layout.PLANE
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"{x.shape=} must be [M, K] with M >= 1")
    k = x.shape[1]
    tiles = -(-out_features // 16)
    blocks = -(-k // span)
    groups = -(-blocks * span // group_size)
    expected = (tiles, blocks, layout.parts(bits), 8, layout.WORDS)
    if packed.dtype != jnp.uint16 or packed.shape != expected:
        raise ValueError(
            f"packed is {packed.dtype}{packed.shape}, must be uint16{expected} for {bits=}, {k=},"
            f" {out_features=}; prepare the weight with fdk_jax.prepare(w, backend='pallas')"
        )
    if scales.shape != (tiles, -(-groups // 4), 64):
        raise ValueError(
            f"{scales.shape=} must be {(tiles, -(-groups // 4), 64)} for {group_size=}, {k=},"
            f" {out_features=}; prepare the weight with fdk_jax.prepare(w, backend='pallas')"
        )
    codebooks = codebook.reshape(-1, codebook.shape[-1]).shape
    if codebook.ndim not in (1, 2) or codebooks[1] != 2**bits or out_features % codebooks[0]:
        raise ValueError(
            f"{codebook.shape=} must be [2**bits] or [C, 2**bits] with C dividing {out_features=}"
        )

"""Checks the arrays of a product and launches the kernel that its plan names."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import gather, integer, tuning
from pallas_kernels.case import Arrays, Case, Norm


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
    config: tuning.Config | None = None,
    interpret: bool = False,
) -> Array:
    """Multiplies x by the transpose of a quantised weight in the planar layout, on an NVIDIA GPU.

        y[m, n] = sum_k x[m, k] * scales[n, k // G] * codebook[codes[n, k]] + bias[n]

    Args:
        x: bfloat16, float16 or float32 [M, K], M >= 1.
        packed: uint16, the codes as `fdk_jax.packing.to_planar` orders them.
        scales: the scales as `to_planar` orders them, in the weight's compute dtype.
        codebook: float32 [2**bits], or [C, 2**bits] with C dividing N.
        bits: 1, 2, 4 or 8.
        group_size: G, weights a scale.
        out_features: N.
        uniform: whether the values of the codebook are evenly spaced, see `fdk_jax.QuantisedTensor`.
        bias: [N] or None, added in float32.
        out_dtype: dtype of y; None for the dtype of x.
        config: a launch configuration instead of the tuned one.
        interpret: run the plain kernel in Pallas' interpreter, which refuses the PTX of the others.

    Returns:
        y [M, N].

    Raises:
        ValueError: arrays that are not a planar weight of the given facts.
        NotImplementedError: a configuration that the kernel cannot run.
    """
    _check(x, packed, scales, codebook, bits, group_size, out_features)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    arrays = Arrays(x, packed, scales, codebook, bias)
    case = _case(arrays, bits, group_size, out_features, uniform, out_dtype)
    chosen = tuning.choose(case) if config is None else _given(case, config)
    if interpret or chosen.kernel == "gather":
        return gather.matmul(
            x,
            packed,
            scales,
            codebook,
            bits=bits,
            group_size=group_size,
            out_features=out_features,
            bias=bias,
            out_dtype=out_dtype,
            interpret=interpret,
        )
    return tuning.launch(case, chosen.kernel, chosen.config, arrays)


def norm_plan(
    x: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    eps: float,
    bits: int,
    group_size: int,
    out_features: int,
    uniform: bool,
    bias: Array | None = None,
) -> tuple[Case, integer.Config] | None:
    """What `norm_matmul` of these arrays (or their shapes and dtypes) runs; None if no kernel does it."""
    arrays = Arrays(x, packed, scales, codebook, bias)
    case = _case(arrays, bits, group_size, out_features, uniform, jnp.dtype(x.dtype))
    config = tuning.choose(case).config
    case = dataclasses.replace(case, norm_eps=eps)
    if not isinstance(config, integer.Config):
        return None
    return None if integer.unsupported_reason(case, config) else (case, config)


def norm_matmul(
    x: Array,
    delta: Array,
    norm_scale: Array,
    packed: Array,
    scales: Array,
    codebook: Array,
    *,
    eps: float,
    bits: int,
    group_size: int,
    out_features: int,
    uniform: bool,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """A residual sum, its RMS norm and a product in one launch.

        sum = x + delta;  y = matmul(norm_scale * sum / sqrt(mean(sum**2) + eps), ...)

    Args:
        x: bfloat16 or float16 [1, K].
        delta: [1, K] of the same dtype.
        norm_scale: [K] of the same dtype.
        packed: See `matmul`.
        scales: See `matmul`.
        codebook: See `matmul`.
        eps: Added to the mean.
        bits: See `matmul`.
        group_size: See `matmul`.
        out_features: N.
        uniform: See `matmul`.
        bias: See `matmul`.

    Returns:
        (sum [1, K], y [1, N]), both in the dtype of x. What is multiplied is not rounded to that dtype.

    Raises:
        ValueError: see `matmul`; or delta and norm_scale that do not fit x.
        NotImplementedError: a case for which `norm_plan` has nothing.
    """
    _check(x, packed, scales, codebook, bits, group_size, out_features)
    for name, array, shape in (("delta", delta, x.shape), ("norm_scale", norm_scale, x.shape[1:])):
        if array.shape != shape or array.dtype != x.dtype:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, must be {x.dtype}{shape}")
    arrays = Arrays(x, packed, scales, codebook, bias)
    facts: dict[str, Any] = dict(
        bits=bits, group_size=group_size, out_features=out_features, uniform=uniform
    )
    plan = norm_plan(*arrays[:4], eps=eps, bias=bias, **facts)
    if plan is None:
        raise NotImplementedError(
            f"no kernel normalises before this product: {x.dtype}{x.shape}, {facts}; add and"
            " normalise first, then call matmul"
        )
    case, config = plan
    y, total = case.launch(
        integer.source(case, config),
        arrays,
        grid=integer.grid(case, config),
        warps=config.warps,
        name="fdk_norm_integer",
        norm=Norm(delta, norm_scale),
    )
    return total, y


def _case(
    arrays: Arrays, bits: int, group_size: int, out_features: int, uniform: bool, out_dtype: Any
) -> Case:
    return Case(
        m=arrays.x.shape[0],
        n=out_features,
        k=arrays.x.shape[1],
        bits=bits,
        group_size=group_size,
        books=arrays.codebook.size // 2**bits,
        x_dtype=arrays.x.dtype,
        scale_dtype=arrays.scales.dtype,
        bias_dtype=None if arrays.bias is None else arrays.bias.dtype,
        out_dtype=out_dtype,
        uniform=uniform,
    )


def _given(case: Case, config: tuning.Config) -> tuning.Plan:
    reason = tuning.unsupported_reason(case, config)
    if reason is not None:
        raise NotImplementedError(f"{config} does not run this product: {reason}")
    return tuning.Plan(tuning.kernel_of(config), config, "given by the caller")


def _check(x, packed, scales, codebook, bits, group_size, out_features) -> None:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"{bits=} is not supported; use 1, 2, 4 or 8")
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"{x.shape=} must be [M, K] with M >= 1")
    k = x.shape[1]
    tiles = -(-out_features // 16)
    blocks = -(-k * bits // 512)
    groups = -(-blocks * (512 // bits) // group_size)
    expected = (tiles, blocks, 2, 8, 32)
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
    books = codebook.reshape(-1, codebook.shape[-1]).shape
    if codebook.ndim not in (1, 2) or books[1] != 2**bits or out_features % books[0]:
        raise ValueError(
            f"{codebook.shape=} must be [2**bits] or [C, 2**bits] with C dividing {out_features=}"
        )

"""The shapes in signatures are those of arguments and results, letter for letter."""

import inspect
import typing

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import fdk_jax
from fdk_jax.format import codebooks, dequantisation, packing, quantisation


def fits(value, hint) -> bool:
    """Whether a value has a shape and dtype of a hint; types that say nothing of shapes are not looked at."""
    if typing.get_origin(hint) is tuple:
        return all(fits(v, h) for v, h in zip(value, typing.get_args(hint), strict=True))
    if hasattr(hint, "__args__") and not isinstance(hint, type):  # a union
        return any(fits(value, part) for part in typing.get_args(hint))
    if hint is type(None):
        return value is None
    return not issubclass(hint, jaxtyping.AbstractArray) or isinstance(value, hint)


def check(function, *args, **options):
    """Calls a function; what its signature says of shapes has to hold for one size of each letter."""
    inner = inspect.unwrap(function)
    hints = typing.get_type_hints(inner, {**inner.__globals__, **vars(jaxtyping)})
    given = inspect.signature(function).bind(*args, **options).arguments
    shaped = {name: hint for name, hint in hints.items() if "jaxtyping" in repr(hint)}
    assert shaped, f"{function} has no shapes"
    with jaxtyping.jaxtyped("context"):
        for name, value in given.items():
            if name in shaped:
                assert fits(value, shaped[name]), f"{name} {np.shape(value)} is not {hints[name]}"
        result = function(*args, **options)
        if "return" in shaped:
            assert fits(result, shaped["return"]), f"the result is not {hints['return']}"
    return result


@pytest.fixture
def weight(rng):
    return fdk_jax.quantise(rng.normal(size=(24, 96)).astype(np.float32), 4, group_size=32)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1)])
def test_matmul(rng, weight, lead):
    x = jnp.asarray(rng.normal(size=(*lead, 96)), jnp.float32)
    check(fdk_jax.matmul, x, weight, bias=jnp.zeros(24))


def test_einsum_and_grouped_matmul(rng, weight):
    x = jnp.asarray(rng.normal(size=(5, 96)), jnp.bfloat16)
    check(fdk_jax.einsum, "bk,nk->bn", x, weight)
    experts = fdk_jax.quantise(rng.normal(size=(2, 24, 96)).astype(np.float32), 4, axes="bnk")
    check(fdk_jax.grouped_matmul, x, experts, jnp.array([2, 3]), bias=jnp.zeros((2, 24)))


@pytest.mark.parametrize(("bits", "lead"), [(4, ()), (1, (2,))])
def test_packing(rng, bits, lead):
    codes = rng.integers(0, 2**bits, (*lead, 24, 96)).astype(np.uint8)
    packed = check(packing.pack, codes, bits)
    check(packing.unpack, packed, bits, 96)
    scales = jnp.ones((*lead, 24, 3), jnp.bfloat16)
    spec = dict(bits=bits, group_size=32, out_features=24, in_features=96)
    check(packing.from_planar, *check(packing.to_planar, packed, scales, **spec), **spec)
    check(packing.from_tiled, *check(packing.to_tiled, packed, scales, **spec), **spec)
    check(packing.convert, packed, scales, "interchange", "planar", **spec)


def test_quantisation(rng, weight):
    matrix = jnp.asarray(rng.normal(size=(24, 96)), jnp.bfloat16)
    check(quantisation.quantise_array, matrix, 4)
    check(fdk_jax.calibrate_array, matrix, 2, second_moment=np.eye(96, dtype=np.float32))
    quotients, scales = check(quantisation.scaled, matrix, 64, "absmax")
    check(quantisation.group_scales, quotients, "rms", jnp.bfloat16)
    codes = check(quantisation.nearest_codes, quotients, weight.codebook, jnp.bfloat16)
    check(dequantisation.lookup, codes, weight.codebook)
    check(dequantisation.spread, scales, 64, 96)
    arrays = weight.packed, weight.scales, weight.codebook
    options = dict(bits=4, group_size=32, in_features=96, dtype=jnp.float32)
    check(dequantisation.dequantise_matrix, *arrays, **options)
    check(type(weight).dequantise, weight)


def test_codebooks(rng):
    for function in (codebooks.nf4, codebooks.fp4, codebooks.ternary):
        check(function)
    check(codebooks.uniform, 4)
    values = rng.normal(size=(7, 30)).astype(np.float32)
    codebook = check(codebooks.kmeans, values, 2, importance=np.ones_like(values))
    check(codebooks.fit, values, 3)
    check(codebooks.fit_parts, [lambda: (jnp.asarray(values), None)], 3)
    check(codebooks.refine, jnp.asarray(values), codebook)


def test_wrong_shapes_and_dtypes_are_seen(weight):
    x = jnp.ones((3, 96))
    for options in (dict(bias=jnp.zeros((24, 1))), dict(bias=jnp.zeros(24, int))):
        with pytest.raises(AssertionError, match="bias"):
            check(fdk_jax.matmul, x, weight, **options)

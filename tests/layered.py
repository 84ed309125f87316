"""Layers for the tests of `pallas_kernels.layers`: on the emulator, with the float64 oracle of each part."""

import dataclasses

import chains
import decode_attention
import emulator
import jax.numpy as jnp
import numpy as np
import planar

from pallas_kernels import layers, ring_arithmetic, short_attention
from pallas_kernels.target import H200

EPS = 1e-3


def make(
    rng,
    config,
    *,
    hidden=512,
    inner=512,
    heads=4,
    kv_heads=2,
    dim=128,
    capacity=64,
    count=1,
    target=H200,
    **kind,
):
    """(plan, layers of 1 bit, their weights as `chains` has them, x) with x the keywords of `run`.

    Without a `config` it is that of the target.
    """
    options = dict(
        uniform=False,
        bias=False,
        group_size=64,
        scales="bfloat16",
        codebooks=(1, 1, 1, 1),
        normed=True,
    )
    options |= kind
    codebooks, normed, length = (
        options.pop("codebooks"),
        options.pop("normed"),
        options.pop("length", 9),
    )
    width = heads * dim
    shapes = [
        (width + 2 * kv_heads * dim, hidden),
        (hidden, width),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    made, weights = [], []
    for _ in range(count):
        found = chains.weights(rng, shapes, 1, codebooks, **options)
        arguments, norms = decode_attention.inputs(
            rng, 1, kv_heads, heads // kv_heads, dim, capacity, "bfloat16", normed, [length]
        )
        # Of both signs: sums whose terms all have one would leave a gate that is almost shut.
        signs = rng.choice([-1, 1], (2, hidden))
        factors = 2.0 ** rng.integers(-1, 2, hidden), rng.uniform(0.5, 2, hidden)
        scales = [jnp.asarray(f * s, chains.HALF) for f, s in zip(factors, signs, strict=True)]
        arrays = tuple(arrays for _, arrays, *_ in found)
        made.append(layers.Layer(arrays, tuple(scales), tuple(norms or ()), *arguments[4:]))
        weights.append(found)
    attention = short_attention.Case(
        heads, kv_heads, dim, capacity, chains.HALF, EPS if normed else None
    )
    products = tuple(case for case, *_ in weights[0])
    config = config or ring_arithmetic.config(products, target, layers.GATE_UP)
    plan = layers.Plan(products, attention, chains.EPS, count, config, target)
    assert layers.unsupported_reason(plan) is None, layers.unsupported_reason(plan)
    total = jnp.asarray(rng.normal(size=(1, hidden)), chains.HALF)
    scaled = total * jnp.asarray(rng.uniform(0.5, 2, (1, hidden)), chains.HALF)
    squares = np.zeros(plan.square_parts(layers.DOWN), np.float32)
    squares[:1] = np.square(np.asarray(total, np.float64)).sum()
    stream = layers.Stream(total, scaled, jnp.asarray(squares))
    x = dict(stream=stream, cos=arguments[1], sin=arguments[2])
    return plan, made, weights, x | dict(lengths=arguments[3])


def run(plan, made, x, chance=None):
    """What a launch leaves: ({name: row or sums, total included}, keys, values); all is poisoned before."""
    return found_in(plan, *launch(plan, made, x, chance))


def launch(plan, made, x, chance=None):
    """The arrays that a launch leaves: the stream, both parts of the exchange, each layer's keys and values."""
    total, scaled, squares, begun = x["stream"]
    if begun is None:
        begun = plan.exchange.begin({"scaled": scaled}, {"squares": squares})
    words, sums = map(np.array, begun)
    left = np.full(total.shape, np.nan, total.dtype)
    operands, caches = [total, words, sums, *(x[n] for n in ("cos", "sin", "lengths"))], []
    for layer in made:
        caches += [np.array(layer.keys), np.array(layer.values)]
        operands += [*list(layers.arrays(layer))[:-2], *caches[-2:]]
    emulator.run(
        layers.source(plan),
        [np.asarray(a) for a in (*operands, left, words, sums, *caches)],
        (1, 1),
        32 * plan.config.warps,
        cluster=plan.config.programs,
        chance=chance,
    )
    return left, words, sums, *caches


def found_in(plan, total, words, sums, *caches):
    """({name: row or sums, total included}, keys, values) of what a launch leaves."""
    exchange = plan.exchange
    found = {name: exchange.row(words, name, plan.layers) for name in exchange.rows}
    found |= {name: exchange.sums(sums, name, plan.layers) for name in exchange.squares}
    found = {name: np.asarray(a) for name, a in found.items()}
    return found | dict(total=np.asarray(total)), list(caches[::2]), list(caches[1::2])


def check(plan, made, weights, x, found):
    """Compares each part of a launch of one layer with float64, from what the part before it left."""
    left, keys, values = found
    (layer,), (weights,) = made, weights
    total, scaled = (np.asarray(a, np.float64) for a in x["stream"][:2])
    qkv, out, gate_up, down = weights
    inverse = chains.inverse_norm(total, plan.eps[0])
    chains.check_product(left["qkv"], scaled * inverse, qkv)
    arguments = (left["qkv"], x["cos"], x["sin"], x["lengths"], layer.keys, layer.values)
    norms = layer.head_norms or None
    decode_attention.check((left["mixed"], *keys, *values), arguments, norms, EPS)
    exact = {name: np.asarray(a, np.float64) for name, a in left.items()}
    first, second = (np.asarray(a, np.float64) for a in layer.norm_scales)
    # The sum after attention stays in the programs: it is what was scaled, by powers of two here.
    middle = exact["sum_scaled"] / first
    chains.check_product(middle.astype(left["total"].dtype), exact["mixed"], out, add=total)
    planar.check_scaled([middle, left["sum_scaled"], left["sum_squares"]], first)
    inverse = chains.inverse_norm(middle, plan.eps[1])
    chains.check_gated(left["inner"], exact["sum_scaled"] * inverse, gate_up)
    chains.check_product(left["total"], exact["inner"], down, add=middle)
    planar.check_scaled([left[n] for n in ("total", "scaled", "squares")], second)


def one_by_one(plan, made, x):
    """What launches of one layer each leave, one after another."""
    alone, keys, values = dataclasses.replace(plan, layers=1), [], []
    for layer in made:
        left, *cache = run(alone, [layer], x)
        keys, values = keys + cache[0], values + cache[1]
        x = x | dict(stream=layers.Stream(*(left[n] for n in ("total", "scaled", "squares"))))
    return left, keys, values

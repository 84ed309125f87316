"""Whole layers of a model for one token, many in one launch.

    y = qkv scaled / rms(total)                       mixed = attention(y), see `short_attention`
    sum = total + out mixed                           inner = silu(gate ..) * (up ..), see `chain`
    total = sum + down inner                          scaled = total * norm_scale of the next layer

What `chain` does between two attentions, this does from a layer to the next one: the producer warps go on to
copy weights during attention, and no launch ends or begins. One program computes the attention of a query head.

All layers are alike but for their arrays. The addresses of these are operands of the launch; a program puts
them into a table in shared memory, and its code is a loop over layers. What the parts of a layer leave to each
other goes through an `exchange`; the residual stream stays where its rows are computed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import chain, integer_plan, ring, short_attention, xla_call
from pallas_kernels.case import Arrays, Case
from pallas_kernels.exchange import Exchange, ExchangePlan
from pallas_kernels.layers_launch import (
    DOWN,
    GATE_UP,
    OUT,
    POINTER,
    QKV,
    LayersLaunch,
    Operands,
    Records,
)
from pallas_kernels.layers_parts import Ends, HeadPart, Part
from pallas_kernels.layout import TILE_ROWS
from pallas_kernels.ptx import Ptx
from pallas_kernels.ring_plan import LaunchPlan, ProductPlan
from pallas_kernels.target import Target

# An address is 8 bytes of a kernel's parameters, of which there are 4352.
_MAX_OPERANDS = 512
_MAX_HEAD_WARPS = 16
_RESIDUAL = (
    OUT,
    DOWN,
)  # the indices of the products whose outputs are added to the residual stream


class Layer(NamedTuple):
    """The arrays of a layer.

    Attributes:
        products: of queries, keys and values; output; gate and up in one; down. Their `x` is not read.
        norm_scales: [D], of the norm after attention and of the one after the layer.
        head_norms: [d], of the norms of queries and keys, or nothing.
        keys, values: [1, KV, S, d], the cache.
    """

    products: tuple[Arrays, ...]
    norm_scales: tuple[Array, Array]
    head_norms: tuple[Array, ...]
    keys: Array
    values: Array


class Stream(NamedTuple):
    """The residual stream between two launches.

    Attributes:
        total: bfloat16 [1, D].
        scaled: the same times the scale of the next norm.
        squares: partial sums of its squares, float32 [square_parts(DOWN)].
        exchange: both parts of what an even number of layers leaves, with which the next launch goes on; None
            before the first layer, and after an odd one.
    """

    total: Array
    scaled: Array
    squares: Array
    exchange: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a launch.

    Attributes:
        products: of a layer, without what is around them.
        attention: of a layer.
        eps: of the norms before attention and before gate and up.
        layers: how many.
        config: W and P. P programs have to fit on the device at once, or they never end.
        target: the GPU.
    """

    products: tuple[Case, ...]
    attention: short_attention.Case
    eps: tuple[float, float]
    layers: int
    config: ring.Config
    target: Target

    @property
    def cases(self) -> list[Case]:
        """The products with what is around them."""
        found = []
        for index, case in enumerate(self.products):
            around: dict[str, Any] = dict(residual=index in _RESIDUAL)
            if index in (QKV, GATE_UP):
                before = self.square_parts(DOWN if index == QKV else OUT)
                around |= dict(squares=before, norm_eps=self.eps[index // GATE_UP])
            found.append(dataclasses.replace(case, **around))
        return found

    def square_parts(self, index: int) -> int:
        """How many partial sums of squares a product with a residual leaves."""
        return self.config.programs * self._product(index, self.products[index]).square_parts

    def _product(self, index: int, case: Case) -> ProductPlan:
        return integer_plan.Plan(
            case=case,
            consumers=self.config.consumers,
            programs=self.config.programs,
            position=index,
            gated=index == GATE_UP,
        )

    @property
    def head_warps(self) -> int:
        """Warps of a program that compute attention: a power of two, so that all have as many slots."""
        return min(_MAX_HEAD_WARPS, 1 << self.config.consumers.bit_length() - 1)

    @property
    def record(self) -> list[str]:
        """Names of a layer's arrays that its programs read, in order."""
        names = []
        for index, case in enumerate(self.products):
            names += [f"packed{index}", f"scales{index}", f"codebook{index}"]
            names += [f"bias{index}"] * (case.bias_dtype is not None)
            names += [f"norm_scale{index}"] * (index in _RESIDUAL)
        names += ["q_norm", "k_norm"] * (self.attention.norm_eps is not None)
        return [*names, "keys", "values"]

    @property
    def launch(self) -> LaunchPlan:
        """The launch's shared memory."""
        head = short_attention.shared_bytes(self.attention, self.head_warps)
        products = tuple(self._product(index, case) for index, case in enumerate(self.cases))
        others = (
            ("table", POINTER * len(self.record) * self.layers),
            ("partial", head),
            ("stream", 4 * TILE_ROWS * products[OUT].max_tiles),
        )
        capacity = self.target.shared_bytes
        return LaunchPlan(products, capacity, others, self.layers, len(products))

    @property
    def operands(self) -> int:
        """Operands and results of the launch."""
        # The cache is a result, too.
        return len(_FIXED) + len(_LEFT) + self.layers * (len(self.record) + 2)

    @property
    def exchange(self) -> ExchangePlan:
        """What the parts give to each other."""
        products = self.products
        rows = dict(scaled=products[DOWN].n, qkv=products[QKV].n, mixed=products[OUT].k)
        rows |= dict(sum_scaled=products[OUT].n, inner=products[DOWN].k)
        squares = dict(squares=self.square_parts(DOWN), sum_squares=self.square_parts(OUT))
        return ExchangePlan(rows, squares)


_FIXED = ("stream", "rows", "squares", "cos", "sin", "lengths")  # operands besides the layers'
_LEFT = ("total", "rows", "squares")  # results besides the caches


def max_layers(plan: Plan) -> int:
    """How many layers like those of a plan a launch may have; zero if not even one."""
    each = (
        dataclasses.replace(plan, layers=1).operands - dataclasses.replace(plan, layers=0).operands
    )
    return (_MAX_OPERANDS - dataclasses.replace(plan, layers=0).operands) // each


def unsupported_reason(plan: Plan) -> str | None:
    """Why the kernel does not take layers, or None."""
    attention, target, config = plan.attention, plan.target, plan.config
    if (bits := plan.products[QKV].bits) != 1:
        return f"products of {bits} bits are as fast in chains"
    # As a chain from attention on, which ends with the next layer's queries, keys and values.
    qkv, *others = plan.products
    if (reason := chain.unsupported_reason([*others, qkv], config, target)) is not None:
        return reason
    groups = {case.group_size for case in plan.products}
    kept = any(product.keeps_scales for product in plan.launch.products)
    if min(groups) < integer_plan.MIN_GROUP or kept:
        return f"layers have no kernel for groups of {', '.join(map(str, sorted(groups)))}"
    if attention.dtype != jnp.bfloat16:
        return f"attention of {attention.dtype} is not of bfloat16"
    if (reason := attention.unsupported_reason(1, target)) is not None:
        return f"attention has no kernel of a program a head: {reason}"
    if attention.heads > config.programs:
        return f"{attention.heads} heads are more than {config.programs} programs"
    if 32 * config.consumers < attention.dim:
        return f"{config} has fewer threads than a head's {attention.dim} outputs"
    shapes = [(case.n, case.k) for case in plan.products]
    width, hidden = attention.heads * attention.dim, plan.products[DOWN].n
    inner = plan.products[DOWN].k
    wanted = [(width + 2 * attention.kv_heads * attention.dim, hidden), (hidden, width)]
    wanted += [(2 * inner, hidden), (hidden, inner)]
    if shapes != wanted:
        return f"products of {shapes} (N, K) do not follow one another; must be {wanted}"
    if plan.products[OUT].codebooks != plan.products[DOWN].codebooks:
        return "the two products back to the residual stream have other numbers of codebooks"
    if plan.operands > _MAX_OPERANDS:
        return f"{plan.operands} operands are more than the {_MAX_OPERANDS} of a launch"
    return target.lacks_shared_memory(config, plan.launch.shared_bytes)


def run(
    plan: Plan,
    layers: Sequence[Layer],
    stream: Stream,
    cos: Array,
    sin: Array,
    lengths: Array,
) -> tuple[Stream, tuple[Array, ...], tuple[Array, ...]]:
    """Runs a launch.

    Args:
        plan: what is static, for which `unsupported_reason` is None.
        layers: their arrays.
        stream: what the layers begin with.
        cos: float32 [1, d / 2], of the token's position.
        sin: Like cos.
        lengths: int32 [1], tokens in the cache.

    Returns:
        (stream, keys, values): the same stream after the layers, and each layer's cache, one token longer.
    """
    total, words, sums, *cache = launch(plan, layers, stream, cos, sin, lengths)
    scaled = plan.exchange.row(words, "scaled", plan.layers)
    squares = plan.exchange.sums(sums, "squares", plan.layers)
    # Of the two copies of every row the next launch writes the first one, which an odd layer has cleared.
    left = None if plan.layers % 2 else (words, sums)
    return Stream(total, scaled, squares, left), tuple(cache[::2]), tuple(cache[1::2])


def launch(
    plan: Plan,
    layers: Sequence[Layer],
    stream: Stream,
    cos: Array,
    sin: Array,
    lengths: Array,
) -> tuple[Array, ...]:
    """The launch of `run`, and what it leaves: the stream, both parts of the exchange, each layer's cache."""
    total, scaled, squares, left = stream
    exchange = plan.exchange
    if left is None:
        left = exchange.begin({"scaled": scaled}, {"squares": squares})
    fixed = (total, *left, cos, sin, lengths)
    each = [list(arrays(layer)) for layer in layers]
    caches = [a for layer in layers for a in (layer.keys, layer.values)]
    outputs = [total, *exchange.shapes, *caches]
    aliases = {_FIXED.index(name): _LEFT.index(name) for name in ("rows", "squares")}
    size = len(each[0])
    for i in range(len(layers)):
        for j in range(2):  # keys and values are the last of a layer
            aliases[len(fixed) + (i + 1) * size - 2 + j] = len(_LEFT) + 2 * i + j
    return xla_call.ptx_call(
        source(plan),
        (*fixed, *(array for row in each for array in row)),
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs),
        plan.target,
        grid=(plan.config.programs,),
        num_warps=plan.config.warps,
        name="fdk_layers",
        aliases=aliases,
    )


def source(plan: Plan) -> str:
    """The kernel's PTX."""
    return _writer(plan).write()


def arrays(layer: Layer) -> Iterator[Array]:
    """A layer's arrays, in the order of `Plan.record`."""
    for index, weight in enumerate(layer.products):
        yield from (weight.packed, weight.scales, weight.codebook)
        if weight.bias is not None:
            yield weight.bias
        if index in _RESIDUAL:
            yield layer.norm_scales[_RESIDUAL.index(index)]
    yield from (*layer.head_norms, layer.keys, layer.values)


# Of each product: its names in the exchange.
_NAMES = (
    dict(x="scaled", squares="squares", y="qkv"),
    dict(x="mixed", scaled="sum_scaled", squares_out="sum_squares"),
    dict(x="sum_scaled", squares="sum_squares", y="inner"),
    dict(x="inner", scaled="scaled", squares_out="squares"),
)


def _writer(plan: Plan) -> LayersLaunch:
    ptx, launch, names = Ptx(plan.target), plan.launch, plan.record
    given = [f"{name} {i}" for i in range(plan.layers) for name in names]
    caches = [f"{name} {i} out" for i in range(plan.layers) for name in ("keys", "values")]
    operands = ptx.operands(*_FIXED, *given, *(f"{name} out" for name in _LEFT), *caches)
    # The cache is read and written by the same address, and so is the exchange.
    addresses = [operands.get(f"{name} out", operands[name]) for name in given]
    records = Records(ptx, names, plan.layers, launch.offsets["table"])
    exchange = Exchange(ptx, plan.exchange, operands["rows out"], operands["squares out"])
    products = []
    for index in range(len(plan.products)):
        own = {n: f"{n}{index}" for n in ("packed", "scales", "codebook", "bias", "norm_scale")}
        own = {name: other for name, other in own.items() if other in names}
        part = Operands({"total": operands["total out"]}, records, own)
        product = Part(launch.products[index], plan.target, ptx, part)
        product.ends = Ends(exchange, _NAMES[index], index == QKV, index == DOWN)
        products.append(product)
    fixed = {name: operands[name] for name in ("cos", "sin", "lengths")}
    own = {name: name for name in ("q_norm", "k_norm", "keys", "values")}
    own |= dict(keys_out="keys", values_out="values")
    head = HeadPart(plan.attention, plan.target, ptx=ptx, operands=Operands(fixed, records, own))
    head.warps = plan.head_warps
    stream = operands["stream"]
    return LayersLaunch(launch, products, head, exchange, records, addresses, stream)

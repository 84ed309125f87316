"""Products in the program of `ring`, alone and several in one launch: without a GPU."""

import dataclasses

import chains
import emulator
import jax
import jax.numpy as jnp
import numpy as np
import planar
import pytest

import pallas_kernels
from pallas_kernels import chain, mailbox, ring, ring_arithmetic, stream
from pallas_kernels.case import Case
from pallas_kernels.target import H200

# Hidden and inner size 512.
SHAPES = [(512, 512), (1024, 512), (512, 512), (96, 512)]


@pytest.mark.parametrize(
    ("bits", "uniform"), [(2, False), (4, False), (4, True), (8, False), (8, True)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "k", "codebooks", "config"),
    [
        (33, 512, 1, ring.Config(4, 2)),
        (96, 1000, 3, ring.Config(8, 7)),
        (16, 2040, 1, ring.Config(4, 132)),
        (64, 512, 1, ring.Config(12, 1)),
        (400, 4096, 1, ring.Config(16, 1)),  # more than the ring holds
        (70, 1000, 1, ring.Config(8, 3, lane_copies=True)),
    ],
)
def test_a_streamed_product(rng, bits, uniform, n, k, codebooks, config, dtype):
    (x, *arrays), _, wanted = planar.product(
        rng, 1, n, k, bits, 64, dtype, codebooks, uniform=uniform
    )
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(1, n, k, bits, 64, codebooks, half, half, single, single, uniform)
    assert stream.unsupported_product(case, config.consumers, config.programs) is None
    bias, y = rng.normal(size=n).astype(np.float32), np.full((1, n), np.nan, np.float32)
    emulator.run(
        ring.source(case, config, H200, stream.Product),
        [np.asarray(a) for a in (case.pad(x), *arrays, bias, y)],
        ring.grid(case, config),
        32 * config.warps,
    )
    wanted.check(y, bias)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("bits", "uniform"), [(2, False), (4, False), (4, True), (8, True)])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, 256])
def test_groups_and_scales_of_a_streamed_product(rng, group_size, bits, uniform, scale_dtype):
    """Of three tiles for two programs, which do not begin at the same block."""
    n, k, config = 48, 2048, ring.Config(16, 2)
    (x, *arrays), _, wanted = planar.product(
        rng, 1, n, k, bits, group_size, "bfloat16", uniform=uniform, scale_dtype=scale_dtype
    )
    half, single = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    kinds = half, jnp.dtype(scale_dtype), None, single
    case = Case(1, n, k, bits, group_size, 1, *kinds, uniform)
    assert stream.unsupported_product(case, config.consumers, config.programs) is None
    y = np.full((1, n), np.nan, np.float32)
    emulator.run(
        ring.source(case, config, H200, stream.Product),
        [np.asarray(a) for a in (x, *arrays, y)],
        ring.grid(case, config),
        32 * config.warps,
    )
    wanted.check(y)


@pytest.mark.parametrize(
    ("bits", "uniform", "codebooks", "config", "count", "bias"),
    [
        (1, False, (1, 2, 1, 3), ring.Config(2, 3), 4, False),
        (1, False, (1, 1, 1, 1), ring.Config(3, 5), 3, True),
        (4, False, (1, 2, 1, 3), ring.Config(2, 7), 4, False),
        (4, True, (1, 1, 1, 1), ring.Config(4, 2), 4, True),
        (2, False, (1, 4, 1, 1), ring.Config(3, 4), 3, False),
        (2, True, (1, 2, 1, 3), ring.Config(5, 4), 4, True),
        (8, True, (1, 2, 1, 3), ring.Config(4, 3), 4, False),
        (8, False, (1, 1, 1, 1), ring.Config(4, 5), 4, True),
    ],
)
def test_values_of_a_chain(rng, bits, uniform, codebooks, config, count, bias):
    _check_chain(rng, SHAPES[:count], bits, uniform, codebooks, config, bias=bias)


@pytest.mark.parametrize(
    ("bits", "codebooks", "config", "shapes"),
    [
        # More warps than units of a tile, and programs that differ in tiles.
        (1, (1, 1, 1, 1), ring.Config(5, 2), [(512, 512), (1024, 512), (512, 512), (208, 512)]),
        (4, (1, 2, 1, 3), ring.Config(4, 3), SHAPES),
        # Sums that take the memory of other numbers of tiles.
        (8, (1, 2, 1, 2), ring.Config(12, 2), [(512, 512), (2048, 512), (512, 1024), (64, 512)]),
    ],
)
def test_a_chain_with_warps_in_any_order(rng, bits, codebooks, config, shapes):
    """Nothing but what the programs wait for is in order: the emulator's warps run as chance has it."""
    _check_chain(rng, shapes, bits, False, codebooks, config, bias=False, chance=rng)


class _LateProducers(np.random.Generator):
    """Chance that lets a producer warp, the last of its program, run only where no consumer can."""

    warps: int

    def choice(self, ready):  # pyright: ignore[reportIncompatibleMethodOverride]
        consumers = ready[ready % self.warps != self.warps - 1]
        return super().choice(consumers if consumers.size else ready)


def test_a_chain_whose_producers_are_late(rng):
    """A producer that waits for a product's outputs finds them, also when the product after it is through.

    Of that one a program has no more slots than are copied before the wait: its consumers wait for no more.
    """
    config, late = ring.Config(4, 5), _LateProducers(np.random.PCG64(1))
    late.warps = config.warps
    _check_chain(rng, SHAPES, 1, False, (1, 2, 1, 3), config, bias=False, chance=late)


@pytest.mark.parametrize(
    ("bits", "uniform", "group_size", "scales"),
    [
        *((1, False, 128, "float16"), (2, False, 128, "float16"), (2, True, 32, "bfloat16")),
        *((4, False, 32, "float32"), (4, True, 32, "float16"), (4, True, 128, "float32")),
        *((8, False, 16, "bfloat16"), (1, False, 16, "float16")),
        # One scale a row, or two: kept in shared memory.
        *((1, False, 512, "bfloat16"), (2, False, 512, "float32"), (2, True, 256, "float16")),
        *((4, False, 512, "bfloat16"), (4, True, 512, "bfloat16"), (8, False, 512, "float16")),
    ],
)
def test_a_chain_of_other_groups_and_scales(rng, bits, uniform, group_size, scales):
    config, codebooks = ring.Config(4, 3), (1, 2, 1, 1)
    kind = dict(group_size=group_size, scales=scales)
    _check_chain(rng, SHAPES, bits, uniform, codebooks, config, bias=False, chance=rng, **kind)


@pytest.mark.parametrize(("bits", "uniform"), [(1, False), (2, True), (4, False)])
def test_a_chain_of_rows_of_several_lengths(rng, bits, uniform):
    """Whose groups are the rows."""
    shapes = [(512, 512), (2048, 512), (512, 1024), (96, 512)]
    weights = chains.weights(rng, shapes, bits, (1, 2, 1, 1), uniform, False, 4096)
    weights = [(dataclasses.replace(c, group_size=c.k), *others) for c, *others in weights]
    _check_weights(rng, weights, ring.Config(4, 3), rng)


@pytest.mark.parametrize("group_size", [16, 512, 1024, 4096, 16384])
def test_warps_by_which_all_products_of_a_chain_have_slots_alike(group_size):
    """In groups of 1024 the scales of one product may be in slots, and those of another be kept."""
    cases = [dataclasses.replace(c, group_size=group_size) for c in _products(1, 4096, 14336, 6144)]
    config = ring_arithmetic.config(cases, H200, chain.GATED)
    assert chain.unsupported_reason(cases, config, H200) is None


def _check_chain(rng, shapes, bits, uniform, codebooks, config, *, bias, chance=None, **kind):
    """Runs the kernel on the emulator, its results poisoned before, and compares with float64."""
    weights = chains.weights(rng, shapes, bits, codebooks, uniform, bias, **kind)
    _check_weights(rng, weights, config, chance)


def _check_weights(rng, weights, config, chance):
    products = [case for case, *_ in weights]
    assert chain.unsupported_reason(products, config, H200) is None
    cases = chain.cases(products, chains.EPS, config, H200)
    x, residual, scales = chains.inputs(rng, 512, 512)
    counters = np.zeros(len(weights), np.int32)
    operands = [x, residual, counters]
    for index, (_, arrays, *_) in enumerate(weights):
        operands += [a for a in arrays[1:] if a is not None]
        operands += [scales[index // 2]] * (index in (0, 2))
    shapes = chain.outputs(cases, config, H200)
    found = {name: np.full(a.shape, np.nan, a.dtype) for name, a in shapes.items()}
    emulator.run(
        chain.source(cases, config, H200),
        [np.asarray(a) for a in (*operands, *found.values())],
        (1, 1),
        32 * config.warps,
        cluster=config.programs,
        chance=chance,
    )
    assert not counters.any(), "the next launch finds counters in use"
    left = [found.get(name) for name in ("sum2", "scaled2", "squares_out2", "y3")]
    chains.check(left, weights, x, residual, scales, found)


@pytest.mark.parametrize(
    ("bits", "uniform", "codebooks", "config", "devices"),
    [
        (1, False, (1, 2, 1, 3), ring.Config(2, 3), 2),
        (4, False, (1, 2, 1, 3), ring.Config(2, 4), 2),
        (4, True, (1, 1, 1, 1), ring.Config(2, 1), 3),
        (2, False, (1, 2, 1, 1), ring.Config(3, 2), 2),
        (8, False, (1, 2, 1, 3), ring.Config(4, 3), 2),
    ],
)
def test_a_chain_over_devices(rng, monkeypatch, bits, uniform, codebooks, config, devices):
    """Each has columns of its own of out and down; later launches find what the earlier ones have left."""
    monkeypatch.setattr(chain, "OVER_DEVICES", (1, 2, 4, 8))
    boxes = [np.zeros(mailbox.words(devices, 512), np.uint32) for _ in range(devices)]
    for launch in range(2):
        own = [chains.weights(rng, SHAPES, bits, codebooks, uniform, False) for _ in range(devices)]
        products = [case for case, *_ in own[0]]
        assert chain.unsupported_reason(products, config, H200, devices) is None
        cases = chain.cases(products, chains.EPS, config, H200, devices)
        _, residual, scales = chains.inputs(rng, 512, 512)
        xs = [chains.inputs(rng, 512, 512)[0] for _ in range(devices)]
        shapes = chain.outputs(cases, config, H200)
        found = [
            {name: np.full(a.shape, np.nan, a.dtype) for name, a in shapes.items()} for _ in own
        ]
        operands = []
        for weights, x, box, left in zip(own, xs, boxes, found, strict=True):
            counters, addresses = np.zeros(4, np.int32), np.zeros(2 + 2 * devices, np.uint32)
            named = [x, residual, counters, box, addresses]
            for index, (_, arrays, *_) in enumerate(weights):
                named += [a for a in arrays[1:] if a is not None]
                named += [scales[index // 2]] * (index in (0, 2))
            operands.append(
                [np.array(a) if a is not box and a is not addresses else a for a in named]
                + list(left.values())
            )
        addresses = [each[3] for each in emulator.addresses(operands)]
        for rank, each in enumerate(operands):
            each[4][:2] = rank, 0
            each[4][2:] = np.asarray(addresses, np.uint64).view(np.uint32)
        emulator.run_devices(
            chain.source(cases, config, H200),
            operands,
            1,
            32 * config.warps,
            cluster=config.programs,
            chance=rng if launch else None,
        )
        for left in found[1:]:
            for name in ("sum0", "scaled0", "squares_out0", "sum2", "scaled2", "squares_out2"):
                assert left[name].tobytes() == found[0][name].tobytes(), "the devices differ"
        chains.check_devices(found, own, xs, residual, scales)


def _products(bits, hidden, inner, qkv, codebooks=(1, 2, 1, 3)):
    half = jnp.dtype(jnp.bfloat16)
    shapes = [(hidden, hidden), (2 * inner, hidden), (hidden, inner), (qkv, hidden)]
    return [
        Case(1, n, k, bits, 64, b, half, half, None, half)
        for (n, k), b in zip(shapes, codebooks, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cases: [*cases[:2], dataclasses.replace(cases[2], bits=4)], "several kinds"),
        (lambda cases: [dataclasses.replace(cases[0], n=1000), *cases[1:]], "whole tiles"),
        (
            lambda cases: [dataclasses.replace(cases[0], group_size=128), *cases[1:]],
            "several sizes",
        ),
        (
            lambda cases: [dataclasses.replace(c, group_size=128, k=1280) for c in cases],
            "split fours",
        ),
        (lambda cases: [dataclasses.replace(c, group_size=192) for c in cases], "whole blocks"),
        (lambda cases: [dataclasses.replace(c, group_size=4) for c in cases], "less than 8"),
        (
            lambda cases: [cases[0], dataclasses.replace(cases[1], codebooks=3), *cases[2:]],
            "codebooks",
        ),
        (lambda cases: _products(8, 1024, 128 * 1024, 1536), "shared memory"),
    ],
)
def test_what_no_chain_takes(change, reason):
    cases = _products(2, 1024, 2048, 1536)
    config = ring.Config(16, 132)
    assert chain.unsupported_reason(cases, config, H200) is None
    assert reason in chain.unsupported_reason(change(cases), config, H200)


def test_chains_copy_in_bulk_alone():
    products, config = _products(2, 1024, 2048, 1536), ring.Config(16, 132, lane_copies=True)
    assert "copy in bulk" in (chain.unsupported_reason(products, config, H200) or "")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="this machine has a GPU")
def test_there_is_no_chain_without_a_gpu_at_hand(rng):
    """Programs that the device does not run at once would wait for each other for ever."""
    weights = chains.weights(rng, SHAPES[:3], 1, (1, 2, 1), False, False)
    spec = dict(bits=1, group_size=64, uniform=False)
    found = [(arrays, spec | {"out_features": case.n}) for case, arrays, *_ in weights]
    assert pallas_kernels.chain_plan(found) is None
    x, residual, scales = chains.inputs(rng, 512, 512)
    with pytest.raises(NotImplementedError, match="run them apart"):
        pallas_kernels.chain_matmul(x, residual, found, scales, chains.EPS)


@pytest.mark.parametrize("bits", [2, 8])
def test_chains_over_gpus_that_were_not_tried_are_refused(bits):
    products, config = _products(bits, 1024, 2048, 1536), ring.Config(16, 132)
    assert chain.unsupported_reason(products, config, H200) is None
    reason = chain.unsupported_reason(products, config, H200, 2)
    assert f"{bits} bits over several GPUs have not been tried" in (reason or "")
    assert chain.unsupported_reason(_products(4, 1024, 2048, 1536), config, H200, 2) is None


def test_bad_chains_are_refused(rng):
    weights = chains.weights(rng, SHAPES, 1, (1, 2, 1, 1), False, False)
    spec = dict(bits=1, group_size=64, uniform=False)
    found = [(arrays, spec | {"out_features": case.n}) for case, arrays, *_ in weights]
    x, residual, scales = chains.inputs(rng, 512, 512)
    for change, message in (
        (dict(weights=found[:2]), "2 weights"),
        (dict(norm_scales=scales[:1]), "1 norms"),
        (dict(weights=[found[0], found[0], *found[2:]]), "do not follow"),
        (dict(x=x[:, :500]), r"x is bfloat16\(1, 500\)"),
        (dict(residual=residual.astype(jnp.float32)), "residual is float32"),
        (dict(norm_scales=[scales[0], scales[1][:5]]), r"norm_scales\[1\]"),
        (dict(weights=[(found[0][0], found[0][1] | {"bits": 2}), *found[1:]]), "packed is"),
    ):
        arguments = dict(x=x, residual=residual, weights=found, norm_scales=scales, eps=chains.EPS)
        with pytest.raises(ValueError, match=message):
            pallas_kernels.chain_matmul(**(arguments | change))


@pytest.mark.parametrize(
    ("bits", "uniform", "group_size", "hidden", "inner", "qkv", "consumers"),
    [
        (1, False, 128, 2048, 6144, 4096, 15),  # any number from 12 on fills as few slots
        (1, False, 128, 2560, 9728, 6144, 19),
        (1, False, 128, 4096, 12288, 6144, 24),  # 8 slots, by 22 warps it would be 12
        (2, True, 64, 4096, 12288, 6144, 24),
        (2, False, 64, 4096, 12288, 6144, 16),
        (4, True, 64, 4096, 14336, 6144, 24),
    ],
)
def test_warps_that_fill_the_fewest_slots(bits, uniform, group_size, hidden, inner, qkv, consumers):
    shapes = [(hidden, hidden), (2 * inner, hidden), (hidden, inner), (qkv, hidden)]
    products = [
        planar.case(1, n, k, bits, group_size=group_size, uniform=uniform) for n, k in shapes
    ]
    config = ring_arithmetic.config(products, H200, chain.GATED)
    assert (config.consumers, config.programs) == (consumers, H200.multiprocessors)
    assert chain.unsupported_reason(products, config, H200) is None

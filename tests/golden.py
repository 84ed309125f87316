"""The PTX of every tuned row and every kernel of a model, and its hashes, recorded in `golden_ptx.json`.

A change of how kernels are written that means to leave the code alone is proven by equal hashes, without a GPU.
After a change that means to change code, and that has been measured on a GPU:

    python tests/golden.py

records the hashes anew; the difference of the file says which kernels changed.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # from the project's root
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jax.numpy as jnp

from pallas_kernels import (
    chain,
    choice,
    dequantise,
    integer,
    integer_tokens,
    layers,
    peer_sum,
    ring,
    ring_arithmetic,
    short_attention,
    split_attention,
    stream,
)
from pallas_kernels.case import Case
from pallas_kernels.target import H200, Target

RECORDED = Path(__file__).with_name("golden_ptx.json")
# Widths of codes, and whether the values are evenly spaced: every decoder.
DECODERS = ((1, False), (2, False), (4, False), (8, False), (4, True), (8, True))
_HALVES = ("bfloat16", "float16")
_MULTIPROCESSORS = 132


def case(m, n, k, bits, uniform=False, *, dtype="bfloat16", group_size=64, **others) -> Case:
    """A product with everything in one dtype."""
    half = jnp.dtype(dtype)
    plain = Case(m, n, k, bits, group_size, 1, half, half, None, half, uniform)
    return dataclasses.replace(plain, **others)


def sources() -> Iterator[tuple[str, str]]:
    """Names and PTX of the kernels."""
    for row in choice.table():
        if row["kernel"] not in choice.KERNELS:
            continue
        target = Target.parse(choice.architecture_of(row), H200)
        module, uniform = choice.KERNELS[row["kernel"]], choice.is_uniform(row)
        shape = row["m"], row["n"], row["k"], row["bits"]
        for dtype in _HALVES:
            product = case(*shape, uniform, dtype=dtype)
            config = choice.fit(product, choice.configuration(row, target), target)
            name = f"{row['device']}: {dtype} {shape} {uniform=} {row['kernel']}"
            yield name, module.source(product, config, target)
            if row["m"] == 1 and dtype == "bfloat16" and config.cluster == 1:
                around = dataclasses.replace(product, squares=96, norm_eps=1e-5, residual=True)
                if choice.unsupported_reason(around, config, target) is None:
                    yield f"{name} with a residual", module.source(around, config, target)
    yield from _other_groups()
    yield from _lane_copies()
    yield from _chains()
    yield from _over_devices()
    yield from _layers()
    for bits, uniform in DECODERS:
        for dtype in _HALVES:
            product = case(512, 4096, 4096, bits, uniform, dtype=dtype)
            yield f"dequantise {bits} {uniform=} {dtype}", dequantise.source(product, H200)
            if bits > 1:
                product = case(1, 4096, 4096, bits, uniform, dtype=dtype)
                config = ring.Config(16, _MULTIPROCESSORS)
                yield (
                    f"stream {bits} {uniform=} {dtype}",
                    ring.source(product, config, H200, stream.Product),
                )
    for heads, kv_heads, dim in ((32, 8, 128), (24, 8, 128), (8, 4, 256), (32, 8, 64)):
        for dtype in _HALVES:
            for eps in (None, 1e-6):
                attention = short_attention.Case(heads, kv_heads, dim, 512, jnp.dtype(dtype), eps)
                yield (
                    f"attention {heads} {kv_heads} {dim} {dtype} {eps}",
                    short_attention.source(attention, H200),
                )
    for heads, kv_heads, dim, capacity, window in (
        *((32, 8, 128, 8192, None), (24, 8, 128, 32768, None), (32, 2, 64, 2048, None)),
        (32, 8, 128, 8192, 1000),
    ):
        for dtype in _HALVES:
            for eps, splits in ((None, 1), (1e-6, 8)):
                arguments = heads, kv_heads, dim, capacity, jnp.dtype(dtype), eps, window
                yield (
                    f"split attention {heads} {kv_heads} {dim} {capacity} {window} {dtype} {eps} {splits}",
                    split_attention.source(split_attention.Case(*arguments), splits, H200),
                )


def _other_groups() -> Iterator[tuple[str, str]]:
    """Scales of other groups than of 64, other dtypes, several codebooks, ragged shapes, a bias."""
    single = jnp.dtype(jnp.float32)
    options = (
        dict(group_size=32),
        dict(group_size=128),
        dict(group_size=16),
        dict(group_size=1024),
        dict(codebooks=3, bias_dtype=single, scale_dtype=single, out_dtype=single),
    )
    for (bits, uniform), m, option in (
        (decoder, m, option) for decoder in DECODERS for m in (1, 11, 40) for option in options
    ):
        product = case(m, 4080, 4100, bits, uniform, **option)
        plan = choice.choose(product, H200)
        if plan.kernel in choice.KERNELS:
            source = choice.KERNELS[plan.kernel].source(product, plan.config, H200)
            yield f"{bits} {uniform=} {m} {option} {plan.kernel}", source


def _lane_copies() -> Iterator[tuple[str, str]]:
    """Products whose producer warp copies 16 bytes a lane, though the GPU has bulk copies."""
    for bits, uniform, option in (
        *((1, False, {}), (1, False, dict(residual=True)), (1, False, dict(group_size=16))),
        *((1, False, dict(group_size=4096)), (2, True, {}), (4, True, {})),
    ):
        product = case(1, 8192, 8192, bits, uniform, **option)
        config = integer.Config(16, _MULTIPROCESSORS, lane_copies=True)
        assert integer.unsupported_reason(product, config, H200) is None
        yield f"lane copies {bits} {uniform=} {option}", integer.source(product, config, H200)
    config = integer_tokens.Config(16, _MULTIPROCESSORS, lane_copies=True)
    product = case(3, 8192, 8192, 1)
    yield "lane copies of three tokens", integer_tokens.source(product, config, H200)
    config, product = ring.Config(16, _MULTIPROCESSORS, lane_copies=True), case(1, 8192, 8192, 4)
    yield "lane copies of a stream", ring.source(product, config, H200, stream.Product)


# Groups and scales of checkpoints that people have: Q1_0, Q2_0, Q4_0, Q8_0, TQ2_0, GPTQ, MXFP4, NVFP4.
CHAIN_GROUPS = (
    *((1, 128, "float16"), (1, 32, "bfloat16"), (1, 256, "float32"), (2, 64, "float16")),
    *((2, 128, "float16"), (2, 256, "float16"), (4, 32, "float16"), (4, 128, "float16")),
    *((4, 32, "bfloat16"), (4, 16, "float32"), (8, 32, "float16")),
)


def _chains() -> Iterator[tuple[str, str]]:
    for bits, group_size, scales in CHAIN_GROUPS:
        shapes = [(4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096)]
        kind = dict(group_size=group_size, scale_dtype=jnp.dtype(scales))
        config = ring.Config(
            ring_arithmetic.CONSUMERS.get(bits, ring_arithmetic.MAX_CONSUMERS), _MULTIPROCESSORS
        )
        products = [case(1, n, k, bits, **kind) for n, k in shapes]
        assert chain.unsupported_reason(products, config, H200) is None
        products = chain.cases(products, (1e-5, 1e-5), config, H200)
        yield f"chain {bits} {group_size} {scales}", chain.source(products, config, H200)
    for bits, uniform in (*DECODERS, (2, True)):
        config = ring.Config(
            ring_arithmetic.CONSUMERS.get(bits, ring_arithmetic.MAX_CONSUMERS), _MULTIPROCESSORS
        )
        for hidden, inner, qkv in ((3072, 8192, 5120), (4096, 14336, 6144), (6144, 21504, 8192)):
            shapes = [(hidden, hidden), (2 * inner, hidden), (hidden, inner), (qkv, hidden)]
            for count in (3, 4):
                products = [case(1, n, k, bits, uniform) for n, k in shapes[:count]]
                if chain.unsupported_reason(products, config, H200) is None:
                    products = chain.cases(products, (1e-5, 1e-5), config, H200)
                    name = f"chain {bits} {uniform=} {hidden} {inner} {count}"
                    yield name, chain.source(products, config, H200)


def _over_devices() -> Iterator[tuple[str, str]]:
    """What sums over devices: apart, and in chains."""
    half, single = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    for devices, rows, features, dtype, normed in (
        *((2, 1, 4096, half, True), (2, 64, 4096, half, True), (4, 1, 8192, half, True)),
        *((8, 3, 16384, half, True), (2, 1, 4096, half, False), (3, 2, 6144, single, True)),
    ):
        arguments = devices, rows, features, dtype, dtype, normed, 1e-5 * normed
        name = f"peer sum {devices} {rows} {features} {dtype} {normed=}"
        yield name, peer_sum.source(peer_sum.PeerSum(*arguments), H200)
    for bits, devices in ((1, 2), (2, 2), (4, 2), (8, 2), (4, 4)):
        config = ring.Config(
            ring_arithmetic.CONSUMERS.get(bits, ring_arithmetic.MAX_CONSUMERS), _MULTIPROCESSORS
        )
        width, inner = 4096 // devices, 14336 // devices
        shapes = [(4096, width), (2 * inner, 4096), (4096, inner), (6144 // devices, 4096)]
        products = [case(1, n, k, bits) for n, k in shapes]
        products = chain.cases(products, (1e-5, 1e-5), config, H200, devices)
        yield f"chain {bits} over {devices} devices", chain.source(products, config, H200)


def plan_of_layers(hidden, inner, qkv, norms, target) -> layers.Plan:
    """As many layers as a launch has, with heads of 128 and 8 key-value heads."""
    heads, half = qkv // 128 - 16, jnp.dtype(jnp.bfloat16)
    shapes = [(qkv, hidden), (hidden, 128 * heads), (2 * inner, hidden), (hidden, inner)]
    attention = short_attention.Case(heads, 8, 128, 128, half, 1e-6 if norms else None)
    products = tuple(case(1, n, k, 1) for n, k in shapes)
    config = ring_arithmetic.config(products, target, layers.GATE_UP)
    plan = layers.Plan(products, attention, (1e-6, 1e-6), 1, config, target)
    return dataclasses.replace(plan, layers=layers.max_layers(plan))


def _layers() -> Iterator[tuple[str, str]]:
    for hidden, inner, qkv, norms in ((3072, 8192, 5120, False), (4096, 12288, 6144, True)):
        plan = plan_of_layers(hidden, inner, qkv, norms, H200)
        assert layers.unsupported_reason(plan) is None
        yield f"layers {hidden}", layers.source(plan)


def canonical(source: str) -> str:
    """A block of PTX without what means nothing: comments, blank lines, names of labels and named registers.

    A register that is declared with others (`.reg .b32 b32_<9>`) keeps its number from its second use on: so
    the hashes that are recorded know the order in which registers are made, too.
    """
    lines = [re.sub(r"\s*//.*", "", line).strip() for line in source.splitlines()]
    lines = [line for line in lines if line]
    kinds: dict[str, str] = {}
    names: set[str] = set()
    for line in lines:
        if found := re.fullmatch(r"\.reg (\S+) (\w+)<\d+>;", line):
            kinds[found[2]] = found[1]
        elif found := re.fullmatch(r"\.reg (\S+) ([\w, ]+);", line):
            names |= set(found[2].split(", "))
            kinds |= {name: found[1] for name in found[2].split(", ")}
        elif found := re.fullmatch(r"(\w+):", line):
            names.add(found[1])
            kinds[found[1]] = "label"
    counts: dict[str, int] = {}
    known: dict[str, str] = {}  # what words are from their second use on

    def rename(found: re.Match) -> str:
        word = found[0]
        if word in known:
            return known[word]
        kind = kinds.get(word) or kinds.get(re.sub(r"\d+$", "", word))
        if kind is None:
            known[word] = word
            return word
        counts[kind] = counts.get(kind, 0) + 1
        known[word] = f"{kind}{counts[kind]}" if word in names else word
        return f"{kind}{counts[kind]}"

    body = [line for line in lines if not line.startswith(".reg")]
    return "\n".join(re.sub(r"\b[a-zA-Z_]\w*\b", rename, line) for line in body)


def digest(source: str) -> str:
    """The hash of a block of PTX, equal for blocks that mean the same word by word; slow."""
    return _hash(canonical(source))


def is_recorded(source: str, recorded: str) -> bool:
    """Whether a block of PTX is one of which `record` has been kept."""
    text, meaning = recorded.split()
    return _hash(source) == text or digest(source) == meaning


def record(source: str) -> str:
    """The hashes of a block of PTX: of its text, which is quick to compare, and its `digest`."""
    return f"{_hash(source)} {digest(source)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    found = {name: record(source) for name, source in sources()}
    RECORDED.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")

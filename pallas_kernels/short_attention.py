"""One token's attention for few sequences and short caches: a program a query head.

At this size there is nothing but latency. So a program asks for all that it needs in its first instructions,
the first keys and values before it knows how many there are; each lane has a few neighbours of a head from the
first load to the last sum, so that the warps meet once, at the end. The query heads of a key-value head read
the same keys, which is cheap as long as all programs run at once.

Glossary: see `attention`. W warps take turns at the slots of a block of the cache; a lane has E = D / 32
neighbours of a head, and the lane 16 away has RoPE's other halves of the pairs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import decoding, xla_call
from pallas_kernels.ptx import (
    LOG2_E,
    Ptx,
    Writer,
    at,
    float_constant,
    over_lanes,
    store_float,
    vector,
    wide,
)
from pallas_kernels.target import Target

_WARPS = 8
_BLOCK = 64  # slots that a program reads at a time
_SLOTS = _BLOCK // _WARPS
NEVER = -1e30  # a score whose power is zero


@dataclasses.dataclass(frozen=True)
class Case:
    """What is static about a launch.

    Attributes:
        heads, kv_heads: H and KV.
        dim: D.
        capacity: S.
        dtype: bfloat16 or float16.
        norm_eps: of the norms of queries and keys, None without norms.
    """

    heads: int
    kv_heads: int
    dim: int
    capacity: int
    dtype: jnp.dtype
    norm_eps: float | None

    def supported(self, batch: int, target: Target) -> bool:
        """Whether the kernel takes the case, and is made for so many sequences: programs run at once."""
        return (
            not target.unknown
            and self.dim in (64, 128, 256)
            and self.capacity % _BLOCK == 0
            and self.dtype in (jnp.bfloat16, jnp.float16)
            and batch * self.heads <= target.multiprocessors
        )


def decode(
    case: Case,
    qkv: Array,
    cos: Array,
    sin: Array,
    lengths: Array,
    keys: Array,
    values: Array,
    norms: tuple[Array, ...],
    target: Target,
) -> tuple[Array, Array, Array]:
    """See `attention.decode`."""
    batch = qkv.shape[0]
    mixed, keys, values = xla_call.ptx_call(
        source(case, target),
        (qkv, cos, sin, lengths, keys, values, *norms),
        (
            jax.ShapeDtypeStruct((batch, case.heads * case.dim), case.dtype),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        target,
        grid=(case.heads, batch),
        num_warps=_WARPS,
        name="decode_attention",
        aliases={4: 1, 5: 2},
    )
    return mixed, keys, values


def source(case: Case, target: Target) -> str:
    """The kernel's PTX."""
    return _Kernel(case, target).write()


class _Kernel(Writer):
    def __init__(self, case: Case, target: Target) -> None:
        self.case, self.ptx = case, Ptx(target)
        self.each = case.dim // 32
        self.row_bytes = 2 * case.dim
        names = ["qkv", "cos", "sin", "lengths", "keys", "values"]
        names += ["q_norm", "k_norm"] * (case.norm_eps is not None)
        names += ["mixed", "keys_out", "values_out"]
        self.operands = {name: f"${i}" for i, name in enumerate(names, 1)}

    def write(self) -> str:
        ptx, case = self.ptx, self.case
        ptx.share(_WARPS * 4 * (case.dim + 2))
        ptx.comment("locate: the head, and the first keys and values")
        self._locate_lane()
        self.head, self.sequence = (ptx.op("mov.u32", f"%ctaid.{axis}") for axis in "xy")
        self.kv_head = ptx.quotient(self.head, case.heads // case.kv_heads)
        addresses = [self._cache(name, self.warp) for name in ("keys", "values")]
        block = [self._load_slots(address) for address in addresses]
        ptx.comment("token: norms, RoPE, its key and value into the cache")
        query = self._new_token()
        ptx.comment("mix: softmax over the cache, a block of it at a time")
        self._mix(addresses, block, query)
        ptx.comment("join: the warps' sums through shared memory, and the output")
        self._join()
        return ptx.text()

    # Addresses and loads

    def _cache(self, name: str, slot: str) -> str:
        """The address of this lane's part of a slot of the cache."""
        ptx, case = self.ptx, self.case
        line = ptx.op("mad.lo.u32", self.sequence, case.kv_heads, self.kv_head)
        size = case.capacity * self.row_bytes
        address = ptx.op("mad.wide.u32", line, size, self.operands[name], kind="b64")
        address = ptx.op("mad.wide.u32", slot, self.row_bytes, address, kind="b64")
        return ptx.op("mad.wide.u32", self.lane, 2 * self.each, address, kind="b64")

    def _load(self, address: str, offset: int = 0, when: str | None = None) -> list[str]:
        """Words of a lane's neighbours. The cache is written in this launch, so not as read-only data."""
        words = self.ptx.registers("b32", self.each // 2)
        width, target = wide(words)
        self.ptx.do(f"ld.global{width}.b32", target, at(address, offset), when=when)
        return words

    def _load_slots(self, address: str, in_bounds: list[str] | None = None) -> list[list[str]]:
        """The warp's slots of a block, or those of them that are there."""
        return [
            self._load(address, i * _WARPS * self.row_bytes, in_bounds[i] if in_bounds else None)
            for i in range(_SLOTS)
        ]

    def _unpack(self, words: list[str]) -> list[str]:
        return [f for word in words for f in decoding.unpack(self.ptx, word, self.case.dtype)]

    def _pack(self, low: str, high: str) -> str:
        return decoding.pack(self.ptx, low, high, self.case.dtype)

    # The new token

    def _new_token(self) -> list[str]:
        """Keeps the new key and value, begins this warp's sums, and returns the query."""
        ptx, case = self.ptx, self.case
        lanes = self.lane, ptx.op("xor.b32", self.lane, 16)
        heads, value = self._load_token(lanes)
        cos, sin = (self._load_turn(name) for name in ("cos", "sin"))
        norms = [self._load_norm(name, lanes) for name in self.operands if name.endswith("_norm")]
        length = ptx.op("mad.wide.u32", self.sequence, 4, self.operands["lengths"], kind="b64")
        length = ptx.op("ld.global.nc.b32", at(length))
        # A full cache loses its last token.
        self.length = ptx.op("min.u32", length, case.capacity - 1)

        values = [[self._unpack(words) for words in head] for head in heads]
        if norms:
            values = [self._norm(*pair) for pair in zip(values, norms, strict=True)]
        # The first half of a pair: x cos - other sin, the second one: x cos + other sin.
        upper = ptx.op("setp.ge.u32", self.lane, 16, kind="pred")
        sign = ptx.op("selp.b32", 0, "0x80000000", upper)
        sin = [ptx.op("xor.b32", s, sign, kind="f32") for s in sin]
        query, key = (
            [self._turn(*x) for x in zip(own, others, cos, sin, strict=True)]
            for own, others in values
        )
        scale = float_constant(case.dim**-0.5 * LOG2_E)
        query = [ptx.op("mul.f32", q, scale, kind="f32") for q in query]
        key = [self._pack(*pair) for pair in zip(key[::2], key[1::2], strict=True)]
        self._keep(key, value)

        # The new token is the first that the first warp has seen; the others have seen none.
        own = over_lanes(ptx, "add.f32", self._dot(query, self._unpack(key)))
        first = ptx.op("setp.eq.u32", self.warp, 0, kind="pred")
        begin = [(own, NEVER), (float_constant(1.0), 0.0)]
        begin += [(v, 0.0) for v in self._unpack(value)]
        self.peak, self.total, *self.sums = (
            ptx.op("selp.f32", is_owner, float_constant(none), first, kind="f32")
            for is_owner, none in begin
        )
        return query

    def _load_token(self, lanes: tuple[str, str]) -> tuple[list[list[list[str]]], list[str]]:
        """Query and key, each with the other halves of the lane's pairs, and the value."""
        ptx, case, row = self.ptx, self.case, self.row_bytes
        features = case.heads + 2 * case.kv_heads
        token = ptx.op("mul.wide.u32", self.sequence, features * row, kind="b64")
        token = ptx.op("add.u64", token, self.operands["qkv"], kind="b64")
        heads = [
            ptx.op("mad.wide.u32", head, row, token, kind="b64")
            for head in (self.head, self.kv_head)
        ]
        places = [
            [ptx.op("mad.wide.u32", lane, 2 * self.each, head, kind="b64") for lane in lanes]
            for head in heads
        ]
        query = [self._load(place) for place in places[0]]
        key = [self._load(place, case.heads * row) for place in places[1]]
        return [query, key], self._load(places[1][0], (case.heads + case.kv_heads) * row)

    def _load_turn(self, name: str) -> list[str]:
        """Cosines or sines of the lane's pairs."""
        ptx, case = self.ptx, self.case
        row = ptx.op("mul.wide.u32", self.sequence, 2 * case.dim, kind="b64")
        row = ptx.op("add.u64", row, self.operands[name], kind="b64")
        pair = ptx.op("and.b32", self.lane, 15)
        address = ptx.op("mad.wide.u32", pair, 4 * self.each, row, kind="b64")
        found = ptx.registers("f32", self.each)
        for i in range(0, self.each, 4):
            width, part = wide(found[i : i + 4])
            ptx.do(f"ld.global.nc{width}.b32", part, at(address, 4 * i))
        return found

    def _load_norm(self, name: str, lanes: tuple[str, str]) -> list[list[str]]:
        """A norm's scales of the lane's neighbours and the other halves of their pairs."""
        ptx, base, size = self.ptx, self.operands[name], 2 * self.each
        places = [ptx.op("mad.wide.u32", lane, size, base, kind="b64") for lane in lanes]
        return [self._load(place) for place in places]

    def _norm(self, head: list[list[str]], scales: list[list[str]]) -> list[list[str]]:
        """The RMS norm of a head, rounded before it is scaled, as everywhere."""
        ptx, case = self.ptx, self.case
        square = over_lanes(ptx, "add.f32", self._dot(head[0], head[0]))
        constants = float_constant(1 / case.dim), float_constant(case.norm_eps or 0.0)
        mean = ptx.op("fma.rn.f32", square, *constants, kind="f32")
        inverse = ptx.op("rsqrt.approx.f32", mean, kind="f32")

        def scaled(x: str, scale: str) -> str:
            x = ptx.op("mul.f32", x, inverse, kind="f32")
            x = self._unpack([self._pack(x, x)])[0]
            return ptx.op("mul.f32", x, scale, kind="f32")

        return [
            [scaled(*x) for x in zip(half, self._unpack(words), strict=True)]
            for half, words in zip(head, scales, strict=True)
        ]

    def _turn(self, x: str, other: str, cos: str, sin: str) -> str:
        turned = self.ptx.op("mul.f32", x, cos, kind="f32")
        return self.ptx.op("fma.rn.f32", other, sin, turned, kind="f32")

    def _dot(self, x: list[str], y: list[str]) -> str:
        """The lane's part of a dot product."""
        total = self.ptx.op("mul.f32", x[0], y[0], kind="f32")
        for pair in zip(x[1:], y[1:], strict=True):
            total = self.ptx.op("fma.rn.f32", *pair, total, kind="f32")
        return total

    def _keep(self, key: list[str], value: list[str]) -> None:
        """A warp of the first of the heads that share them writes the new key and value into the cache."""
        ptx, case = self.ptx, self.case
        rank = ptx.op("mad.lo.u32", self.kv_head, -(case.heads // case.kv_heads) % 2**32, self.head)
        rank = ptx.op("mad.lo.u32", rank, _WARPS, self.warp)
        keeps = ptx.op("setp.eq.u32", rank, 1, kind="pred")
        for name, words in (("keys_out", key), ("values_out", value)):
            address = self._cache(name, self.length)
            width, part = wide(words)
            ptx.do(f"st.global{width}.b32", at(address), part, when=keeps)

    # The tokens before it

    def _mix(self, addresses: list[str], block: list[list[list[str]]], query: list[str]) -> None:
        """Adds the warp's slots to its sums, the next block under way meanwhile."""
        ptx = self.ptx
        slot = ptx.op("mov.u32", self.warp)
        ptx.label("fdk_block")
        none = ptx.op("setp.ge.u32", slot, self.length, kind="pred")
        ptx.do("bra", "fdk_mixed", when=none)
        in_bounds = self._are_in_bounds(slot)
        ptx.do("add.u32", slot, slot, _BLOCK)
        for address in addresses:
            ptx.do("add.u64", address, address, _BLOCK * self.row_bytes)
        next_in_bounds = self._are_in_bounds(slot)
        following = [self._load_slots(address, next_in_bounds) for address in addresses]
        self._add(block[0], block[1], in_bounds, query)
        for slots, next_slots in zip(block, following, strict=True):
            for words, next_words in zip(slots, next_slots, strict=True):
                for word, next_word in zip(words, next_words, strict=True):
                    ptx.do("mov.b32", word, next_word)
        ptx.do("bra", "fdk_block")
        ptx.label("fdk_mixed")

    def _are_in_bounds(self, slot: str) -> list[str]:
        """Which of the warp's slots of a block hold a token."""
        ptx = self.ptx
        places = [ptx.op("add.u32", slot, i * _WARPS) for i in range(_SLOTS)]
        return [ptx.op("setp.lt.u32", place, self.length, kind="pred") for place in places]

    def _add(self, keys, values, in_bounds: list[str], query: list[str]) -> None:
        ptx = self.ptx
        scores = [self._dot(query, self._unpack(words)) for words in keys]
        scores = [over_lanes(ptx, "add.f32", score) for score in scores]
        never = float_constant(NEVER)
        peak = self.peak
        for score, is_in_bounds in zip(scores, in_bounds, strict=True):
            seen = ptx.op("selp.f32", score, never, is_in_bounds, kind="f32")
            peak = ptx.op("max.f32", peak, seen, kind="f32")
        shrink = self._power(self.peak, peak)
        for total in (self.total, *self.sums):
            ptx.do("mul.f32", total, total, shrink)
        for score, words, is_in_bounds in zip(scores, values, in_bounds, strict=True):
            weight = self._power(score, peak)
            ptx.do("add.f32", self.total, self.total, weight, when=is_in_bounds)
            for total, value in zip(self.sums, self._unpack(words), strict=True):
                ptx.do("fma.rn.f32", total, weight, value, total, when=is_in_bounds)
        ptx.do("mov.f32", self.peak, peak)

    def _power(self, score: str, peak: str) -> str:
        below = self.ptx.op("sub.f32", score, peak, kind="f32")
        return self.ptx.op("ex2.approx.f32", below, kind="f32")

    # The end

    def _join(self) -> None:
        """Joins the warps' sums and writes the head's output."""
        ptx, case, row = self.ptx, self.case, 4 * self.case.dim
        place = ptx.op("mad.lo.u32", self.warp, row, self.shared)
        place = ptx.op("mad.lo.u32", self.lane, 4 * self.each, place)
        for i in range(0, self.each, 4):
            width, part = wide(self.sums[i : i + 4])
            ptx.do(f"st.shared{width}.b32", at(place, 4 * i), part)
        place = ptx.op("mad.lo.u32", self.warp, 8, self.shared)
        first = ptx.op("setp.eq.u32", self.lane, 0, kind="pred")
        facts = vector([self.peak, self.total])
        ptx.do("st.shared.v2.b32", at(place, _WARPS * row), facts, when=first)
        ptx.do("barrier.sync", 0)
        outside = ptx.op("setp.ge.u32", self.thread, case.dim, kind="pred")
        ptx.do("bra", "fdk_end", when=outside)
        place = ptx.op("mad.lo.u32", self.thread, 4, self.shared)
        peaks, totals, sums = [], [], []
        for warp in range(_WARPS):
            pair = ptx.registers("f32", 2)
            source = at(self.shared, _WARPS * row + 8 * warp)
            ptx.do("ld.shared.v2.b32", vector(pair), source)
            peaks.append(pair[0])
            totals.append(pair[1])
            sums.append(ptx.op("ld.shared.f32", at(place, warp * row), kind="f32"))
        highest = peaks[0]
        for peak in peaks[1:]:
            highest = ptx.op("max.f32", highest, peak, kind="f32")
        shares = [self._power(peak, highest) for peak in peaks]
        total, value = self._dot(shares, totals), self._dot(shares, sums)
        inverse = ptx.op("rcp.approx.f32", total, kind="f32")
        value = ptx.op("mul.f32", value, inverse, kind="f32")
        row = ptx.op("mad.lo.u32", self.sequence, case.heads, self.head)
        output = ptx.op("mad.wide.u32", row, self.row_bytes, self.operands["mixed"], kind="b64")
        output = ptx.op("mad.wide.u32", self.thread, 2, output, kind="b64")
        store_float(ptx, output, value, case.dtype)
        ptx.label("fdk_end")

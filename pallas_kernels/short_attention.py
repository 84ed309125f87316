"""One token's attention for few sequences and short caches: a program a query head.

At this size there is nothing but latency. So a program asks for all that it needs in its first instructions,
the first keys and values before it knows how many there are; each lane has a few neighbours of a head from the
first load to the last sum, so that there is one barrier, at the end. The query heads of a key-value head read
the same keys, which is cheap as long as all programs run at once.

Glossary: see `attention`. W warps take every W-th slot of a block of the cache; a lane has E = D / 32
neighbours of a head, and the lane 16 away has RoPE's other halves of the pairs.

`Head` writes the stages, for a launch of its own here and as a part of a launch of whole layers in `layers`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import Array

from pallas_kernels import xla_call
from pallas_kernels.attention_stages import NEVER, AttentionCase, AttentionWriter
from pallas_kernels.ptx import over_lanes, store_float
from pallas_kernels.registers import Register, at, vector, wide
from pallas_kernels.target import Target

SLOTS = 1024  # of a cache, below which all programs of such a launch are done before others join
_WARPS = 8
_BLOCK = 64  # slots that a program reads at a time


@dataclasses.dataclass(frozen=True)
class Case(AttentionCase):
    """What is static about a launch."""

    @property
    def each(self) -> int:
        """E, neighbours of a head that a lane has."""
        return self.dim // 32

    def unsupported_reason(self, batch: int, target: Target) -> str | None:
        """Why the kernel does not take the case with so many sequences, or None."""
        if target.unknown:
            return target.unknown
        if (reason := self.unsupported_shape((64, 128, 256), _BLOCK)) is not None:
            return reason
        if batch * self.heads > target.multiprocessors:
            return (
                f"{batch} x {self.heads} programs are more than {target.multiprocessors}"
                " multiprocessors run at once"
            )
        return None


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


def shared_bytes(case: Case, warps: int) -> int:
    """Shared memory of the warps' sums."""
    return warps * 4 * (case.dim + 2)


class _Token(NamedTuple):
    """Registers of the new token: query and key, with the other halves of the lane's pairs each, and value."""

    heads: list[list[list[Register]]]
    value: list[Register]


class _Beside(NamedTuple):
    """Registers of what comes with it: cosines and sines, and scales of norms like `heads`."""

    cos: list[Register]
    sin: list[Register]
    norms: list[list[list[Register]]]


class Head(AttentionWriter):
    """Writes the stages of a program's head.

    Attributes:
        warps: W.
        offset: where in shared memory the warps' sums are.
        head, kv_head: registers with the program's query head and the key-value head that it reads.
    """

    case: Case
    warps = _WARPS
    offset = 0

    def locate(self, head: Register, sequence: Register) -> None:
        """Registers for the head and the sequence that the program has."""
        self.head, self.sequence = head, sequence
        self.kv_head = head // (self.case.heads // self.case.kv_heads)

    @functools.cached_property
    def lanes(self) -> tuple[Register, Register]:
        """This lane, and the one with the other halves of its pairs."""
        return self.lane, self.lane ^ 16

    def load_cache(self) -> None:
        """Asks for the first keys and values, which the new token does not change."""
        self.addresses = [self._cache(name, self.warp) for name in ("keys", "values")]
        self.block = [self._load_slots(address) for address in self.addresses]

    def mix(self, query: list[Register]) -> None:
        """Adds the tokens before the new one to the warp's sums."""
        self.ptx.comment("multiply: scores, softmax and values, a block of the cache at a time")
        self._mix(self.addresses, self.block, query)

    # Addresses and loads

    def _cache(self, name: str, slot: Register) -> Register:
        """The address of this lane's part of a slot of the cache."""
        case = self.case
        line = self.kv_head + self.sequence * case.kv_heads
        size = case.capacity * self.row_bytes
        address = self.operands[name] + line * size + slot * self.row_bytes
        return address + self.lane * (2 * self.case.each)

    def _load(
        self, address: Register, offset: int = 0, when: Register | None = None
    ) -> list[Register]:
        """Words of a lane's neighbours. The cache is written in this launch, so not as read-only data."""
        words = self.ptx.registers("b32", self.case.each // 2)
        width, target = wide(words)
        self.ptx.do(f"ld.global{width}.b32", target, at(address, offset), when=when)
        return words

    def _load_slots(
        self, address: Register, in_bounds: list[Register] | None = None
    ) -> list[list[Register]]:
        """The warp's slots of a block, or those of them that are there."""
        return [
            self._load(
                address, i * self.warps * self.row_bytes, in_bounds[i] if in_bounds else None
            )
            for i in range(_BLOCK // self.warps)
        ]

    # The new token

    def load_beside(self) -> _Beside:
        """Loads what does not depend on the token: angles, norms, and how long the cache is."""
        cos, sin = (self._load_angles(name) for name in ("cos", "sin"))
        names = ("q_norm", "k_norm") if self.case.norm_eps is not None else ()
        norms = [self._load_norm(name, self.lanes) for name in names]
        self.load_length()
        return _Beside(cos, sin, norms)

    def start(self, token: _Token, beside: _Beside) -> list[Register]:
        """Keeps the new key and value, begins this warp's sums, and returns the query."""
        ptx, case = self.ptx, self.case
        (heads, value), (cos, sin, norms) = token, beside
        values = [[self.unpack(words) for words in head] for head in heads]
        if norms:
            values = [self._norm(*pair) for pair in zip(values, norms, strict=True)]
        # The first half of a pair: x cos - other sin, the second one: x cos + other sin.
        upper = self.lane >= 16
        sign = ptx.op("selp.b32", 0, "0x80000000", upper)
        sin = [ptx.op("xor.b32", s, sign, kind="f32") for s in sin]
        query, key = (
            [self.rotate(*x) for x in zip(own, others, cos, sin, strict=True)]
            for own, others in values
        )
        scale = case.score_scale
        query = [q * scale for q in query]
        key = self.pack(key)
        self._keep(key, value)

        # The new token is the first that the first warp has seen; the others have seen none.
        own = over_lanes(ptx, "add.f32", self.dot(query, self.unpack(key)))
        first = self.warp.eq(0)
        begin = [(own, NEVER), (1.0, 0.0)]
        begin += [(v, 0.0) for v in self.unpack(value)]
        self.peak, self.total, *self.sums = (
            ptx.op("selp.f32", is_owner, none, first) for is_owner, none in begin
        )
        return query

    def load_token(self) -> _Token:
        """Loads the new token's query, key and value."""
        case, row, lanes = self.case, self.row_bytes, self.lanes
        token = self._token_row()
        heads = [token + head * row for head in (self.head, self.kv_head)]
        addresses = [[head + lane * (2 * self.case.each) for lane in lanes] for head in heads]
        query = [self._load_part(address) for address in addresses[0]]
        key = [self._load_part(address, case.heads * row) for address in addresses[1]]
        value = self._load_part(addresses[1][0], (case.heads + case.kv_heads) * row)
        return _Token([query, key], value)

    def _token_row(self) -> Register:
        """The address of the token's queries, keys and values."""
        features = self.case.heads + 2 * self.case.kv_heads
        return (self.sequence * (features * self.row_bytes)).wide() + self.operands["qkv"]

    def _load_part(self, address: Register, offset: int = 0) -> list[Register]:
        """Words of a lane's neighbours in the token's row."""
        return self._load(address, offset)

    def _load_angles(self, name: str) -> list[Register]:
        """Cosines or sines of the lane's pairs."""
        ptx, case = self.ptx, self.case
        row = (self.sequence * (2 * case.dim)).wide() + self.operands[name]
        pair = self.lane & 15
        address = row + pair * (4 * self.case.each)
        found = ptx.registers("f32", self.case.each)
        for i in range(0, self.case.each, 4):
            width, part = wide(found[i : i + 4])
            ptx.do(f"ld.global.nc{width}.b32", part, at(address, 4 * i))
        return found

    def _load_norm(self, name: str, lanes: tuple[Register, Register]) -> list[list[Register]]:
        """A norm's scales of the lane's neighbours and the other halves of their pairs."""
        base, size = self.operands[name], 2 * self.case.each
        addresses = [base + lane * size for lane in lanes]
        return [self._load(address) for address in addresses]

    def _norm(
        self, head: list[list[Register]], scales: list[list[Register]]
    ) -> list[list[Register]]:
        """The RMS norm of a head, rounded before it is scaled, as everywhere."""
        inverse = self.inverse_norm(head[0], (1, 2, 4, 8, 16))

        def scaled(x: Register, scale: Register) -> Register:
            x = x * inverse
            x = self.unpack(self.pack([x, x]))[0]
            return x * scale

        return [
            [scaled(*x) for x in zip(half, self.unpack(words), strict=True)]
            for half, words in zip(head, scales, strict=True)
        ]

    def _keep(self, key: list[Register], value: list[Register]) -> None:
        """A warp of the first of the heads that share them writes the new key and value into the cache."""
        ptx, case = self.ptx, self.case
        rank = self.head - self.kv_head * (case.heads // case.kv_heads)
        rank = self.warp + rank * self.warps
        keeps = rank.eq(1)
        for name, words in (("keys_out", key), ("values_out", value)):
            address = self._cache(name, self.length)
            width, part = wide(words)
            ptx.do(f"st.global{width}.b32", at(address), part, when=keeps)

    # The tokens before it

    def _mix(
        self, addresses: list[Register], block: list[list[list[Register]]], query: list[Register]
    ) -> None:
        """Adds the warp's slots to its sums, the next block under way meanwhile."""
        ptx = self.ptx
        slot = ptx.op("mov.u32", self.warp)
        ptx.label("fdk_block")
        none = slot >= self.length
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

    def _are_in_bounds(self, slot: Register) -> list[Register]:
        """Which of the warp's slots of a block hold a token."""
        slots = [slot + i * self.warps for i in range(_BLOCK // self.warps)]
        return [slot < self.length for slot in slots]

    def _add(self, keys, values, in_bounds: list[Register], query: list[Register]) -> None:
        ptx = self.ptx
        scores = [self.dot(query, self.unpack(words)) for words in keys]
        scores = [over_lanes(ptx, "add.f32", score) for score in scores]
        peak = self.peak
        for score, is_in_bounds in zip(scores, in_bounds, strict=True):
            seen = ptx.op("selp.f32", score, NEVER, is_in_bounds)
            peak = ptx.op("max.f32", peak, seen)
        shrink = self.power(self.peak, peak)
        for total in (self.total, *self.sums):
            ptx.do("mul.f32", total, total, shrink)
        for score, words, is_in_bounds in zip(scores, values, in_bounds, strict=True):
            weight = self.power(score, peak)
            ptx.do("add.f32", self.total, self.total, weight, when=is_in_bounds)
            for total, value in zip(self.sums, self.unpack(words), strict=True):
                ptx.do("fma.rn.f32", total, weight, value, total, when=is_in_bounds)
        ptx.do("mov.f32", self.peak, peak)

    # The end

    def store_sums(self) -> None:
        """Stores the warp's sums where `join_sums` reads them, once all warps have."""
        ptx, row = self.ptx, 4 * self.case.dim
        address = self.shared + self.warp * row + self.lane * (4 * self.case.each)
        for i in range(0, self.case.each, 4):
            width, part = wide(self.sums[i : i + 4])
            ptx.do(f"st.shared{width}.b32", at(address, self.offset + 4 * i), part)
        address = self.shared + self.warp * 8
        first = self.lane.eq(0)
        pair = vector([self.peak, self.total])
        ptx.do("st.shared.v2.b32", at(address, self.offset + self.warps * row), pair, when=first)

    def join_sums(self) -> None:
        """Joins the warps' sums and writes the head's output."""
        ptx, case, row = self.ptx, self.case, 4 * self.case.dim
        outside = self.thread >= case.dim
        ptx.do("bra", "fdk_end", when=outside)
        address = self.shared + self.thread * 4
        peaks, totals, sums = [], [], []
        for warp in range(self.warps):
            pair = ptx.registers("f32", 2)
            source = at(self.shared, self.offset + self.warps * row + 8 * warp)
            ptx.do("ld.shared.v2.b32", vector(pair), source)
            peaks.append(pair[0])
            totals.append(pair[1])
            sums.append(ptx.op("ld.shared.f32", at(address, self.offset + warp * row)))
        _, shares = self.shares(peaks)
        total, value = self.dot(shares, totals), self.dot(shares, sums)
        inverse = ptx.op("rcp.approx.f32", total)
        value = value * inverse
        self._store_output(value)
        ptx.label("fdk_end")

    def _store_output(self, value: Register) -> None:
        """Stores the thread's element of the head's output."""
        row = self.head + self.sequence * self.case.heads
        output = self.operands["mixed"] + row * self.row_bytes + self.thread * 2
        store_float(self.ptx, output, value, self.case.dtype)


class _Kernel(Head):
    """Writes the kernel: `write` is its stages in order."""

    def __init__(self, case: Case, target: Target) -> None:
        super().__init__(case, target, "mixed", "keys_out", "values_out")

    def write(self) -> str:
        ptx, case = self.ptx, self.case
        ptx.share(shared_bytes(case, _WARPS))
        ptx.comment("locate and load: the head, and the first keys and values")
        self._locate_lane()
        self.locate(*(ptx.op("mov.u32", f"%ctaid.{axis}") for axis in "xy"))
        self.load_cache()
        ptx.comment("token: norms, RoPE, its key and value into the cache")
        token = self.load_token()
        beside = self.load_beside()
        self.mix(self.start(token, beside))
        ptx.comment("reduce and store: the warps' sums through shared memory")
        self.store_sums()
        ptx.do("barrier.sync", 0)
        self.join_sums()
        return ptx.text()

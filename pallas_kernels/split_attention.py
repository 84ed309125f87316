"""One token's attention over long caches: programs share the slots of a key-value head.

Its plain twin is the Pallas kernel in `attention`. What counts is the bytes of the cache, read once for all
query heads that share a key-value head: those are the rows of `mma.sync.m16n8k16`. Keys and values go from
memory into the registers in which the tensor cores want them, without shared memory: the order of a head's
elements in a product of queries and keys is free, as is the order of the outputs, so that every lane loads 8
neighbours at a time. While the scores of a tile become weights, the next keys are on their way already.

Glossary: see `attention`. A tile is 16 slots of the cache; a program has W warps, each takes every W-th tile of
the program's range. A lane is (g, t): g = lane / 4 is a row (query head g, and g + 8 if there are more than
8) and, in loads, a slot or a run of 8 elements; t = lane % 4. Scores are in units of log 2.
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
    half_kind,
    over_lanes,
    vector,
)
from pallas_kernels.short_attention import NEVER
from pallas_kernels.target import Target

_WARPS = 4
_TILE = 16  # slots
_PROGRAMS = 2  # that a multiprocessor runs at once, by their registers
_QUAD = (1, 2)  # lanes of a row


@dataclasses.dataclass(frozen=True)
class Case:
    """What is static about a launch.

    Attributes:
        heads, kv_heads: H and KV.
        dim: D.
        capacity: S.
        dtype: bfloat16 or float16.
        norm_eps: of the norms of queries and keys, None without norms.
        window: slots that a token sees, its own included; None for all.
    """

    heads: int
    kv_heads: int
    dim: int
    capacity: int
    dtype: jnp.dtype
    norm_eps: float | None
    window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    def supported(self, target: Target) -> bool:
        """Whether the kernel takes the case."""
        return (
            not target.unknown
            and self.dim in (64, 128)
            and self.group <= 16
            and self.capacity % (4 * _TILE) == 0
            and self.capacity * self.dim < 2**30
            and self.dtype in (jnp.bfloat16, jnp.float16)
        )

    def splits(self, batch: int, target: Target) -> int:
        """Programs that share a key-value head: as many as run at once, each with a tile a warp at least."""
        seen = min(self.capacity, self.window or self.capacity)
        most = max(1, _PROGRAMS * target.multiprocessors // (batch * self.kv_heads))
        return max(1, min(most, seen // (_WARPS * _TILE)))


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
    splits: int | None = None,
) -> tuple[Array, Array, Array]:
    """See `attention.decode`."""
    batch, dim = qkv.shape[0], case.dim
    splits = splits or case.splits(batch, target)
    mixed_dtype = case.dtype if splits == 1 else jnp.float32
    part = jax.ShapeDtypeStruct((batch, splits, case.heads), jnp.float32)
    mixed, peak, total, keys, values = xla_call.ptx_call(
        source(case, splits, target),
        (qkv, cos, sin, lengths, keys, values, *norms),
        (
            jax.ShapeDtypeStruct((batch, splits, case.heads * dim), mixed_dtype),
            part,
            part,
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ),
        target,
        grid=(splits, case.kv_heads * batch),
        num_warps=_WARPS,
        name="decode_attention",
        aliases={4: 3, 5: 4},
    )
    if splits == 1:
        return mixed[:, 0], keys, values
    weight = jnp.exp2(peak - peak.max(axis=1, keepdims=True))
    weight /= (weight * total).sum(axis=1, keepdims=True)
    joined = (mixed.reshape(batch, splits, case.heads, dim) * weight[..., None]).sum(axis=1)
    return joined.reshape(batch, case.heads * dim).astype(case.dtype), keys, values


def source(case: Case, splits: int, target: Target) -> str:
    """The kernel's PTX."""
    return _Kernel(case, splits, target).write()


class _Kernel(Writer):
    def __init__(self, case: Case, splits: int, target: Target) -> None:
        self.case, self.splits, self.ptx = case, splits, Ptx(target)
        self.row_bytes = 2 * case.dim
        self.chunks = case.dim // 32  # runs of 8 elements that a lane has of a query or a key
        self.blocks = case.dim // 64  # and of a value
        self.halves = 2 if case.group > 8 else 1  # rows of a lane
        names = ["qkv", "cos", "sin", "lengths", "keys", "values"]
        names += ["q_norm", "k_norm"] * (case.norm_eps is not None)
        names += ["mixed", "peak", "total", "keys_out", "values_out"]
        self.operands = {name: f"${i}" for i, name in enumerate(names, 1)}

    def write(self) -> str:
        ptx, case = self.ptx, self.case
        self.facts_at = (
            _WARPS * 4 * case.group * case.dim
        )  # in shared memory, behind the warps' sums
        ptx.share(self.facts_at + _WARPS * 8 * case.group)
        self._locate_lane()
        self.split, self.line = (ptx.op("mov.u32", f"%ctaid.{axis}") for axis in "xy")
        self.sequence = ptx.quotient(self.line, case.kv_heads)
        self.kv_head = ptx.remainder(self.line, case.kv_heads)
        self.zero = ptx.op("mov.b32", 0)
        self._locate_range()
        value_slot = ptx.op("shl.b32", self.quad, 1)
        self.key_address = self._cache("keys", self._slot(self.row), self.quad)
        self.value_address = self._cache("values", self._slot(value_slot), self.row)
        self.keys = [ptx.registers("b32", 4) for _ in range(2 * self.chunks)]
        self.more = ptx.op("setp.lt.u32", self.tile, self.stop, kind="pred")
        self._load_keys()
        query = self._new_token()
        self._mix(query)
        self._join()
        return ptx.text()

    # Addresses and loads

    def _locate_range(self) -> None:
        """The tiles of this program, as even shares of those that the token sees."""
        ptx, case = self.ptx, self.case
        length = ptx.op("mad.wide.u32", self.sequence, 4, self.operands["lengths"], kind="b64")
        length = ptx.op("ld.global.nc.b32", at(length))
        # A full cache loses its last token.
        self.length = ptx.op("min.u32", length, case.capacity - 1)
        end = ptx.op("add.u32", self.length, _TILE - 1)
        end = ptx.op("shr.u32", end, 4)
        self.lowest, first = self.zero, self.zero
        if case.window is not None:
            seen = ptx.op("add.u32", self.length, 1)
            lowest = ptx.op("sub.u32", seen, case.window)
            hides = ptx.op("setp.ge.u32", seen, case.window, kind="pred")
            self.lowest = ptx.op("selp.b32", lowest, 0, hides)
            first = ptx.op("shr.u32", self.lowest, 4)
        tiles = ptx.op("sub.u32", end, first)
        each = ptx.quotient(ptx.op("add.u32", tiles, self.splits - 1), self.splits)
        start = ptx.op("mad.lo.u32", self.split, each, first)
        self.stop = ptx.op("add.u32", start, each)
        self.stop = ptx.op("min.u32", self.stop, end)
        self.tile = ptx.op("add.u32", start, self.warp)

    def _slot(self, offset: str) -> str:
        return self.ptx.op("mad.lo.u32", self.tile, _TILE, offset)

    def _cache(self, name: str, slot: str, run: str) -> str:
        """The address of a run of 8 elements in a slot of this key-value head's cache."""
        ptx, case = self.ptx, self.case
        size = case.capacity * self.row_bytes
        address = ptx.op("mad.wide.u32", self.line, size, self.operands[name], kind="b64")
        address = ptx.op("mad.wide.u32", slot, self.row_bytes, address, kind="b64")
        return ptx.op("mad.wide.u32", run, 16, address, kind="b64")

    def _load(self, words: list[str], address: str, offset: int = 0, when: str | None = None):
        """Eight elements. The cache is written in this launch, so not as read-only data."""
        self.ptx.do("ld.global.v4.b32", vector(words), at(address, offset), when=when)
        return words

    def _new(self, address: str, offset: int = 0) -> list[str]:
        return self._load(self.ptx.registers("b32", 4), address, offset)

    def _load_keys(self) -> None:
        """The tile's keys: slots g and g + 8, runs t, t + 4 and so on."""
        for i, words in enumerate(self.keys):
            slot, chunk = divmod(i, self.chunks)
            self._load(words, self.key_address, slot * 8 * self.row_bytes + chunk * 64, self.more)

    def _load_values(self, there: list[str]) -> list[list[list[str]]]:
        """The tile's values: of runs g and g + 8 slots 2t, 2t + 1, 2t + 8, 2t + 9; zero past the tokens."""
        found = []
        for block in range(self.blocks):
            found.append([])
            for slot, is_there in zip((0, 1, 8, 9), there, strict=True):
                words = [self.ptx.op("mov.b32", 0) for _ in range(4)]
                offset = slot * self.row_bytes + block * 128
                found[-1].append(self._load(words, self.value_address, offset, is_there))
        return found

    def _unpack(self, words: list[str]) -> list[str]:
        return [f for word in words for f in decoding.unpack(self.ptx, word, self.case.dtype)]

    def _pack(self, values: list[str]) -> list[str]:
        pairs = zip(values[::2], values[1::2], strict=True)
        return [decoding.pack(self.ptx, *pair, self.case.dtype) for pair in pairs]

    # The new token

    def _new_token(self) -> list[list[str]]:
        """Keeps the new key and value, begins the sums, and returns the query: words of a lane's rows."""
        ptx, case = self.ptx, self.case
        features = case.heads + 2 * case.kv_heads
        token = ptx.op("mul.wide.u32", self.sequence, features * self.row_bytes, kind="b64")
        token = ptx.op("add.u64", token, self.operands["qkv"], kind="b64")
        run = ptx.op("mad.wide.u32", self.quad, 16, token, kind="b64")
        rows = []
        for half in range(self.halves):
            row = ptx.op("add.u32", self.row, 8 * half)
            row = ptx.op("min.u32", row, case.group - 1)  # the surplus rows repeat the last
            head = ptx.op("mad.lo.u32", self.kv_head, case.group, row)
            rows.append(ptx.op("mad.wide.u32", head, self.row_bytes, run, kind="b64"))
        key = ptx.op("mad.wide.u32", self.kv_head, self.row_bytes, run, kind="b64")
        heads = [
            [self._new(address, offset + 64 * chunk) for chunk in range(self.chunks)]
            for address, offset in [*((r, 0) for r in rows), (key, case.heads * self.row_bytes)]
        ]
        value = ptx.op("mad.wide.u32", self.quad, 32, token, kind="b64")
        value = ptx.op("mad.wide.u32", self.kv_head, self.row_bytes, value, kind="b64")
        offset = (case.heads + case.kv_heads) * self.row_bytes
        value = [
            self._new(value, offset + 128 * block + 16 * part)
            for block in range(self.blocks)
            for part in range(2)
        ]
        turn = [self._load_turn(name) for name in ("cos", "sin")]
        floats = [[f for words in head for f in self._unpack(words)] for head in heads]
        if case.norm_eps is not None:
            scales = [self._load_norm(name) for name in ("q_norm", "k_norm")]
            scales = [scales[0]] * self.halves + [scales[1]]
            floats = [self._norm(*pair) for pair in zip(floats, scales, strict=True)]
        *queries, key = (self._rotate(head, *turn) for head in floats)
        scale = float_constant(case.dim**-0.5 * LOG2_E)
        queries = [[ptx.op("mul.f32", x, scale, kind="f32") for x in head] for head in queries]
        queries, key = [self._pack(head) for head in queries], self._pack(key)
        self._keep(key, value)
        self._begin(queries, key, value)
        return queries

    def _load_turn(self, name: str) -> list[str]:
        """Cosines or sines of the lane's pairs."""
        ptx, case = self.ptx, self.case
        row = ptx.op("mul.wide.u32", self.sequence, 2 * case.dim, kind="b64")
        row = ptx.op("add.u64", row, self.operands[name], kind="b64")
        row = ptx.op("mad.wide.u32", self.quad, 32, row, kind="b64")
        found = ptx.registers("f32", 4 * self.chunks)
        for i in range(0, len(found), 4):
            chunk, part = divmod(i, 8)
            place = at(row, 128 * chunk + 4 * part)
            ptx.do("ld.global.nc.v4.b32", vector(found[i : i + 4]), place)
        return found

    def _load_norm(self, name: str) -> list[str]:
        address = self.ptx.op("mad.wide.u32", self.quad, 16, self.operands[name], kind="b64")
        runs = [self._new(address, 64 * chunk) for chunk in range(self.chunks)]
        return [f for words in runs for f in self._unpack(words)]

    def _norm(self, head: list[str], scales: list[str]) -> list[str]:
        """The RMS norm of a head, rounded before it is scaled, as everywhere."""
        ptx, case = self.ptx, self.case
        square = over_lanes(ptx, "add.f32", self._dot(head, head), _QUAD)
        constants = float_constant(1 / case.dim), float_constant(case.norm_eps or 0.0)
        mean = ptx.op("fma.rn.f32", square, *constants, kind="f32")
        inverse = ptx.op("rsqrt.approx.f32", mean, kind="f32")
        head = [ptx.op("mul.f32", x, inverse, kind="f32") for x in head]
        head = self._unpack(self._pack(head))
        return [
            ptx.op("mul.f32", x, scale, kind="f32") for x, scale in zip(head, scales, strict=True)
        ]

    def _rotate(self, head: list[str], cos: list[str], sin: list[str]) -> list[str]:
        ptx, half = self.ptx, len(head) // 2
        minus = [ptx.op("xor.b32", s, "0x80000000", kind="f32") for s in sin]

        def turned(x: str, other: str, c: str, s: str) -> str:
            x = ptx.op("mul.f32", x, c, kind="f32")
            return ptx.op("fma.rn.f32", other, s, x, kind="f32")

        first, second = head[:half], head[half:]
        return [
            *(turned(*x) for x in zip(first, second, cos, minus, strict=True)),
            *(turned(*x) for x in zip(second, first, cos, sin, strict=True)),
        ]

    def _dot(self, x: list[str], y: list[str]) -> str:
        """The lane's part of a dot product."""
        total = self.ptx.op("mul.f32", x[0], y[0], kind="f32")
        for pair in zip(x[1:], y[1:], strict=True):
            total = self.ptx.op("fma.rn.f32", *pair, total, kind="f32")
        return total

    def _is_first(self, *others: str) -> str:
        """Whether this is the first program and warp, and `others` are zero."""
        found = self.ptx.op("or.b32", self.split, self.warp)
        for other in others:
            found = self.ptx.op("or.b32", found, other)
        return self.ptx.op("setp.eq.u32", found, 0, kind="pred")

    def _keep(self, key: list[str], value: list[list[str]]) -> None:
        """Four lanes of the first program write the new key and value into the cache."""
        keeps = self._is_first(self.row)
        address = self._cache("keys_out", self.length, self.quad)
        for chunk in range(self.chunks):
            words = vector(key[4 * chunk : 4 * chunk + 4])
            self.ptx.do("st.global.v4.b32", at(address, 64 * chunk), words, when=keeps)
        address = self._cache("values_out", self.length, self.ptx.op("shl.b32", self.quad, 1))
        for i, words in enumerate(value):
            offset = 128 * (i // 2) + 16 * (i % 2)
            self.ptx.do("st.global.v4.b32", at(address, offset), vector(words), when=keeps)

    def _begin(self, queries: list[list[str]], key: list[str], value: list[list[str]]) -> None:
        """The new token is the first that the first warp has seen; the others have seen none.

        `sums[row][i]` belongs to element 16 t + i % 16 of block i // 16; `totals` are parts of a row's.
        """
        ptx = self.ptx
        first, counts = self._is_first(), self._is_first(self.quad)
        key, values = self._unpack(key), [f for words in value for f in self._unpack(words)]
        never, one, zero = (float_constant(x) for x in (NEVER, 1.0, 0.0))
        self.peaks, self.totals, self.sums = [], [], []
        for query in queries:
            own = over_lanes(ptx, "add.f32", self._dot(self._unpack(query), key), _QUAD)
            self.peaks.append(ptx.op("selp.f32", own, never, first, kind="f32"))
            self.totals.append(ptx.op("selp.f32", one, zero, counts, kind="f32"))
            self.sums.append([ptx.op("selp.f32", v, zero, first, kind="f32") for v in values])

    # The tokens before it

    def _mix(self, query: list[list[str]]) -> None:
        """Adds the warp's tiles to its sums."""
        ptx = self.ptx
        slot = self._slot(ptx.op("shl.b32", self.quad, 1))
        if self.halves == 1:
            self.sums.append(
                [ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in self.sums[0]]
            )
        ptx.label("fdk_tile")
        ptx.do("bra", "fdk_mixed", when=f"!{self.more}")
        places = [ptx.op("add.u32", slot, i) for i in (0, 1, 8, 9)]
        there = [ptx.op("setp.lt.u32", place, self.length, kind="pred") for place in places]
        values = self._load_values(there)
        scores = self._scores(query)
        step = _WARPS * _TILE
        ptx.do("add.u32", self.tile, self.tile, _WARPS)
        ptx.do("setp.lt.u32", self.more, self.tile, self.stop)
        for address in (self.key_address, self.value_address):
            ptx.do("add.u64", address, address, step * self.row_bytes)
        ptx.do("add.u32", slot, slot, step)
        self._load_keys()
        if self.case.window is not None:
            seen = [ptx.op("setp.ge.u32", place, self.lowest, kind="pred") for place in places]
            there = [
                ptx.op("and.pred", a, b, kind="pred") for a, b in zip(there, seen, strict=True)
            ]
        weights = [self._weights(half, scores[half], there) for half in range(self.halves)]
        self._add(weights, values)
        ptx.do("bra", "fdk_tile")
        ptx.label("fdk_mixed")

    def _multiply(self, sums: list[str], a: list[str], b: list[str]) -> None:
        kind = half_kind(self.case.dtype)
        self.ptx.do(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
            vector(sums),
            vector(a),
            vector(b),
            vector(sums),
        )

    def _scores(self, query: list[list[str]]) -> list[list[str]]:
        """Of a lane's rows, the scores of slots 2t, 2t + 1, 2t + 8 and 2t + 9."""
        ptx = self.ptx
        sums = [
            [ptx.op("mov.f32", float_constant(0.0), kind="f32") for _ in range(4)] for _ in range(2)
        ]
        for step in range(0, 4 * self.chunks, 2):
            rows = [query[half][step : step + 2] for half in range(self.halves)]
            rows += [[self.zero] * 2] * (2 - self.halves)
            a = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
            chunk, word = divmod(step, 4)
            for slot in range(2):
                self._multiply(
                    sums[slot], a, self.keys[slot * self.chunks + chunk][word : word + 2]
                )
        return [
            [sums[slot][2 * half + i] for slot in range(2) for i in range(2)] for half in range(2)
        ]

    def _weights(self, half: int, scores: list[str], there: list[str]) -> list[str]:
        """Packed weights of a row's four slots, after the sums before them have been scaled down."""
        ptx, never = self.ptx, float_constant(NEVER)
        seen = [
            ptx.op("selp.f32", score, never, is_there, kind="f32")
            for score, is_there in zip(scores, there, strict=True)
        ]
        peak = seen[0]
        for score in seen[1:]:
            peak = ptx.op("max.f32", peak, score, kind="f32")
        peak = ptx.op(
            "max.f32", over_lanes(ptx, "max.f32", peak, _QUAD), self.peaks[half], kind="f32"
        )
        shrink = self._power(self.peaks[half], peak)
        for total in (self.totals[half], *self.sums[half]):
            ptx.do("mul.f32", total, total, shrink)
        ptx.do("mov.f32", self.peaks[half], peak)
        weights = []
        for score, is_there in zip(seen, there, strict=True):
            weight = self._power(score, peak)
            weight = ptx.op("selp.f32", weight, float_constant(0.0), is_there, kind="f32")
            weights.append(weight)
        packed = self._pack(weights)
        # Of the rounded ones: so a row whose largest weight was rounded is not off as a whole.
        for weight in self._unpack(packed):
            ptx.do("add.f32", self.totals[half], self.totals[half], weight)
        return packed

    def _add(self, weights: list[list[str]], values: list[list[list[str]]]) -> None:
        rows = weights + [[self.zero] * 2] * (2 - self.halves)
        a = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
        for block, slots in enumerate(values):
            for element in range(8):
                word, choice = element // 2, ("0x5410", "0x7632")[element % 2]
                b = [
                    self.ptx.op("prmt.b32", slots[i][word], slots[i + 1][word], choice)
                    for i in (0, 2)
                ]
                places = (16 * block + element, 16 * block + 8 + element)
                sums = [self.sums[half][place] for half in range(2) for place in places]
                self._multiply(sums, a, b)

    def _power(self, score: str, peak: str) -> str:
        below = self.ptx.op("sub.f32", score, peak, kind="f32")
        return self.ptx.op("ex2.approx.f32", below, kind="f32")

    # The end

    def _join(self) -> None:
        """Joins the warps' sums, and writes the program's or, if it has all slots, the output."""
        ptx, case = self.ptx, self.case
        leads = ptx.op("setp.eq.u32", self.quad, 0, kind="pred")
        for half in range(self.halves):
            total = over_lanes(ptx, "add.f32", self.totals[half], _QUAD)
            row = ptx.op("add.u32", self.row, 8 * half)
            is_row = ptx.op("setp.lt.u32", row, case.group, kind="pred")
            place = ptx.op("mad.lo.u32", self.warp, case.group, row)
            facts = ptx.op("mad.lo.u32", place, 8, self.shared)
            writes = ptx.op("and.pred", leads, is_row, kind="pred")
            pair = vector([self.peaks[half], total])
            ptx.do("st.shared.v2.b32", at(facts, self.facts_at), pair, when=writes)
            place = ptx.op("mad.lo.u32", place, 4 * case.dim, self.shared)
            place = ptx.op("mad.lo.u32", self.quad, 64, place)
            for i in range(0, len(self.sums[half]), 4):
                block, part = divmod(i, 16)
                target = at(place, 256 * block + 4 * part)
                words = vector(self.sums[half][i : i + 4])
                ptx.do("st.shared.v4.b32", target, words, when=is_row)
        ptx.do("barrier.sync", 0)
        outputs, threads = case.group * case.dim // 4, 32 * _WARPS
        for first in range(0, outputs, threads):
            index = ptx.op("add.u32", self.thread, first)
            if first + threads > outputs:
                outside = ptx.op("setp.ge.u32", index, outputs, kind="pred")
                ptx.do("bra", "fdk_end", when=outside)
            self._write(index)
        ptx.label("fdk_end")

    def _write(self, index: str) -> None:
        """Four elements of the output, the `index`-th."""
        ptx, case = self.ptx, self.case
        row = ptx.quotient(index, case.dim // 4)
        facts = ptx.op("mad.lo.u32", row, 8, self.shared)
        place = ptx.op("mad.lo.u32", index, 16, self.shared)
        peaks, totals, parts = [], [], []
        for warp in range(_WARPS):
            pair, part = ptx.registers("f32", 2), ptx.registers("f32", 4)
            source = at(facts, self.facts_at + 8 * case.group * warp)
            ptx.do("ld.shared.v2.b32", vector(pair), source)
            ptx.do("ld.shared.v4.b32", vector(part), at(place, 4 * case.group * case.dim * warp))
            peaks.append(pair[0])
            totals.append(pair[1])
            parts.append(part)
        highest = peaks[0]
        for peak in peaks[1:]:
            highest = ptx.op("max.f32", highest, peak, kind="f32")
        shares = [self._power(peak, highest) for peak in peaks]
        total = self._dot(shares, totals)
        values = [self._dot(shares, list(column)) for column in zip(*parts, strict=True)]
        line = ptx.op("mad.lo.u32", self.sequence, self.splits, self.split)
        head = ptx.op("mad.lo.u32", self.kv_head, case.group, row)
        line = ptx.op("mad.lo.u32", line, case.heads, head)
        column = ptx.remainder(index, case.dim // 4)
        size = 2 if self.splits == 1 else 4
        output = ptx.op("mad.wide.u32", line, case.dim * size, self.operands["mixed"], kind="b64")
        output = ptx.op("mad.wide.u32", column, 4 * size, output, kind="b64")
        if self.splits == 1:
            inverse = ptx.op("rcp.approx.f32", total, kind="f32")
            values = self._pack([ptx.op("mul.f32", v, inverse, kind="f32") for v in values])
            ptx.do("st.global.v2.b32", at(output), vector(values))
            return
        ptx.do("st.global.v4.b32", at(output), vector(values))
        leads = ptx.op("setp.eq.u32", column, 0, kind="pred")
        for name, fact in (("peak", highest), ("total", total)):
            address = ptx.op("mad.wide.u32", line, 4, self.operands[name], kind="b64")
            ptx.do("st.global.f32", at(address), fact, when=leads)

"""One token's attention over long caches: programs share the slots of a key-value head.

Its plain twin is the Pallas kernel in `attention`. What counts is the bytes of the cache, read once for all
query heads that share a key-value head: those are the rows of `mma.sync.m16n8k16`. Keys and values go from
memory into the registers in which the tensor cores want them, without shared memory: the order of a head's
elements in a product of queries and keys is free, as is the order of the outputs, so that every lane loads 8
neighbours at a time. While the scores of a tile become weights, the next keys are on their way already. The
last program of a head to be done joins the results of all, see `split_attention_join`: one launch is all.

Glossary: see `attention`. A tile is 16 slots of the cache; a program has W warps, each takes every W-th tile of
the program's range. A lane is (g, t): g = lane / 4 is a row (query head g, and g + 8 if there are more than
8) and, in loads, a slot or a run of 8 elements; t = lane % 4. Scores are in units of log 2.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import xla_call
from pallas_kernels.attention_stages import NEVER
from pallas_kernels.ptx import ROW_LANES, half_kind, over_lanes
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.split_attention_join import Joining
from pallas_kernels.split_attention_plan import TILE, WARPS, Case
from pallas_kernels.target import Target

__all__ = ["WARPS", "Case", "decode", "source"]


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
    shape, single, operands = jax.ShapeDtypeStruct, jnp.float32, (keys, values, *norms)
    parts: tuple[jax.ShapeDtypeStruct, ...] = ()
    if splits > 1:
        operands += (jnp.zeros(batch * case.kv_heads, jnp.int32),)
        per_head = shape((batch, splits, case.heads), single)
        parts = shape((batch, splits, case.heads * dim), single), per_head, per_head
    mixed, keys, values, *_ = xla_call.ptx_call(
        source(case, splits, target),
        (qkv, cos, sin, lengths, *operands),
        (
            shape((batch, case.heads * dim), case.dtype),
            shape(keys.shape, keys.dtype),
            shape(values.shape, values.dtype),
            *parts,
        ),
        target,
        grid=(splits, case.kv_heads * batch),
        num_warps=WARPS,
        name="decode_attention",
        aliases={4: 1, 5: 2},
    )
    return mixed, keys, values


def source(case: Case, splits: int, target: Target) -> str:
    """The kernel's PTX."""
    return _Kernel(case, splits, target).write()


class _Kernel(Joining):
    """Writes the kernel: `write` is its stages in order."""

    case: Case

    def __init__(self, case: Case, splits: int, target: Target) -> None:
        counters = ("counters",) * (splits > 1)
        parts = ("parts", "peak", "total") if splits > 1 else ()
        super().__init__(case, target, *counters, "mixed", "keys_out", "values_out", *parts)
        self.splits = splits

    def write(self) -> str:
        ptx, case = self.ptx, self.case
        ptx.share(case.shared_bytes)
        ptx.comment("locate: the sequence, the head and this warp's tiles of the cache")
        self._locate_lane()
        self.split, self.line = (ptx.op("mov.u32", f"%ctaid.{axis}") for axis in "xy")
        self.sequence = self.line // case.kv_heads
        self.kv_head = self.line % case.kv_heads
        self.zero = ptx.op("mov.b32", 0)
        self._locate_range()
        value_slot = self.thread_in_group << 1
        self.key_address = self._cache("keys", self._slot(self.row), self.thread_in_group)
        self.value_address = self._cache("values", self._slot(value_slot), self.row)
        ptx.comment("load: the keys of the first tile")
        self.keys = [ptx.registers("b32", 4) for _ in range(2 * case.chunks)]
        self.more = self.tile < self.stop
        self._load_keys()
        ptx.comment("token: norms, RoPE, its key and value into the cache")
        query = self._new_token()
        ptx.comment("multiply: scores, softmax and values, a tile at a time")
        self._mix(query)
        ptx.comment("reduce: the warps' sums through shared memory")
        self.join_warps()
        if self.splits > 1:
            ptx.comment("reduce: the programs' sums, in the last one to be done")
            self.join_programs()
        return ptx.text()

    # Locate

    def _locate_range(self) -> None:
        """The tiles of this program, as even shares of those that the token sees."""
        ptx, case = self.ptx, self.case
        self.load_length()
        end = self.length + (TILE - 1)
        end = end >> 4
        self.lowest, first = self.zero, self.zero
        if case.window is not None:
            seen = self.length + 1
            lowest = seen - case.window
            hides = seen >= case.window
            self.lowest = ptx.op("selp.b32", lowest, 0, hides)
            first = self.lowest >> 4
        tiles = end - first
        each = (tiles + (self.splits - 1)) // self.splits
        start = first + self.split * each
        self.stop = start + each
        self.stop = ptx.op("min.u32", self.stop, end)
        self.tile = start + self.warp

    def _slot(self, offset: Register) -> Register:
        return offset + self.tile * TILE

    def _cache(self, name: str, slot: Register, run: Register) -> Register:
        """The address of a run of 8 elements in a slot of this key-value head's cache."""
        case = self.case
        size = case.capacity * self.row_bytes
        address = self.operands[name] + self.line * size + slot * self.row_bytes
        return address + run * 16

    # Load

    def _load(
        self,
        words: list[Register],
        address: Register,
        offset: int = 0,
        when: Register | None = None,
    ):
        """Eight elements. The cache is written in this launch, so not as read-only data."""
        self.ptx.do("ld.global.v4.b32", vector(words), at(address, offset), when=when)
        return words

    def _new(self, address: Register, offset: int = 0) -> list[Register]:
        return self._load(self.ptx.registers("b32", 4), address, offset)

    def _load_keys(self) -> None:
        """The tile's keys: slots g and g + 8, runs t, t + 4 and so on."""
        for i, words in enumerate(self.keys):
            slot, chunk = divmod(i, self.case.chunks)
            self._load(words, self.key_address, slot * 8 * self.row_bytes + chunk * 64, self.more)

    def _load_values(self, in_bounds: list[Register]) -> list[list[list[Register]]]:
        """The tile's values: of runs g and g + 8 slots 2t, 2t + 1, 2t + 8, 2t + 9; zero past the tokens."""
        found = []
        for block in range(self.case.blocks):
            found.append([])
            for slot, is_in_bounds in zip((0, 1, 8, 9), in_bounds, strict=True):
                words = [self.ptx.op("mov.b32", 0) for _ in range(4)]
                offset = slot * self.row_bytes + block * 128
                found[-1].append(self._load(words, self.value_address, offset, is_in_bounds))
        return found

    def _load_angles(self, name: str) -> list[Register]:
        """Cosines or sines of the lane's pairs."""
        ptx, case = self.ptx, self.case
        row = (
            (self.sequence * (2 * case.dim)).wide()
            + self.operands[name]
            + self.thread_in_group * 32
        )
        found = ptx.registers("f32", 4 * self.case.chunks)
        for i in range(0, len(found), 4):
            chunk, part = divmod(i, 8)
            address = at(row, 128 * chunk + 4 * part)
            ptx.do("ld.global.nc.v4.b32", vector(found[i : i + 4]), address)
        return found

    def _load_norm(self, name: str) -> list[Register]:
        address = self.operands[name] + self.thread_in_group * 16
        runs = [self._new(address, 64 * chunk) for chunk in range(self.case.chunks)]
        return [f for words in runs for f in self.unpack(words)]

    # The new token

    def _new_token(self) -> list[list[Register]]:
        """Keeps the new key and value, begins the sums, and returns the query: words of a lane's rows."""
        ptx, case = self.ptx, self.case
        features = case.heads + 2 * case.kv_heads
        token = (self.sequence * (features * self.row_bytes)).wide() + self.operands["qkv"]
        run = token + self.thread_in_group * 16
        rows = []
        for half in range(self.case.halves):
            row = self.row + 8 * half
            row = ptx.op("min.u32", row, case.group - 1)  # the surplus rows repeat the last
            head = row + self.kv_head * case.group
            rows.append(run + head * self.row_bytes)
        key = run + self.kv_head * self.row_bytes
        heads = [
            [self._new(address, offset + 64 * chunk) for chunk in range(self.case.chunks)]
            for address, offset in [*((r, 0) for r in rows), (key, case.heads * self.row_bytes)]
        ]
        value = token + self.thread_in_group * 32 + self.kv_head * self.row_bytes
        offset = (case.heads + case.kv_heads) * self.row_bytes
        value = [
            self._new(value, offset + 128 * block + 16 * part)
            for block in range(self.case.blocks)
            for part in range(2)
        ]
        angles = [self._load_angles(name) for name in ("cos", "sin")]
        floats = [[f for words in head for f in self.unpack(words)] for head in heads]
        if case.norm_eps is not None:
            scales = [self._load_norm(name) for name in ("q_norm", "k_norm")]
            scales = [scales[0]] * self.case.halves + [scales[1]]
            floats = [self._norm(*pair) for pair in zip(floats, scales, strict=True)]
        *queries, key = (self._rotate(head, *angles) for head in floats)
        scale = case.score_scale
        queries = [[x * scale for x in head] for head in queries]
        queries, key = [self.pack(head) for head in queries], self.pack(key)
        self._keep(key, value)
        self._begin(queries, key, value)
        return queries

    def _norm(self, head: list[Register], scales: list[Register]) -> list[Register]:
        """The RMS norm of a head, rounded before it is scaled, as everywhere."""
        inverse = self.inverse_norm(head, ROW_LANES)
        head = [x * inverse for x in head]
        head = self.unpack(self.pack(head))
        return [x * scale for x, scale in zip(head, scales, strict=True)]

    def _rotate(
        self, head: list[Register], cos: list[Register], sin: list[Register]
    ) -> list[Register]:
        ptx, half = self.ptx, len(head) // 2
        minus = [ptx.op("xor.b32", s, "0x80000000", kind="f32") for s in sin]

        first, second = head[:half], head[half:]
        return [
            *(self.rotate(*x) for x in zip(first, second, cos, minus, strict=True)),
            *(self.rotate(*x) for x in zip(second, first, cos, sin, strict=True)),
        ]

    def _is_first(self, *others: Register) -> Register:
        """Whether this is the first program and warp, and `others` are zero."""
        found = self.split | self.warp
        for other in others:
            found = found | other
        return found.eq(0)

    def _keep(self, key: list[Register], value: list[list[Register]]) -> None:
        """Four lanes of the first program write the new key and value into the cache."""
        keeps = self._is_first(self.row)
        address = self._cache("keys_out", self.length, self.thread_in_group)
        for chunk in range(self.case.chunks):
            words = vector(key[4 * chunk : 4 * chunk + 4])
            self.ptx.do("st.global.v4.b32", at(address, 64 * chunk), words, when=keeps)
        address = self._cache("values_out", self.length, self.thread_in_group << 1)
        for i, words in enumerate(value):
            offset = 128 * (i // 2) + 16 * (i % 2)
            self.ptx.do("st.global.v4.b32", at(address, offset), vector(words), when=keeps)

    def _begin(
        self, queries: list[list[Register]], key: list[Register], value: list[list[Register]]
    ) -> None:
        """The new token is the first that the first warp has seen; the others have seen none.

        `sums[row][i]` belongs to element 16 t + i % 16 of block i // 16; `totals` are parts of a row's.
        """
        ptx = self.ptx
        first, counts = self._is_first(), self._is_first(self.thread_in_group)
        key, values = self.unpack(key), [f for words in value for f in self.unpack(words)]
        never, one, zero = NEVER, 1.0, 0.0
        self.peaks, self.totals, self.sums = [], [], []
        for query in queries:
            own = over_lanes(ptx, "add.f32", self.dot(self.unpack(query), key), ROW_LANES)
            self.peaks.append(ptx.op("selp.f32", own, never, first))
            self.totals.append(ptx.op("selp.f32", one, zero, counts))
            self.sums.append([ptx.op("selp.f32", v, zero, first) for v in values])

    # Multiply: the tokens before it

    def _mix(self, query: list[list[Register]]) -> None:
        """Adds the warp's tiles to its sums."""
        ptx = self.ptx
        slot = self._slot(self.thread_in_group << 1)
        if self.case.halves == 1:
            self.sums.append([ptx.zero() for _ in self.sums[0]])
        ptx.label("fdk_tile")
        ptx.do("bra", "fdk_mixed", when=~self.more)
        slots = [slot + i for i in (0, 1, 8, 9)]
        in_bounds = [slot < self.length for slot in slots]
        values = self._load_values(in_bounds)
        scores = self._scores(query)
        step = WARPS * TILE
        ptx.do("add.u32", self.tile, self.tile, WARPS)
        ptx.do("setp.lt.u32", self.more, self.tile, self.stop)
        for address in (self.key_address, self.value_address):
            ptx.do("add.u64", address, address, step * self.row_bytes)
        ptx.do("add.u32", slot, slot, step)
        self._load_keys()
        if self.case.window is not None:
            seen = [slot >= self.lowest for slot in slots]
            in_bounds = [a & b for a, b in zip(in_bounds, seen, strict=True)]
        weights = [self._weights(half, scores[half], in_bounds) for half in range(self.case.halves)]
        self._add(weights, values)
        ptx.do("bra", "fdk_tile")
        ptx.label("fdk_mixed")

    def _scores(self, query: list[list[Register]]) -> list[list[Register]]:
        """Of a lane's rows, the scores of slots 2t, 2t + 1, 2t + 8 and 2t + 9."""
        ptx = self.ptx
        sums = [[ptx.zero() for _ in range(4)] for _ in range(2)]
        for step in range(0, 4 * self.case.chunks, 2):
            rows = [query[half][step : step + 2] for half in range(self.case.halves)]
            rows += [[self.zero] * 2] * (2 - self.case.halves)
            a = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
            chunk, word = divmod(step, 4)
            for slot in range(2):
                self.ptx.multiply_add(
                    half_kind(self.case.dtype),
                    sums[slot],
                    a,
                    self.keys[slot * self.case.chunks + chunk][word : word + 2],
                )
        return [
            [sums[slot][2 * half + i] for slot in range(2) for i in range(2)] for half in range(2)
        ]

    def _weights(
        self, half: int, scores: list[Register], in_bounds: list[Register]
    ) -> list[Register]:
        """Packed weights of a row's four slots, after the sums before them have been scaled down."""
        ptx, never = self.ptx, NEVER
        seen = [
            ptx.op("selp.f32", score, never, is_in_bounds)
            for score, is_in_bounds in zip(scores, in_bounds, strict=True)
        ]
        peak = seen[0]
        for score in seen[1:]:
            peak = ptx.op("max.f32", peak, score)
        peak = ptx.op("max.f32", over_lanes(ptx, "max.f32", peak, ROW_LANES), self.peaks[half])
        shrink = self.power(self.peaks[half], peak)
        for total in (self.totals[half], *self.sums[half]):
            ptx.do("mul.f32", total, total, shrink)
        ptx.do("mov.f32", self.peaks[half], peak)
        weights = []
        for score, is_in_bounds in zip(seen, in_bounds, strict=True):
            weight = self.power(score, peak)
            weight = ptx.op("selp.f32", weight, 0.0, is_in_bounds)
            weights.append(weight)
        packed = self.pack(weights)
        # Of the rounded ones: so a row whose largest weight was rounded is not off as a whole.
        for weight in self.unpack(packed):
            ptx.do("add.f32", self.totals[half], self.totals[half], weight)
        return packed

    def _add(self, weights: list[list[Register]], values: list[list[list[Register]]]) -> None:
        rows = weights + [[self.zero] * 2] * (2 - self.case.halves)
        a = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
        for block, slots in enumerate(values):
            for element in range(8):
                word, choice = element // 2, ("0x5410", "0x7632")[element % 2]
                b = [
                    self.ptx.op("prmt.b32", slots[i][word], slots[i + 1][word], choice)
                    for i in (0, 2)
                ]
                elements = (16 * block + element, 16 * block + 8 + element)
                sums = [self.sums[half][i] for half in range(2) for i in elements]
                self.ptx.multiply_add(half_kind(self.case.dtype), sums, a, b)

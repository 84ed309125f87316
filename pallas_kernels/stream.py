"""Products of one token with codes of 2, 4 and 8 bits in the program of `ring`.

What it multiplies is what `matvec` does, with x and the weight from shared memory. Each program has rows of one
codebook (of two, if its outputs are gated), for which it makes the decoder's table once. By itself such a
product is no faster than `matvec`'s; `chain` has several in a launch.
"""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import decoding, ring
from pallas_kernels.case import PLANE, TILE_ROWS, Case
from pallas_kernels.ptx import at, float_constant, vector, wide
from pallas_kernels.target import Target

_CODES = 1024  # bytes of a block's codes
_STEPS = 4  # instructions a plane
_AT_ONCE = 8  # vectors of x that a thread has on their way


def unsupported_product(case: Case, workers: int, programs: int) -> str | None:
    """Why the arithmetic does not take a case, or None."""
    if case.bits == 1 or case.m != 1 or case.group_size != PLANE:
        return f"{case.m} tokens, {case.bits} bits in groups of {case.group_size} are not 1, 2 to 8 and 64"
    if case.blocks * case.planes % 4 or workers * case.planes % 4:
        return f"blocks of {case.span} weights of {case.k} a row, {workers} at a time, split fours of scales"
    if jnp.dtype(case.scale_dtype).itemsize != 2:
        return f"scales are {case.scale_dtype}, not of two bytes"
    if case.books > min(programs, case.tiles):
        return f"{case.books} codebooks are more than {programs} programs or {case.tiles} tiles"
    return None


class Product(ring.Product):
    """Writes a product by decoded weights."""

    def __init__(self, case: Case, workers: int, programs: int, target: Target, **options) -> None:
        self.run_books = max(1, case.books // (2 if options.get("gated") else 1))
        self.book_programs = programs // self.run_books
        super().__init__(case, workers, programs, target, **options)
        books = self.runs if case.books > 1 else 1
        self.decoders = [
            decoding.decoder(self.ptx, case.bits, case.x_dtype, even=case.even)
            for _ in range(books)
        ]
        self.decoder = self.decoders[0]

    def _max_tiles(self) -> int:
        return -(-(self.run_tiles // self.run_books) // self.book_programs)

    def areas(self) -> dict[str, int]:
        """The decoders' tables, and x."""
        case, tables = self.case, 0
        for decoder in self.decoders:
            decoder.place = tables
            tables += decoder.shared_bytes
        books = len(self.decoders) * 4 * 2**case.bits
        return {"tables": tables, "x": case.blocks * case.span * 2, self.books_name: books}

    def _share(self, program: str) -> tuple[str, str]:
        if self.run_books == 1:
            self.book = None
            return super()._share(program)
        # Rows of one codebook; programs that are left over have none.
        ptx, book_tiles = self.ptx, self.run_tiles // self.run_books
        self.book = ptx.quotient(program, self.book_programs)
        rank = ptx.op("mad.lo.u32", self.book, -self.book_programs % 2**32, program)
        first, tiles = self._among(rank, book_tiles, self.book_programs)
        inside = ptx.op("setp.lt.u32", self.book, self.run_books, kind="pred")
        first = ptx.op("mad.lo.u32", self.book, book_tiles, first)
        return first, ptx.op("selp.b32", tiles, 0, inside)

    # Before the loop

    def load_books(self) -> Callable[[], None]:
        """Loads the codebook of the program's rows of each run."""
        ptx, threads, values = self.ptx, 32 * self.workers, 2**self.case.bits
        codebook, loads = self.operands["codebook"], []
        if self.book is not None:
            last = ptx.op("min.u32", self.book, self.run_books - 1)
            codebook = ptx.op("mad.wide.u32", last, 4 * values, codebook, kind="b64")
        for run, decoder in enumerate(self.decoders):
            decoder.space = "global"
            source = ptx.op("add.u64", codebook, run * self.run_books * 4 * values, kind="b64")
            for start in range(0, values, threads):
                index = ptx.op("add.u32", self.thread, start)
                in_bounds = ptx.op("setp.lt.u32", index, values, kind="pred")
                place = ptx.op("mad.lo.u32", index, 4, self.shared)
                value = decoder.value(source, index, in_bounds)
                loads.append((at(place, self.books_place + run * 4 * values), value, in_bounds))
            decoder.space = "shared"

        def store() -> None:
            for target, value, in_bounds in loads:
                ptx.do("st.shared.f32", target, value, when=in_bounds)

        return store

    def prepare_constants(self) -> None:
        """Makes the decoders' tables."""
        for run, decoder in enumerate(self.decoders):
            place = self.books_place + run * 4 * 2**self.case.bits
            codebook = self.ptx.op("add.u32", self.shared, place)
            decoder.set_up(codebook, self.thread, 32 * self.workers)

    def prepare_x(self, meanwhile: Callable[[], object]) -> None:
        """Copies x."""
        ptx, threads = self.ptx, 32 * self.workers
        count = self.case.blocks * self.case.span // 8
        address = ptx.op("mad.wide.u32", self.thread, 16, self.operands["x"], kind="b64")
        target = ptx.op("mad.lo.u32", self.thread, 16, self.shared)
        starts = range(0, count, threads)
        for first in range(0, len(starts), _AT_ONCE):
            loads = []
            for start in starts[first : first + _AT_ONCE]:
                in_bounds = ptx.op(
                    "setp.lt.u32", self.thread, min(count - start, threads), kind="pred"
                )
                words = ptx.registers("b32", 4)
                ptx.do(
                    f"{self.load}.v4.b32", vector(words), at(address, 16 * start), when=in_bounds
                )
                loads.append((start, words, in_bounds))
            if not first:
                meanwhile()
            for start, words, in_bounds in loads:
                place = at(target, self.places["x"] + 16 * start)
                ptx.do("st.shared.v4.b32", place, vector(words), when=in_bounds)

    # The loop over the program's blocks

    def start_run(self, run: int) -> None:
        """Where this lane's operands are."""
        self.decoder = self.decoders[min(run, len(self.decoders) - 1)]
        if run:
            return
        ptx, case = self.ptx, self.case
        self.has_token = ptx.op("setp.eq.u32", self.row, 0, kind="pred")
        self.keeps = ptx.op("setp.eq.u32", self.quad, 0, kind="pred")
        self.x_place = ptx.op("mad.lo.u32", self.quad, 16, self.shared)
        codes = ptx.op("mul.lo.u32", self.warp, _CODES)
        self.codes = ptx.op("mad.lo.u32", self.lane, 16, codes)
        # Four groups of a row are neighbours, each with the scales of the upper and the lower row.
        group = ptx.op("mul.lo.u32", self.warp, case.planes)
        scales = ptx.op("mul.lo.u32", ptx.op("shr.u32", group, 2), 64 * 2)
        scales = ptx.op("mad.lo.u32", ptx.op("and.b32", group, 3), 2 * 2, scales)
        self.scales = ptx.op("mad.lo.u32", self.row, 8 * 2, scales)
        place = ptx.op("mad.lo.u32", self.warp, 4 * TILE_ROWS, self.shared)
        self.partial = ptx.op("mad.lo.u32", self.row, 8, place)
        self.zero = ptx.op("mov.f32", float_constant(0.0), kind="f32")

    def start_tile(self, tile: str, run: int) -> None:
        """Nothing: the rows have one codebook."""

    def load_x(self, block: str) -> None:
        """The x of a block's planes, for the lanes of the column that has a token."""
        ptx, case = self.ptx, self.case
        place = ptx.op("mad.lo.u32", block, case.span * 2, self.x_place)
        self.x = []
        for plane in range(case.planes):
            words = ptx.registers("b32", 8)
            for half in range(2):
                part = vector(words[4 * half : 4 * half + 4])
                offset = self.places["x"] + plane * 2 * PLANE + half * PLANE
                ptx.do("ld.shared.v4.b32", part, at(place, offset), when=self.has_token)
            self.x.append(self.decoder.paired(words))

    def load_block(self, slot: str) -> None:
        """The codes, and the scales of the upper and the lower row."""
        ptx, planes = self.ptx, self.case.planes
        self.words, self.scale_pairs = ptx.registers("b32", 8), ptx.registers("b32", planes)
        codes, scales = (ptx.op("add.u32", slot, part) for part in (self.codes, self.scales))
        for half in range(2):
            part = vector(self.words[4 * half : 4 * half + 4])
            ptx.do("ld.shared.v4.b32", part, at(codes, half * _CODES // 2))
        width, pairs = wide(self.scale_pairs)
        ptx.do(f"ld.shared{width}.b32", pairs, at(scales, self.workers * _CODES))

    def multiply(self) -> None:
        """Adds the products of the planes, times their scales, to the totals."""
        ptx, case, kind = self.ptx, self.case, self.decoder.kind
        for plane, (x, pair) in enumerate(zip(self.x, self.scale_pairs, strict=True)):
            sums = ptx.registers("f32", 4)
            for step in range(_STEPS):
                ptx.do(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
                    vector(sums),
                    vector(self.decoder.operands(self.words, plane, step)),
                    vector(x[2 * step : 2 * step + 2]),
                    vector(sums if step else [self.zero] * 4),
                )
            factors = decoding.unpack(ptx, pair, case.scale_dtype)
            for total, factor, part in zip(self.totals, factors, sums[::2], strict=True):
                ptx.do("fma.rn.f32", total, factor, part, total)

    def store_totals(self, tile: str) -> None:
        """Stores the sums of the column that has a token."""
        place = self.ptx.op("mad.lo.u32", tile, self.workers * 4 * TILE_ROWS, self.partial)
        target = at(place, self.places["partial"])
        self.ptx.do("st.shared.v2.b32", target, vector(self.totals), when=self.keeps)

    def finish(self, total: str, run: int) -> str:
        """The sum times what the decoder has left out."""
        factor = self.decoders[min(run, len(self.decoders) - 1)].factor
        return total if factor is None else self.ptx.op("mul.f32", total, factor, kind="f32")

"""What a program of the Mosaic GPU kernel computes, and how it finds its tile of a grouped product, in MLIR."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils

from pallas_kernels.mosaic_values import U32, i32, minimum, op, thread


class Tile(NamedTuple):
    """What a program computes.

    Attributes:
        m: the first row of x.
        rows: how many of them are its own; None for as many as there are.
        program: along N.
        group: whose matrix; None if there is one matrix.
        first_slab: where along K it starts.
        slabs: how many it takes.
        before: slabs that a persistent program has gone through before; None of other programs.
    """

    m: Any
    rows: Any
    program: Any
    group: Any
    first_slab: Any
    slabs: Any
    before: Any = None

    def from_row(self, first: Any) -> "Tile":
        """The part of it from one of its rows of x on."""
        rows = None if self.rows is None else jnp.maximum(self.rows - first, 0)
        return self._replace(m=self.m + first, rows=rows)

    def past(self, count: Any, per_slab: int = 1) -> Any:
        """A number of slabs (or of planes, with so many a slab), with those before the tile."""
        return count if self.before is None else self.before * per_slab + count

    def of_matrix(self, ref: Any, *index: Any) -> Any:
        """A part of an array with an element for each matrix."""
        return ref.at[index if self.group is None else (self.group, *index)]


def find_tile(
    sizes: ir.Value, visit: U32, *, groups: int, tokens: int, rows: int
) -> tuple[U32, U32, U32]:
    """The tile of a grouped product that a program computes: its group, first row, and number of rows.

    Tiles of T rows start with each group; group E stands for the rows that belong to none. The lanes of each
    warp add the sizes of some neighbours each, and ask each other for the sums of those before.

    Args:
        sizes: int32 [E] in device memory.
        visit: which tile.
        groups: E.
        tokens: T.
        rows: of x.

    Returns:
        (group, first, rows); no rows if there is no such tile.
    """
    lane, each = thread() % 32, -(-groups // 32)
    base, limit = utils.memref_ptr(sizes), U32(rows)
    found = []
    for i in range(each):
        index = lane * each + i
        known = 1 - (index >= groups)
        in_bounds_index = minimum(index, U32(groups - 1))
        size = llvm.load(i32(), utils.getelementptr(base, [in_bounds_index.value], i32()))
        # A negative size counts as none, one past x as its end: no sum overflows.
        size = arith.minsi(arith.maxsi(size, U32(0).value), limit.value)
        found.append(U32(size) * known)
    tiles = [(size + (tokens - 1)) // tokens for size in found]
    row, tile = _before(sum(found, U32(0)), lane), _before(sum(tiles, U32(0)), lane)
    all_rows, all_tiles = (
        op("shfl.sync.idx.b32 $0, $1, 31, 31, 0xffffffff;", total)
        for total in (row + sum(found, U32(0)), tile + sum(tiles, U32(0)))
    )
    results = [U32(0)] * 3
    for i, (size, count) in enumerate(zip(found, tiles, strict=True)):
        here = (visit >= tile) * (1 - (visit >= tile + count))
        first = row + (visit - tile) * tokens
        for j, value in enumerate((lane * each + i, first, row + size)):
            results[j] = results[j] + here * value
        row, tile = row + size, tile + count
    group, first, end = (op("redux.sync.add.u32 $0, $1, 0xffffffff;", r) for r in results)
    past = visit >= all_tiles
    group = group + past * groups
    first = first + past * (all_rows + (visit - all_tiles) * tokens)
    end = minimum(end + past * rows, limit)
    return group, first, (end - first) * (end >= first)


def _before(value: U32, lane: U32) -> U32:
    """The sum of the values of the lanes before."""
    total = value
    for distance in (1, 2, 4, 8, 16):
        other = op(f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;", total)
        total = total + other * (lane >= distance)
    return total - value

"""Which tiles, and which parts of them, persistent programs of the Mosaic GPU kernel compute.

There are at most as many programs as multiprocessors. Each computes whole tiles, every `programs`-th one, as
long as there is one for every program. The tiles that are left (all of them, if there are fewer than programs)
are shared by slabs: each program has as many consecutive slabs, so of one tile, or of the end of one and the
start of the next. Whoever has the last slabs of a tile adds the sums of the others, and writes it.

A program starts with the start of its second shared tile, whose sums it gives away, and ends with the first
one: so the sums for which it waits there were mostly given long ago. It waits for programs of lower numbers
only, which were launched before it: they end even where the GPU does not run all programs at once.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp


class Piece(NamedTuple):
    """Consecutive slabs of a tile.

    Attributes:
        tile: which one.
        first: its first slab.
        slabs: how many, perhaps none.
    """

    tile: Any
    first: Any
    slabs: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who computes what.

    Attributes:
        tiles: how many there are.
        slabs: of a tile.
        programs: how many.
    """

    tiles: int
    slabs: int
    programs: int

    @property
    def rounds(self) -> int:
        """Whole tiles of each program."""
        return self.tiles // self.programs

    @property
    def shared(self) -> int:
        """The last tiles, whose slabs programs share."""
        return self.tiles % self.programs

    @property
    def most(self) -> int:
        """Slabs of the program that has the most."""
        return self.rounds * self.slabs - -self.shared * self.slabs // self.programs

    def start(self, program: Any) -> Any:
        """The first slab of a program, of those of all shared tiles."""
        return program * (self.shared * self.slabs) // self.programs

    def steps(self) -> range:
        """The numbers of `piece`; the first and the last one are shared tiles."""
        return range(0, self.rounds + 2) if self.shared else range(1, self.rounds + 1)

    def piece(self, program: Any, step: Any) -> Piece:
        """What a program computes in a step."""
        tile = (step - 1) * self.programs + program
        if not self.shared:
            return Piece(tile, 0, self.slabs)
        start, end = self.start(program), self.start(program + 1)
        middle = jnp.minimum((start // self.slabs + 1) * self.slabs, end)
        is_first, is_last = step == 0, step == self.rounds + 1
        first = jnp.where(is_first, middle, start)
        count = jnp.where(is_first, end, middle) - first
        is_shared = is_first | is_last
        return Piece(
            jnp.where(is_shared, self.rounds * self.programs + first // self.slabs, tile),
            jnp.where(is_shared, first % self.slabs, 0),
            jnp.where(is_shared, count, self.slabs),
        )

    def ends(self, piece: Piece) -> Any:
        """Whether a piece has the last slab of its tile: so its program writes the tile."""
        return piece.first + piece.slabs == self.slabs

    def first_giver(self, piece: Piece) -> Any:
        """The first program with slabs of the tile of a piece."""
        slab = (piece.tile - self.rounds * self.programs) * self.slabs
        # The largest p with p * all // programs <= slab.
        return ((slab + 1) * self.programs - 1) // (self.shared * self.slabs)


def fewest_programs(tiles: int, slabs: int, most: int) -> int:
    """The fewest programs, of so many at most, that need no more rounds or slabs than all of them would."""
    if tiles >= most:
        return most
    longest = -(-tiles * slabs // most)
    return -(-tiles * slabs // longest)

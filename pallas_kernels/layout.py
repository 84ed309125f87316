"""The planar order of codes and scales: where in a tile a code is, and which code is where.

A tile is 16 rows by E = 8 / bits planes of 64 weights. Its codes are uint16 [2, 8, 32]: words [a, r, index]
have codes of the rows r and r + 8, 16 / bits of each word. `fdk_jax.format.packing` writes and draws this
order; here is its arithmetic, for kernels that index words.
"""

import dataclasses
from typing import Any

PLANE = 64  # weights of a row in a plane
HALF_PLANE = PLANE // 2  # of which a lane has 8 neighbours
TILE_ROWS = 16
WORDS = 32  # words of a row and half of a tile
HALVES = 2
TILE_BYTES = 2 * HALVES * 8 * WORDS  # of a tile's codes
SCALE_GROUPS = 4  # groups whose scales are neighbours
FOUR_SCALES = SCALE_GROUPS * TILE_ROWS  # scales of a tile's rows in four such groups


@dataclasses.dataclass(frozen=True)
class Shift:
    """The codes that one shift brings to the lowest bits of a half's words: one of each.

    Words at even and odd indices differ in one of row, plane and column within it, by the width of a code.

    Attributes:
        bits: width of a code.
        half: a, the half of the tile.
        number: of the shift, which is by `number * bits`.
    """

    bits: int
    half: int
    number: int

    def _slot(self, odd: int) -> int:
        """The number of the code among the 64 / bits of a lane and step."""
        if self.bits == 1:
            return 32 * self.half + 2 * self.number + odd
        return (2 * self.half + odd) * (16 // self.bits) + self.number

    def lower(self, odd: int) -> bool:
        """Whether the code at an even or odd index is of the row r + 8."""
        return bool(self._slot(odd) >> 1 & 1)

    def plane(self, odd: int) -> int:
        """The plane of the code at an even or odd index."""
        return self._slot(odd) >> 3

    def column(self, index: Any) -> Any:
        """The column in the tile of the code at an index, or at an array of indices."""
        first, second = (self._column(odd) for odd in range(2))
        step, half, eighth = index >> 1 & 1, index >> 2 & 1, index >> 3
        return first + (second - first) * (index & 1) + 32 * half + 8 * eighth + 4 * step

    def _column(self, odd: int) -> int:
        slot = self._slot(odd)
        return PLANE * (slot >> 3) + 2 * (slot >> 2 & 1) + (slot & 1)


def shifts(bits: int) -> list[Shift]:
    """All shifts of both halves of a tile: with them each code of it is found once."""
    return [Shift(bits, half, i) for half in range(HALVES) for i in range(16 // bits)]


def scale_index(row: Any, group: Any) -> tuple[Any, Any]:
    """Where among the scales [fours, 64] of a tile's rows that of a row (0 to 15) and a group is."""
    return group >> 2, ((row & 7) * SCALE_GROUPS + (group & 3)) * 2 + (row >> 3)


def scale_offset(group: int, scale_bytes: int) -> int:
    """Bytes from a row's first scale to that of a group. The scale of row + 8 follows each."""
    four, within = divmod(group, SCALE_GROUPS)
    return (four * FOUR_SCALES + 2 * within) * scale_bytes

"""The planar order of codes and scales: where in a tile a code is, and which code is where.

A tile is 16 rows by E planes of 64 weights. Its codes are uint16 [parts, 8, 32]: words [a, r, index] have
codes of the rows r and r + 8. Widths that divide 8 have two parts, halves, and 16 / bits codes of a row in a
word. `fdk_jax.format.packing` writes and draws this order; here is its arithmetic, for kernels that index
words.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

PLANE = 64  # weights of a row in a plane
HALF_PLANE = PLANE // 2  # of which a lane has 8 neighbours
TILE_ROWS = 16
WORDS = 32  # words of a row and part of a tile
PART_BYTES = 2 * 8 * WORDS  # 32 bits of each lane and step
# E by the width of a code. All that kernels do with a width starts here: one that is missing is refused.
PLANES = {1: 8, 2: 4, 4: 2, 8: 1}
SCALE_GROUPS = 4  # groups whose scales are neighbours
FOUR_SCALES = SCALE_GROUPS * TILE_ROWS  # scales of a tile's rows in four such groups


def planes(bits: int) -> int:
    """E, planes of 64 weights a tile, after checking that there is a planar order for such codes."""
    if type(bits) is not int or bits not in PLANES:  # 4.0 == 4, but no shape takes it
        raise ValueError(f"{bits=} is not supported by GPU kernels; use one of {(*PLANES,)}")
    return PLANES[bits]


def parts(bits: int) -> int:
    """Parts of a tile, each with 32 bits of each lane and step, which has 8 codes of each plane."""
    return planes(bits) * bits // 4


@dataclasses.dataclass(frozen=True)
class Shift:
    """The codes that one shift brings to the lowest bits of a half's words: one of each.

    For widths that divide 8; others have codes in words of several parts.

    Words at even and odd indices differ in one of row, plane and column within it, by the width of a code.

    Attributes:
        bits: width of a code.
        half: a, the half of the tile.
        number: of the shift, which is by `number * bits`.
    """

    bits: int
    half: int
    number: int

    def code(self, words: Sequence[Any]) -> Any:
        """The codes, from the words of each part."""
        return words[self.half] >> (self.number * self.bits) & (2**self.bits - 1)

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
    return [Shift(bits, half, i) for half in range(parts(bits)) for i in range(16 // bits)]


def scale_index(row: Any, group: Any) -> tuple[Any, Any]:
    """Where among the scales [fours, 64] of a tile's rows that of a row (0 to 15) and a group is."""
    return group >> 2, ((row & 7) * SCALE_GROUPS + (group & 3)) * 2 + (row >> 3)


def scale_offset(group: int, scale_bytes: int) -> int:
    """Bytes from a row's first scale to that of a group. The scale of row + 8 follows each."""
    four, within = divmod(group, SCALE_GROUPS)
    return (four * FOUR_SCALES + 2 * within) * scale_bytes

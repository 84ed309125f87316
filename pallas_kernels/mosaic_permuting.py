"""Values of codes of 2 and 4 bits by permutations of bytes in registers, in MLIR.

Where a program has many tokens, its shared memory is busy with x, and a table there would be in the way. A
`prmt` takes four of eight bytes by the three lower bits of four digits (4 bits each), so that two of them and a
selection look up a byte of four values among 16.
"""

from pallas_kernels.mosaic_values import U32, op

_LOWER, _UPPER = "0x6420", "0x7531"  # of each of two registers with two halves


def table(pairs: list[U32]) -> list[U32]:
    """Registers with the lower bytes of all halves, then with the upper ones, from two halves a register."""
    twos = list(zip(pairs[::2], pairs[1::2], strict=True))
    return [
        op(f"prmt.b32 $0, $1, $2, {order};", *two) for order in (_LOWER, _UPPER) for two in twos
    ]


def halves(word: U32, looked_up: list[U32], bits: int) -> list[U32]:
    """The values of four codes, two a register.

    Args:
        word: the codes, lowest first; all other bits are zero.
        looked_up: what `table` gives for the 2**bits values.
        bits: 2 or 4.
    """
    if bits == 2:  # each code becomes a digit
        word = op("lop3.b32 $0, $1, $2, 0x0F0F, 0xA8;", word, word << 4)
        word = op("lop3.b32 $0, $1, $2, 0x3333, 0xA8;", word, word << 2)
        low, high = (op("prmt.b32 $0, $1, $1, $2;", part, word) for part in looked_up)
    else:
        mask = _upper_half_mask(word, "0xD9C8")
        word = op("and.b32 $0, $1, 0x7777;", word)
        low, high = (_among_16(looked_up[start : start + 4], word, mask) for start in (0, 4))
    return [op(f"prmt.b32 $0, $1, $2, {order};", low, high) for order in ("0x5140", "0x7362")]


def products(pairs: list[U32], scale: U32) -> list[U32]:
    """16 halves times a scale as integers of 8 bits, four a register.

    Args:
        pairs: float16, two a register.
        scale: float16, twice.
    """
    # Between 1024 and 2048 halves are integers: 1536 + i has i in its lower byte.
    text = "fma.rn.f16x2 $0, $1, $2, $3;"
    return table([op(text, pair, scale, U32(0x66006600)) for pair in pairs])[:4]


def integers(word: U32, tables: list[list[U32]]) -> list[U32]:
    """Integers of 8 bits for eight codes of 4 bits, of which row g has the first two of each four.

    Args:
        word: the codes, lowest first.
        tables: what `products` gives for rows g and g + 8.

    Returns:
        A register for each row.
    """
    digits, found = op("and.b32 $0, $1, 0x77777777;", word), []
    orders = ("0x20", "0xEAC8"), ("0x31", "0xFBD9")
    for row, (digit_order, mask_order) in zip(tables, orders, strict=True):
        own = op(f"prmt.b32 $0, $1, $1, {digit_order};", digits)
        found.append(_among_16(row, own, _upper_half_mask(word, mask_order)))
    return found


def _upper_half_mask(word: U32, order: str) -> U32:
    """A byte of ones for each of four digits that is 8 or more.

    The order takes highest bits of bytes, which those of even digits are after a shift.
    """
    return op(f"prmt.b32 $0, $1, $2, {order};", word << 4, word)


def _among_16(parts: list[U32], digits: U32, mask: U32) -> U32:
    """Four of 16 bytes; the mask says which are in the upper half."""
    low, high = (
        op("prmt.b32 $0, $1, $2, $3;", *parts[start : start + 2], digits) for start in (0, 2)
    )
    return op("lop3.b32 $0, $1, $2, $3, 0xE4;", high, low, mask)

"""Instructions on integers, bits and predicates: functions of raw bits [threads] uint64."""

import functools
import re
from collections.abc import Callable

import numpy as np

Operation = Callable[..., np.ndarray]
_WORD = np.uint64(32)


def signed(bits: np.ndarray, width: int) -> np.ndarray:
    """The low bits as two's complement, int64."""
    shift = 64 - width
    return (bits << np.uint64(shift)).view(np.int64) >> shift


def low(bits: np.ndarray, width: int) -> np.ndarray:
    """The low bits, the others zero."""
    return bits & np.uint64(2**width - 1)


def four_bytes(bits: np.ndarray, kind: str) -> np.ndarray:
    """The bytes [threads, 4] of the low 32 bits, the lowest first; signed of kind "s"."""
    return bits.astype(np.uint32)[:, None].view(np.int8 if kind == "s" else np.uint8)


def _number(bits: np.ndarray, kind: str, width: int) -> np.ndarray:
    return signed(bits, width) if kind == "s" else low(bits, width)


def _shift(way: str, kind: str, width: int, a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Shifts; by the width or more nothing is left but signs, as in numpy."""
    by = low(by, 32)
    if way == "shl":
        return a << by
    if kind == "s":
        return (signed(a, width) >> by.view(np.int64)).view(np.uint64)
    return a >> by


def _product(part: str, kind: str, width: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The low or high half, or the whole, of a product."""
    product = (_number(a, kind, width) * _number(b, kind, width)).view(np.uint64)
    return product >> np.uint64(width) if part == "hi" else product


def _multiply_add(
    part: str, kind: str, width: int, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> np.ndarray:
    return _product(part, kind, width, a, b) + c


def _extreme(choose: Operation, kind: str, width: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return choose(_number(a, kind, width), _number(b, kind, width)).astype(np.uint64)


def permute_bytes(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """The byte of each selector's low three bits, or its sign eight times if the fourth is set."""
    selectors = selectors[:, None] >> np.arange(0, 16, 4, dtype=np.uint64)
    both = (low(a, 32) | b << _WORD)[:, None].view(np.uint8)
    found = np.take_along_axis(both, low(selectors, 3).view(np.int64), axis=1)
    if (negative := selectors & np.uint64(8)).any():
        found = np.where(negative != 0, np.uint8(0xFF) * (found >> 7), found)
    return found.view(np.uint32)[:, 0].astype(np.uint64)


def by_table(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit by bit what a table of eight bits says of (a, b, c), a the highest."""
    result, entries = np.zeros_like(a), int(table[0])
    for i in range(8):
        if entries >> i & 1:
            x, y, z = (v if i & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1)))
            result |= x & y & z
    return result


def extract_bits(kind: str, a: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`bfe`: up to `count` bits from `start` on, both modulo 256; beyond the top there are signs or zeros."""
    start, count = (np.minimum(low(v, 8), _WORD) for v in (start, count))
    moved = _shift("shr", kind, 32, a, start)
    field = low(moved, 32) & (np.uint64(1) << count) - np.uint64(1)
    if kind == "u":
        return field
    # The sign is that of the field's last bit, or of the word if the field reaches beyond it.
    last = np.minimum(start + count - np.uint64(1), np.uint64(31))
    sign = np.where(count == 0, 0, low(a >> last, 1))
    return np.where(sign, field | ~np.uint64(0) << count, field)


def dot_bytes(kinds: tuple[str, str], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The products of four bytes each, added to a number."""
    x, y = (four_bytes(v, k) for v, k in zip((a, b), kinds, strict=True))
    return c + np.einsum("ti,ti->t", x, y, dtype=np.int64).view(np.uint64)


_SIMPLE: dict[str, Operation] = {
    "mov": lambda a: a,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "add": np.add,
    "sub": np.subtract,
}
_PATTERNS: list[tuple[str, Callable[[re.Match], Operation]]] = [
    (r"(?:and|or|xor|not)\.b(?:16|32|64)", lambda m: _SIMPLE[m[0][: m[0].index(".")]]),
    (r"(and|or|xor|not|mov)\.pred", lambda m: _SIMPLE[m[1]]),
    (r"(mov)\.[busf](?:16|32|64)", lambda m: _SIMPLE[m[1]]),
    (r"(add|sub)\.[us](?:32|64)", lambda m: _SIMPLE[m[1]]),
    (r"(sh[lr])\.([bus])(32|64)", lambda m: functools.partial(_shift, m[1], m[2], int(m[3]))),
    (r"mul\.(lo|hi|wide)\.([us])(32)", lambda m: _of(_product, m)),
    (r"mul\.(lo)\.([us])(64)", lambda m: _of(_product, m)),
    (r"mad\.(lo|wide)\.([us])(32)", lambda m: _of(_multiply_add, m)),
    (r"mad\.(lo)\.([us])(64)", lambda m: _of(_multiply_add, m)),
    (r"min\.([us])(32|64)", lambda m: functools.partial(_extreme, np.minimum, m[1], int(m[2]))),
    (r"max\.([us])(32|64)", lambda m: functools.partial(_extreme, np.maximum, m[1], int(m[2]))),
    (r"prmt\.b32", lambda m: permute_bytes),
    (r"lop3\.b32", lambda m: by_table),
    (r"bfe\.([us])32", lambda m: functools.partial(extract_bits, m[1])),
    (r"dp4a\.([us])32\.([us])32", lambda m: functools.partial(dot_bytes, (m[1], m[2]))),
]


def _of(function: Operation, found: re.Match) -> Operation:
    return functools.partial(function, found[1], found[2], int(found[3]))


def find(opcode: str) -> Operation | None:
    """The function of an opcode's sources, or None."""
    for pattern, make in _PATTERNS:
        if found := re.fullmatch(pattern, opcode):
            operation = make(found)
            width = 64 if "wide" in opcode else int((re.findall(r"\d+$", opcode) or ["1"])[0])
            if width == 64:
                return operation
            return lambda *values: low(operation(*values), width)
    return None

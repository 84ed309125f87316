"""Look-ups by permutations of bytes, with the instructions in numpy: every code against its value."""

import itertools
import re

import numpy as np
import pytest

from pallas_kernels import mosaic_permuting


def _permute(a, b, order):
    """PTX's `prmt`: four bytes of eight, or their highest bits spread over a byte."""
    eight = [(word >> 8 * i) & 255 for word in (a, b) for i in range(4)]
    result = 0
    for i in range(4):
        digit = order >> 4 * i & 15
        byte = np.choose(digit & 7, np.broadcast_arrays(*eight))
        byte = np.where(digit & 8, (byte >> 7) * 255, byte)
        result = result + (byte << 8 * i)
    return result


def _logic(a, b, c, table):
    return sum(
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        for i in range(8)
        if table >> i & 1
    )


def _fma(a, b, c):
    def halves(word):
        return np.asarray(word, np.uint32)[..., None].view(np.float16).astype(np.float64)

    wide = halves(a) * halves(b) + halves(c)
    return wide.astype(np.float16).view(np.uint32)[..., 0].astype(np.int64)


def _op(text, *operands):
    """An instruction of `mosaic_values.op` on arrays of numbers."""
    name, *slots = re.fullmatch(r"(\S+) \$0, (.*);", text)[0].rstrip(";").replace(",", "").split()
    values = [operands[int(slot[1:]) - 1] if slot[0] == "$" else int(slot, 0) for slot in slots[1:]]
    run = {"prmt.b32": _permute, "lop3.b32": _logic, "fma.rn.f16x2": _fma}
    run["and.b32"] = lambda a, b: a & b
    return run[name](*values) & 0xFFFFFFFF


@pytest.fixture(autouse=True)
def _in_numpy(monkeypatch):
    monkeypatch.setattr(mosaic_permuting, "op", _op)
    monkeypatch.setattr(mosaic_permuting, "U32", int)


@pytest.mark.parametrize("bits", [2, 4])
def test_halves_of_every_four_codes(bits, rng):
    values = rng.integers(0, 2**16, 2**bits)
    pairs = [np.int64(low | high << 16) for low, high in values.reshape(-1, 2)]
    words = np.arange(2 ** (4 * bits))
    first, second = mosaic_permuting.halves(words, mosaic_permuting.table(pairs), bits)
    codes = [words >> bits * i & 2**bits - 1 for i in range(4)]
    np.testing.assert_array_equal(first, values[codes[0]] | values[codes[1]] << 16)
    np.testing.assert_array_equal(second, values[codes[2]] | values[codes[3]] << 16)


def test_integers_of_every_code_in_every_place(rng):
    """Products of values and scales, rounded, of codes of two rows in turn."""
    values = np.sort(rng.uniform(-1, 1, 16)).astype(np.float16)
    pairs = [np.int64(word) for word in values.view(np.uint32)]
    scales = rng.uniform(0, 127, 2).astype(np.float16)
    twice = [np.int64(np.repeat(scale, 2).view(np.uint32)[0]) for scale in scales]
    tables = [mosaic_permuting.products(pairs, scale) for scale in twice]
    words = rng.integers(0, 2**32, 4096)
    found = mosaic_permuting.integers(words, tables)
    wide = values.astype(np.float64), scales.astype(np.float64)
    for row, (code, byte) in itertools.product(range(2), zip((0, 1, 4, 5), range(4), strict=True)):
        codes = words >> 4 * (code + 2 * row) & 15
        wanted = np.rint(wide[0] * wide[1][row]).astype(np.int8)[codes]
        np.testing.assert_array_equal((found[row] >> 8 * byte & 255).astype(np.int8), wanted)

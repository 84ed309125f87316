"""The table of modelled times is what `bounds` counts, and its model is near what an H200 took."""

import bounds
import numpy as np
import pytest

from pallas_kernels.ptx import Ptx
from pallas_kernels.registers import at, vector


def test_the_table_of_the_document():
    [found] = bounds._TABLE.findall(bounds.DOCUMENT.read_text(encoding="utf-8"))
    assert found == bounds.table(), "python tests/bounds.py prints it"


def test_the_model_beside_rows_of_an_h200():
    rows = list(bounds.compared())
    assert len(rows) == 12
    errors = {(bits, m): modelled / us - 1 for bits, m, us, modelled in rows}
    print(errors)
    worst = errors.pop((1, 16))
    assert abs(worst) < 0.25 and max(map(abs, errors.values())) < 0.15


@pytest.mark.parametrize(
    ("addresses", "size", "cycles"),
    [
        (np.arange(32) * 4, 4, 1),  # each a bank of its own
        (np.zeros(32, int), 4, 1),  # one word for all
        (np.arange(32) * 128, 4, 32),  # one bank
        (np.arange(32) * 8, 4, 2),
        (np.arange(32) * 16, 16, 4),  # 512 bytes
        (np.arange(32) * 2, 2, 1),
    ],
)
def test_cycles_of_an_access_to_shared_memory(addresses, size, cycles):
    assert bounds._bank_cycles(addresses, np.arange(32), size) == cycles


def test_counts_of_a_program():
    """Two warps: 32 lanes load 16 bytes each, half of them under a predicate, and store 4 to shared memory."""
    ptx = Ptx()
    [x] = ptx.operands("x").values()
    ptx.share(1024)
    thread = ptx.op("mov.u32", "%tid.x")
    words = ptx.registers("b32", 4)
    for word in words:
        ptx.do("mov.b32", word, 0)
    ptx.do("ld.global.v4.b32", vector(words), at(x + thread * 16), when=thread < 32)
    ptx.do("st.shared.b32", at(ptx.op("mov.u32", "fdk_shared") + thread * 4), words[0])
    counts = bounds.run(ptx.text(), [np.zeros(256, np.uint32)], 64)
    assert (counts.bytes, counts.cycles) == (512, 4 + 2)
    assert (counts.integers, counts.macs) == (2, 0)
    assert counts.issued == 2 * (1 + 4 + 1 + 1 + 1 + 1 + 1 + 1)

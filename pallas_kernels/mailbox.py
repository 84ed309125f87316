"""Words that GPUs of one process leave in each other's memory, over the links between them.

Each device has a mailbox, and stores what it has for the others, itself included, into theirs: nobody asks for
anything, so that a word takes one way over a link. A word is 32 bits of a value beside a number of 32 bits, and
is written at once: who finds the number that it waits for has the value too. The number counts the launches, so
that no word has to be cleared. Two parts of a mailbox take turns: who has started on the next sum but one has
seen all others finish this one.

Of a mailbox `peer_sum` has the first rows, and `chain` what comes after them.
"""

import jax

from pallas_kernels.ptx import Ptx
from pallas_kernels.registers import Register, at, wide

MAX_ROWS = 64
MAX_PROGRAMS = 256  # of a chain: each counts its launches
HEAD = 128  # bytes of a row before its words: the number of the newest launch
PARTS = 2
WORD = 8  # bytes
# How often a thread looks whether a word has come, about a minute. Then it traps: the others are not there.
_LOOKS = 1 << 26


def words(devices: int, features: int) -> int:
    """Of 32 bits, that each device's mailbox has for rows of so many features."""
    return (chain_start(devices, features) + chain_bytes(devices, features)) // 4


def row_bytes(devices: int, features: int) -> int:
    """What a row takes: for each value a word from each device, in each part."""
    return HEAD + PARTS * devices * features * WORD


def chain_start(devices: int, features: int) -> int:
    """Where in a mailbox a chain's part is, in bytes."""
    return MAX_ROWS * row_bytes(devices, features)


def chain_bytes(devices: int, features: int) -> int:
    """What a chain takes, after all rows: the programs' counts, and words as of a row."""
    return 4 * MAX_PROGRAMS + PARTS * devices * features * WORD


def check(mailbox: jax.Array, devices: int, features: int) -> None:
    """Refuses an array that is no mailbox.

    Raises:
        ValueError: one of other devices or features.
    """
    if mailbox.size != words(devices, features):
        raise ValueError(
            f"a mailbox of {mailbox.size} words is not for {devices} devices and {features} features"
        )


def open_all(
    ptx: Ptx, mailbox: Register, addresses: Register, devices: int
) -> tuple[Register, list[Register]]:
    """This device's number, and where each device's mailbox is; traps if its own is not there.

    Args:
        ptx: the block.
        mailbox: this device's.
        addresses: of an array: the device's number and zero, then the address of each mailbox.
        devices: how many.
    """
    rank = ptx.op("ld.global.nc.b32", at(addresses))
    found = [ptx.op("ld.global.nc.b64", at(addresses, 8 + 8 * i)) for i in range(devices)]
    own = ptx.op("ld.global.nc.b64", at(addresses + rank * 8, 8))
    # A mailbox that was copied is another: the others would write where nobody reads.
    moved = own.ne(mailbox)
    ptx.do("trap", when=moved)
    return rank, found


def send(
    ptx: Ptx,
    address: Register,
    values: list[Register],
    number: Register,
    offset: int = 0,
    when: Register | None = None,
) -> None:
    """Stores words of values and the number."""
    found = ptx.registers("b64", len(values))
    for word, value in zip(found, values, strict=True):
        ptx.do("mov.b64", word, f"{{{value}, {number}}}")
    kind, operand = wide(found)
    ptx.do(f"st.relaxed.sys.global{kind}.b64", at(address, offset), operand, when=when)


def receive(
    ptx: Ptx, addresses: list[tuple[Register, int]], count: int, number: Register, name: str
) -> list[list[Register]]:
    """Waits until words with the number are at all addresses: `count` values from each address on."""
    looks = ptx.op("mov.u32", 0)
    words = [ptx.registers("b64", count) for _ in addresses]
    halves = [[ptx.registers("b32", 2) for _ in own] for own in words]
    ptx.label(f"fdk_receive_{name}")
    ready = None
    for (address, offset), own, parts in zip(addresses, words, halves, strict=True):
        kind, operand = wide(own)
        ptx.do(f"ld.relaxed.sys.global{kind}.b64", operand, at(address, offset))
        for word, half in zip(own, parts, strict=True):
            ptx.do("mov.b64", f"{{{half[0]}, {half[1]}}}", word)
            here = half[1].eq(number)
            ready = here if ready is None else ready & here
    assert ready is not None
    ptx.do("bra", f"fdk_received_{name}", when=ready)
    ptx.do("add.u32", looks, looks, 1)
    again = looks < _LOOKS
    ptx.do("bra", f"fdk_receive_{name}", when=again)
    ptx.do("trap")
    ptx.label(f"fdk_received_{name}")
    return [[half[0] for half in parts] for parts in halves]

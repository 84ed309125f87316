"""Registers that seem to be alive all around a loop, and are not.

An instruction under a predicate may leave its register as it was, and what one branch writes may be read
after a branch of the same condition. Around such code a loop makes an assembler keep the register for a whole
round, for a value that nobody reads; with hundreds of them it spills. A kernel with such a loop marks places in
it, and `define` writes zeros there: then every register has a value before it may be read.
"""

import re
from collections.abc import Iterable

MARK = "// define"  # a line of a kernel's text at which registers may be set
_REGISTER = re.compile(r"\b(?:b16|b32|b64|f32|pred)_\d+\b")
_NO_RESULT = (
    "st.",
    "red.",
    "bra",
    "bar",
    "cp.",
    "mbarrier.init",
    "mbarrier.arrive",
    "fence",
    "trap",
)
_ZERO = {"b16": "mov.b16 {}, 0;", "b32": "mov.b32 {}, 0;", "b64": "mov.b64 {}, 0;"}
_ZERO |= {"f32": "mov.f32 {}, 0f00000000;", "pred": "setp.ne.u32 {}, 0, 0;"}


def define(text: str, loop: str) -> str:
    """A block of PTX in which no register is alive at a loop's start without having a value there.

    Args:
        text: the block, with marks in the loop.
        loop: the label of the loop's start.
    """
    lines = text.splitlines()
    start = lines.index(f"{loop}:")
    alive = _alive(lines, start)
    before = {
        name for line in lines[:start] for name in _REGISTER.findall(line) if ".reg" not in line
    }
    after: dict[int, list[str]] = {}
    mark = None
    for i in range(start, len(lines)):
        if lines[i] == MARK:
            mark = i
        for name in _REGISTER.findall(lines[i]):
            if name in alive and name not in before:
                if mark is None:
                    raise ValueError(f"{name} is used before the first mark of the loop {loop}")
                before.add(name)
                after.setdefault(mark, []).append(_ZERO[name.partition("_")[0]].format(name))
    found: list[str] = []
    for i, line in enumerate(lines):
        found += [line, *after.get(i, ())]
    return "\n".join(found)


def _alive(lines: list[str], at: int) -> set[str]:
    """The registers whose values at a line may be read later."""
    numbers: dict[str, int] = {}
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    effects = [_effects(line, numbers, labels) for line in lines]
    alive = [0] * (len(lines) + 1)
    changed = True
    while changed:
        changed = False
        for i in range(len(lines) - 1, -1, -1):
            reads, writes, jump, goes_on = effects[i]
            out = (alive[i + 1] if goes_on else 0) | (0 if jump is None else alive[jump])
            now = reads | (out & ~writes)
            if now != alive[i]:
                alive[i], changed = now, True
    return {name for name, number in numbers.items() if alive[at] >> number & 1}


def _effects(
    line: str, numbers: dict[str, int], labels: dict[str, int]
) -> tuple[int, int, int | None, bool]:
    """Masks of what a line reads and of what it surely writes, the line it may jump to, and if it goes on."""

    def mask(names: Iterable[str]) -> int:
        found = 0
        for name in names:
            found |= 1 << numbers.setdefault(name, len(numbers))
        return found

    if line.startswith((".", "//", "{", "}")) or line.endswith(":"):
        return 0, 0, None, True
    guard, rest = _groups(r"(@!?\w+ )?(.*)", line)
    opcode, _, operands = rest.partition(" ")
    if opcode == "bra":
        return mask(_REGISTER.findall(guard or "")), 0, labels[operands.rstrip(";")], bool(guard)
    result = ""
    if not opcode.startswith(_NO_RESULT):
        result, operands = _groups(r"(\{[^}]*\}|[^,;]+)(.*)", operands)
    reads, writes = (
        mask(_REGISTER.findall(f"{guard or ''} {operands}")),
        mask(_REGISTER.findall(result)),
    )
    return (reads | writes, 0, None, True) if guard else (reads, writes, None, True)


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that a text begins with."""
    found = re.match(pattern, text)
    if found is None:
        raise ValueError(f"{text!r} is no instruction")
    return found.groups()

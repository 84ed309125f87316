"""How the programs of a launch give rows to each other: who needs one polls it until all of it is there.

A barrier of the grid costs a store's way to L2 and back, a count, somebody's look at the count, and only then
the loads of what was stored. Here the data says itself that it is there, so that a store and a load are all:
bfloat16 is stored with all bits inverted, and zero is what nobody has written yet. (A number whose bits are all
ones is a NaN that no conversion gives.) Sums of squares are float32 and larger than zero.

There are two copies of every row. In an even layer the programs write the first one and clear their own
elements of the second one for the layer after it, in an odd layer the other way round. That is safe because
sums of squares come from every program and go to every program, twice a layer, with fences: whoever clears, or
looks at what was cleared, has seen that all were through with what was there.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.outputs import Load
from pallas_kernels.ptx import Ptx, half_kind
from pallas_kernels.registers import Register, at, wide

_LOOKS = 1 << 25  # about a minute; see `ring_launch`
_PAUSE = 20  # nanoseconds between two looks
_FIRST = 2  # loads of a thread that are polled; the others follow once these are there
_ALIGNED = 128


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """What is exchanged.

    Attributes:
        rows: names and elements of rows of bfloat16.
        squares: names and numbers of partial sums of squares.
    """

    rows: Mapping[str, int]
    squares: Mapping[str, int]

    def offset(self, name: str) -> int:
        """Where a row or sums are in a copy, in bytes."""
        offset = 0
        group, size = (self.rows, 2) if name in self.rows else (self.squares, 4)
        for other, count in group.items():
            if other == name:
                return offset
            offset += -(-size * count // _ALIGNED) * _ALIGNED
        raise KeyError(name)

    @property
    def row_bytes(self) -> int:
        """Bytes of a copy of all rows."""
        return _end(self.rows, 2)

    @property
    def square_bytes(self) -> int:
        """Bytes of a copy of all sums."""
        return _end(self.squares, 4)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Both copies of all rows as they are stored, and of all sums."""
        return (
            jax.ShapeDtypeStruct((2, self.row_bytes // 2), jnp.uint16),
            jax.ShapeDtypeStruct((2, self.square_bytes // 4), jnp.float32),
        )

    def begin(self, rows: Mapping[str, Array], squares: Mapping[str, Array]) -> tuple[Array, Array]:
        """The arrays before the first layer, with rows [1, n] and sums [n] in the copy of an odd layer."""
        least = float(jnp.finfo(jnp.float32).tiny)
        words = {name: _invert(row[0]) for name, row in rows.items()}
        sums = {name: jnp.maximum(parts, least) for name, parts in squares.items()}
        return self._placed(words, *self.shapes[:1]), self._placed(sums, *self.shapes[1:])

    def _placed(self, parts: Mapping[str, Array], like: jax.ShapeDtypeStruct) -> Array:
        """Zeros but for these parts in the copy of an odd layer; as padding, which is one kernel of XLA's."""
        placed = []
        for name, part in parts.items():
            before = like.shape[1] + self.offset(name) // part.dtype.itemsize
            placed.append(jnp.pad(part, (before, 2 * like.shape[1] - before - part.size)))
        return functools.reduce(jnp.add, placed).reshape(like.shape)

    def row(self, words: Array, name: str, layers: int) -> Array:
        """A row [1, n] of what so many layers have left."""
        start = self.offset(name) // 2
        found = words[(layers - 1) % 2, start : start + self.rows[name]]
        return jax.lax.bitcast_convert_type(~found, jnp.bfloat16)[None]

    def sums(self, sums: Array, name: str, layers: int) -> Array:
        """Partial sums [n] of what so many layers have left."""
        start = self.offset(name) // 4
        return sums[(layers - 1) % 2, start : start + self.squares[name]]


def _end(counts: Mapping[str, int], size: int) -> int:
    return sum(-(-size * count // _ALIGNED) * _ALIGNED for count in counts.values())


def _invert(row: Array) -> Array:
    return ~jax.lax.bitcast_convert_type(row.astype(jnp.bfloat16), jnp.uint16)


class Exchange:
    """Writes stores into rows, and loads that wait for what they load.

    Args:
        ptx: the block.
        plan: what is exchanged.
        rows: the address of the rows.
        squares: the address of the sums.
    """

    now: Register
    before: Register

    def __init__(self, ptx: Ptx, plan: ExchangePlan, rows: Register, squares: Register) -> None:
        self.ptx, self.plan, self.rows, self.squares = ptx, plan, rows, squares
        self._labels = 0

    def begin_layer(self, layer: Register) -> None:
        """Sets which copy is this layer's, and which the last one's and the next one's."""
        self.now = layer & 1
        self.before = self.now ^ 1

    def address(self, name: str, *, before: bool = False) -> Register:
        """The address of a row or of sums in this layer's copy, or in that of the layer before it."""
        plan = self.plan
        base, size = self.rows, plan.row_bytes
        if name in plan.squares:
            base, size = self.squares, plan.square_bytes
        address = base + (self.before if before else self.now) * size
        return address + plan.offset(name) if plan.offset(name) else address

    def put(self, name: str, index: Register, value: Register) -> None:
        """Stores an element of a row as bfloat16, and clears it in the other copy."""
        ptx = self.ptx
        half = ptx.op(f"cvt.rn.{half_kind(jnp.bfloat16)}.f32", value, kind="b16")
        half = ptx.op("xor.b16", half, "0xffff", kind="b16")
        nothing = ptx.op("mov.b16", 0, kind="b16")
        for before, what in ((False, half), (True, nothing)):
            address = self.address(name, before=before) + index * 2
            ptx.do("st.relaxed.gpu.global.b16", at(address), what)

    def put_sum(self, name: str, index: Register, value: Register, when: Register) -> None:
        """Stores a sum, after all that this program has stored before, and clears it in the other copy."""
        ptx = self.ptx
        value = ptx.op("max.NaN.f32", value, float(jnp.finfo(jnp.float32).tiny))
        nothing = ptx.zero()
        ptx.do("fence.acq_rel.gpu", when=when)
        for before, what in ((False, value), (True, nothing)):
            address = self.address(name, before=before) + index * 4
            ptx.do("st.relaxed.gpu.global.f32", at(address), what, when=when)

    def load(self, load: Load) -> None:
        """Starts a load; lanes without one have what counts as there."""
        if load.when is not None and load.registers[0].kind != "f32":
            for register in load.registers:
                self.ptx.do("mov.b32", register, "0xffffffff")
        width, registers = wide(load.registers)
        kind = load.registers[0].kind
        opcode = f"ld.relaxed.gpu.global{width}.{kind}"
        self.ptx.do(opcode, registers, load.source, when=load.when)

    def settle(self, loads: Sequence[Load]) -> None:
        """Loads again until everything is there. Whole warps."""
        first, rest = loads[:_FIRST], loads[_FIRST:]
        self._wait(first, rest)
        if rest:
            self._wait(rest)
        for load in loads:
            for register in load.registers if load.registers[0].kind != "f32" else ():
                self.ptx.do("xor.b32", register, register, "0xffffffff")

    def _wait(self, loads: Sequence[Load], others: Sequence[Load] = ()) -> None:
        """Loads again until all are there; if they were not at once, then loads the others again, too."""
        ptx, number = self.ptx, self._labels
        self._labels += 1
        ptx.do("bra", f"fdk_there_{number}", when=~self._any_missing(loads))
        looks = ptx.op("mov.u32", 0)
        ptx.label(f"fdk_look_{number}")
        ptx.do("nanosleep.u32", _PAUSE)
        for load in loads:
            self.load(load)
        ptx.do("add.u32", looks, looks, 1)
        too_long = looks >= _LOOKS
        ptx.do("trap", when=too_long)
        ptx.do("bra", f"fdk_look_{number}", when=self._any_missing(loads))
        for load in others:
            self.load(load)
        ptx.label(f"fdk_there_{number}")

    def _any_missing(self, loads: Sequence[Load]) -> Register:
        """Whether any lane of the warp has loaded something that was not there."""
        ptx, missing, floats = self.ptx, None, None
        for load in loads:
            for register in load.registers:
                if register.kind == "f32":
                    none = ptx.op("setp.eq.f32", register, 0.0)
                    none = none if load.when is None else none & load.when
                    floats = none if floats is None else floats | none
                    continue
                # A half that is zero borrows from the bit above it, where it has none.
                borrows = (register + "0xfffeffff") & (register ^ "0xffffffff")
                missing = borrows if missing is None else missing | borrows
        if floats is None:
            assert missing is not None, "nothing to wait for"
            floats = (missing & "0x80008000").ne(0)
        found = ptx.register("pred")
        ptx.do("vote.sync.any.pred", found, floats, "0xffffffff")
        return found

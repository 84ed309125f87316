"""The end of `split_attention`: the sums of a program's warps, then those of programs that share a head.

Each program leaves its results in memory; the last one to do so, as a counter says, joins them all. The
counters are zero before a launch and after it.
"""

from collections.abc import Callable

from pallas_kernels.attention_stages import NEVER, AttentionWriter
from pallas_kernels.ptx import ROW_LANES, over_lanes
from pallas_kernels.registers import Register, at, vector
from pallas_kernels.split_attention_plan import WARPS, Case

_AT_ONCE = 16  # programs whose parts are loaded at once


class Joining(AttentionWriter):
    """Writes this end.

    Attributes:
        splits: programs that share a key-value head; registers that `split_attention` has filled are:
        split, line, kv_head: which of them this one is, of which sequence and head, of which head.
        zero: a register with zero.
        peaks, totals, sums: of each row of the lane, see `split_attention`.
    """

    case: Case
    splits: int
    split: Register
    line: Register
    kv_head: Register
    zero: Register
    peaks: list[Register]
    totals: list[Register]
    sums: list[list[Register]]

    def join_warps(self) -> None:
        """Joins the warps' sums, and writes the program's or, if it has all slots, the output."""
        ptx, case = self.ptx, self.case
        leads = self.thread_in_group.eq(0)
        for half in range(self.case.halves):
            total = over_lanes(ptx, "add.f32", self.totals[half], ROW_LANES)
            row = self.row + 8 * half
            is_row = row < case.group
            pair_index = row + self.warp * case.group
            pair_address = self.shared + pair_index * 8
            writes = leads & is_row
            pair = vector([self.peaks[half], total])
            ptx.do("st.shared.v2.b32", at(pair_address, self.case.pairs_offset), pair, when=writes)
            address = self.shared + pair_index * (4 * case.dim) + self.thread_in_group * 64
            for i in range(0, len(self.sums[half]), 4):
                block, part = divmod(i, 16)
                target = at(address, 256 * block + 4 * part)
                words = vector(self.sums[half][i : i + 4])
                ptx.do("st.shared.v4.b32", target, words, when=is_row)
        ptx.do("barrier.sync", 0)
        self._for_outputs(self._store, "fdk_end")

    def _for_outputs(self, store: Callable[[Register], None], after: str) -> None:
        """Writes the program's outputs, four a thread at a time."""
        ptx, outputs, threads = self.ptx, self.case.group * self.case.dim // 4, 32 * WARPS
        for first in range(0, outputs, threads):
            index = self.thread + first
            if first + threads > outputs:
                outside = index >= outputs
                ptx.do("bra", after, when=outside)
            store(index)
        ptx.label(after)

    def _store(self, index: Register) -> None:
        """Four elements of the output, the `index`-th."""
        ptx, case = self.ptx, self.case
        row = index // (case.dim // 4)
        pair_address = self.shared + row * 8
        address = self.shared + index * 16
        peaks, totals, parts = [], [], []
        for warp in range(WARPS):
            pair, part = ptx.registers("f32", 2), ptx.registers("f32", 4)
            source = at(pair_address, self.case.pairs_offset + 8 * case.group * warp)
            ptx.do("ld.shared.v2.b32", vector(pair), source)
            ptx.do("ld.shared.v4.b32", vector(part), at(address, 4 * case.group * case.dim * warp))
            peaks.append(pair[0])
            totals.append(pair[1])
            parts.append(part)
        highest, shares = self.shares(peaks)
        total = self.dot(shares, totals)
        values = [self.dot(shares, list(column)) for column in zip(*parts, strict=True)]
        column = index % (case.dim // 4)
        if self.splits == 1:
            self._store_mixed(row, column, values, total)
            return
        line = self.split + self.sequence * self.splits
        head = row + self.kv_head * case.group
        line = head + line * case.heads
        output = self.operands["parts"] + line * (case.dim * 4) + column * 16
        ptx.do("st.global.v4.b32", at(output), vector(values))
        leads = column.eq(0)
        for name, result in (("peak", highest), ("total", total)):
            address = self.operands[name] + line * 4
            ptx.do("st.global.f32", at(address), result, when=leads)

    def _store_mixed(
        self, row: Register, column: Register, values: list[Register], total: Register
    ) -> None:
        """Four elements of a head's output, of which the sum of the weights is given."""
        ptx, case = self.ptx, self.case
        head = row + self.kv_head * case.group
        line = head + self.sequence * case.heads
        output = self.operands["mixed"] + line * (case.dim * 2) + column * 8
        inverse = ptx.op("rcp.approx.f32", total)
        values = self.pack([v * inverse for v in values])
        ptx.do("st.global.v2.b32", at(output), vector(values))

    def join_programs(self) -> None:
        """The last program of a key-value head to come here joins the results of all."""
        ptx = self.ptx
        ptx.do("barrier.sync", 0)
        first = self.thread.eq(0)
        counter, before = self.operands["counters"] + self.line * 4, ptx.register("b32")
        ptx.do("bra", "fdk_counted", when=~first)
        ptx.do("atom.acq_rel.gpu.global.add.u32", before, at(counter), 1)
        ptx.do("st.shared.b32", at(self.shared), before)
        ptx.label("fdk_counted")
        ptx.do("barrier.sync", 0)
        ptx.do("ld.shared.b32", before, at(self.shared))
        others = before.ne(self.splits - 1)
        ptx.do("bra", "fdk_joined", when=others)
        ptx.do("st.global.b32", at(counter), self.zero, when=first)
        self._for_outputs(self._store_joined, "fdk_joined")

    def _store_joined(self, index: Register) -> None:
        """Four elements of the output, the `index`-th, of the parts that all programs have left."""
        ptx, case = self.ptx, self.case
        row, column = index // (case.dim // 4), index % (case.dim // 4)
        head = row + self.kv_head * case.group
        line = head + self.sequence * (self.splits * case.heads)
        addresses = [self.operands[name] + line * 4 for name in ("peak", "total")]
        address = self.operands["parts"] + line * (case.dim * 4) + column * 16
        peak, joined, part = ptx.op("mov.f32", NEVER), [ptx.zero() for _ in range(5)], 0
        while part < self.splits:
            count = min(_AT_ONCE, self.splits - part)
            peaks, totals, parts = [peak], [joined[0]], [joined[1:]]
            for i in range(part, part + count):
                words = ptx.registers("f32", 4)
                source = at(address, i * case.heads * case.dim * 4)
                ptx.do("ld.global.v4.b32", vector(words), source)
                for found, start in zip((peaks, totals), addresses, strict=True):
                    found.append(ptx.op("ld.global.f32", at(start, i * case.heads * 4)))
                parts.append(words)
            peak, shares = self.shares(peaks)
            columns = [totals, *map(list, zip(*parts, strict=True))]
            joined = [self.dot(shares, column) for column in columns]
            part += count
        self._store_mixed(row, column, joined[1:], joined[0])

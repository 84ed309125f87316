"""The last stages of a product whose warps share K: reduce their sums, store the outputs."""

import itertools

from pallas_kernels.layout import TILE_ROWS
from pallas_kernels.registers import Register, at
from pallas_kernels.target import Target
from pallas_kernels.tile_plan import SumsPlan
from pallas_kernels.tile_writer import TileWriter


class SumsWriter(TileWriter):
    """Writes the end of a product.

    A lane's totals are float32 [tiles, columns of 8 tokens, 4]: of row g tokens 2 t and 2 t + 1, then
    of row g + 8, where t is its `thread_in_group`. In shared memory sums lie from
    `sums` on, float32 [k_warps_here, sum_tokens, sum_stride]: of each warp that shares K, of each token,
    of each of the program's rows.
    """

    plan: SumsPlan

    def __init__(self, plan: SumsPlan, target: Target) -> None:
        super().__init__(plan, target, plan.tokens)

    # Reduce

    def locate_sums(self, *, of_one_token: bool = False) -> Register:
        """Where this lane stores its totals; with one token lane 0 of each four does."""
        plan = self.plan
        address = self.sums + self.k_warp_here * plan.warp_sums_bytes
        row = self.row + self.row_warp * (plan.tiles * TILE_ROWS)
        address = address + row * 4
        return (
            address if of_one_token else address + self.thread_in_group * (2 * plan.sum_stride * 4)
        )

    def store_sums(
        self,
        address: Register,
        totals: list[list[list[Register]]],
        *,
        of_one_token: bool = False,
        when: Register | None = None,
    ) -> None:
        """Stores the totals of some tokens; with one token only those of the first column."""
        for tile, row_totals in enumerate(totals):
            for column, column_totals in enumerate(row_totals):
                for i in (0, 2) if of_one_token else range(4):
                    token, row = 8 * column + i % 2, TILE_ROWS * tile + 8 * (i // 2)
                    offset = (token * self.plan.sum_stride + row) * 4
                    self.ptx.do("st.shared.f32", at(address, offset), column_totals[i], when=when)

    def join_programs(self) -> None:
        """Waits for the program's other warps, or for those of the cluster."""
        if self.plan.cluster == 1:
            self.ptx.do("bar.sync", 0)
        else:
            self.ptx.do("barrier.cluster.arrive.release")
            self.ptx.do("barrier.cluster.wait.acquire")

    def leave_cluster(self) -> None:
        """Nobody leaves whose sums another program still reads."""
        if self.plan.cluster > 1:
            self.ptx.do("barrier.cluster.arrive.relaxed")
            self.ptx.do("barrier.cluster.wait")

    def reduce_in_parts(self, totals: list[list[list[Register]]]) -> None:
        """Reduces and stores as many tokens at a time as have their sums in shared memory."""
        ptx, plan = self.ptx, self.plan
        ptx.comment("reduce: the warps' sums through shared memory, some tokens at a time")
        address = self.locate_sums()
        for first in range(0, plan.tokens, plan.sum_tokens):
            self.join_programs()
            part = slice(first // 8, (first + plan.sum_tokens) // 8)
            self.store_sums(address, [columns[part] for columns in totals])
            self.join_programs()
            self.store_outputs(plan.sum_tokens, f"{first}_")
            ptx.do("add.u32", self.first_token, self.first_token, plan.sum_tokens)
        self.leave_cluster()

    # Store

    def load_residuals(self) -> None:
        """Starts loading what this thread's outputs are added to and scaled by."""
        ptx, rows = self.ptx, self.plan.rows
        self.residuals = []
        for start in range(0, rows, 32 * self.plan.warps) if self.case.residual else ():
            row = ptx.op("min.u32", self.thread + start, rows - 1)
            self.residuals.append(self._load_residual(self.program_row + row))

    def store_outputs(self, tokens: int, name: str = "") -> None:
        """Adds the sums of so many tokens, and stores them: each program of a cluster its part."""
        ptx, plan = self.ptx, self.plan
        thread, threads = self.thread, 32 * plan.warps * plan.cluster
        if plan.cluster > 1:
            thread = thread + self.rank * (32 * plan.warps)
        ptx.comment("store: each thread's outputs")
        if self.case.residual:
            self.squares = ptx.zero()
        for number, start in enumerate(range(0, plan.rows * tokens, threads)):
            self._store_output(thread + start, number, tokens, f"fdk_next{name}{start}")
        if self.case.residual:
            self._store_squares(self.squares, plan.square_parts)

    def _store_output(self, index: Register, number: int, tokens: int, after: str) -> None:
        """The `number`-th output of a thread, the `index`-th of the program; then the label `after`."""
        ptx, case, plan = self.ptx, self.case, self.plan
        token = index // plan.rows
        row = index % plan.rows
        address = row + token * plan.sum_stride
        address = self.sums + address * 4
        n = self.output_row + row
        m = self.first_token + token
        for value, bound in ((token, tokens), (m, case.m), (n, case.n)):
            ptx.do("bra", after, when=value >= bound)
        total = ptx.zero()
        space, addresses = "shared", [address]
        if plan.cluster > 1:
            space, ranks = "shared::cluster", range(plan.cluster)
            addresses = [ptx.op(f"mapa.{space}.u32", address, rank) for rank in ranks]
        for part_address, warp in itertools.product(addresses, range(plan.k_warps_here)):
            part = ptx.op(f"ld.{space}.f32", at(part_address, warp * plan.warp_sums_bytes))
            ptx.do("add.f32", total, total, part)
        if self.decoder.factor is not None:
            ptx.do("mul.f32", total, total, self.decoder.factor)
        if case.squares:
            total = self._normalise(total, plan.squares_offset)
        if case.bias_dtype is not None:
            self._add_bias(total, n)
        if case.residual:
            self._store_sum(total, n, self.residuals[number], self.squares)
        else:
            self._store(total, n, "y", m)
        ptx.label(after)

"""Runs the Mosaic GPU kernel on a CPU, by JAX's interpreter of Mosaic GPU, to compare its values without a GPU.

The interpreter knows copies, barriers, warpgroups and `wgmma`, but no single instructions in MLIR. What
the kernel has of those, the functions below stand for, by the same names: `decode` reads codes and scales
where `mosaic_decoding` says that a thread finds them, the others do in whole arrays what the instructions
do by lanes. So schedules, slots of shared memory, the order of barriers and who computes what are the
kernel's own. What is not: single instructions, registers, swizzles, `wgmma` that is still under way, two
programs at once (they run one after another, in order).
"""

import contextlib
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter  # public from JAX 0.11 on
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_decoding, mosaic_kernel, mosaic_results, mosaic_values
from pallas_kernels.case import Arrays, Case
from pallas_kernels.layout import PLANE
from pallas_kernels.mosaic_matmul import GROUP_ROWS, Config, columns, schedule, slab


def matmul(case: Case, config: Config, arrays: Arrays, **options: Any) -> jax.Array:
    """`mosaic_kernel.matmul`, interpreted; `options` are the interpreter's."""
    twins = _Twins(case, config)
    with contextlib.ExitStack() as stack:
        for module in (mosaic_kernel, mosaic_results):
            stack.enter_context(mock.patch.object(module, "inline", twins.inline))
        for name, right in (("plgpu", plgpu), ("pl", pl)):
            stack.enter_context(mock.patch.object(mosaic_kernel, name, _Namespace(twins, right)))
        for name in ("_scratch", "_kernel", "_persistent", "_specialise"):
            twin = getattr(twins, name.removeprefix("_"))(getattr(mosaic_kernel, name))
            stack.enter_context(mock.patch.object(mosaic_kernel, name, twin))
        for name in ("_take_turn", "_give_turn"):
            stack.enter_context(mock.patch.object(mosaic_kernel, name, lambda _: None))
        params = interpreter.InterpretGPUParams(**options)
        stack.enter_context(interpreter.force_gpu_interpret_mode(params))
        return mosaic_kernel.matmul.__wrapped__(case, config, arrays)


def found_races() -> bool:
    """Whether the last product, with `detect_races`, wrote memory that something else wrote or read at once."""
    return gpu_callbacks.get_races().races_found


class _Namespace:
    """Pallas, or its Mosaic GPU, with what the interpreter lacks replaced."""

    def __init__(self, twins, right):
        self._right, self.wgmma, self.get_global = right, twins.wgmma, twins.get_global

    def __getattr__(self, name):
        return getattr(self._right, name)


class _Slots:
    """Planes of x, whose transposition is left to `wgmma`."""

    def __init__(self, ref):
        self._ref = ref

    @property
    def at(self):
        return self

    def __getitem__(self, slot):
        return _Slots(self._ref.at[slot])

    def transpose(self, _):
        return self._ref


class _Twins:
    def __init__(self, case: Case, config: Config) -> None:
        self.case, self.config = case, config
        self.sync: Any = None  # a barrier of the compute warpgroups
        self.operands: Any = None  # of each warpgroup's products

    def scratch(self, right):
        def scratch(case, config):
            found = right(case, config)
            shape = config.x_stages, config.tokens, columns(case)
            sync = plgpu.Barrier(num_arrivals=config.warpgroups)
            free = plgpu.Barrier(num_arrivals=config.row_groups, num_barriers=config.x_stages)
            return found | dict(
                x_smem=plgpu.SMEM(shape, case.x_dtype),
                x_free=free,
                sync=sync,
                operands=[
                    plgpu.SMEM((config.warpgroups, *shape), case.x_dtype)
                    for shape in ((GROUP_ROWS, columns(case)), (columns(case), config.tokens))
                ],
            )

        return scratch

    def kernel(self, right):
        def kernel(*args, sync, operands, x_smem, **scratch):
            self.sync, self.operands = sync, operands
            self.free = scratch["x_free"], scratch["w_free"]
            return right(*args, x_smem=[_Slots(x_smem), x_smem], **scratch)

        return kernel

    persistent = kernel

    def specialise(self, right):
        def specialise(config, warpgroup, copy, consume):
            def copy_and_wait() -> None:
                copy()
                # The interpreter wants to see every barrier waited for as often as it was completed.
                stages = config.x_stages, config.w_stages
                slabs = self._slabs()
                counts = slabs * (slab(self.case, config) // columns(self.case)), slabs
                for barrier, stage, count in zip(self.free, stages, counts, strict=True):
                    wait = functools.partial(self._wait_for_slot, barrier)
                    jax.lax.fori_loop(0, jnp.minimum(count, stage), wait, ())

            right(config, warpgroup, copy_and_wait, consume)

        return specialise

    @staticmethod
    def _wait_for_slot(barrier, slot, _):
        plgpu.barrier_wait(barrier.at[slot])
        return ()

    def _slabs(self):
        """How many the program computes."""
        if not self.config.programs:
            return -(-self.case.k // slab(self.case, self.config))
        plan, program = schedule(self.case, self.config), jax.lax.axis_index("program")
        return plan.rounds * plan.slabs + plan.start(program + 1) - plan.start(program)

    def inline(self, **_):
        return lambda function: getattr(self, function.__name__)

    def _wait_for_warpgroups(self) -> None:
        plgpu.barrier_arrive(self.sync)
        plgpu.barrier_wait(self.sync)

    def wgmma(self, acc, a, b) -> None:
        """From shared memory, as the interpreter's operands are; its references know no transposition."""
        here = jax.lax.axis_index("wg")
        weights, x = (operand.at[here] for operand in self.operands)
        weights[...], x[...] = a, b[...].T
        plgpu.commit_smem()  # before copies may write where x was read, as `wgmma` would
        plgpu.wgmma(acc, weights, x)

    def set_up(self, codebook, table, index) -> None:
        values = 2**self.case.bits

        @pl.when(jax.lax.axis_index("wg") == 0)
        def _():
            for i in range(values):
                table[i] = jax.lax.bitcast_convert_type(codebook[index * values + i], jnp.uint32)

        self._wait_for_warpgroups()

    def decode(self, codes, scales, table, group, plane):
        values = table[0 : 2**self.case.bits]
        shape = jax.ShapeDtypeStruct((GROUP_ROWS, columns(self.case)), self.case.x_dtype)
        read = codes[...], scales[...]
        plgpu.commit_smem()
        return jax.pure_callback(self._decode, shape, *read, values, group, plane)

    def _decode(self, codes, scales, values, group, plane):
        """The weights of a plane, in numpy; codes as [4, blocks, 8, 64], not swizzled."""
        case, thread = self.case, np.arange(128)
        codes, scales, values = (np.asarray(a) for a in (codes, scales, values))
        group, plane = int(group), int(plane)
        raw, line = codes.view(np.uint8).reshape(-1, 8, 8, 16), np.arange(8)[:, None]
        raw = raw[:, line, np.arange(8) ^ line]  # as the copies swizzle lines of 128 bytes
        shared = np.concatenate([raw.reshape(-1), np.zeros(4, np.uint8)]).astype(np.int64)
        warp, g, c = mosaic_values.lane_of(thread)
        swapped = mosaic_decoding.swaps_halves(case.bits, thread)
        found = np.zeros((GROUP_ROWS, PLANE), np.int64)
        offsets = mosaic_decoding.code_offsets(case.bits, thread, plane, codes.shape[1])
        for chunk, (offset, bit) in enumerate(offsets):
            word = sum(shared[offset + i] << 8 * i for i in range(4)) >> bit
            first = 8 * ((chunk + 4 * swapped) % 8)
            for row in range(2):
                for e in range(2):
                    shift = row + 16 * e if case.bits == 1 else case.bits * (2 * row + e)
                    code = word >> shift & 2**case.bits - 1
                    found[16 * warp + g + 8 * row, first + 2 * c + e] = code
        width = min(case.group_size, PLANE)
        of_rows = np.zeros((GROUP_ROWS, PLANE // width), scales.dtype)
        for part in range(PLANE // width):
            index = group + (plane * PLANE + part * width) // case.group_size
            place = mosaic_decoding.scale_offset(thread, index, scales.shape[1]) // 2
            for row in range(2):
                of_rows[16 * warp + g + 8 * row, part] = scales.reshape(-1)[place + row]
        half = case.x_dtype
        return values.view(np.float32).astype(half)[found] * np.repeat(of_rows, width, 1).astype(
            half
        )

    def transpose(self, target, _, total, first_row, group, *others):
        self._wait_for_warpgroups()
        if others:
            rows = jnp.minimum(first_row + jnp.arange(GROUP_ROWS), self.case.n - 1)
            total = total + others[0][...][rows].astype(jnp.float32)[:, None]
        target[...] = total.T.astype(self.case.out_dtype)

    def get_global(self, _) -> None:
        """No flags: programs run one after another, and sums that nobody has given are NaN."""

    def give(self, sums, _, total, place) -> None:
        sums[place] = total.reshape(-1)

    def take(self, sums, _, total, place):
        return total + sums[place].reshape(total.shape)

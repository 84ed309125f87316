"""Runs the kernels' PTX on numpy, a program or cluster at a time: values and every access, without a GPU.

`run` is all that tests need, and `run_devices` where GPUs reach each other's memory. Threads run in lockstep,
the ones with the least program counter first, which joins branches again by itself; or warps run by turns as
chance has it, each for a while, so that only what the program orders is in order. Asynchronous copies arrive at
once or as late as they may, by chance in both.

A `Fault` is what a GPU refuses, or need not do the same way every time:

* an access outside of the operands, or a misaligned one; more shared memory than there is;
* a register that is read before it is written, or while `wgmma` works with it, or given to it without a fence;
* `ld.global.nc` of what the kernel itself stores to;
* part of a warp at an instruction that takes whole ones; a barrier that too many threads reach, or too few.

An instruction that the emulator does not know is refused before anything runs (NotImplementedError): it knows
what the kernels use. It is kinder than a GPU in this: memory is consistent, so a missing `.acquire`, `.release`
or `fence` goes unseen; programs of a grid run one after the other; approximate instructions round to nearest;
`mul` and `add` are never joined to a multiply-add; what is in shared memory before it is written is 0xAB.
"""

from emulator.running import addresses, run, run_devices
from emulator.source import Fault

__all__ = ["Fault", "addresses", "run", "run_devices"]

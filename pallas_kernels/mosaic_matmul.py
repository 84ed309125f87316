"""Products of many rows of x with Mosaic GPU: configurations, and what they take; see `mosaic_kernel`."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from pallas_kernels.case import PLANE, Arrays, Case
from pallas_kernels.target import Target

TILE_ROWS = 64  # of the weight, an operand of a warpgroup's
_TABLE_BYTES = 32 * 1024
_BARRIER_BYTES = 768  # and what the compiler adds


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration.

    Attributes:
        tokens: T, a multiple of 16 up to 256.
        row_groups: V, compute warpgroups with 64 rows of their own.
        k_groups: U, compute warpgroups that share the K of these rows: V * U in all.
        x_stages: planes of x in shared memory.
        w_stages: slabs of codes and scales in shared memory.
        cluster: programs that share the copies of x, each with rows of its own: 1 or 2.
        splits: programs that share the K of their rows, of a cluster too: 1 or 2.
        row_tiles: 64 rows so many times for each warpgroup: 2 halve the reads of x, up to 128 tokens.
    """

    tokens: int = 128
    row_groups: int = 2
    k_groups: int = 1
    x_stages: int = 4
    w_stages: int = 2
    cluster: int = 1
    splits: int = 1
    row_tiles: int = 1

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return TILE_ROWS * self.row_groups * self.row_tiles

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute."""
        return self.row_groups * self.k_groups


ANY = Config(tokens=0)  # in the tuned table: what `guess` says


def slab(case: Case) -> int:
    """Columns of K whose codes and scales are copied at once."""
    return max(256, case.span)


def quads(case: Case) -> int:
    """Fours of groups that a slab touches."""
    return -(-slab(case) // (4 * case.group_size))


def sum_stages(config: Config) -> int:
    """Stages of x whose memory holds the sums of warpgroups that share K, and then outputs."""
    over_k = 2 * (config.warpgroups - config.row_groups) + config.row_groups * config.row_tiles
    return max(over_k, 2 * config.row_groups if config.splits > 1 else 0)


def shared_bytes(case: Case, config: Config) -> int:
    """Shared memory of a program, without its barriers."""
    x = config.x_stages * config.tokens * PLANE * 2
    w = config.rows * (slab(case) * case.bits // 8 + quads(case) * 8)
    table = 16 if case.bits == 1 else _TABLE_BYTES
    return x + config.w_stages * w + table + _BARRIER_BYTES


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if not target.has_wgmma:
        return f"{target.architecture} has no wgmma, which is sm_90's alone"
    if case.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {case.x_dtype}, the tensor cores' inputs are bfloat16 or float16"
    if case.scale_dtype != case.x_dtype or case.out_dtype != case.x_dtype:
        return f"scales and outputs must be {case.x_dtype} as x is"
    if case.group_size < 8 or case.group_size & (case.group_size - 1):
        return f"group_size={case.group_size} is no power of two from 8 on"
    if case.n % 8 or case.k % 8:
        return f"n={case.n} and k={case.k} are no multiples of 8, which tensor copies need"
    if case.books > 1 and (case.n // case.books) % config.rows:
        return f"{case.books} codebooks do not change at multiples of {config.rows} rows"
    if config.tokens % 16 or not 16 <= config.tokens <= 256:
        return f"{config.tokens} tokens a program are no multiple of 16 up to 256"
    if config.tokens * config.row_tiles > 256:
        return (
            f"the sums of {config.tokens} tokens and {config.row_tiles} tiles do not fit registers"
        )
    if config.x_stages % config.k_groups or config.x_stages < sum_stages(config):
        return f"{config.x_stages} stages of x do not divide over {config.k_groups} warpgroups"
    if slab(case) // PLANE % config.k_groups:
        return f"{config.k_groups} warpgroups do not divide the planes of a slab"
    if config.cluster * config.splits > 2:
        return "a cluster is of two programs at most"
    if -(-case.k // slab(case)) < config.splits:
        return f"{case.k=} is too small to be shared by {config.splits} programs"
    if case.residual or case.squares:
        return "it has no residual"
    if (needed := shared_bytes(case, config)) > target.shared_bytes:
        return (
            f"{config} needs {needed} bytes of shared memory, {target.architecture} gives a"
            f" thread block {target.shared_bytes}"
        )
    return None


# Microseconds a plane of a program, with any width of codes, by (tokens, row_groups, k_groups, stages of x).
# H200, 2026-11-29, 8192 x 8192, 4 bits.
_PLANE_US = {
    (16, 1, 2, 16): 0.18,
    (32, 1, 2, 16): 0.18,
    (64, 1, 2, 12): 0.185,
    (128, 1, 2, 8): 0.25,
    (128, 2, 1, 8): 0.41,
    (256, 2, 1, 4): 0.70,
}
_PROGRAM_US, _SPLIT_US = 6.0, 2.0  # the start and the end of a program, and of sums over two


def guess(case: Case, target: Target) -> Config | None:
    """The configuration that should be fastest, by a count of programs and planes; None if none runs."""
    planes = -(-case.k // slab(case)) * slab(case) // PLANE

    def microseconds(config: Config) -> float:
        programs = math.ceil(case.m / config.tokens) * math.ceil(case.n / config.rows)
        waves = math.ceil(programs * config.splits / target.multiprocessors)
        key = config.tokens, config.row_groups, config.k_groups, config.x_stages
        own = planes / config.splits * _PLANE_US[key]
        return waves * (_PROGRAM_US + own + (_SPLIT_US if config.splits > 1 else 0))

    found = []
    for tokens, row_groups, k_groups, x_stages in _PLANE_US:
        for w_stages, splits in ((3, 1), (2, 1), (3, 2), (2, 2)):
            config = Config(tokens, row_groups, k_groups, x_stages, w_stages, splits=splits)
            if unsupported_reason(case, config, target) is None:
                found.append(config)
    return min(found, key=microseconds, default=None)


def matmul(case: Case, config: Config, arrays: Arrays, group_sizes: Array | None = None) -> Array:
    """X [M, K] times the transpose of a planar weight: [M, N]; see `mosaic_kernel.matmul`."""
    from pallas_kernels import mosaic_kernel  # Mosaic GPU does not load on every platform

    return mosaic_kernel.matmul(case, config, arrays, group_sizes)

"""Products of many rows of x with Mosaic GPU: configurations, and what they take; see `mosaic_kernel`."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.case import Arrays, Case
from pallas_kernels.layout import PLANE
from pallas_kernels.mosaic_schedule import Schedule, fewest_programs
from pallas_kernels.target import Target

GROUP_ROWS = 64  # of the weight, a warpgroup's
BITS = (1, 2, 4, 8)  # of codes that `mosaic_decoding` finds in a tile
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
        programs: persistent ones, which share tiles and parts of tiles (`mosaic_schedule`); 0 for one a tile.
    """

    tokens: int = 128
    row_groups: int = 2
    k_groups: int = 1
    x_stages: int = 4
    w_stages: int = 2
    cluster: int = 1
    splits: int = 1
    programs: int = 0

    @property
    def rows(self) -> int:
        """Rows of the weight a program."""
        return GROUP_ROWS * self.row_groups

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute."""
        return self.row_groups * self.k_groups


ANY = Config(tokens=0)  # in the tuned table: what `guess` says


def columns(case: Case) -> int:
    """Columns of K whose x is a line of 128 bytes, and whose products are asked for at once."""
    return 128 // jnp.dtype(case.x_dtype).itemsize


def slab(case: Case, config: Config) -> int:
    """Columns of K whose codes and scales are copied at once: two lines of x at least for each warpgroup.

    What the products under way read from registers must not be written: a loop over slabs decodes into the
    registers of the other line.
    """
    return max(256, case.span, 2 * columns(case) * config.k_groups)


def scale_fours(case: Case, config: Config) -> int:
    """Fours of groups that a slab touches."""
    return -(-slab(case, config) // (4 * case.group_size))


def schedule(case: Case, config: Config) -> Schedule:
    """What each of a configuration's persistent programs computes."""
    tiles = -(-case.m // config.tokens) * -(-case.n // config.rows)
    return Schedule(tiles, -(-case.k // slab(case, config)), config.programs)


def computes_values(case: Case) -> bool:
    """Whether codes become values by arithmetic: evenly spaced ones of 8 bits, unless rounded to integers."""
    return case.bits == 8 and case.computes_values and case.x_dtype != jnp.int8


def sum_stages(config: Config) -> int:
    """Stages of x whose memory holds the sums of warpgroups that share K, and then outputs."""
    over_k = 2 * (config.warpgroups - config.row_groups) + config.row_groups
    return max(over_k, 2 * config.row_groups if config.splits > 1 else 0)


def shared_bytes(case: Case, config: Config) -> int:
    """Shared memory of a program, without its barriers."""
    x = config.x_stages * config.tokens * 128
    scale_bytes = 4 * jnp.dtype(case.scale_dtype).itemsize
    codes = slab(case, config) * case.bits // 8
    w = config.rows * (codes + scale_fours(case, config) * scale_bytes)
    table = 16 if case.bits == 1 or computes_values(case) else _TABLE_BYTES
    return x + config.w_stages * w + table + _BARRIER_BYTES


def unsupported_reason(case: Case, config: Config, target: Target) -> str | None:
    """Why the kernel does not take a case, or None."""
    if not target.has_wgmma:
        return f"{target.architecture} has no wgmma, which is sm_90's alone"
    if case.bits not in BITS:
        return f"its decoder has no codes of {case.bits} bits, only of {BITS}"
    if case.x_dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {case.x_dtype}, the tensor cores' inputs are bfloat16 or float16"
    if case.out_dtype != case.x_dtype:
        return f"outputs must be {case.x_dtype} as x is"
    power = case.group_size >= 8 and not case.group_size & (case.group_size - 1)
    if not power and case.group_size % slab(case, config) and case.group_size < case.k:
        return (
            f"group_size={case.group_size} is no power of two from 8 on, no multiple of"
            f" {slab(case, config)} and no whole row"
        )
    if case.n % 8 or case.k % 8:
        return f"n={case.n} and k={case.k} are no multiples of 8, which tensor copies need"
    if case.codebooks > 1 and (case.n // case.codebooks) % config.rows:
        return f"{case.codebooks} codebooks do not change at multiples of {config.rows} rows"
    if config.tokens % 16 or not 16 <= config.tokens <= 256:
        return f"{config.tokens} tokens a program are no multiple of 16 up to 256"
    if config.warpgroups < 2:
        return "one warpgroup does not fill the table"
    if config.warpgroups > 2 and config.tokens > 128:
        return f"{config.warpgroups} warpgroups have too few registers for {config.tokens} tokens"
    if config.x_stages % config.k_groups or config.x_stages < sum_stages(config):
        return f"{config.x_stages} stages of x do not divide over {config.k_groups} warpgroups"
    if slab(case, config) // PLANE % config.k_groups:
        return f"{config.k_groups} warpgroups do not divide the planes of a slab"
    if config.cluster * config.splits > 2:
        return "a cluster is of two programs at most"
    if -(-case.k // slab(case, config)) < config.splits:
        return f"{case.k=} is too small to be shared by {config.splits} programs"
    if config.programs and (reason := _no_persistence(case, config, target)) is not None:
        return reason
    if case.residual or case.squares:
        return "it has no residual"
    return target.lacks_shared_memory(config, shared_bytes(case, config))


def _no_persistence(case: Case, config: Config, target: Target) -> str | None:
    """Why the programs of a configuration cannot be persistent, or None."""
    plan = schedule(case, config)
    if config.k_groups * config.splits * config.cluster > 1:
        return "persistent programs share K by slabs alone, and no copies of x"
    if case.codebooks > 1:
        return "persistent programs fill one table of values"
    if config.programs > target.multiprocessors:
        return f"{config.programs} persistent programs do not run at once"
    if 0 < plan.shared * plan.slabs < config.programs:
        return f"{case.k=} is too small to be shared by {config.programs} programs"
    if config.x_stages <= config.row_groups:
        return f"results take the memory of all {config.x_stages} stages of x"
    return None


# Microseconds a plane of a program by its tokens, for (row_groups, k_groups): of codes that are looked up, of
# those of 8 bits, and of those of one bit. H200, 8192 x 8192, 2026-11-30; from 96 tokens on, where products one
# after another leave the card less than its highest clock, 2026-12-01. Of three row groups 6144 x 21504, of
# four 28672 x 4096, the same day.
_LOOKED_UP_US = {
    (1, 2): ((16, 0.138), (64, 0.163), (96, 0.2), (128, 0.248), (192, 0.35), (256, 0.48)),
    (2, 1): ((16, 0.213), (64, 0.281), (96, 0.352), (128, 0.434), (192, 0.6), (256, 0.755)),
    (2, 2): ((16, 0.178), (32, 0.192), (64, 0.254), (80, 0.3)),
    (3, 1): ((64, 0.444), (96, 0.543), (128, 0.65)),
    (4, 1): ((64, 0.503),),
}
_BYTES_US = {
    (1, 2): ((16, 0.2), (64, 0.23), (96, 0.26), (128, 0.305), (192, 0.45), (256, 0.564)),
    (2, 1): ((16, 0.38), (64, 0.43), (96, 0.478), (128, 0.55), (192, 0.7), (256, 0.86)),
    (2, 2): ((16, 0.33), (32, 0.34), (64, 0.36), (80, 0.42)),
}
_SELECTED_US = {
    (1, 2): ((16, 0.125), (64, 0.151), (96, 0.181), (128, 0.21), (192, 0.286), (256, 0.422)),
    (2, 1): ((16, 0.172), (64, 0.231), (96, 0.307), (128, 0.366), (192, 0.5), (256, 0.675)),
    (2, 2): ((16, 0.189), (32, 0.206), (64, 0.252)),
    (3, 1): ((64, 0.415), (96, 0.518), (128, 0.595)),
    (4, 1): ((64, 0.46),),
}
# Rows of x in all stages. More would sometimes fit, and are slower: 6 stages of 256 took 108 us where 4 took 96
# (1 bit), 6 of 192 took 42.0 where 4 took 40.9 (4 bits).
_MAX_X_ROWS = 1024
_PROGRAM_US, _SPLIT_US = 6.0, 2.0  # the start and the end of a program, and of sums over two
# Of persistent programs, by counting: the end of a tile that is not the last one, and sums that all programs at
# once write to the L2 cache (5.5 TB/s), and that one reads (64 bytes a clock).
_TILE_US, _GIVEN_KIB_A_US, _TAKEN_KIB_A_US = 1.5, 41.0, 90.0


def guess(case: Case, target: Target) -> Config | None:
    """The configuration that should be fastest, by a count of programs and planes; None if none runs."""
    found = [config for config in _guesses(case) if not unsupported_reason(case, config, target)]
    return min(found, key=lambda c: (_microseconds(case, c, target), -c.x_stages), default=None)


def even_tokens(m: int) -> list[int]:
    """Tokens a program, by which programs share m rows of x evenly: the fewest programs, and up to two more.

    More than the fewest pay off where the last one would be nearly empty.
    """
    fewest = -(-m // 256)
    return sorted(
        {min(256, -(-m // (16 * programs)) * 16) for programs in range(fewest, fewest + 3)}
    )


def divides(case: Case, config: Config) -> bool:
    """Whether programs of so many tokens share the rows of x evenly: `ANY` never, others near their own m."""
    return config.tokens in even_tokens(case.m)


def _guesses(case: Case) -> Iterator[Config]:
    """Configurations whose programs share the rows of x evenly, of any number of stages."""
    kinds = _plane_us(case)
    sizes = itertools.product(even_tokens(case.m), kinds, (3, 2), (1, 2))
    for tokens, (row_groups, k_groups), w_stages, splits in sizes:
        if tokens > kinds[row_groups, k_groups][-1][0]:
            continue  # the compiler lacks registers for two planes of products under way
        for x_stages in (16, 12, 8, 6, 4):
            if x_stages * tokens <= _MAX_X_ROWS:
                yield Config(tokens, row_groups, k_groups, x_stages, w_stages, splits=splits)


def _plane_us(case: Case) -> dict[tuple[int, int], tuple[tuple[int, float], ...]]:
    return {1: _SELECTED_US, 8: _BYTES_US}.get(case.bits, _LOOKED_UP_US)


def _microseconds(case: Case, config: Config, target: Target) -> float:
    """What a product should take."""
    planes = -(-case.k // slab(case, config)) * slab(case, config) // PLANE
    programs = math.ceil(case.m / config.tokens) * math.ceil(case.n / config.rows)
    waves = math.ceil(programs * config.splits / target.multiprocessors)
    tokens, times = zip(*_plane_us(case)[config.row_groups, config.k_groups], strict=True)
    plane_us = float(np.interp(config.tokens, tokens, times))
    if config.programs:
        return _PROGRAM_US + _persistent_us(case, config, plane_us)
    sums = _SPLIT_US if config.splits > 1 else 0.0
    return waves * (_PROGRAM_US + planes / config.splits * plane_us + sums)


def _persistent_us(case: Case, config: Config, plane_us: float) -> float:
    """What the persistent program with the most slabs takes, without its start and its end. Not measured."""
    plan = schedule(case, config)
    us = plan.most * slab(case, config) / PLANE * plane_us + plan.rounds * _TILE_US
    if plan.shared:
        kib = config.rows * config.tokens * 4 / 1024
        us += kib / _GIVEN_KIB_A_US + kib * math.ceil(plan.slabs / plan.most) / _TAKEN_KIB_A_US
    return us


def persistent_guesses(case: Case, target: Target, count: int = 2) -> list[Config]:
    """The persistent configurations that should be fastest, by the same count; of different tiles."""
    found: dict[tuple[int, int], Config] = {}
    for guessed in _guesses(case):
        if guessed.k_groups * guessed.splits > 1:
            continue
        config = for_programs(case, guessed, target)
        key = config.tokens, config.row_groups
        if key not in found and not unsupported_reason(case, config, target):
            found[key] = config
    return sorted(found.values(), key=lambda c: _microseconds(case, c, target))[:count]


def for_programs(case: Case, config: Config, target: Target) -> Config:
    """A configuration with the persistent programs that a case takes on a GPU."""
    plan = schedule(case, dataclasses.replace(config, programs=1))
    programs = fewest_programs(plan.tiles, plan.slabs, target.multiprocessors)
    return dataclasses.replace(config, programs=programs)


def fit(case: Case, config: Config, target: Target) -> Config | None:
    """A configuration of the table as a case takes it; what `guess` says, where it does not fit the case."""
    if config.programs:
        own = [for_programs(case, config, target)] if divides(case, config) else []
        found = own or persistent_guesses(case, target, 1)
        config = next((c for c in found if not unsupported_reason(case, c, target)), ANY)
    return config if divides(case, config) else guess(case, target)


def matmul(case: Case, config: Config, arrays: Arrays, group_sizes: Array | None = None) -> Array:
    """X [M, K] times the transpose of a planar weight: [M, N]; see `mosaic_kernel.matmul`."""
    from pallas_kernels import mosaic_kernel  # Mosaic GPU does not load on every platform

    return mosaic_kernel.matmul(case, config, arrays, group_sizes)

"""The search for the fastest kernel and launch configuration of a product, on the GPU at hand.

    python -m pallas_kernels.tuning --shapes 4096x4096 --bits 4,1 --m 1,16

writes a cache file, whose rows win over those that come with the package; `choice` looks them up.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from pallas_kernels import choice, integer, integer_tokens, matvec, mma, mosaic_matmul, wgmma
from pallas_kernels.case import Arrays, Case
from pallas_kernels.layout import PLANES
from pallas_kernels.target import Target, current

# What was ever the fastest, by what limits it: (tiles, warps, stages, row_warps) of `matvec`.
_ONE_TOKEN = ((1, 8, 1, 1), (1, 16, 1, 1), (1, 16, 1, 2), (1, 8, 2, 1), (1, 16, 2, 1), (2, 8, 1, 1))
_DIAGONAL = {
    1: ((1, 4, 1, 1), (1, 8, 1, 1), (1, 8, 2, 1), (1, 16, 1, 2), (2, 8, 1, 1)),
    2: ((1, 4, 2, 1), (1, 8, 2, 1), (1, 8, 2, 2), (2, 8, 2, 2)),
    4: ((1, 8, 4, 1), (1, 16, 4, 2)),
    8: (),
}
_TOKENS = (
    *((1, 8, 1, 1), (1, 8, 2, 1), (1, 16, 1, 2), (1, 16, 2, 2)),
    *((2, 8, 1, 1), (2, 8, 1, 2), (2, 16, 1, 1), (2, 16, 1, 2)),
)
# The same, with several thread blocks a multiprocessor, which loop over tiles of rows.
_PERSISTENT = ((1, 8, 1, 1, 4), (1, 16, 1, 1, 2), (1, 16, 1, 2, 2))
# (consumers, thread blocks a multiprocessor) of `integer` and of `integer_tokens`.
_INTEGER = ((8, 1), (12, 1), (16, 1), (24, 1), (8, 2), (12, 2))
_INTEGER_TOKENS = ((8, 1), (12, 1), (16, 1), (8, 2))
# (tokens, row_groups, k_groups, stages, cluster, ring) of `wgmma` for at least so many tokens.
_WGMMA = {
    16: ((16, 1, 4, 2, 1, False), (16, 1, 2, 2, 1, False), (16, 1, 2, 4, 2, False)),
    32: (
        *((16, 1, 4, 2, 1, False), (32, 1, 2, 2, 1, False), (32, 1, 4, 2, 1, False)),
        *((32, 2, 2, 2, 1, False), (32, 1, 2, 2, 2, False), (32, 2, 2, 2, 2, False)),
    ),
    64: (
        *((32, 1, 2, 2, 1, False), (32, 1, 4, 2, 1, False), (32, 2, 2, 2, 1, False)),
        *((64, 2, 1, 2, 1, False), (64, 4, 1, 2, 1, False), (64, 1, 4, 2, 1, True)),
        *((64, 1, 2, 2, 2, False), (64, 1, 2, 3, 2, False), (64, 2, 1, 4, 2, False)),
        *((64, 2, 2, 2, 2, True), (64, 2, 2, 3, 2, False), (64, 2, 2, 4, 2, False)),
    ),
    128: (
        *((64, 2, 1, 2, 1, False), (64, 4, 1, 2, 1, False), (64, 2, 2, 2, 1, False)),
        *((64, 2, 2, 3, 1, False), (128, 2, 1, 2, 1, False), (128, 2, 1, 2, 2, True)),
        *((64, 4, 1, 2, 2, True), (256, 2, 1, 2, 2, False), (256, 2, 1, 3, 2, False)),
        (256, 2, 1, 4, 2, False),
    ),
}


# (tokens, tiles, row_warps, teams, x_stages) of `mma` for at least so many tokens.
_MMA = {
    9: ((16, 2, 2, 8, 2), (16, 2, 2, 4, 4)),
    17: ((24, 2, 2, 8, 2), (24, 2, 2, 4, 4), (24, 2, 2, 4, 2)),
    25: ((32, 2, 2, 8, 2), (32, 2, 2, 4, 4), (32, 2, 2, 4, 2), (32, 1, 4, 4, 4)),
    33: ((48, 2, 2, 4, 2), (48, 2, 2, 4, 4)),
    49: ((64, 2, 2, 4, 2), (64, 2, 2, 4, 4), (64, 1, 4, 4, 2), (64, 1, 4, 2, 2)),
    65: ((64, 2, 4, 2, 4), (64, 2, 2, 2, 2), (64, 2, 2, 4, 2), (128, 1, 4, 2, 2)),
}
_MOSAIC = 32  # tokens from which on it may be the fastest
_PERSISTENT_MOSAIC = 128  # and from which on its persistent programs may be


def candidates(case: Case, target: Target) -> Iterator[tuple[str, Any]]:
    """(kernel, configuration) pairs that may be the fastest for a case: those that ever were.

    Not all of them run on every GPU: see `choice.unsupported_reason`.
    """
    if case.m == 1:
        for values in _DIAGONAL.get(case.bits, ()):
            yield "matvec", matvec.Config(*values[:3], row_warps=values[3], diagonal=True)
        ways = (False, True) if target.has_bulk_copies else (False,)
        for (consumers, each), lane_copies in itertools.product(_INTEGER, ways):
            programs = each * target.multiprocessors
            yield "integer", integer.Config(consumers, programs, lane_copies)
        for *values, row_warps, each in _PERSISTENT:
            programs = each * target.multiprocessors
            config = matvec.Config(*values, row_warps=row_warps, programs=programs)
            if matvec.Plan.of(case, config).is_persistent:
                yield "matvec", config
    if case.bits == 1 and case.m in integer_tokens.TOKENS:
        for consumers, each in _INTEGER_TOKENS:
            config = integer_tokens.Config(consumers, each * target.multiprocessors)
            yield "integer_tokens", config
    if case.m <= (2 * choice.FEW if target.has_wgmma else choice.FEW):
        for values in _ONE_TOKEN if case.m == 1 else _TOKENS:
            config = matvec.Config(*values[:3], row_warps=values[3])
            yield "matvec", choice.fit(case, config, target)
    if case.m >= min(_WGMMA) and target.has_wgmma:
        for values in _WGMMA[max(m for m in _WGMMA if m <= case.m)]:
            yield "wgmma", wgmma.Config(*values)
    if case.m >= min(_MMA):
        for *values, x_stages in _MMA[max(m for m in _MMA if m <= case.m)]:
            stages = max(2, x_stages // case.planes)
            yield "mma", mma.Config(*values, stages=stages, x_stages=x_stages)
    if case.m >= _MOSAIC and (found := mosaic_matmul.guess(case, target)) is not None:
        yield "mosaic", found
    if case.m >= _PERSISTENT_MOSAIC:
        for found in mosaic_matmul.persistent_guesses(case, target):
            yield "mosaic", found
    if case.m >= (128 if target.has_wgmma else 64):
        yield "dequantise", None


def search(cases: list[Case], seconds: float = 0.01) -> list[dict]:
    """Measures the candidates of cases with one weight on the GPU at hand; a row of the table for each case."""
    weights, target = _random_weights(cases[0]), current()
    jobs = [
        (case, kernel, config)
        for case in cases
        for kernel, config in candidates(case, target)
        if config is None or choice.unsupported_reason(case, config, target) is None
    ]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda job: _compile(*job, weights=weights, target=target), jobs))
    best: dict[Case, dict] = {}
    for (case, kernel, config), program in zip(jobs, programs, strict=True):
        microseconds = _measure(case, program, weights, seconds)
        if case not in best or microseconds < best[case]["us"]:
            best[case] = {
                "device": target.kind,
                "architecture": target.architecture,
                "bits": case.bits,
                "m": case.m,
                "n": case.n,
                "k": case.k,
                "uniform": case.uniform,
                "kernel": kernel,
                "config": _recorded(config, target),
                "us": round(microseconds, 2),
            }
    for row in best.values():
        print(json.dumps(row), flush=True)
    return list(best.values())


def _has_kernels_of_its_own(case: Case) -> bool:
    """Whether evenly spaced values have other kernels than any codebook."""
    return case.computes_values or (case.bits == 2 and case.m == 1)


def _recorded(config: Any, target: Target) -> dict:
    """A configuration as a row of the table has it, see `configuration`."""
    is_mosaic = isinstance(config, mosaic_matmul.Config)
    if is_mosaic and not config.programs:  # what its guess says of any case near
        return {"tokens": mosaic_matmul.ANY.tokens}
    values = {} if config is None else dataclasses.asdict(config)
    if values.get("programs") and not is_mosaic:  # whose number follows from each case
        values["programs_each"] = values.pop("programs") // target.multiprocessors
    return values


_TRIPS = 32  # so many that the host's work at the start of a program does not count


def _compile(case: Case, kernel: str, config: Any, weights: list, target: Target) -> Any:
    """A loop over products that rotates weights past the caches."""
    product = jax.jit(functools.partial(choice.launch, case, kernel, config, target=target))

    def loop(x, weights, codebook):
        def body(_, carry):
            x, _ = carry
            results = [
                product(Arrays(x, packed, scales, codebook, None))[0] for packed, scales in weights
            ]
            # Every result is carried on, and every trip's x depends on them: nothing is left out or hoisted.
            return jax.lax.optimization_barrier((x, results))

        zeros = [jnp.zeros((case.m, case.n), case.out_dtype) for _ in weights]
        return jax.lax.fori_loop(0, _TRIPS, body, (x, zeros))

    return jax.jit(loop).lower(*_inputs(case, weights)).compile()


def _inputs(case: Case, weights: list) -> tuple:
    x = jax.random.normal(jax.random.key(0), (case.m, case.k), case.x_dtype)
    codebook = jnp.sort(jax.random.normal(jax.random.key(1), (2**case.bits,)))
    return x, weights, codebook


def _measure(case: Case, program: Any, weights: list, seconds: float) -> float:
    """Microseconds of a product, the lower quartile: what disturbs a sample makes it longer.

    With the loop's copies of results, the same for all candidates.
    """
    inputs = _inputs(case, weights)
    times, end = [], None
    while end is None or time.perf_counter() < end or len(times) < 12:
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        times.append(time.perf_counter() - start)
        end = end or time.perf_counter() + seconds
    return sorted(times)[len(times) // 4] / (_TRIPS * len(weights)) * 1e6


def _random_weights(case: Case) -> list:
    """Copies of a weight, together larger than the cache of any GPU."""
    shape = (case.tiles, case.blocks, 2, 8, 32)
    copies = max(2, min(24, math.ceil(240e6 / (2 * math.prod(shape)))))

    @jax.jit
    def one(key):
        packed = jax.random.bits(key, shape, jnp.uint16)
        scales = jax.random.uniform(key, (case.tiles, case.scale_fours, 64), minval=0.5)
        return packed, scales.astype(case.scale_dtype)

    return [one(jax.random.key(i)) for i in range(copies)]


def _write(rows: list[dict], path: Path) -> None:
    """Merges rows into a table file; whole or not at all."""
    merged = {}
    if path.is_file():
        merged = {choice.row_key(row): row for row in json.loads(path.read_text(encoding="utf-8"))}
    merged |= {choice.row_key(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(f"[\n{text}\n]\n")
    os.replace(file.name, path)


def _numbers(text: str, separator: str = ",") -> list[int]:
    if not re.fullmatch(rf"[1-9]\d*({separator}[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers from 1 on")
    return [int(part) for part in text.split(separator)]


def _shapes(text: str) -> list[list[int]]:
    shapes = [_numbers(shape, "x") for shape in text.split(",")]
    if any(len(shape) != 2 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text} has shapes that are not NxK")
    return shapes


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = _Parser(prog="fdk-jax tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--shapes", type=_shapes, default="4096x4096,8192x8192", help="NxK, comma-separated"
    )
    parser.add_argument("--bits", type=_numbers, default=",".join(map(str, PLANES)))
    parser.add_argument("--m", type=_numbers, default="1,16,32,64,256", help="numbers of tokens")
    parser.add_argument("--codebook", default="any,uniform", help="of these, comma-separated")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=choice.cache_file())
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; then it writes")
    flags = parser.parse_args(argv)
    codebooks = flags.codebook.split(",")
    if not {*codebooks} <= {"any", "uniform"}:
        parser.error(f"--codebook {flags.codebook}: list any, uniform or both")
    if not {*flags.bits} <= {*PLANES}:
        parser.error(f"--bits {','.join(map(str, flags.bits))}: list some of {(*PLANES,)}")
    if flags.group_size < 1:
        parser.error(f"--group_size {flags.group_size}: at least 1")
    if jax.default_backend() != "gpu":
        raise SystemExit("tuning needs an NVIDIA GPU that JAX sees")
    half, start = jnp.dtype(jnp.bfloat16), time.perf_counter()
    for (n, k), bits, codebook in itertools.product(flags.shapes, flags.bits, codebooks):
        weight = n, k, bits, flags.group_size, 1
        uniform = codebook == "uniform"
        cases = [Case(m, *weight, half, half, None, half, uniform) for m in flags.m]
        if uniform:
            cases = [case for case in cases if _has_kernels_of_its_own(case)]
        if cases and time.perf_counter() - start < flags.budget:
            _write(search(cases), flags.output)


if __name__ == "__main__":
    main()

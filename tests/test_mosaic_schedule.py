"""Which tiles and slabs persistent programs of the Mosaic GPU kernel compute, and which cases take them."""

import dataclasses

import jax
import jax.numpy as jnp
import planar
import pytest
from backends import for_a_gpu

from pallas_kernels import choice, mosaic_integers, mosaic_matmul, tuning
from pallas_kernels.case import Arrays
from pallas_kernels.mosaic_matmul import Config
from pallas_kernels.mosaic_schedule import Schedule, fewest_programs
from pallas_kernels.target import H200, Target

BF16 = jnp.dtype(jnp.bfloat16)


def _pieces(plan, program):
    """What a program computes, in order, as numbers."""
    pieces = [plan.piece(program, step) for step in plan.steps()]
    pieces = [type(piece)(*map(int, piece)) for piece in pieces]
    return [piece for piece in pieces if piece.slabs]


@pytest.mark.parametrize(
    ("tiles", "slabs", "programs"),
    [
        (3, 4, 2),
        (5, 3, 5),
        (7, 5, 3),
        (2, 7, 5),
        (1, 6, 6),
        (9, 2, 4),
        (224, 16, 132),
        (48, 84, 131),
    ],
)
def test_every_slab_of_every_tile_is_computed_once(tiles, slabs, programs):
    plan = Schedule(tiles, slabs, programs)
    found, counts = [], []
    for program in range(programs):
        pieces = _pieces(plan, program)
        counts.append(sum(piece.slabs for piece in pieces))
        found += [(piece.tile, piece.first + i) for piece in pieces for i in range(piece.slabs)]
    assert sorted(found) == [(tile, slab) for tile in range(tiles) for slab in range(slabs)]
    assert max(counts) == plan.most and max(counts) - min(counts) <= 1 + slabs * (plan.shared == 0)


@pytest.mark.parametrize(
    ("tiles", "slabs", "programs"), [(3, 4, 2), (7, 5, 3), (2, 7, 5), (1, 6, 6), (224, 16, 132)]
)
def test_sums_are_given_once_and_taken_once_by_a_later_program(tiles, slabs, programs):
    plan, given, taken = Schedule(tiles, slabs, programs), [], []
    for program in range(programs):
        pieces = _pieces(plan, program)
        for piece in pieces:
            if not plan.ends(piece):
                given.append((piece.tile, program))
            elif piece.first:
                first = int(plan.first_giver(piece))
                taken += [(piece.tile, giver) for giver in range(first, program)]
        # What it takes comes last, and what it gives, if it takes anything, first.
        assert all(piece.first == 0 and plan.ends(piece) for piece in pieces[1:-1])
        assert sum(not plan.ends(piece) for piece in pieces) <= 1
    assert given and sorted(given) == sorted(taken)


def test_programs_are_as_few_as_take_as_long():
    assert fewest_programs(224, 16, 132) == 132  # a round, and the rest in shares
    assert fewest_programs(32, 56, 132) == 128  # four share a tile, 14 slabs each
    assert fewest_programs(128, 32, 132) == 128  # nothing to share
    assert fewest_programs(1, 4, 132) == 4


def _config(case, **others):
    return mosaic_matmul.for_programs(case, Config(**others), H200)


def test_the_rest_of_a_round_is_shared():
    case = planar.case(512, 14336, 4096, 4)
    config = _config(case, tokens=256, w_stages=3)
    assert config.programs == 132 and mosaic_matmul.unsupported_reason(case, config, H200) is None
    assert mosaic_matmul.schedule(case, config) == Schedule(224, 16, 132)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({}, Config(64, 1, 2, 8, programs=8), "by slabs alone"),
        ({}, Config(128, 2, 1, 4, splits=2, programs=8), "by slabs alone"),
        (dict(codebooks=2), Config(programs=8), "one table"),
        ({}, Config(programs=133), "at once"),
        (dict(k=256), Config(programs=131), "too small"),
        ({}, Config(64, 4, 1, 4, programs=8), "memory of all 4 stages"),
    ],
)
def test_persistent_programs_refuse_what_they_cannot_do(change, config, words):
    case = dataclasses.replace(planar.case(300, 4096, 4096, 4), **change)
    assert words in mosaic_matmul.unsupported_reason(case, config, H200)


def test_integers_have_no_persistent_programs():
    case = planar.case(512, 4096, 4096, 4)
    reason = mosaic_integers.unsupported_reason(case, Config(256, programs=64), H200)
    assert reason is not None


def test_the_search_tries_them_and_the_table_follows():
    """A row of the search is read for its case, for one of other tokens, and on a GPU of other size."""
    case = planar.case(512, 14336, 4096, 4)
    tried = [config for name, config in tuning.candidates(case, H200) if name == "mosaic"]
    assert [bool(config.programs) for config in tried] == [False, True, True]
    for config in tried[1:]:
        assert mosaic_matmul.unsupported_reason(case, config, H200) is None
        row = dict(kernel="mosaic", config=dataclasses.asdict(config))
        assert choice.fit(case, choice.configuration(row, H200), H200) == config
        other = dataclasses.replace(case, m=480)
        fitted = choice.fit(other, choice.configuration(row, H200), H200)
        assert fitted.programs and mosaic_matmul.divides(other, fitted)
        small = Target((9, 0), 78, H200.shared_bytes, "a smaller one")
        assert choice.fit(case, choice.configuration(row, small), small).programs == 78
        # Where they cannot run, what the other configurations' count says.
        several = dataclasses.replace(case, codebooks=2)
        assert choice.fit(several, config, H200) == mosaic_matmul.guess(several, H200)


def test_nothing_takes_them_unasked():
    for m in (128, 192, 512, 2048):
        found = mosaic_matmul.guess(planar.case(m, 14336, 4096, 4), H200)
        assert found is not None and not found.programs


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((300, 1416, 2056, 4), Config(128, 2, 1, 4, 2, programs=20)),
        ((300, 1416, 2056, 1), Config(96, 3, 1, 8, 2, programs=5)),
        ((70, 1416, 2056, 2), Config(64, 4, 1, 8, 2, programs=7)),
        ((300, 1416, 4096, 8), Config(256, 2, 1, 4, 2, programs=24)),
    ],
)
def test_lowers_for_a_gpu(shape, config):
    case = planar.case(*shape, bias=BF16)
    assert mosaic_matmul.unsupported_reason(case, config, H200) is None
    struct = jax.ShapeDtypeStruct
    arrays = Arrays(
        struct((case.m, case.k), BF16),
        struct((case.tiles, case.blocks, 2, 8, 32), jnp.uint16),
        struct((case.tiles, case.scale_fours, 64), BF16),
        struct((2**case.bits,), jnp.float32),
        struct((case.n,), BF16),
    )
    with for_a_gpu():
        traced = jax.jit(lambda a: mosaic_matmul.matmul(case, config, a)).trace(arrays)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

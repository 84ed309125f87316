"""The Mosaic GPU kernel's values without a GPU, by JAX's interpreter: see `mosaic_interpreted`."""

import jax
import jax.numpy as jnp
import planar
import pytest

from pallas_kernels import mosaic_matmul, mosaic_results
from pallas_kernels.case import Arrays
from pallas_kernels.mosaic_matmul import Config
from pallas_kernels.target import H200

mosaic_interpreted = pytest.importorskip(
    "mosaic_interpreted", reason="this JAX has no interpreter of Mosaic GPU", exc_type=ImportError
)
RAGGED = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="before JAX 0.11 the interpreter takes whole tiles only"
)
BF16 = jnp.dtype(jnp.bfloat16)


def _product(rng, m, n, k, bits, *, bias=False, group=64):
    arrays, _, wanted = planar.product(rng, m, n, k, bits, group, BF16, 1, scale_dtype=BF16)
    added = jnp.asarray(rng.normal(size=n), BF16) if bias else None
    case = planar.case(m, n, k, bits, group_size=group, bias=BF16 if bias else None)
    return case, Arrays(*arrays, added), wanted, added


def _check(rng, *shape, config, **options):
    case, arrays, wanted, added = _product(rng, *shape, **options)
    assert mosaic_matmul.unsupported_reason(case, config, H200) is None
    y = mosaic_interpreted.matmul(case, config, arrays, detect_races=True)
    wanted.check(y, added)
    # Of sums in device memory the interpreter does not know who waits for whom.
    if not (config.programs and mosaic_matmul.schedule(case, config).shared):
        assert not mosaic_interpreted.found_races()


@pytest.mark.parametrize("bits", [4, 8])
def test_one_program_a_tile(rng, bits):
    _check(rng, 16, 256, 512, bits, config=Config(16, 2, 1, 4, 2), bias=True)


@pytest.mark.parametrize(
    ("bits", "tiles", "programs"),
    [(4, 4, 2), (4, 3, 2), (1, 1, 3), (2, 2, 3)],
)
def test_persistent_programs(rng, bits, tiles, programs):
    """Rounds; a round and a rest that two share; a tile that three share; a program with parts of two tiles."""
    config = Config(16, 2, 1, 4, 2, programs=programs)
    _check(rng, 16, 128 * tiles, 768 if bits > 1 else 1536, bits, config=config, bias=True)


@RAGGED
@pytest.mark.parametrize("programs", [0, 3])
def test_ragged_along_every_axis(rng, programs):
    config = Config(32, 2, 1, 4, 2, programs=programs)
    _check(rng, 40, 200, 1032, 4, config=config, bias=True, group=32)


def test_memory_that_is_given_back_too_early_is_found(rng, monkeypatch):
    """Results take the place of x: the producer must not copy the next tile's there yet."""
    case, arrays, *_ = _product(rng, 16, 512, 512, 4)
    monkeypatch.setattr(mosaic_results, "kept_planes", lambda _: 0)
    config = Config(16, 2, 1, 4, 2, programs=2)
    mosaic_interpreted.matmul(case, config, arrays, detect_races=True)
    assert mosaic_interpreted.found_races()


def test_sums_that_are_taken_from_the_wrong_program_are_found(rng, monkeypatch):
    case, arrays, wanted, _ = _product(rng, 16, 128, 768, 4)
    monkeypatch.setattr("pallas_kernels.mosaic_schedule.Schedule.first_giver", lambda _, piece: 1)
    y = mosaic_interpreted.matmul(case, Config(16, 2, 1, 4, 2, programs=3), arrays)
    with pytest.raises(AssertionError, match="worst element"):
        wanted.check(y)

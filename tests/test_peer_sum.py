"""Sums over devices through each other's memory: on the emulator, whose devices run at the same time."""

import dataclasses

import emulator
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mailbox, peer_sum
from pallas_kernels.peer_sum import PeerSum
from pallas_kernels.target import H200, Target

_EPS = 1e-5


def _case(devices, rows, features, dtype="bfloat16", out_dtype="bfloat16", normed=True) -> PeerSum:
    return PeerSum(
        devices, rows, features, jnp.dtype(dtype), jnp.dtype(out_dtype), normed, _EPS * normed
    )


class _Devices:
    """Mailboxes of several devices, and launches on all of them."""

    def __init__(self, case: PeerSum, rng: np.random.Generator):
        self.case, self.rng = case, rng
        words = mailbox.words(case.devices, case.features)
        self.boxes = [np.zeros(words, np.uint32) for _ in range(case.devices)]

    def launch(self, case: PeerSum, chance=None, boxes=None):
        """(results of each device, rows of each device, residual, scale), of fresh random numbers."""
        rng, shape = self.rng, (case.rows, case.features)
        xs = [rng.standard_normal(shape).astype(case.dtype) for _ in range(case.devices)]
        residual = rng.standard_normal(shape).astype(case.out_dtype)
        scale = rng.standard_normal(case.features).astype(case.out_dtype)
        operands = []
        for rank, x in enumerate(xs):
            addresses = np.zeros(2 + 2 * case.devices, np.uint32)
            own = [x, self.boxes[rank], addresses]
            own += [residual.copy(), scale.copy()] if case.normed else []
            results = [np.full(shape, np.nan, case.out_dtype) for _ in range(1 + case.normed)]
            operands.append([*own, *results])
        found = [own[1] for own in emulator.addresses(operands)]
        for rank, own in enumerate(operands):
            own[2][:2] = rank, 0
            own[2][2:] = np.asarray(found, np.uint64).view(np.uint32)
        if boxes is not None:
            boxes(operands)
        source = peer_sum.source(case, H200)
        emulator.run_devices(source, operands, case.rows, case.threads, chance=chance)
        return [own[5 if case.normed else 3 :] for own in operands], xs, residual, scale


def _check(case: PeerSum, results, xs, residual, scale) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a.view(np.uint8) == b.view(np.uint8)).all(), "the devices differ"
    wide = [np.asarray(x, np.float64) for x in xs]
    step = float(jnp.finfo(case.out_dtype).eps) / 2
    total, found = sum(wide), np.asarray(results[0][0], np.float64)
    allowed = case.devices * 2.0**-24 * sum(np.abs(x) for x in wide)
    if case.normed:
        wide_residual = np.asarray(residual, np.float64)
        total = total + wide_residual
        allowed += 2.0**-24 * (np.abs(wide_residual) + np.abs(total))
    assert (np.abs(found - total) <= 1.001 * allowed + step * np.abs(total) + 1e-30).all()
    if not case.normed:
        return
    # The norm is of the sum as it was stored.
    root = np.sqrt((found**2).mean(axis=1, keepdims=True) + case.eps)
    wanted = found / root * np.asarray(scale, np.float64)
    y = np.asarray(results[0][1], np.float64)
    assert (np.abs(y - wanted) <= (2.1 * step + 1e-6) * np.abs(wanted) + 1e-30).all()


@pytest.mark.parametrize(
    "case",
    [
        _case(2, 1, 64),
        _case(2, 3, 4096 + 4),
        _case(2, 2, 192, "float32"),
        _case(2, 1, 96, "float16", "float16"),
        _case(3, 2, 128, "float32", "float32"),
        _case(4, 1, 68, "bfloat16", "float32"),
        _case(8, 1, 128),
        _case(2, 2, 256, normed=False),
        _case(4, 1, 64, "float32", normed=False),
    ],
    ids=str,
)
def test_sums_of_devices(rng, case):
    devices = _Devices(case, rng)
    for launch in range(3):  # both parts of the mailbox, and one of them again
        _check(case, *devices.launch(case, chance=rng if launch else None))


def test_sums_of_other_rows_and_kinds_share_a_mailbox(rng):
    first = _case(2, 3, 96)
    devices = _Devices(first, rng)
    kinds = [first, _case(2, 1, 96, normed=False), first, _case(2, 2, 96, "float32")] * 2
    for case in kinds:
        _check(case, *devices.launch(case, chance=rng))


def test_a_mailbox_that_was_moved_traps(rng):
    case = _case(2, 1, 64)

    def move(operands):
        operands[1][2][4] += 128  # where the others think that the second mailbox is

    with pytest.raises(emulator.Fault, match="trap"):
        _Devices(case, rng).launch(case, boxes=move)


def test_a_sum_half_a_percent_off_fails(rng):
    case = _case(2, 1, 64)
    results, *given = _Devices(case, rng).launch(case)
    for which in (0, 1):
        wrong = [[array.copy() for array in own] for own in results]
        for own in wrong:
            own[which] = (own[which].astype(np.float32) * np.float32(1.005)).astype(case.out_dtype)
        with pytest.raises(AssertionError):
            _check(case, wrong, *given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(devices=9), "9 devices"),
        (dict(rows=65), "65 rows"),
        (dict(features=66), "66 features"),
        (dict(features=32768), "32768 features"),
        (dict(dtype=jnp.dtype(jnp.int32)), "int32"),
    ],
)
def test_what_there_is_no_kernel_for(changes, reason):
    case = _case(2, 1, 64)
    assert peer_sum.unsupported_reason(case, H200) is None
    other = dataclasses.replace(case, **changes)
    assert reason in (peer_sum.unsupported_reason(other, H200) or "")
    assert "not known" in (peer_sum.unsupported_reason(case, Target(None, 132, 0, "other")) or "")

"""The attention suite: its oracle, its loop, and what it does without a GPU."""

import functools

import jax
import numpy as np
import pytest

from fdk_jax.benchmark import attention as suite
from fdk_jax.benchmark import probes, records, report, runner, timing
from pallas_kernels import attention

CASE = suite.AttentionCase(2, 128)


@pytest.fixture
def interpreted(monkeypatch):
    """The plain kernel in Pallas' interpreter, as if it ran on a GPU."""
    plain = functools.partial(attention.decode, interpret=True, splits=1)
    monkeypatch.setattr(attention, "decode", plain)
    monkeypatch.setattr(attention, "choose", lambda *_: ("plain", ""))
    device = jax.devices("cpu")[0]
    monkeypatch.setattr(suite.environment, "device_for", lambda backend: device)
    monkeypatch.setattr(probes, "bound", lambda *_: {"bound_us": 1e5})
    return monkeypatch


def test_a_case_is_checked_and_timed(interpreted):
    session = timing.Session(3, copies=2, sample_seconds=1e-3)
    (row,) = runner.measure(suite, [CASE], session)
    assert row["status"] == "ok", row["reason"]
    assert 0 < row["rel_rms_error"] < 2**-8
    assert (row["copies"], row["calls"], len(row["samples_us"])) == (2, 2, 3)


@pytest.mark.parametrize("one_head", [False, True])
def test_a_wrong_kernel_is_not_timed(interpreted, one_head):
    right = attention.decode

    def off(*arguments):
        mixed, *cache = right(*arguments)
        factor = np.full(mixed.shape, 1.01, np.float32)
        factor[:, 128 * one_head :] = 1 if one_head else 1.01
        return (mixed.astype(np.float32) * factor).astype(mixed.dtype), *cache

    interpreted.setattr(attention, "decode", off)
    (row,) = runner.measure(suite, [CASE], timing.Session(3))
    assert row["status"] == "failed" and "is above" in row["reason"]


def test_without_a_gpu_it_is_skipped():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    (row,) = runner.measure(suite, [CASE], timing.Session())
    assert row["status"] == "skipped" and "needs a GPU" in row["reason"]


def test_rows_become_a_table():
    found = records.statistics([3.0, 4.0, 5.0]) | {"bound_us": 1.0, "rel_rms_error": 2e-3}
    row = records.make_row(CASE.fields(), {"device": "a", "commit": "c" * 40}, found)
    assert "| 2 | 128 | 4.0 | 25% | 0.0020 |" in report.attention([row])
    assert "No rows" in report.attention([])


def test_every_combination_is_a_case_once():
    cases = suite.make_cases(batches=[1, 16], slots=[1024, 8192], dtypes=["bfloat16"])
    assert len({case.name for case in cases}) == len(cases) == 4

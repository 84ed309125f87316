"""Runs of the benchmark that share a GPU."""

import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from fdk_jax.benchmark import cases, records, runner, timing

fcntl = pytest.importorskip("fcntl")  # of POSIX systems alone
from fdk_jax.benchmark import turns  # noqa: E402

SMALL = dict(backends=["xla"], m=[1], k=[64], n=["k"], bits=[4])


def test_runs_that_share_a_file_measure_in_turn(tmp_path):
    """Samples, and what XLA measures when it compiles its own products, wait for another run's turn to end."""
    session = timing.Session(3, turns=turns.Turns(tmp_path / "turns"))

    def free(lock=fcntl.LOCK_EX) -> bool:
        with open(tmp_path / "turns", "a") as file:
            try:
                fcntl.flock(file, lock | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def measure(case, session):
        assert free()
        with session.using():
            assert free(fcntl.LOCK_SH) and not free()
            with session.turn():
                assert not free(fcntl.LOCK_SH)
            assert free(fcntl.LOCK_SH) and not free()
        samples = yield lambda: float(not free(fcntl.LOCK_SH))
        return records.statistics(samples)

    (made,) = runner.measure(
        types.SimpleNamespace(measure=measure), cases.make_cases(**SMALL), session
    )
    assert made["status"] == "ok" and made["samples_us"] == [1.0] * 3 and free()

    held = []
    x = jnp.ones((4, 4))
    for product in (True, False):
        lowered = jax.jit(lambda x, p=product: x @ x if p else x + x).lower(x)
        watched = types.SimpleNamespace(
            as_text=lowered.as_text, compile=lambda: held.append(not free())
        )
        timing.compiled_in_turn(watched, session)
    assert held == [True, False]


def test_runs_that_use_a_gpu_do_not_wait_for_each_other(tmp_path):
    """Both want to measure while they use it, and neither while the other does."""
    inside, most, met = [], [], threading.Barrier(2, timeout=30)

    def run():
        own = turns.Turns(tmp_path / "turns")
        with own.using():
            met.wait()  # two at a time
            for _ in range(20):
                with own.alone():
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(1e-3)
                    inside.pop()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run) for _ in range(2)]:
            done.result(timeout=60)
    assert most == [1] * 40


def test_a_run_that_wants_to_measure_comes_before_later_uses(tmp_path):
    """A shared lock is granted again and again: what comes after a run that wants to measure waits for it."""
    first, second, third = (turns.Turns(tmp_path / "turns") for _ in range(3))
    order, asked = [], threading.Event()

    def measures():
        asked.set()
        with second.alone():
            order.append("measured")

    def uses():
        with third.using():
            order.append("used")

    def waits_for(file: str, kind: str) -> bool:
        with open(tmp_path / file, "a") as opened:
            try:
                fcntl.flock(opened, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with ThreadPoolExecutor(2) as pool:
        with first.using():
            done = [pool.submit(measures)]
            assert asked.wait(30)
            while not waits_for("turns.door", fcntl.LOCK_EX):
                time.sleep(1e-3)
            done.append(pool.submit(uses))
            time.sleep(0.05)
            assert order == []
        for ended in done:
            ended.result(timeout=30)
    assert order == ["measured", "used"]


def test_one_run_measures_for_all_that_share_a_file(tmp_path):
    asked = []

    def measure():
        asked.append(1)
        return [1.5, float(len(asked))]

    found = [turns.Turns(tmp_path / "turns").once("device", measure) for _ in range(3)]
    assert found == [[1.5, 1.0]] * 3
    assert turns.Turns(tmp_path / "turns").once("another", measure) == [1.5, 2.0]
    assert turns.Turns(tmp_path / "turns").once("device", measure) == [1.5, 1.0]

"""Runs the cases of a suite, one row after the other, and survives interruption."""

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from fdk_jax.benchmark import environment, records, timing

# Each holds its copies of the weights until all are sampled.
_MOST_TOGETHER = 16


class Interrupted(Exception):
    """A signal asked the run to end; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """Within it SIGINT and SIGTERM raise `Interrupted`, so that what was measured is kept and shown.

    Python drops an exception that a signal raises in a destructor or in a callback of its
    collector, and a library may take it for an error of its own: `check` raises it again.
    """

    def __init__(self) -> None:
        self._shielded = False
        self._pending: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _stop(self, signum: int, _frame: Any) -> None:
        self._pending = signum
        if not self._shielded:
            raise Interrupted(signum)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self._pending is not None:
            raise Interrupted(self._pending)

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Within it a signal waits for the end."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        self.check()

    def __enter__(self) -> "Interrupts":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def run(
    suite: ModuleType,
    cases: Sequence[Any],
    session: timing.Session,
    write: Callable[[dict[str, Any]], None],
) -> int | None:
    """Measures the cases and hands each finished row to `write`.

    Args:
        suite: a module as the package's docstring describes.
        cases: what to measure.
        session: how.
        write: takes a row as soon as it is finished.

    Returns:
        The signal that ended the run early, None when it came to its end.
    """
    try:
        with Interrupts() as interrupts, _progress(len(cases)) as progress:

            def announce(name: str) -> None:
                interrupts.check()
                progress.start(name)

            for together in _groups(suite, cases):
                for row in measure(suite, together, session, announce):
                    interrupts.check()
                    with interrupts.shield():
                        write(row)
                        progress.finish(row)
    except Interrupted as stop:
        return stop.signum
    return None


def _groups(suite: ModuleType, cases: Sequence[Any]) -> Iterator[list[Any]]:
    for _, together in itertools.groupby(cases, suite.group):
        rest = list(together)
        while rest:
            yield rest[:_MOST_TOGETHER]
            rest = rest[_MOST_TOGETHER:]


def measure(
    suite: ModuleType,
    cases: Sequence[Any],
    session: timing.Session,
    announce: Callable[[str], None] = lambda name: None,
) -> Iterator[dict[str, Any]]:
    """The rows of cases that are sampled in turn, whatever happens to each.

    Args:
        suite: a module as the package's docstring describes.
        cases: what to measure.
        session: how.
        announce: told the name of a case when work on it starts.
    """
    attempts = []
    for case in cases:
        announce(case.name)
        attempts.append(_Attempt(suite, case, session))
    active = [a for a in attempts if a.wants_sample]
    with session.turn():
        while active:
            for attempt in active:
                announce(attempt.case.name)
                attempt.take_sample()
            active = [a for a in active if a.wants_sample]
    for attempt in attempts:
        yield attempt.row()


class _Attempt:
    """One case on its way to a row: made ready on construction, then sampled."""

    def __init__(self, suite: ModuleType, case: Any, session: timing.Session):
        self.case = case
        self._session = session
        self._samples: list[float] = []
        self._warm_ups = 1
        self._spent = 0.0
        self._run: Callable[[], float] | None = None
        self._result: dict[str, Any] = {}
        self._measurement: timing.Measurement = suite.measure(case, session)
        with self._outcome():
            self._run = next(self._measurement)

    @contextlib.contextmanager
    def _outcome(self) -> Iterator[None]:
        """Turns the end of the measurement, good or bad, into its result."""
        try:
            yield
        except StopIteration as stop:
            self._end(stop.value)
        except Interrupted:
            raise
        except NotImplementedError as error:
            self._end({"status": "skipped", "reason": _reason(error)})
        except Exception as error:
            reason = f"{type(error).__name__}: {_reason(error)}"
            self._end({"status": "failed", "reason": reason})

    def _end(self, result: dict[str, Any]) -> None:
        self._result, self._run = result, None

    @property
    def wants_sample(self) -> bool:
        """Whether there is something left to time."""
        return self._run is not None

    def take_sample(self) -> None:
        """Runs once: to warm up at first, then for a sample; ends with the last one."""
        if self._run is None:
            return
        late = self._spent > self._session.max_seconds
        with self._outcome():
            start = time.perf_counter()
            seconds = self._run()
            self._spent += time.perf_counter() - start
            if self._warm_ups and not late:
                self._warm_ups -= 1
                return
            self._samples.append(seconds)
            late = self._spent > self._session.max_seconds
            wanted = self._session.repetitions
            if len(self._samples) >= (min(records.MIN_SAMPLES, wanted) if late else wanted):
                self._measurement.send(self._samples)

    def row(self) -> dict[str, Any]:
        """The row of the case."""
        try:
            device = environment.device_for(self.case.backend)
        except NotImplementedError:
            device = environment.device_for("xla")
        return records.make_row(self.case.fields(), environment.describe(device), self._result)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else type(error).__name__


class _Lines:
    """A line for each finished case on stderr, when that is not a terminal."""

    def __init__(self, total: int):
        self._total, self._done = total, 0

    def start(self, name: str) -> None:
        pass

    def finish(self, row: dict[str, Any]) -> None:
        self._done += 1
        time = row["reason"] if row["median_us"] is None else f"{row['median_us']:.2f} us"
        print(
            f"[{self._done}/{self._total}] {row['name']}: {row['status']}, {time}", file=sys.stderr
        )


class _Bar:
    """A live progress bar."""

    def __init__(self, bar: Any, total: int):
        self._bar, self._task = bar, bar.add_task("", total=total)

    def start(self, name: str) -> None:
        self._bar.update(self._task, description=name)

    def finish(self, row: dict[str, Any]) -> None:
        self._bar.advance(self._task)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[_Lines | _Bar]:
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    try:
        from rich import console, progress
    except ImportError:
        yield _Lines(total)
        return
    columns = (
        progress.SpinnerColumn(),
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, total)

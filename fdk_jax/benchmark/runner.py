"""Runs the cases of a suite, one row after the other, and survives interruption."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from fdk_jax.benchmark import environment, records


class Interrupted(Exception):
    """A signal asked the run to end; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise `Interrupted`, so that what was measured is kept and shown."""

    def stop(signum, _frame):
        raise Interrupted(signum)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(
    suite: ModuleType,
    cases: Sequence[Any],
    session: Any,
    write: Callable[[dict[str, Any]], None],
) -> int | None:
    """Measures the cases and hands each finished row to `write`.

    Args:
        suite: a module as the package's docstring describes.
        cases: what to measure.
        session: handed to `suite.measure`.
        write: takes a row as soon as it is finished.

    Returns:
        The signal that ended the run early, None when it came to its end.
    """
    try:
        with interruptible(), _progress(len(cases)) as progress:
            for case in cases:
                progress.start(case.name)
                row = measure(suite, case, session)
                write(row)
                progress.finish(row)
    except Interrupted as stop:
        return stop.signum
    return None


def measure(suite: ModuleType, case: Any, session: Any) -> dict[str, Any]:
    """The row of one case, whatever happens to it."""
    facts: dict[str, Any] = {}
    try:
        facts = environment.facts(environment.device_for(case.backend))
        result = suite.measure(case, session)
    except NotImplementedError as error:
        result = {"status": "skipped", "reason": _reason(error)}
    except Interrupted:
        raise
    except Exception as error:
        result = {"status": "failed", "reason": f"{type(error).__name__}: {_reason(error)}"}
    if not facts:
        facts = environment.facts(environment.device_for("xla"))
    return records.make_row(case.fields(), facts, result)


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

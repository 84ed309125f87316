"""Processes that a test starts, and that have ended when it has."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def children() -> Iterator[Callable[..., subprocess.Popen]]:
    """`subprocess.Popen`, whose processes are killed when the block ends, however it does, with their own ones.

    Each is the first of a group of its own: what it has started goes with it.
    """
    with contextlib.ExitStack() as ending:

        def start(*args: Any, **options: Any) -> subprocess.Popen:
            process = ending.enter_context(
                subprocess.Popen(*args, start_new_session=True, **options)
            )
            ending.callback(_kill, process.pid)
            return process

        yield start


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(group, signal.SIGKILL)

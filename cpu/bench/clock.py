"""Which time samples are: wall time, or processor time on a machine that others use too."""

import os
import time

_PROCESSOR = "FDK_BENCH_PROCESSOR_TIME"  # in the environment, which the processes inherit


def take_processor_time() -> None:
    """From now on, here and in processes that are started later."""
    os.environ[_PROCESSOR] = "1"


def is_processor() -> bool:
    """Whether samples are processor time."""
    return _PROCESSOR in os.environ


def name() -> str:
    """As rows name it."""
    return "processor" if is_processor() else "wall"


def now() -> float:
    """Seconds."""
    return time.process_time() if is_processor() else time.perf_counter()

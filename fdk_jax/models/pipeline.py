"""Stages of a checkpoint on their way to a device: some threads read, others make parameters."""

import collections
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from fdk_jax.files.contents import HostArray, Stored
from fdk_jax.format.quantised_tensor import QuantisedTensor

_READERS = 8  # threads that read and unpack
MAKERS = 4  # threads that make parameters: join, convert, put on the device
Take = Callable[[str], HostArray | QuantisedTensor | Stored]
Finish = Callable[[], None]


class Pipeline:
    """Reads the arrays of a stage in threads, and makes parameters of them in others.

    Two stages at most are on the host, and the first: `run` begins one, then waits for the one before it.

    Args:
        tensors: the checkpoint's arrays by name.
        makers: threads that make parameters; one takes them in order.
    """

    def __init__(self, tensors: Mapping[str, Stored], makers: int):
        self._tensors = tensors
        self._readers = ThreadPoolExecutor(_READERS)
        self._makers = ThreadPoolExecutor(makers)
        # A context of this thread alone.
        self._device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_) -> None:
        for pool in (self._readers, self._makers):
            pool.shutdown(cancel_futures=True)

    def read(
        self, names: Iterable[str], left: Callable[[str, Stored], bool] = lambda *_: False
    ) -> Take:
        """Starts reading arrays; gives what takes each of them once, when it is there.

        Args:
            names: of the arrays.
            left: whether one is left to who takes it, who reads it by runs of rows.
        """
        stored = {name: self._tensors[name] for name in names}
        taken = {name: one for name, one in stored.items() if left(name, one)}
        arrays = {
            name: self._readers.submit(one.read)
            for name, one in stored.items()
            if name not in taken
        }
        return lambda name: taken[name] if name in taken else arrays.pop(name).result()

    def each(self, function: Callable[[int], None], items: Iterable[int]) -> None:
        """Calls a function with each of the items in the threads that read."""

        def call(item: int) -> None:
            with jax.default_device(self._device):
                function(item)

        list(self._readers.map(call, items))

    def make(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Starts a function that makes parameters; one thread begins them in order."""

        def made() -> Any:
            with jax.default_device(self._device):
                return function(*arguments)

        return self._makers.submit(made)


def run(stages: Iterable[Callable[[], Finish]], progress: Callable[[int], None]) -> None:
    """Begins each stage while the one before is under way, and finishes them in order.

    Only the first waits until the last: it is one large table, which one thread reads beside the others.
    """
    begun: collections.deque[tuple[int, Finish]] = collections.deque()
    for number, begin in enumerate(stages):
        begun.append((number, begin()))
        if len(begun) > 2:
            first = begun.popleft()
            _finish(begun.popleft(), progress)
            begun.appendleft(first)
    for stage in begun:
        _finish(stage, progress)


def _finish(stage: tuple[int, Finish], progress: Callable[[int], None]) -> None:
    number, finish = stage
    finish()
    progress(number)

"""The registers of all threads: raw bits, and which threads' are defined."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from emulator.source import Fault

_POISON = np.uint64(0x7FFF7FFF)  # NaN in every type
_LITERAL = re.compile(r"-?\d+|0x[0-9a-fA-F]+")
_FLOAT_LITERAL = re.compile(r"0f[0-9a-fA-F]{8}")

Known = np.ndarray | None  # [threads] whose value is defined; None: everybody's


class Registers:
    """Values [threads] uint64 by name; a predicate is 0 or 1.

    A register that a thread has not written is undefined, and so is what is calculated from it. It may be moved
    about, as lanes do whose results nobody looks at; that something depends on it is a fault.
    """

    def __init__(self, threads: int, fixed: Mapping[str, np.ndarray], fences: bool) -> None:
        """Starts without registers, with names that have fixed values; `fences`: there is wgmma."""
        self._threads, self._fences = threads, fences
        self._fixed = dict(fixed)
        self._values: dict[str, np.ndarray] = {}
        self._partly: dict[str, np.ndarray] = {}  # whose value is defined, if not everybody's
        self.in_flight: dict[str, np.ndarray] = {}  # operands of wgmma, and whose
        self.unfenced: dict[str, np.ndarray] = {}  # written since the last wgmma.fence, and whose

    def read(self, name: str, active: np.ndarray) -> np.ndarray:
        """A register, fixed name or literal, on which something depends."""
        values, known = self.peek(name, active), self.known(name)
        if known is not None and (active & ~known).any():
            raise Fault(f"{name} is undefined: it comes from what these threads never wrote")
        return values

    def peek(self, name: str, active: np.ndarray) -> np.ndarray:
        """The same for what may be undefined."""
        if self.in_flight and name in self.in_flight and (self.in_flight[name] & active).any():
            raise Fault(f"{name} belongs to a wgmma that has not been waited for")
        return self.operand(name)

    def operand(self, name: str) -> np.ndarray:
        """The same for `wgmma` itself."""
        values = self._values.get(name)
        return self._other(name) if values is None else values

    def known(self, *names: str) -> Known:
        """Whose values of some registers are all defined."""
        found = None
        for name in names:
            if name not in self._values and name not in self._fixed:
                self._other(name)
            if name in self._partly:
                found = self._partly[name] if found is None else found & self._partly[name]
        return found

    def write(self, name: str, values: np.ndarray, active: np.ndarray, known: Known = None) -> None:
        """Sets a register of the active threads, which is defined where `known`; `_` takes no value."""
        if name == "_":
            return
        if self.in_flight and name in self.in_flight and (self.in_flight[name] & active).any():
            raise Fault(f"{name} belongs to a wgmma that has not been waited for")
        if self._fences:
            self.unfenced[name] = active | self.unfenced.get(name, False)
        self.replace(name, values, active, known)

    def replace(
        self, name: str, values: np.ndarray, active: np.ndarray, known: Known = None
    ) -> None:
        """The same for a result of `wgmma` itself."""
        values = values.astype(np.uint64, copy=False)
        new = name not in self._values
        if np.count_nonzero(active) == active.size:
            self._values[name] = values
            defined = known
        else:
            self._values[name] = np.where(active, values, _POISON if new else self._values[name])
            before = self._partly.get(name, not new)
            if known is None and before is True:
                return
            defined = np.where(active, True if known is None else known, before)
        if defined is None or defined.all():
            self._partly.pop(name, None)
        else:
            self._partly[name] = defined

    def hold(self, names: Iterable[str], active: np.ndarray) -> None:
        """Says that `wgmma` works with registers."""
        for name in names:
            self.in_flight[name] = active | self.in_flight.get(name, False)

    def fence(self, active: np.ndarray) -> None:
        """Lets `wgmma` see what the registers of these threads hold."""
        if active.all():
            self.unfenced.clear()
        for name, threads in self.unfenced.items():
            self.unfenced[name] = threads & ~active

    def _other(self, name: str) -> np.ndarray:
        """A fixed name or literal, kept for the next time; or a register that nobody has written."""
        if name not in self._fixed:
            if _FLOAT_LITERAL.fullmatch(name):
                self._fixed[name] = np.full(self._threads, int(name[2:], 16), np.uint64)
            elif _LITERAL.fullmatch(name):
                self._fixed[name] = np.full(self._threads, int(name, 0) % 2**64, np.uint64)
            elif name.startswith(("%", "$")):
                raise NotImplementedError(f"{name} is not known to the emulator")
            else:
                self._values[name] = np.full(self._threads, _POISON)
                self._partly[name] = np.zeros(self._threads, bool)
                return self._values[name]
        return self._fixed[name]

"""How every command ends: what it refuses is one line on stderr, and exit status 2."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags


def fail(program: str, message: object) -> NoReturn:
    """Ends the program: says in one line what is wrong with its arguments."""
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def exit_status(action: Callable[[], object], *, debug: bool = False) -> int:
    """Runs a command and returns its exit status: errors are one line on stderr, with `debug` a traceback.

    Args:
        action: the command; an integer that it returns is its status, anything else is 0.
        debug: raises errors.
    """
    try:
        status = action()
        print(end="", flush=True)  # a full disk, and a reader that has gone, are noticed here
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if debug:
            raise
        print_error(error)
        return 2
    finally:
        _drop_what_cannot_be_written()
    return status if isinstance(status, int) else 0


def _drop_what_cannot_be_written() -> None:
    """Otherwise Python would try it once more at its end, and say so in two lines of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(error: Exception) -> None:
    """Says on stderr, in one line, what went wrong."""
    text = " ".join(str(error).split()) or "no reason given"
    if not isinstance(error, (ValueError, OSError, ImportError, NotImplementedError)):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    with contextlib.suppress(OSError):  # nobody is there to be told
        print(f"error: {text}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        fail(self.prog, f"{message} (--help lists the arguments)")


def flags_parser(program: str) -> Callable[[Sequence[str]], list[str]]:
    """The `flags_parser` of `absl.app.run` for a program: errors are one line, and `--help` is none."""

    def parse(argv: Sequence[str]) -> list[str]:
        if {"--help", "-h"} & {*argv[1:]}:
            print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="\n")
            sys.exit(0)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            fail(program, error)

    return parse

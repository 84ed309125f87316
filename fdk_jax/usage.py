"""How every command refuses its arguments: one line on stderr, and exit status 2."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags


def fail(program: str, message: object) -> NoReturn:
    """Ends the program: says in one line what is wrong with its arguments."""
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


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

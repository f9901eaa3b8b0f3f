"""Mistakes that a user can mend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """One line: what is wrong, where (file, id or key), and what to do about it.

    The entry points print it and exit with code 2; from Python it is an ordinary exception.
    """


def fail(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run an entry point on the command line's arguments; a UserError becomes one line and exit code 2,
    Ctrl-C one and 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others, instead of the usage and then a line."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m fastmrcnn.{module}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; settings are given as key=value, such as train.steps=1000"
        raise UserError(f"{message} (see {self.prog} --help)")

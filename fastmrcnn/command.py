"""What the entry points share on the command line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fastmrcnn.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like all others, instead of the usage and then a line."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m fastmrcnn.{module}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; settings are given as key=value, such as train.steps=1000"
        raise UserError(f"{message} (see {self.prog} --help)")

"""Commands on the console: no chatter of the libraries, and one reader for commands of several parts."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from typing import Protocol


def quiet() -> None:
    """Keeps the libraries' chatter out of the log; their warnings of consequence stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    for name in ("DeepSpeed", "streaming"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Subcommand(Protocol):
    """A module whose docstring's first paragraph says what it does; `run` returns what is printed."""

    def arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> str: ...


def run_one_of(program: str, description: str, modules: Mapping[str, Subcommand], argv: list[str] | None) -> int:
    """A command of several, each a module by its name; ValueError and OSError become one line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        about = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        module.arguments(commands.add_parser(name, help=about, description=about))
    args = parser.parse_args(argv)
    quiet()
    try:
        print(modules[args.command].run(args))
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0

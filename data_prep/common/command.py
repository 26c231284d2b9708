"""Command lines: a parser whose help has the program's name as it was started, and every default; and how a command ends."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def program() -> str:
    """This command as it was started: `python -m MODULE`, `python FILE.py`, or a console command's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to an option's help, where the help does not say it and there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        shown = action.default is not None and not isinstance(action.default, bool | list) and action.option_strings
        if shown and action.default is not argparse.SUPPRESS and "default" not in text:
            return f"{text} (default: %(default)s)".lstrip()
        return text


def command_parser(description: str, **more: Any) -> argparse.ArgumentParser:
    """A parser for a command's `main`.

    From here on output has `?` for a sign that its encoding lacks, such as × where it is ASCII: the sign would end a training.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    return argparse.ArgumentParser(prog=program(), description=description, formatter_class=_Help, **more)


def run_action(
    name: str, action: Callable[[], str], mistakes: tuple[type[Exception], ...] = (ValueError, OSError)
) -> int:
    """Runs a command's action and prints the text that it returns; one of `mistakes` becomes one line. Returns the exit code."""
    try:
        print(action())
    except mistakes as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0

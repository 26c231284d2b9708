"""Output of the commands: the libraries silenced, and one reader for commands of several parts."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from typing import Protocol

from data_prep.common.command import command_parser, run_action


def silence_libraries() -> None:
    """Keeps the libraries' routine messages out of the log; errors and other warnings stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    # More loader processes than cores are the user's choice.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # a level would be set anew when the library is imported
    logging.getLogger("diffusers.quantizers").setLevel(logging.ERROR)  # says that it does not know this torchao
    logging.getLogger("streaming").setLevel(logging.ERROR)  # a filter would not see what its modules' loggers write


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def log_from_first(rank: int, line: str) -> None:
    """Prints a line on process 0."""
    if rank == 0:
        print(line, flush=True)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accepts the --local_rank=N that the launcher `deepspeed` adds to a command; LOCAL_RANK says the same."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


class Subcommand(Protocol):
    """Module of one subcommand: its docstring's first paragraph is the help, `run` returns the text to print."""

    def arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, args: argparse.Namespace) -> str: ...


def run_one_of(program: str, description: str, modules: Mapping[str, Subcommand], argv: list[str] | None) -> int:
    """Runs the subcommand that `argv` names; ValueError and OSError become one line. Returns the exit code."""
    parser = command_parser(description)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        about = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        module.arguments(commands.add_parser(name, help=about, description=about))
    args = parser.parse_args(argv)
    silence_libraries()
    return run_action(program, lambda: modules[args.command].run(args))

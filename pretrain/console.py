"""Output of the commands: the libraries silenced, and one reader for commands of several parts."""

from __future__ import annotations

import argparse
import ast
import logging
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from data_prep.common.command import command_parser, run_action


def silence_libraries() -> None:
    """Keeps the libraries' routine messages out of the log; errors and other warnings stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    # More loader processes than cores are the user's choice.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # Of a compiled training on a CPU, where a CUDA toolkit is installed.
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # a level would be set anew when the library is imported
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # says where its cache is, in a home that cannot be written
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


def run_one_of(program: str, description: str, modules: Mapping[str, str], argv: list[str] | None) -> int:
    """Runs the subcommand that `argv` names; ValueError and OSError become one line. Returns the exit code.

    `modules`: each subcommand's module by its name. The first paragraph of its docstring is the help; `arguments` adds its
    options to a parser; `run` takes the arguments and returns the text to print. Only the module that is asked for is
    imported, as its libraries take seconds.
    """
    words = sys.argv[1:] if argv is None else argv
    silence_libraries()
    parser = command_parser(description)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in modules.items():
        about = _purpose(module)
        command = commands.add_parser(name, help=about, description=about)
        if words[:1] == [name]:
            import_module(module).arguments(command)
    args = parser.parse_args(words)
    return run_action(program, lambda: import_module(modules[args.command]).run(args))


def _purpose(module: str) -> str:
    """First paragraph of the module's docstring, read from its file."""
    spec = find_spec(module)
    assert spec and spec.origin, f"{module} has no file"
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())

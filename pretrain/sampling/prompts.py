"""Files of prompts."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """A prompt a line, which a newline alone ends; empty lines do not count. Raises ValueError for a file without any."""
    if not path.is_file():
        kind = "it is a folder" if path.is_dir() else "it is not there"
        raise FileNotFoundError(f"no prompts file {path} ({kind}): expected a file with a prompt a line")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts

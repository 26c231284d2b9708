"""imagereward: a learned score of people's preferences (arXiv 2304.05977), by a scorer in an environment of its own.

The scorer is any program that speaks lines of JSON (docs/evaluation.md). `image_reward_server.py` is one for the package
image-reward, whose pins conflict with this project's.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from typing import IO, TYPE_CHECKING, Any

from pretrain.evaluate.metric import NotRun, Picture, Record, Result, Value
from pretrain.evaluate.pictures import with_prompts

if TYPE_CHECKING:
    import torch


def arguments(parser: argparse.ArgumentParser) -> None:
    """The scorer's command."""
    parser.add_argument("--imagereward-command", metavar="COMMAND", help="starts the scorer; quoted as for a shell")
    parser.add_argument(
        "--imagereward-timeout", type=float, default=300.0, help="seconds for its start, and for an answer"
    )


def check_prompts(args: argparse.Namespace) -> None:
    """It takes any prompts."""


def build(args: argparse.Namespace, device: torch.device) -> ImageRewardScorer:
    """The scorer, started. It chooses its device itself."""
    if args.imagereward_command is None:
        raise NotRun("no scorer; give --imagereward-command 'ENVIRONMENT/bin/python image_reward_server.py …'")
    try:
        process = Process(shlex.split(args.imagereward_command), args.imagereward_timeout, args.out / "imagereward.log")
        answer = process.answer("its start")
    except (ValueError, OSError) as error:
        raise NotRun(f"--imagereward-command: {error}") from error
    if not isinstance(answer.get("scorer"), dict):
        reason = answer.get("error", f'it begins with {answer}, expected {{"scorer": {{"library": …}}}}')
        raise NotRun(f"--imagereward-command {args.imagereward_command}: {reason}")
    return ImageRewardScorer(process, answer["scorer"])


class ImageRewardScorer:
    """Asks the scorer for one picture after the other."""

    batch = 1  # each answer is on disk before the next is asked for

    def __init__(self, process: Process, identity: Mapping[str, Any]):
        self._process, self.identity = process, identity

    def score(self, pictures: Sequence[Picture]) -> list[Record]:
        """Scores. Raises ValueError where the scorer errs, ends, stalls or answers something else."""
        return [
            {"score": self._process.score(p.path, prompt)}
            for p, prompt in zip(pictures, with_prompts(pictures, "imagereward"), strict=True)
        ]

    def summarise(self, pictures: Sequence[Picture], records: Sequence[Record]) -> Result:
        """The mean."""
        return Result({"imagereward": Value.mean([r["score"] for r in records])})


class Process:
    """A scorer's process: a line of JSON to it, a line back.

    Args:
        timeout: seconds that an answer may take.
        log: file for what it writes to stderr.

    Raises:
        OSError: there is no such program.
    """

    def __init__(self, command: Sequence[str], timeout: float, log: Path):
        self._name, self._timeout, self._log = shlex.join(command), timeout, log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            )
        weakref.finalize(self, _end, self._process)
        self._lines: Queue[str] = Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_listen, args=(self._process.stdout, self._lines), daemon=True).start()

    def score(self, picture: Path, prompt: str) -> float:
        """A picture's score. Raises ValueError where there is none."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the answer says
            self._process.stdin.write(json.dumps({"picture": str(picture.resolve()), "prompt": prompt}) + "\n")
            self._process.stdin.flush()
        answer = self.answer(picture.name)
        if "error" in answer:
            raise ValueError(f"{picture.name}: the scorer says {str(answer['error'])!r}")
        score = answer.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f'{self._name}: answered {answer} for {picture.name}, expected {{"score": NUMBER}}')
        return float(score)

    def answer(self, subject: str) -> dict[str, Any]:
        """The next answer. Raises ValueError, and ends the process, where none comes in time or it is no JSON object."""
        try:
            line = self._lines.get(timeout=self._timeout)
        except Empty:
            _end(self._process)
            raise ValueError(
                f"{self._name}: no answer for {subject} within {self._timeout:g} s; see {self._log}, "
                "or raise --imagereward-timeout"
            ) from None
        if not line:
            code = self._process.wait()
            last = self._log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise ValueError(
                f"{self._name}: ended with code {code} before it answered for {subject}: {last} ({self._log})"
            )
        try:
            answer = json.loads(line)
        except ValueError:
            answer = line
        if not isinstance(answer, dict):
            _end(self._process)
            raise ValueError(f"{self._name}: answered {line.strip()[:200]!r} for {subject}, expected a JSON object")
        return answer


def _listen(stream: IO[str], lines: Queue[str]) -> None:
    """Passes on a stream's lines, and an empty one at its end."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # a line that it had not read
        process.stdin.close()

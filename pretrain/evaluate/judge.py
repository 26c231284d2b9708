"""A judge: a vision-language model that answers questions about pictures.

    --judge-url http://HOST:8000/v1 --judge-model NAME    an OpenAI-compatible endpoint, such as a vLLM server (judge_endpoint.py)
    --judge-folder FOLDER                                 a model of transformers in this process (judge_folder.py)

An answer is on disk as soon as it is there: whatever stops the command, no judge is asked the same of a picture twice.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.common.paths import path_or_url
from pretrain.evaluate.metric import NotRun, Picture
from pretrain.evaluate.records import Records

if TYPE_CHECKING:
    import torch

_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:very )?sorry|i (?:apologi[sz]e|decline|refuse)|"
    r"i(?:'m| am) (?:unable|not able)|i (?:can(?:no|')t|can not|won't|will not) (?:\w+ ){0,2}(?:assist|help|provide|rate|answer|"
    r"evaluate|score|judge|discuss|comply))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """What a judge said.

    Attributes:
        text: whole; empty where it said nothing.
        refused: the judge, or a filter before it, refused in the endpoint's own terms.
    """

    text: str
    refused: bool = False

    @property
    def conclusion(self) -> str:
        """The text without the thoughts that come first."""
        return self.text.rpartition("</think>")[2].strip()

    @property
    def kind(self) -> str:
        """Why nothing can be read from the answer: "refused" or "unparsable"."""
        return "refused" if self.refused or _REFUSAL.search(self.conclusion.replace("’", "'")) else "unparsable"


class Judge(Protocol):
    """A judge that is ready.

    Attributes:
        identity: all that its answers depend on beside picture and question.
        concurrency: questions that it takes at once.
    """

    identity: Mapping[str, Any]
    concurrency: int

    def ask(self, picture: Picture, question: str) -> Answer:
        """Its answer. Raises ValueError where there is none: the endpoint stays silent or is told wrongly."""
        ...


class Interview:
    """Questions to a judge, and the answers that there are.

    Files: OUT/records/judge-HASH/00000.jsonl, one for each process; HASH is of the judge's identity.
    """

    def __init__(self, judge: Judge, out: Path, rank: int = 0):
        self.judge = judge
        self._records = Records(out, "judge", judge.identity, rank)
        self._there = self._records.all()
        self._lock = Lock()

    def ask(self, asked: Sequence[tuple[Picture, str]]) -> list[Answer]:
        """The answers to questions about pictures, each asked if it was not yet.

        Raises:
            ValueError: one has no answer; the others' are kept.
        """
        keys = [(picture.sha256, question) for picture, question in asked]
        todo = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in self._there}
        pool = ThreadPoolExecutor(self.judge.concurrency)
        try:
            for done in as_completed([pool.submit(self._ask, *pair) for pair in todo.values()]):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # what is being asked is answered, and kept
        return [Answer(**self._there[key]) for key in keys]

    def _ask(self, picture: Picture, question: str) -> None:
        answer = asdict(self.judge.ask(picture, question))
        with self._lock:
            self._records.write([replace(picture, prompt=question)], [answer])
            self._there[picture.sha256, question] = answer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the judge's options, which its metrics share."""
    group = parser.add_argument_group("judge of sctf and dpg")
    group.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, such as http://HOST:8000/v1")
    group.add_argument("--judge-model", metavar="NAME", help="the endpoint's model")
    group.add_argument(
        "--judge-folder", type=path_or_url, help="instead: a model of transformers, folder or name on the hub"
    )
    group.add_argument("--judge-concurrency", type=int, default=8, help="questions that an endpoint is asked at once")
    group.add_argument("--judge-timeout", type=float, default=120.0, help="seconds without a byte of an answer")
    group.add_argument("--judge-tries", type=int, default=5, help="requests for an answer, errors and silence counted")
    group.add_argument("--judge-tokens", type=int, default=256, help="longest answer")


def interview_of(args: argparse.Namespace, device: torch.device) -> Interview:
    """The interview with the judge that the options name. Raises NotRun without any, ValueError for options that are wrong."""
    from pretrain.sampling.drawing import share_of_process

    return Interview(_judge_of(args, device), args.out, share_of_process()[0])


def _judge_of(args: argparse.Namespace, device: torch.device) -> Judge:
    for name in ("concurrency", "timeout", "tries", "tokens"):
        if getattr(args, f"judge_{name}") <= 0:
            raise ValueError(f"--judge-{name} {getattr(args, f'judge_{name}')}: must be more than 0")
    if args.judge_url and args.judge_folder:
        raise ValueError("--judge-url and --judge-folder: give one of them")
    if args.judge_folder:
        from pretrain.evaluate.judge_folder import FolderJudge

        return FolderJudge(args.judge_folder, device, args.judge_tokens)
    if args.judge_url:
        from pretrain.evaluate.judge_endpoint import EndpointJudge

        return EndpointJudge.of(args)
    raise NotRun("no judge; give --judge-url URL --judge-model NAME, or --judge-folder FOLDER")

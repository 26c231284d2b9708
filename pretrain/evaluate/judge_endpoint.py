"""A judge behind an OpenAI-compatible endpoint: chat completions with a picture in them.

Asked again, after 1, 2, 4, … seconds or when the server says: 408, 429, 5xx, silence, a dropped connection, an answer that is no
chat completion. Every other status is the user's to mend. The key, where one is needed, stands in the environment.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import tenacity

from pretrain.evaluate.judge import Answer
from pretrain.evaluate.metric import Picture

KEY_VARIABLE = "JUDGE_API_KEY"
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two requests
_TYPES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_FILTERED = re.compile(r"content.?(?:filter|policy|management)|data_inspection_failed|safety", re.IGNORECASE)


class _NoAnswer(Exception):
    """A request that may succeed when it is repeated, and the seconds that the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class EndpointJudge:
    """Asks one model of an endpoint; an instance serves several threads."""

    def __init__(
        self, url: str, model: str, key: str | None, *, concurrency: int, timeout: float, tries: int, tokens: int
    ):
        """Args: url: up to `/v1`; timeout: seconds; tokens: the longest answer. Raises ValueError for a URL that is none."""
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"--judge-url {url}: must be the endpoint's address, such as http://HOST:8000/v1")
        self.url, self.model, self.concurrency = url.rstrip("/"), model, concurrency
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout, self._tries, self._tokens = timeout, tries, tokens
        # Without the address: a server that was started anew elsewhere goes on with the same answers.
        self.identity: Mapping[str, Any] = {
            "judge": model,
            "by": "chat completions",
            "temperature": 0,
            "tokens": tokens,
        }

    @classmethod
    def of(cls, args: argparse.Namespace) -> EndpointJudge:
        """The judge of the command's options. Raises ValueError where one is missing."""
        if not args.judge_model:
            raise ValueError(
                "--judge-model: needed with --judge-url; give the name under which the server has its model"
            )
        return cls(
            args.judge_url,
            args.judge_model,
            os.environ.get(KEY_VARIABLE),
            concurrency=args.judge_concurrency,
            timeout=args.judge_timeout,
            tries=args.judge_tries,
            tokens=args.judge_tokens,
        )

    def ask(self, picture: Picture, question: str) -> Answer:
        """Its answer. Raises ValueError after the last try, and at once for a status that repeating does not mend."""
        picture.open()  # an unreadable one is said by its name, not by the server
        content = base64.b64encode(picture.path.read_bytes()).decode()
        image = f"data:image/{_TYPES[picture.path.suffix.lower()]};base64,{content}"
        parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": self._tokens,
        }
        retried = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_NoAnswer),
            stop=tenacity.stop_after_attempt(self._tries),
            wait=_wait,
            reraise=True,
        )
        try:
            return retried(self._request, json.dumps(body).encode())
        except _NoAnswer as error:
            raise ValueError(
                f"{self.url} gave no answer about {picture.path.name} in {self._tries} tries ({error}); look at the server and "
                "repeat the command: answers are kept"
            ) from error

    def _request(self, body: bytes) -> Answer:
        try:
            with urlopen(Request(f"{self.url}/chat/completions", body, self._headers), timeout=self._timeout) as reply:
                return _answer(reply.read())
        except HTTPError as error:
            return self._judge_status(error)
        except (OSError, HTTPException) as error:  # URLError, a dropped connection and silence are OSErrors
            raise _NoAnswer(str(getattr(error, "reason", error)) or type(error).__name__) from error

    def _judge_status(self, error: HTTPError) -> Answer:
        if error.code in (408, 429) or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            raise _NoAnswer(f"{error.code} {error.reason}", float(wait) if wait.isdigit() else 0.0) from error
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        except (OSError, HTTPException) as silence:
            raise _NoAnswer(f"{error.code} {error.reason}, then {silence}") from error
        if error.code in (400, 403, 451) and _FILTERED.search(said):
            return Answer(said, refused=True)
        mend = {
            401: f"put the key into {KEY_VARIABLE}",
            403: f"put a key that is let in into {KEY_VARIABLE}",
            404: "look at --judge-url (it ends in /v1) and --judge-model",
        }.get(error.code, "the server does not take this request")
        raise ValueError(f"{self.url} answers {error.code} {error.reason}: {mend} ({said})") from error


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, _NoAnswer) else 0.0
    return min(LONGEST_WAIT, max(asked, FIRST_WAIT * 2 ** (state.attempt_number - 1)))


def _answer(content: bytes) -> Answer:
    try:
        choice: Mapping[str, Any] = json.loads(content)["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _NoAnswer(f"no chat completion: {content[:80]!r}") from error
    if refusal or choice.get("finish_reason") == "content_filter":
        return Answer(refusal or text, refused=True)
    return Answer(text)

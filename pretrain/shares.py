"""Shares of named sources in what is drawn (`data.sources`): a number each, or numbers by step.

`{photos: 0.8, art: {0: 0.2, 20000: 0.5}}`: a share holds from its optimizer step, counted from 0, until the next one. Shares are
proportions: they need not sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

EXAMPLE = "{0: 0.2, 20000: 0.5}"


def _share(value: Any) -> float | dict[int, float]:
    """A source's share, or its shares by step. Raises PydanticCustomError, whose words end before "not" and the value."""
    if not isinstance(value, Mapping):
        share = _number(value)
        if share is None or share == 0:
            raise _problem(f"must be a share above 0, or shares by step such as {EXAMPLE}")
        return share
    steps = [int(step) if str(step).isdecimal() else None for step in value]
    shares = [_number(share) for share in value.values()]
    if None in steps:
        raise _problem(f"must have whole numbers as steps, such as {EXAMPLE}")
    if not steps or steps[0] != 0:
        raise _problem(f"must begin at step 0, such as {EXAMPLE}")
    if any(later <= earlier for earlier, later in pairwise(steps)):  # type: ignore[operator]
        raise _problem(f"must have rising steps, such as {EXAMPLE}")
    if None in shares:
        raise _problem(f"must have shares of 0 or more, such as {EXAMPLE}")
    if not any(shares):
        raise _problem("must have a share above 0 at some step, or be left out")
    return dict(zip(steps, shares, strict=True))  # type: ignore[arg-type]


def _number(value: Any) -> float | None:
    """A finite number of 0 or more; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < math.inf else None


def _problem(words: str) -> PydanticCustomError:
    return PydanticCustomError("share", "{words}", {"words": words})


Shares = dict[str, Annotated[float | dict[int, float], BeforeValidator(_share)]]


def by_step(sources: Shares) -> dict[int, dict[str, float]]:
    """The shares of all sources, by name in order, from each step on at which one changes; the first is 0."""
    courses = {name: share if isinstance(share, dict) else {0: share} for name, share in sorted(sources.items())}
    return {
        step: {name: course[max(s for s in course if s <= step)] for name, course in courses.items()}
        for step in sorted({step for course in courses.values() for step in course})
    }


def share_problems(sources: Shares) -> list[str]:
    """A problem where no source has a share."""
    empty = [step for step, shares in by_step(sources).items() if not any(shares.values())]
    return [f"sources: all shares are 0 from step {empty[0]} on; give a source a share there"] if empty else []

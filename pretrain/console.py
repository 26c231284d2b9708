"""What long commands show: a bar on a terminal, plain lines in a log, and no chatter of the libraries."""

from __future__ import annotations

import logging
import warnings
from types import TracebackType

from tqdm import tqdm


def quiet() -> None:
    """Keeps the libraries' chatter out of the log; their warnings of consequence stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    for name in ("DeepSpeed", "streaming"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Progress:
    """So many of `total` items are done: a bar, or a line after each update where there is no terminal."""

    def __init__(self, total: int, unit: str):
        self._bar = tqdm(total=total, unit=unit, disable=None)
        self._total, self._unit, self._done = total, unit, 0

    def update(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        self._bar.update(count)
        if self._bar.disable:
            print(f"{self._done} of {self._total} {self._unit}s", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

"""A board on which all processes of a run post notes and read them: from any thread, without a collective.

It is a connection of its own to the store of torch.distributed's rendezvous, which process 0 keeps.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError
from torch.distributed.distributed_c10d import _get_default_store

__all__ = ["DistError", "DistNetworkError", "KeyValueStore"]


class KeyValueStore:
    """Notes by name. Each thread wants a board of its own: a connection serves one request at a time.

    Reading raises DistError where a note is not there within `patience` seconds, or process 0 is gone (DistNetworkError).
    """

    def __init__(self, patience: float):
        self.patience = patience
        self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=patience))

    def post(self, name: str, note: Any) -> None:
        """Puts up a note, in place of an older one of this name."""
        self._store.set(name, json.dumps(note))

    def read(self, names: list[str]) -> list[Any]:
        """The notes, as soon as all are there."""
        return [json.loads(note) for note in self._store.multi_get(names)]

    def has(self, name: str) -> bool:
        return self._store.check([name])

"""Values that the processes of a run leave for one another by name: from any thread, and without a collective."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError

from pretrain.distributed import torch_private

__all__ = ["DistError", "DistNetworkError", "KeyValueStore"]


class KeyValueStore:
    """JSON values by name, kept by process 0: a connection of its own to the store of torch.distributed's rendezvous.

    Each thread needs an instance of its own, as a connection serves one request at a time.

    Raises:
        DistError: in any method: a value is not there within `timeout` seconds.
        DistNetworkError: a DistError: process 0 is gone.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._store = torch_private.clone_default_store()
        self._store.set_timeout(timedelta(seconds=timeout))

    def set(self, name: str, value: Any) -> None:
        """Stores a value, in place of an older one of this name. Other connections may see it a little later."""
        self._store.set(name, json.dumps(value))

    def get_all(self, names: list[str]) -> list[Any]:
        """Waits until all names have a value, and returns the values in order."""
        return [json.loads(value) for value in self._store.multi_get(names)]

    def has(self, name: str) -> bool:
        """True where the name has a value."""
        return self._store.check([name])

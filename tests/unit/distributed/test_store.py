"""Values by name between threads of a run's processes, here of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
from engines import one_process

from pretrain.distributed.store import DistError, KeyValueStore


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with one_process():
        yield


def test_values_by_name() -> None:
    """Any JSON value; a later one replaces the earlier; another connection reads the same, as soon as it is there."""
    store, other = KeyValueStore(60), KeyValueStore(60)
    assert not other.has("a")
    store.set("a", {"loss": 1.5, "keys": ["é", None]})
    store.set("b", [1])
    assert other.get_all(["b", "a"]) == [[1], {"loss": 1.5, "keys": ["é", None]}]
    assert other.has("a") and other.has("b")
    store.set("a", "later")
    assert store.get_all(["a"]) == ["later"], "one connection's requests are served in order"
    assert other.get_all(["a"]) == ["later"]
    assert other.get_all([]) == []


def test_a_value_that_comes_later_is_waited_for() -> None:
    reader, found = KeyValueStore(60), []
    thread = threading.Thread(target=lambda: found.append(reader.get_all(["late/0", "late/1"])))
    thread.start()
    writer = KeyValueStore(60)
    writer.set("late/1", 1)
    writer.set("late/0", 0)
    thread.join(60)
    assert found == [[0, 1]]


def test_a_value_that_never_comes() -> None:
    store = KeyValueStore(0.2)
    assert store._store.timeout == timedelta(seconds=0.2)
    store.set("there", 1)
    with pytest.raises(DistError):
        store.get_all(["there", "not there"])
    assert store.get_all(["there"]) == [1], "the connection still serves"

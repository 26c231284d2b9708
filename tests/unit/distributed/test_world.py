"""Collectives: nothing to do for one process, and the same on all of several."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from support import ROOT, free_port, launcher

from pretrain.distributed.world import (
    World,
    all_gather,
    all_gather_into,
    all_reduce,
    barrier,
    broadcast,
    exchange,
    in_each,
    once,
    once_per_node,
    reduce_scatter,
)

ALONE = World.alone()


def raising(error: Exception) -> None:
    raise error


def test_one_process_alone() -> None:
    """Without a process group: none of them may ask for one."""
    assert not torch.distributed.is_initialized()
    barrier(ALONE)
    x = torch.arange(3.0)
    assert all_reduce(x, ALONE) is x and x.tolist() == [0, 1, 2]
    all_gather_into(x, x.clone(), ALONE)
    assert x.tolist() == [0, 1, 2]
    reduce_scatter(x, ALONE)()
    exchange([(x, 0, 0)], ALONE)
    assert x.tolist() == [0, 1, 2]
    assert all_gather("mine", ALONE) == ["mine"]
    assert broadcast({"a": 1}, ALONE) == {"a": 1}
    assert once_per_node(lambda: 5, ALONE) == 5
    assert once(lambda: 5, ALONE) == 5
    assert in_each(lambda: 5, ALONE) == [5]


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("wrong"), KeyError("a defect")])
def test_an_error_of_one_process_is_raised_as_it_is(error: Exception) -> None:
    for run in (once_per_node, once, in_each):
        with pytest.raises(type(error)) as raised:
            run(lambda: raising(error), ALONE)
        assert raised.value is error


def test_the_second_process_of_a_node_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert once_per_node(lambda: raising(KeyError()), ALONE) is None


def test_collectives_are_called_in_one_place() -> None:
    """torch.distributed is met where the group is made, in its private interfaces, in the store, and in world.py; and by the
    benchmark of the network alone, which runs where DeepSpeed is missing."""
    files = (path for path in (ROOT / "pretrain").rglob("*.py"))
    met = {
        path.name
        for path in files
        if re.search(r"^\s*(import|from) torch\.distributed", path.read_text(), re.MULTILINE)
    }
    met |= {p.name for p in (ROOT / "pretrain").rglob("*.py") if re.search(r"torch\.distributed\.\w+\(", p.read_text())}
    assert met == {"world.py", "rendezvous.py", "torch_private.py", "store.py", "network.py"}


COLLECTIVES = """
import json, os, sys
import torch
import torch.distributed as dist
from pretrain.distributed.world import *
from pretrain.distributed.world import World

dist.init_process_group("gloo")
rank = dist.get_rank()
world = World(rank, dist.get_world_size(), torch.device("cpu"))
said = {}
barrier(world)
said["sum"] = all_reduce(torch.tensor([rank + 1.0, 10.0]), world).tolist()
whole = torch.zeros(4)
all_gather_into(whole, torch.tensor([rank, rank + 0.5]), world)
said["whole"] = whole.tolist()
parts = torch.tensor([rank + 1.0, 5.0 * rank])
reduce_scatter(parts, world)()
exchange([(parts[:1], 0, 1), (parts[1:], 1, 0)], world)
said["parts"] = parts.tolist()
exchange([(parts, 0, 0)], world)
said["items"] = all_gather({"rank": rank}, world)
said["first"] = broadcast(f"from {rank}", world)
said["once per node"] = once_per_node(lambda: f"done by {rank}", world)
said["once"] = once(lambda: f"done by {rank}", world)
said["in each"] = in_each(lambda: f"done by {rank}", world)

def fail():
    raise OSError(f"no disk on {rank}")

def fail_in_1():
    return rank if rank == 0 else fail()

said["errors"] = []
for run, action in ((once_per_node, fail), (once, fail), (in_each, fail), (in_each, fail_in_1)):
    try:
        run(action, world)
    except ValueError as error:
        said["errors"].append(str(error))
barrier(world)
print(json.dumps(said))
"""


def test_two_processes() -> None:
    """Both are on one node, so `once_per_node` runs in process 0 alone, and its error is raised in both."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COLLECTIVES],
            cwd=ROOT,
            env=os.environ | launcher(rank, 2, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [s.pop("once per node") for s in said] == ["done by 0", None]
    assert said[0] == said[1]
    assert said[0] == {
        "sum": [3.0, 20.0],
        "whole": [0.0, 0.5, 1.0, 1.5],
        "parts": [3.0, 5.0],
        "items": [{"rank": 0}, {"rank": 1}],
        "first": "from 0",
        "once": "done by 0",
        "in each": ["done by 0", "done by 1"],
        "errors": ["no disk on 0", "no disk on 0", "no disk on 0", "no disk on 1"],
    }

"""Binding to the processors beside a GPU, with a folder in place of /sys and this machine's processors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.distributed import numa
from pretrain.distributed.numa import bind_to_gpu, bind_to_pci

ADDRESS = "0000:1b:00.0"


@pytest.fixture
def mine() -> Iterator[list[int]]:
    """The processors that this process may use; as before afterwards."""
    before = os.sched_getaffinity(0)
    yield sorted(before)
    os.sched_setaffinity(0, before)


def system(folder: Path, node: str, processors: str) -> Path:
    """A /sys with one device on a NUMA node, and node 1's processors."""
    (folder / "bus/pci/devices" / ADDRESS).mkdir(parents=True)
    (folder / "bus/pci/devices" / ADDRESS / "numa_node").write_text(f"{node}\n")
    (folder / "devices/system/node/node1").mkdir(parents=True)
    (folder / "devices/system/node/node1/cpulist").write_text(f"{processors}\n")
    return folder


def test_a_process_keeps_to_its_gpus_node(mine: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To those processors of it that it may use; its own processes and threads follow."""
    monkeypatch.setattr(numa, "SYSTEM", system(tmp_path, "1", f"{mine[-1]},1000-1003"))
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert bind_to_gpu(torch.device("cuda", 0)) is None
    assert os.sched_getaffinity(0) == {mine[-1]}


def test_a_launcher_that_bound_it_to_another_node_is_named(mine: list[int], tmp_path: Path) -> None:
    problem = bind_to_pci(ADDRESS, system(tmp_path, "1", "1000-1003"))
    assert problem is not None and "is on NUMA node 1" in problem and "srun --cpu-bind=none" in problem
    assert sorted(os.sched_getaffinity(0)) == mine


@pytest.mark.parametrize("node", ["-1", "7"])
def test_without_nodes_there_is_nothing_to_do(node: str, mine: list[int], tmp_path: Path) -> None:
    assert bind_to_pci(ADDRESS, system(tmp_path, node, "0")) is None
    assert bind_to_pci("0000:ff:00.0", tmp_path) is None
    assert sorted(os.sched_getaffinity(0)) == mine


def test_lists_of_processors() -> None:
    assert numa._numbers("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert numa._numbers("\n") == set()

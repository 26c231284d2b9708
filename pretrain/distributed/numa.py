"""Processors beside a GPU: a process on another NUMA node's reaches its GPU, and its memory, through the other socket.

Memory follows the processors: Linux gives a process pages of the node on which it first touches them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

SYSTEM = Path("/sys")


def bind_to_gpu(device: torch.device) -> str | None:
    """Keeps this process, and those that it starts, on the processors of its GPU's NUMA node, as far as it may use them.

    Returns:
        Why it stays where it is, a line; None where it is bound, or where the system names no NUMA node.
    """
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's type stub leaves these out
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    return bind_to_pci(address, SYSTEM)


def bind_to_pci(address: str, system: Path) -> str | None:
    """The same for a device by its PCI address, such as 0000:1b:00.0; `system` is the folder of sysfs."""
    try:
        node = int((system / "bus/pci/devices" / address / "numa_node").read_text())
        processors = _numbers((system / f"devices/system/node/node{node}/cpulist").read_text())
    except OSError:
        return None
    allowed = os.sched_getaffinity(0)
    if not processors & allowed:
        return (
            f"GPU {address} is on NUMA node {node}, and this process may use none of its processors "
            f"({len(allowed)} of other nodes): start it with srun --cpu-bind=none, as slurm/common.sh does"
        )
    os.sched_setaffinity(0, processors & allowed)
    return None


def _numbers(ranges: str) -> set[int]:
    """The numbers of a list such as 0-3,8."""
    ends = [part.split("-") for part in ranges.strip().split(",") if part]
    return {number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)}

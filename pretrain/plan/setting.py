"""Setting of a plan: the cluster, and the rates that are assumed or were measured."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from pretrain.gpus import GPUS, PCIE_4_GBS, Gpu
from pretrain.plan.measured import Measured

MFU, JITTER = 0.4, 0.02


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        network_gbs: bandwidth of each GPU to other nodes in GB/s, in one direction.
        disk_gbs: GB/s with which all nodes together write checkpoints.
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    network_gbs: float
    disk_gbs: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def dividing(self, batch: int) -> Cluster:
        """The largest part of the cluster, in whole nodes where it has several, whose GPUs divide a global batch."""
        for nodes in range(self.nodes, 0, -1):
            if batch % (nodes * self.gpus_per_node) == 0:
                return replace(self, nodes=nodes)
        fitting = max(n for n in range(1, self.gpus_per_node + 1) if batch % n == 0)
        return replace(self, nodes=1, gpus_per_node=fitting)

    def of(self, gpus: int) -> Cluster:
        """A cluster of the same nodes with another number of GPUs in all: a part of one node, or whole nodes."""
        if gpus <= self.gpus_per_node:
            return replace(self, nodes=1, gpus_per_node=gpus)
        return replace(self, nodes=gpus // self.gpus_per_node)


@dataclass(frozen=True)
class Setting:
    """A cluster with the assumptions that a plan rests on.

    Attributes:
        mfu: share of the GPU's bf16 rate that a training step reaches; `mfu_from` says where it comes from.
        price: of a GPU for an hour; None where it is not known.
        jitter: relative standard deviation of a GPU's computing time from step to step; `jitter_from` says where it comes from.
        failure_hours: mean hours between the failures of one GPU.
        restart_s: seconds from a start to its first step.
    """

    cluster: Cluster
    samples: int
    caption_tokens: float
    mfu: float
    mfu_from: str
    price: float | None
    jitter: float
    jitter_from: str
    failure_hours: float
    restart_s: float


def setting_of(args: argparse.Namespace, measured: Measured | None) -> Setting:
    """The setting that a command line asks for. Raises ValueError for a GPU that is not known."""
    cluster = Cluster(args.nodes, args.gpus_per_node, gpu_of(args), args.network / 8, args.disk)
    mfu = spread = None
    if measured is not None:
        mfu = measured.mfu, f"median of speed/mfu_percent in {args.measured}"
        spread = measured.jitter, f"spread of speed/step_s in {args.measured}"
    rates = (*_rate(args.mfu, "--mfu", mfu, MFU), args.price, *_rate(args.jitter, "--jitter", spread, JITTER))
    return Setting(cluster, args.samples, args.caption_tokens, *rates, args.failure_hours, args.restart)


def _rate(given: float | None, option: str, measured: tuple[float, str] | None, assumed: float) -> tuple[float, str]:
    """A rate and where it comes from: the option, else a run, else an assumption."""
    if given is not None:
        return given, option
    return measured or (assumed, "assumed; --measured RUN takes a run's")


def gpu_of(args: argparse.Namespace) -> Gpu:
    """The GPU of a command line, its data sheet's figures replaced by those that are given.

    Raises:
        ValueError: the table lacks it, and not all of its figures are given.
    """
    given = {"bf16_tflops": args.tflops, "memory_gib": args.memory, "memory_tbs": args.bandwidth, "link_gbs": args.link}
    given = {field: value for field, value in given.items() if value is not None}
    if args.gpu in GPUS:
        return replace(GPUS[args.gpu], **given)
    missing = [option for option in ("tflops", "memory", "bandwidth") if getattr(args, option) is None]
    if missing:
        raise ValueError(
            f"--gpu {args.gpu}: not in the table ({', '.join(GPUS)}); for another GPU give "
            "--tflops (dense bf16, TFLOP/s), --memory (GiB) and --bandwidth (of its memory, TB/s); "
            f"missing: {', '.join(f'--{option}' for option in missing)}"
        )
    return Gpu(**({"device": args.gpu, "fp8_tflops": 0.0, "link_gbs": PCIE_4_GBS} | given))

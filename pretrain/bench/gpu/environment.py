"""Environment: the device, its driver and clocks, the processor, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from pretrain.bench.gpu.session import Numbers, Session

PACKAGES = (
    "torch", "triton", "deepspeed", "mosaicml-streaming", "diffusers", "transformers", "torchao", "pydantic", "omegaconf",
    "numpy", "einops", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,temperature.gpu"


def run(session: Session) -> None:
    """Records the device, the host and the versions."""
    session.measure("device", _device)
    session.measure("host", _host)
    session.measure("versions", _versions)
    if session.cuda:
        session.measure("nvidia-smi", _smi)


def _device(session: Session) -> Numbers:
    if not session.cuda:
        return {"name": "CPU", "dtype": str(session.dtype)}
    properties = torch.cuda.get_device_properties(session.device)
    return {
        "name": properties.name,
        "number": torch.cuda.device_count(),
        "GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "in the table of rates": session.gpu is not None,
    }


def _host(session: Session) -> Numbers:
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPUs": len(os.sched_getaffinity(0)),
        "memory GiB": pages / 2**30,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "not set"),
    }


def _versions(session: Session) -> Numbers:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    shown = ("torch", "triton", "deepspeed", "diffusers", "transformers")
    cuda = {"CUDA": torch.version.cuda or "none", "cuDNN": torch.backends.cudnn.version() or "none"}
    return {name: found[name] for name in shown} | cuda | {"all": found}


def _smi(session: Session) -> Numbers:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    return dict(zip(QUERY.split(","), map(str.strip, first.split(",")), strict=True))

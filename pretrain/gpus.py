"""Rates of GPUs by their data sheets: dense, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates.

    Attributes:
        device: a part of the name that the driver gives the device.
        bf16_tflops, fp8_tflops: matrix products in TFLOP/s; 0 where it has no such products.
        memory_tbs: bandwidth of its memory in TB/s.
        memory_gib: size of its memory.
        link_gbs: bandwidth to the other GPUs of its node in GB/s, in one direction: NVLink's, or PCIe's where not all are linked.
    """

    device: str
    bf16_tflops: float
    fp8_tflops: float
    memory_tbs: float
    memory_gib: float
    link_gbs: float


PCIE_4_GBS = 32  # of 16 lanes, in one direction

# By the name that a user gives. Of two names of which one is a part of the other, the longer comes first.
GPUS = {
    "h100-pcie": Gpu("H100 PCIe", 756.0, 1513.0, 2.0, 80, 64),
    "h100-nvl": Gpu("H100 NVL", 835.0, 1671.0, 3.9, 94, 64),
    "h100": Gpu("H100", 989.0, 1979.0, 3.35, 80, 450),
    "h200": Gpu("H200", 989.0, 1979.0, 4.8, 141, 450),
    "h800": Gpu("H800", 989.0, 1979.0, 3.35, 80, 200),
    "b200": Gpu("B200", 2250.0, 4500.0, 8.0, 180, 900),
    "a100-40": Gpu("A100-SXM4-40GB", 312.0, 0.0, 1.555, 40, 300),
    "a100": Gpu("A100", 312.0, 0.0, 2.039, 80, 300),
    "a800": Gpu("A800", 312.0, 0.0, 2.039, 80, 200),
    "l40s": Gpu("L40S", 362.0, 733.0, 0.864, 48, PCIE_4_GBS),
}


def named_gpu(name: str) -> Gpu:
    """The GPU of a name in the table. Raises ValueError with the known names."""
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; the GPUs are {', '.join(GPUS)}")
    return GPUS[name]


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU whose driver calls it so; None where the table lacks it."""
    return next((gpu for gpu in GPUS.values() if gpu.device in device_name), None)

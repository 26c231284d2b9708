"""Names of GPUs, as users and drivers have them."""

import pytest

from pretrain.gpus import GPUS, gpu_of, named_gpu


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GeForce RTX 2080", None),
    ],
)
def test_a_device_is_found_by_its_drivers_name(driver, name):
    assert gpu_of(driver) == (None if name is None else GPUS[name])


def test_a_longer_name_comes_before_its_part():
    names = [gpu.device for gpu in GPUS.values()]
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b]


def test_an_unknown_name_is_told():
    assert named_gpu("h200").memory_tbs == 4.8
    with pytest.raises(ValueError, match=r"unknown GPU 'h1000'; the GPUs are h100-pcie, "):
        named_gpu("h1000")

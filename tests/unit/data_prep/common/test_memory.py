"""data_prep.common.memory: tensors that take the memory of those before them fault no pages in again."""

from __future__ import annotations

import subprocess
import sys

# Faults of eight tensors of 64 MiB, each freed before the next, once the memory has found its size.
SCRIPT = """
import resource, sys, torch
from data_prep.common.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(64):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> int:
    return int(subprocess.run([sys.executable, "-c", SCRIPT, word], capture_output=True, check=True).stdout)


def test_freed_memory_is_taken_again() -> None:
    without, kept = faults("default"), faults("keep")
    assert kept < 100 < without / 100

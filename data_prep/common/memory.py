"""Memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from its malloc.h, and the largest value that one takes.
TRIM_THRESHOLD, MMAP_MAX, LARGEST = -1, -4, 2**31 - 1


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensors; nothing where the C library is another.

    By default every larger tensor is mapped anew, and the first write to each of its pages takes a page fault: time and memory
    in docs/benchmarks.md, "Page faults".
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, LARGEST)

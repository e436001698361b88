"""Memory of a process that calls a model over and over."""

from __future__ import annotations

import ctypes
import os

import torch


def size_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_memory() -> None:
    """Asks glibc to keep freed memory: giving pages back and faulting them in again costs up to a third of a small
    model's time on the CPU. For programs (the command line, training); a library leaves its host's allocator alone."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError):  # another C library
        pass

"""Memory whose end can be felt."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def before_a_wall(size: int) -> Tensor:
    """Bytes that end where memory ends that can be read: whoever goes on dies."""
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    wall = found[pages * mmap.PAGESIZE :].data_ptr()
    nothing = 0  # PROT_NONE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, nothing) == 0
    return found[pages * mmap.PAGESIZE - size : pages * mmap.PAGESIZE]

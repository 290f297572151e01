"""Keep freed memory in the process: a training step then reuses its pages.

By default glibc hands large buffers back to the system at every step and fetches fresh, zeroed
pages at the next one; on a virtual machine that was up to a quarter of a training step.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # M_* of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_GIBIBYTE = 2**30


def keep_freed_memory() -> bool:
    """Let malloc keep up to a gibibyte of freed memory, for the whole process.

    Returns:
        Whether the C library took it; only glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wishes = (
        (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_TRIM_THRESHOLD, _GIBIBYTE),
        (_TOP_PAD, _LARGEST_MMAP_THRESHOLD),
    )
    return all([mallopt(option, value) == 1 for option, value in wishes])

"""Work shared out to as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Slice = tuple[int, int]
"""The first, and the one behind the last."""


def slices(count: int, parts: int) -> list[Slice]:
    """Split ``count`` things into equal parts, at least one."""
    edges = [count * i // max(1, parts) for i in range(max(1, parts) + 1)]
    return list(pairwise(edges))


def each_in_threads(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call ``function`` with each job's arguments, on as many threads as torch has."""
    if torch.get_num_threads() == 1 or len(jobs) == 1:
        return [function(*job) for job in jobs]
    return list(_pool(torch.get_num_threads()).map(lambda job: function(*job), jobs))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gpsearch")

"""Work shared out to as many threads as torch has."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
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
    """Call ``function`` with each job's arguments, on as many threads as torch has.

    No job is left at work when this ends, be it by a job's error or by Ctrl-C: the memory whose
    addresses it has may be freed then.
    """
    if torch.get_num_threads() == 1 or len(jobs) == 1:
        return [function(*job) for job in jobs]
    pool = _pool(torch.get_num_threads())
    futures = [pool.submit(function, *job) for job in jobs]
    try:
        return [future.result() for future in futures]
    except BaseException:
        _settle(futures)
        raise


def _settle(futures: Sequence[Future[Any]]) -> None:
    """Wait for what has begun, however often Ctrl-C is pressed, and take the rest back."""
    for future in futures:
        future.cancel()
    while True:
        with suppress(KeyboardInterrupt):
            wait(futures)
            return


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gpsearch")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)

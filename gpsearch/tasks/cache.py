"""Features of recordings, computed once and kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from gpsearch.files import write_atomically
from gpsearch.tasks import audio, features


def default_folder() -> Path:
    """Return `gpsearch` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpsearch"


def levels_of(
    paths: Sequence[Path], name: str, folder: Path
) -> list[UInt8[Tensor, "_ bands"] | audio.AudioError]:
    """Return each recording's levels, or why it has none.

    They are kept in one file, which is written only when all recordings are good, and which
    counts only while every recording has its size and time of change, and `features.VERSION`.

    Args:
        paths: The recordings.
        name: The corpus' name; a later corpus of that name takes the place of this one.
        folder: The cache. If it cannot be written, nothing is kept.
    """
    file = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    key = _key(paths)
    kept = _load(file, key)
    if kept is not None:
        return list(kept)
    computed = [_levels(path) for path in paths]
    good = [levels for levels in computed if isinstance(levels, Tensor)]
    if 0 < len(good) == len(paths):
        _save(file, key, good)
    return computed


def _levels(path: Path) -> UInt8[Tensor, "_ bands"] | audio.AudioError:
    try:
        return features.levels(audio.read(path))
    except audio.AudioError as error:
        return error


def _key(paths: Sequence[Path]) -> str:
    """Return a digest that changes when a recording or the features' definition does."""
    states = [(str(path), *_state(path)) for path in paths]
    return hashlib.sha256(json.dumps([features.VERSION, states]).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    """Return a file's size and time of change; (-1, -1) if it cannot be looked at."""
    try:
        facts = path.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


def _load(file: Path, key: str) -> tuple[UInt8[Tensor, "_ bands"], ...] | None:
    """Return the kept levels, if they are there, whole, and of ``key``."""
    try:
        with file.open("rb") as opened, np.load(opened) as kept:
            if str(kept["key"]) == key:
                return torch.split(torch.from_numpy(kept["levels"]), kept["frames"].tolist())
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        pass
    return None


def _save(file: Path, key: str, levels: Sequence[UInt8[Tensor, "_ bands"]]) -> None:
    """Keep the levels; a cache that cannot be written costs seconds next time, not this run."""
    frames = np.array([len(each) for each in levels])
    joined = torch.cat(list(levels)).numpy()
    with contextlib.suppress(OSError):
        write_atomically(
            file,
            lambda temporary: np.savez(temporary, key=np.array(key), frames=frames, levels=joined),
        )

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from gpsearch.tasks import audio, cache, features


@pytest.fixture
def recordings(tmp_path: Path) -> list[Path]:
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 4000))
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for path, samples in zip(paths, noise, strict=True):
        soundfile.write(path, samples, 16_000)
    return paths


def test_kept_features_are_the_computed_ones(tmp_path: Path, recordings: list[Path]) -> None:
    folder = tmp_path / "cache"
    first = cache.levels_of(recordings, "mine", folder)
    (file,) = folder.iterdir()
    written_ns = file.stat().st_mtime_ns
    again = cache.levels_of(recordings, "mine", folder)
    assert file.stat().st_mtime_ns == written_ns
    for path, one, two in zip(recordings, first, again, strict=True):
        assert isinstance(one, torch.Tensor)
        assert isinstance(two, torch.Tensor)
        assert torch.equal(one, two)
        assert torch.equal(one, features.levels(audio.read(path)))


def test_a_changed_recording_is_computed_again(tmp_path: Path, recordings: list[Path]) -> None:
    folder = tmp_path / "cache"
    old, _ = cache.levels_of(recordings, "mine", folder)
    os.replace(recordings[1], recordings[0])
    soundfile.write(recordings[1], np.random.default_rng(1).normal(0, 0.1, 4000), 16_000)
    new, _ = cache.levels_of(recordings, "mine", folder)
    assert isinstance(old, torch.Tensor)
    assert isinstance(new, torch.Tensor)
    assert not torch.equal(old, new)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"no zip file"])
def test_a_damaged_cache_is_replaced(tmp_path: Path, recordings: list[Path], damage: bytes) -> None:
    folder = tmp_path / "cache"
    cache.levels_of(recordings, "mine", folder)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    cache.levels_of(recordings, "mine", folder)
    assert len(file.read_bytes()) > 1000


def test_bad_recordings_are_told_and_nothing_is_kept(
    tmp_path: Path, recordings: list[Path]
) -> None:
    recordings[0].write_bytes(b"")
    bad, good, missing = cache.levels_of([*recordings, tmp_path / "c.wav"], "m", tmp_path / "cache")
    assert (str(bad), str(missing)) == ("empty", "missing")
    assert isinstance(good, torch.Tensor)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_trouble(
    tmp_path: Path, recordings: list[Path]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    levels, _ = cache.levels_of(recordings, "mine", tmp_path / "cache")
    assert isinstance(levels, torch.Tensor)

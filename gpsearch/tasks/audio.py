"""Audio files of any rate and number of channels, read as 16 kHz mono."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from torch import Tensor

from gpsearch.tasks.features import SAMPLE_RATE_HZ

SHORTEST_S, LONGEST_S = 0.1, 60.0
LOWEST_RATE_HZ = 8000
QUIETEST = 1e-4
"""A recording whose samples stay this close to their mean (3 steps of 16 bits) is silent."""


class AudioError(ValueError):
    """A recording that cannot be used; says why in a few words, without the file's name."""


def read(path: Path) -> Float64[Tensor, " samples"]:
    """Return a recording at 16 kHz, its channels averaged.

    Reads what libsndfile reads (wav, flac and more), NIST sphere with plain samples, and
    headerless `.raw` files: 16 bits, big-endian, 16 kHz, mono, as in AN4's original.

    Raises:
        AudioError: The file is missing, broken, empty, silent, too short or too long.
    """
    try:
        samples, rate_hz = _samples(path)
    except FileNotFoundError:
        raise AudioError("missing") from None
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror or error}") from None
    mono = samples.mean(1)
    if not np.isfinite(mono).all():
        raise AudioError("broken: holds values that are no numbers")
    if np.abs(mono - mono.mean()).max() < QUIETEST:
        raise AudioError("silent")
    return torch.from_numpy(_resample(mono, rate_hz))


def _samples(path: Path) -> tuple[Float64[ndarray, "samples channels"], int]:
    """Return the samples, -1 to 1, and their rate in Hz."""
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise AudioError("empty")
    if head.startswith(b"NIST_1A"):
        return _sphere(path.read_bytes())
    if path.suffix.lower() == ".raw":
        return _integers(path.read_bytes(), ">i2", 1, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ
    return _libsndfile(path)


def _libsndfile(path: Path) -> tuple[Float64[ndarray, "samples channels"], int]:
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            _check_length(file.frames, file.samplerate)
            samples = file.read(dtype="float64", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"broken, or no audio: {error.error_string}") from None
    if len(samples) < file.frames:
        raise AudioError(f"broken: ends after {len(samples)} of {file.frames} samples")
    return samples, file.samplerate


def _sphere(content: bytes) -> tuple[Float64[ndarray, "samples channels"], int]:
    """Read NIST sphere: lines of `name -type value`, padded to a stated size, then samples."""
    try:
        size = int(content[8:16])
        lines = content[16:size].decode("ascii").split("end_head")[0].splitlines()
        facts = {name: value for name, _, value in (line.split(None, 2) for line in lines if line)}
        channels, rate_hz = int(facts["channel_count"]), int(facts["sample_rate"])
        coding, width = facts.get("sample_coding", "pcm"), int(facts["sample_n_bytes"])
        count = int(facts["sample_count"])
    except (ValueError, KeyError):
        raise AudioError("broken: its NIST sphere header cannot be read") from None
    if coding.strip() != "pcm" or width != 2:
        raise AudioError(
            f"NIST sphere coded as {coding.strip()}, {8 * width} bits; only plain 16-bit pcm is "
            "read: convert it (sph2pipe -f wav IN OUT)"
        )
    order = ">i2" if facts.get("sample_byte_format", "01").strip() == "10" else "<i2"
    samples = _integers(content[size:], order, channels, rate_hz)
    if len(samples) < count:
        raise AudioError(f"broken: ends after {len(samples)} of {count} samples")
    return samples[:count], rate_hz


def _integers(
    content: bytes, order: str, channels: int, rate_hz: int
) -> Float64[ndarray, "samples channels"]:
    """Decode 16-bit samples; an incomplete last one is dropped."""
    count = len(content) // (2 * channels)
    _check_length(count, rate_hz)
    integers = np.frombuffer(content, order, count * channels).reshape(count, channels)
    return integers.astype(np.float64) / 32768


def _check_length(samples: int, rate_hz: int) -> None:
    """Refuse what is too short or long, or sampled too slowly, before it is decoded."""
    if samples == 0:
        raise AudioError("empty")
    if rate_hz < LOWEST_RATE_HZ:
        raise AudioError(f"sampled at {rate_hz} Hz; at least {LOWEST_RATE_HZ} Hz are needed")
    duration_s = samples / rate_hz
    if duration_s < SHORTEST_S:
        raise AudioError(f"too short: {duration_s:.3f} s of at least {SHORTEST_S} s")
    if duration_s > LONGEST_S:
        raise AudioError(f"too long: {duration_s:.0f} s of at most {LONGEST_S:.0f} s; cut it")


def _resample(mono: Float64[ndarray, " samples"], rate_hz: int) -> Float64[ndarray, " samples_out"]:
    if rate_hz == SAMPLE_RATE_HZ:
        return mono
    import soxr

    resampled: Float64[ndarray, " samples_out"] = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ)
    return resampled[: math.ceil(len(mono) * SAMPLE_RATE_HZ / rate_hz)]

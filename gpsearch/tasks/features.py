"""Audio to log-mel features, and the perturbations that make more of little speech.

A recording becomes *levels*: for each 10 ms frame and each of 64 mel bands, the power in decibels
below the recording's loudest value, in whole steps of 1.4 dB. They are unsigned bytes, so they
are stored without loss, and the recording's loudness cancels out. `normalise` turns them into
what a network reads.

References:
    Tempo: Ko et al. 2015, "Audio augmentation for speech recognition".
    VTLP: Jaitly and Hinton 2013, "Vocal tract length perturbation improves speech recognition".
    Masks: Park et al. 2019, "SpecAugment" (arXiv:1904.08779).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Generator, Tensor

VERSION = 1
"""Goes up with every change to `levels`, so that no cache mixes two definitions."""

SAMPLE_RATE_HZ = 16_000
BANDS = 64
LOWEST_HZ, HIGHEST_HZ = 20.0, 8000.0
WINDOW = 400
"""Samples under the Hann window: 25 ms."""
HOP = 160
"""Samples from one frame to the next: 10 ms."""
FFT = 512
RANGE_DB = 80.0
"""Level 0 stands for everything this far below the recording's loudest value, or further."""
STEP_DB = 1.4
"""One step of a level: the finest at which AN4 fits in 8 MB; its rounding noise is 0.4 dB."""
SPREAD_DB = 15.0
"""A band's typical deviation from its mean in AN4; one unit of a normalised feature."""


def levels(audio: Float[Tensor, " samples"]) -> UInt8[Tensor, "frames bands"]:
    """Return the levels of 16 kHz mono audio, one frame for each 10 ms and one more.

    In float64 throughout: another machine's FFT then rounds to the same steps.
    """
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)
    spectrum = torch.stft(
        audio.double() - audio.double().mean(),
        FFT,
        HOP,
        WINDOW,
        window,
        pad_mode="constant",
        return_complex=True,
    )
    power = mel_filters() @ spectrum.abs().square()
    loudest = power.max()
    if loudest == 0:
        return torch.zeros(power.shape[1], BANDS, dtype=torch.uint8)
    decibels = 10 * (power / loudest).clamp_min(10 ** (-RANGE_DB / 10)).log10()
    return ((decibels + RANGE_DB) / STEP_DB).round().to(torch.uint8).T.contiguous()


def normalise(levels: UInt8[Tensor, "frames bands"]) -> Float[Tensor, "frames bands"]:
    """Return what a network reads: levels less each band's mean over the recording, scaled."""
    values = levels.float()
    return (values - values.mean(0)) * (STEP_DB / SPREAD_DB)


@cache
def mel_filters() -> Float64[Tensor, "bands bins"]:
    """Return the triangles, evenly spaced in mel, that sum a power spectrum into bands."""
    ends = _mel(torch.tensor([LOWEST_HZ, HIGHEST_HZ], dtype=torch.float64)).tolist()
    corners = torch.linspace(ends[0], ends[1], BANDS + 2, dtype=torch.float64)
    bins = _mel(torch.linspace(0, SAMPLE_RATE_HZ / 2, FFT // 2 + 1, dtype=torch.float64))
    left, centre, right = (corners[i : i + BANDS, None] for i in range(3))
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0)


def stretch(
    features: Float[Tensor, "frames bands"], factor: float
) -> Float[Tensor, "frames_out bands"]:
    """Make a recording last ``factor`` times as long."""
    frames = features.shape[0]
    places = torch.linspace(0, frames - 1, max(1, round(frames * factor)))
    below = places.long().clamp(0, frames - 1)
    above = (below + 1).clamp_max(frames - 1)
    low, high = features.index_select(0, below), features.index_select(0, above)
    return torch.lerp(low, high, (places - below)[:, None])


def vtlp(
    features: Float[Tensor, "batch frames bands"], factors: Float[Tensor, " batch"]
) -> Float[Tensor, "batch frames bands"]:
    """Make vocal tracts longer or shorter: warp each recording's frequencies by its factor.

    Frequencies scale by one factor up to 4.8 kHz, and from there on linearly to 8 kHz, which
    stays where it is.
    """
    heard_at, bands = _warped_bands(factors), torch.arange(BANDS)
    # Every band is the mean of the two beside the place where it is heard, weighted by nearness.
    share = (1 - (bands[:, None] - heard_at[:, None, :]).abs()).clamp_min(0)
    return features @ share


def mask(
    features: Float[Tensor, "frames bands"],
    generator: Generator,
    *,
    time_masks: int = 2,
    longest: int = 20,
    share: float = 0.2,
    band_masks: int = 2,
    widest: int = 10,
) -> Float[Tensor, "frames bands"]:
    """Set random stretches of time and of frequency to 0, the mean (SpecAugment without warp).

    Args:
        features: Normalised features; they are left as they are.
        generator: Draws the places and sizes.
        time_masks: How many stretches of time.
        longest: A stretch of time covers 0 to this many frames.
        share: And at most this share of the recording's frames.
        band_masks: How many stretches of frequency.
        widest: A stretch of frequency covers 0 to this many bands.
    """
    frames, bands = features.shape
    hidden = features.clone()
    for start, end in _stretches(frames, time_masks, min(longest, int(share * frames)), generator):
        hidden[start:end] = 0
    for start, end in _stretches(bands, band_masks, widest, generator):
        hidden[:, start:end] = 0
    return hidden


def _mel(hz: Float64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Return the pitch in mel (O'Shaughnessy's formula)."""
    return 2595 * torch.log10(1 + hz / 700)


def _hz(mel: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Undo `_mel`."""
    hz: Float64[Tensor, " n"] = 700 * torch.expm1(mel * (math.log(10) / 2595))
    return hz


@cache
def _band_centres() -> tuple[Float64[Tensor, " bands"], float, float]:
    """Return the bands' centres in Hz, and band 0's centre and the spacing in mel."""
    ends = _mel(torch.tensor([LOWEST_HZ, HIGHEST_HZ], dtype=torch.float64)).tolist()
    spacing = (ends[1] - ends[0]) / (BANDS + 1)
    first = ends[0] + spacing
    centres = first + spacing * torch.arange(BANDS, dtype=torch.float64)
    return _hz(centres), first, spacing


def _warped_bands(
    factors: Float[Tensor, " batch"], knee_hz: float = 4800.0
) -> Float[Tensor, "batch bands"]:
    """Return, for each band, the (fractional) band that is heard there after the warp."""
    centres, first, spacing = _band_centres()
    factor = factors.double()[:, None]
    knee = knee_hz * factor.clamp_max(1) / factor
    slope = (HIGHEST_HZ - knee * factor) / (HIGHEST_HZ - knee)
    warped = torch.where(
        centres <= knee, centres * factor, HIGHEST_HZ - slope * (HIGHEST_HZ - centres)
    )
    return ((_mel(warped) - first) / spacing).clamp(0, BANDS - 1).float()


def _stretches(
    length: int, count: int, longest: int, generator: Generator
) -> list[tuple[int, int]]:
    """Return ``count`` random stretches of ``length`` places: the first, and the one behind."""
    stretches = []
    for size, start in torch.rand(count, 2, generator=generator).tolist():
        covered = int(size * (longest + 1))
        first = int(start * (length - covered + 1))
        stretches.append((first, first + covered))
    return stretches

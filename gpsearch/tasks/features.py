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
from jaxtyping import Float, Float64, Int, UInt8
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


def normalise(
    levels: UInt8[Tensor, "*batch frames bands"], lengths: Int[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch frames bands"]:
    """Return what a network reads: levels less each band's mean over the recording, scaled.

    Args:
        levels: Of a recording, or of a batch of them, with zeros behind their ends.
        lengths: The frames of each recording of a batch; what is behind its end means nothing.
    """
    values = levels.float()
    frames = values.shape[-2] if lengths is None else lengths[..., None, None]
    return (values - values.sum(-2, keepdim=True) / frames) * (STEP_DB / SPREAD_DB)


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
    features: Float[Tensor, "batch frames bands"],
    lengths: Int[Tensor, " batch"],
    factors: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch frames_out bands"], Int[Tensor, " batch"]]:
    """Make each recording last ``factors`` times as long; return it with its new length.

    Behind its end, its last frame goes on.
    """
    longer = (lengths.double() * factors.double()).round().long().clamp_min(1)
    last, steps = (lengths - 1)[:, None], (longer - 1).clamp_min(1)[:, None]
    places = torch.arange(int(longer.max())) * (last / steps)
    below = places.long().minimum(last)
    above = (below + 1).minimum(last)
    starts = features.shape[1] * torch.arange(len(features))[:, None]
    frames = features.flatten(0, 1)
    low, high = (
        frames.index_select(0, (starts + at).flatten()).view(*at.shape, -1) for at in (below, above)
    )
    return low.lerp_(high, (places - below).clamp_max(1)[..., None]), longer


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
    features: Float[Tensor, "batch frames bands"],
    lengths: Int[Tensor, " batch"],
    generator: Generator,
    *,
    time_masks: int = 2,
    longest: int = 20,
    share: float = 0.2,
    band_masks: int = 2,
    widest: int = 10,
) -> Float[Tensor, "batch frames bands"]:
    """Set random stretches of time and of frequency to 0, the mean (SpecAugment without warp).

    Args:
        features: Normalised features; they are left as they are.
        lengths: The frames of each recording.
        generator: Draws the places and sizes.
        time_masks: How many stretches of time, in each recording.
        longest: A stretch of time covers 0 to this many frames.
        share: And at most this share of the recording's frames.
        band_masks: How many stretches of frequency.
        widest: A stretch of frequency covers 0 to this many bands.
    """
    _, frames, bands = features.shape
    most = (share * lengths.double()).long().clamp_max(longest)
    times = _left(frames, lengths, time_masks, most, generator)
    every, widths = (torch.full_like(lengths, one) for one in (bands, widest))
    left = _left(bands, every, band_masks, widths, generator)
    return (features * times[:, :, None]).mul_(left[:, None, :])  # faster than masked_fill


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


def _left(
    places: int,
    lengths: Int[Tensor, " batch"],
    count: int,
    longest: Int[Tensor, " batch"],
    generator: Generator,
) -> Float[Tensor, "batch places"]:
    """Return 0 for the places that ``count`` random stretches cover, else 1.

    Stretches lie within the first ``lengths`` places, and cover ``longest`` at the most.
    """
    size, start = torch.rand(2, len(lengths), count, generator=generator).unbind()
    covered = (size * (longest[:, None] + 1)).long()
    first = (start * (lengths[:, None] - covered + 1)).long()[..., None]
    at = torch.arange(places)
    return ((at < first) | (at >= first + covered[..., None])).all(1).float()

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from gpsearch.tasks import features


def sine(hz: float, seconds: float = 1.0) -> Tensor:
    time_s = torch.arange(round(seconds * 16_000), dtype=torch.float64) / 16_000
    return torch.sin(2 * math.pi * hz * time_s)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# Centres on the mel scale, 2595 lg(1 + f / 700): band 0 at 48 Hz, band 63 at 7672 Hz.
@pytest.mark.parametrize(("hz", "band"), [(200, 5), (1000, 21), (4000, 48), (7700, 63)])
def test_a_sine_is_loudest_in_its_band(hz: float, band: int) -> None:
    levels = features.levels(sine(hz))
    assert levels.shape == (101, 64)
    assert (levels[5:-5].argmax(1) == band).all()
    assert levels.max() == round(80 / 1.4)


def test_the_filters_cover_every_frequency_evenly() -> None:
    filters = features.mel_filters()
    assert filters.shape == (64, 257)
    assert (filters.sum(1) > 0).all()
    inner = filters.sum(0)[2:246]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_silence_is_level_zero() -> None:
    assert features.levels(torch.zeros(1600)).eq(0).all()
    assert features.levels(torch.full((1600,), 0.3)).eq(0).all()


def test_a_single_sample_has_a_frame() -> None:
    assert features.levels(torch.ones(1)).shape == (1, 64)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 10.0))
def test_loudness_and_offset_cancel_out(gain: float) -> None:
    audio = torch.randn(4000, generator=seeded(), dtype=torch.float64)
    assert torch.equal(features.levels(audio * gain + 0.1), features.levels(audio))


def test_levels_are_decibels_below_the_loudest() -> None:
    loud, soft = sine(1000), sine(1000) * 10 ** (-14 / 20)
    levels = features.levels(torch.cat([loud, soft]))[:, 21].int()
    assert levels[50] - levels[150] == 10  # 14 dB are ten steps of 1.4 dB


def test_normalised_bands_have_mean_zero() -> None:
    levels = torch.tensor([[0, 10], [30, 10]], dtype=torch.uint8)
    expected = torch.tensor([[-15.0, 0], [15, 0]]) * 1.4 / 15
    torch.testing.assert_close(features.normalise(levels), expected)


def test_stretching_changes_only_the_number_of_frames() -> None:
    ramp = torch.linspace(0, 1, 100)[:, None].expand(100, 64)
    for factor in (0.9, 0.955, 1.0, 1.1):
        out = features.stretch(ramp, factor)
        assert len(out) == round(100 * factor)
        torch.testing.assert_close(out[:, 0], torch.linspace(0, 1, len(out)))


def test_vtlp_moves_a_peak_by_the_factor() -> None:
    frame = features.levels(sine(1000)).float()[50:51]
    warped = features.vtlp(frame.repeat(3, 1, 1), torch.tensor([0.8, 1.0, 1.2]))
    # 1000 Hz lies in band 21, 1000 Hz / 1.2 = 833 Hz in band 19, 1000 Hz / 0.8 = 1250 Hz in 25.
    assert warped.argmax(2).flatten().tolist() == [25, 21, 19]


def test_perturbing_by_nothing_changes_nothing() -> None:
    speech = torch.randn(50, 64, generator=seeded())
    torch.testing.assert_close(features.stretch(speech, 1.0), speech)
    torch.testing.assert_close(
        features.vtlp(speech[None], torch.ones(1))[0], speech, atol=1e-3, rtol=0
    )
    still = features.mask(speech, seeded(), time_masks=0, band_masks=0)
    assert torch.equal(still, speech)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 10_000))
def test_masks_hide_whole_frames_and_bands_within_their_limits(frames: int, seed: int) -> None:
    ones = torch.ones(frames, 64)
    out = features.mask(ones, seeded(seed), time_masks=2, longest=20, share=0.2, widest=10)
    hidden_frames, hidden_bands = (out == 0).all(1), (out == 0).all(0)
    assert hidden_frames.sum() <= 2 * min(20, int(0.2 * frames))
    assert hidden_bands.sum() <= 20
    assert torch.equal(out == 0, hidden_frames[:, None] | hidden_bands)
    assert ones.eq(1).all()


def test_masks_reach_every_place() -> None:
    hidden = sum(features.mask(torch.ones(100, 64), seeded(s)).eq(0) for s in range(300))
    assert isinstance(hidden, Tensor)
    assert (hidden > 0).all()


def test_the_same_seed_hides_the_same() -> None:
    speech = torch.randn(80, 64, generator=seeded())
    one, same, other = (features.mask(speech, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)

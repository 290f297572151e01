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


@settings(max_examples=20)
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


def test_a_recording_is_normalised_in_a_batch_as_it_is_alone() -> None:
    alone = torch.tensor([[0, 10], [30, 10], [3, 4]], dtype=torch.uint8)
    batch = torch.zeros(2, 5, 2, dtype=torch.uint8)
    batch[0, :3], batch[1] = alone, 7
    one, other = features.normalise(batch, torch.tensor([3, 5]))
    torch.testing.assert_close(one[:3], features.normalise(alone))
    assert other.eq(0).all()


def test_stretching_changes_only_the_number_of_frames() -> None:
    ramp = torch.linspace(0, 1, 100)[:, None].expand(4, 100, 64)
    factors = torch.tensor([0.9, 0.958, 1.0, 1.1])
    stretched, lengths = features.stretch(ramp, torch.full((4,), 100), factors)
    assert lengths.tolist() == [90, 96, 100, 110]
    for one, end in zip(stretched, lengths.tolist(), strict=True):
        torch.testing.assert_close(one[:end, 0], torch.linspace(0, 1, end))


def test_a_recording_is_stretched_in_a_batch_as_it_is_alone() -> None:
    batch = torch.randn(3, 40, 64, generator=seeded())
    lengths, factors = torch.tensor([40, 1, 17]), torch.tensor([1.1, 0.3, 0.93])
    together, longer = features.stretch(batch, lengths, factors)
    for i, (start, end) in enumerate(zip(lengths.tolist(), longer.tolist(), strict=True)):
        own, _ = features.stretch(batch[i : i + 1, :start], lengths[i : i + 1], factors[i : i + 1])
        torch.testing.assert_close(together[i, :end], own[0])


def test_vtlp_moves_a_peak_by_the_factor() -> None:
    frame = features.levels(sine(1000)).float()[50:51]
    warped = features.vtlp(frame.repeat(3, 1, 1), torch.tensor([0.8, 1.0, 1.2]))
    # 1000 Hz lies in band 21, 1000 Hz / 1.2 = 833 Hz in band 19, 1000 Hz / 0.8 = 1250 Hz in 25.
    assert warped.argmax(2).flatten().tolist() == [25, 21, 19]


def test_perturbing_by_nothing_changes_nothing() -> None:
    speech, all_frames = torch.randn(1, 50, 64, generator=seeded()), torch.tensor([50])
    torch.testing.assert_close(features.stretch(speech, all_frames, torch.ones(1))[0], speech)
    torch.testing.assert_close(features.vtlp(speech, torch.ones(1)), speech, atol=1e-3, rtol=0)
    still = features.mask(speech, all_frames, seeded(), time_masks=0, band_masks=0)
    assert torch.equal(still, speech)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(0, 10_000))
def test_masks_hide_whole_frames_and_bands_within_their_limits(
    lengths: list[int], seed: int
) -> None:
    ones = torch.ones(len(lengths), max(lengths), 64)
    out = features.mask(
        ones, torch.tensor(lengths), seeded(seed), time_masks=2, longest=20, share=0.2, widest=10
    )
    for one, frames in zip(out, lengths, strict=True):
        hidden_frames, hidden_bands = (one == 0).all(1), (one == 0).all(0)
        assert hidden_frames.sum() <= 2 * min(20, int(0.2 * frames))
        assert not hidden_frames[frames:].any()
        assert hidden_bands.sum() <= 20
        assert torch.equal(one == 0, hidden_frames[:, None] | hidden_bands)
    assert ones.eq(1).all()


def test_masks_reach_every_place() -> None:
    ones, lengths = torch.ones(300, 100, 64), torch.full((300,), 100)
    hidden = features.mask(ones, lengths, seeded()).eq(0)
    assert hidden.any(0).all()
    assert not hidden.all(0).any()


def test_the_same_seed_hides_the_same() -> None:
    speech, lengths = torch.randn(2, 80, 64, generator=seeded()), torch.tensor([80, 70])
    one, same, other = (features.mask(speech, lengths, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)

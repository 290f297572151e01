from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from gpsearch.tasks import audio, features


def speechlike(rate_hz: int = 16_000, seconds: float = 0.5) -> np.ndarray:
    """Chirps of 200 to 3000 Hz: all rates from 8 kHz can hold them."""
    time_s = np.arange(round(rate_hz * seconds)) / rate_hz
    return 0.3 * np.sin(2 * np.pi * (200 * time_s + 2800 * time_s**2)) * np.hanning(len(time_s))


def sphere(samples: np.ndarray, coding: str = "pcm", order: str = "10") -> bytes:
    lines = [
        f"sample_count -i {len(samples)}",
        "sample_n_bytes -i 2",
        "channel_count -i 1",
        f"sample_byte_format -s2 {order}",
        "sample_rate -i 16000",
        f"sample_coding -s{len(coding)} {coding}",
        "end_head",
    ]
    head = "NIST_1A\n   1024\n" + "\n".join(lines) + "\n"
    integers = (samples * 32768).astype(">i2" if order == "10" else "<i2")
    return head.encode().ljust(1024) + integers.tobytes()


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", speechlike(), 16_000, subtype="PCM_16")
    return tmp_path / "a.wav"


def test_wav_flac_sphere_and_raw_hold_the_same_samples(tmp_path: Path, wav: Path) -> None:
    expected = audio.read(wav)
    samples = expected.numpy()
    soundfile.write(tmp_path / "a.flac", samples, 16_000, subtype="PCM_16")
    (tmp_path / "big.sph").write_bytes(sphere(samples))
    (tmp_path / "little.sph").write_bytes(sphere(samples, order="01"))
    (tmp_path / "a.raw").write_bytes((samples * 32768).astype(">i2").tobytes())
    for name in ("a.flac", "big.sph", "little.sph", "a.raw"):
        assert torch.equal(audio.read(tmp_path / name), expected), name


@pytest.mark.parametrize("rate_hz", [8000, 22_050, 44_100, 48_000])
def test_other_rates_and_stereo_give_nearly_the_same_features(
    tmp_path: Path, wav: Path, rate_hz: int
) -> None:
    mono = speechlike(rate_hz)
    soundfile.write(tmp_path / "b.wav", np.stack([mono * 1.5, mono * 0.5], 1), rate_hz)
    expected, got = (features.levels(audio.read(path)) for path in (wav, tmp_path / "b.wav"))
    assert got.shape == expected.shape
    audible = expected[2:-2] > 20  # within 52 dB of the loudest
    difference = (got.int() - expected.int())[2:-2][audible].abs()
    assert difference.max() <= 1


def bad_files(folder: Path) -> dict[str, str]:
    """Write one file of each kind of trouble; return what each is called."""
    good = speechlike()
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16_000)
    soundfile.write(folder / "constant.wav", np.full(8000, 0.2), 16_000)
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "short.wav", good[:100], 16_000)
    soundfile.write(folder / "long.flac", np.zeros(16_000 * 61), 16_000)
    soundfile.write(folder / "slow.wav", good, 4000)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "opposite.wav", np.stack([good, -good], 1), 16_000)
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio at all")
    (folder / "shorten.sph").write_bytes(sphere(good, "pcm,embedded-shorten-v2.00"))
    (folder / "cut.sph").write_bytes(sphere(good)[:-10])
    (folder / "headless.sph").write_bytes(b"NIST_1A\n   1024\nend_head\n")
    (folder / "folder.wav").mkdir()
    return {
        "silent.wav": "silent",
        "constant.wav": "silent",
        "opposite.wav": "silent",
        "no_samples.wav": "empty",
        "nothing.wav": "empty",
        "short.wav": "too short: 0.006 s",
        "long.flac": "too long: 61 s of at most 60 s; cut it",
        "slow.wav": "sampled at 4000 Hz; at least 8000 Hz",
        "nan.wav": "broken: holds values that are no numbers",
        "text.wav": "broken, or no audio",
        "shorten.sph": "convert it (sph2pipe -f wav IN OUT)",
        "cut.sph": "broken: ends after 7995 of 8000 samples",
        "headless.sph": "header cannot be read",
        "folder.wav": "cannot be read: Is a directory",
        "missing.wav": "missing",
    }


def test_trouble_is_called_by_its_name(tmp_path: Path) -> None:
    for name, trouble in bad_files(tmp_path).items():
        with pytest.raises(audio.AudioError) as caught:
            audio.read(tmp_path / name)
        assert trouble in str(caught.value), name


def test_a_cut_flac_is_broken(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000)
    soundfile.write(tmp_path / "a.flac", noise, 16_000)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(audio.AudioError, match="broken"):
        audio.read(tmp_path / "a.flac")

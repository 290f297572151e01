from __future__ import annotations

import hashlib
import runpy
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpsearch.errors import UserError
from gpsearch.tasks import Split, audio, corpus, features
from gpsearch.tasks.corpus import Corpus

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "gpsearch" / "tasks" / "data"
ARCHIVES = [place / "shared" / "data" / "an4.tar.gz" for place in (ROOT, ROOT.parent)]


@pytest.fixture(scope="module")
def an4() -> Corpus:
    return corpus.load_an4()


def speakers(loaded: Corpus, split: Split) -> set[str]:
    return {u.speaker for u in loaded.split(split)}


def test_an4_is_whole(an4: Corpus) -> None:
    counts = Counter(u.split for u in an4.utterances)
    assert counts == {"train": 819, "dev": 129, "test": 130}
    assert counts["train"] + counts["dev"] == 948
    assert len({u.id for u in an4.utterances}) == 1078
    frames = sum(len(u.levels) for u in an4.utterances)
    assert 48.3 < frames * 0.01 / 60 < 48.6  # minutes


def test_no_speaker_of_an4_is_in_two_splits(an4: Corpus) -> None:
    train, dev, test = (speakers(an4, split) for split in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (64, 10, 10)
    assert len(train | dev | test) == 84


def test_the_texts_of_an4(an4: Corpus) -> None:
    assert "".join(an4.alphabet) == " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert an4.alphabet[0] == ""
    assert all(u.text and u.text == " ".join(u.text.split()) for u in an4.utterances)
    texts = {u.id: u.text for u in an4.utterances}
    assert texts["an251-fash-b"] == "YES"
    assert texts["an406-fcaw-b"] == "RUBOUT G M E F THREE NINE"
    assert sum(len(u.text.split()) for u in an4.split("test")) == 773


def test_the_features_of_an4_are_scaled(an4: Corpus) -> None:
    values = torch.cat([u.features for u in an4.split("train")])
    assert abs(float(values.mean())) < 1e-3
    assert 0.95 < float(values.std()) < 1.05
    assert all(u.levels.max() == 57 for u in an4.utterances)  # the loudest: 80 dB / 1.4 dB


def test_texts_survive_the_alphabet(an4: Corpus) -> None:
    assert an4.encode("A B").tolist() == [2, 1, 3]
    for utterance in an4.split("dev")[:20]:
        assert an4.decode(an4.encode(utterance.text).tolist()) == utterance.text
    assert an4.encode("4!").tolist() == []


def test_an4_fits_in_eight_megabytes_and_its_checksums_hold() -> None:
    lines = (DATA / corpus.AN4_CHECKSUMS).read_text().splitlines()
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest
    assert sum(file.stat().st_size for file in DATA.iterdir() if "an4" in file.name) <= 8_000_000
    assert "Carnegie Mellon" in (DATA / "AN4-LICENSE").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("an4.levels", b"half", "an4.levels is damaged: its SHA-256 is wrong; reinstall gpsearch"),
        ("an4.csv", b"", "an4.csv is damaged"),
        ("an4.sha256", b"", "an4.csv is damaged"),
        ("an4.csv", None, "an4.csv cannot be read"),
    ],
)
def test_a_damaged_package_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    for file in DATA.glob("an4.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpus.load_an4(tmp_path)


@pytest.mark.data
def test_the_packaged_features_are_those_of_the_recordings(an4: Corpus, tmp_path: Path) -> None:
    archive = next((file for file in ARCHIVES if file.exists()), None)
    if archive is None:
        pytest.skip("the raw corpus, shared/data/an4.tar.gz, is not beside the checkout")
    packaged = {u.id: u for u in an4.utterances}
    compared = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            if Path(member.name).suffix != ".wav":
                continue
            tar.extract(member, tmp_path, filter="data")
            levels = features.levels(audio.read(tmp_path / member.name))
            assert torch.equal(levels, packaged[Path(member.name).stem].levels), member.name
            compared += 1
            if compared == 8:
                return
    raise AssertionError("the archive holds too few recordings")


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=2), st.floats(0.05, 0.5))
def test_held_out_groups_hold_their_share_if_they_can(groups: list[str], share: float) -> None:
    chosen = corpus.hold_out(groups, share, "dev")
    held, most = sum(group in chosen for group in groups), max(2 * share * len(groups), 1)
    left = set(groups) - chosen
    assert left
    assert held <= most
    assert (
        held >= share * len(groups)
        or len(left) == 1
        or all(held + groups.count(group) > most for group in left)
    )
    assert chosen == corpus.hold_out(groups[::-1], share, "dev")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_group_that_is_most_of_a_corpus_is_never_held_out(split: str) -> None:
    groups = [*"a" * 900, *"b" * 50, *"c" * 50]
    assert corpus.hold_out(groups, 0.1, split) == {"b", "c"}
    assert corpus.hold_out([*"ab" * 12, *"c" * 12], 0.1, split) == frozenset()


def test_the_dev_split_of_an4_stays_what_it_was(an4: Corpus) -> None:
    ids = "\n".join(sorted(u.id for u in an4.split("dev")))
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "4c74b2954bb52e7d"
    assert an4.notes == (
        "no dev split given: 129 of 948 utterances held out, all those of 10 speakers",
    )


def voices(folder: Path, names: list[str]) -> None:
    """Write a second of noise for each name, wav and flac by turns, at several rates."""
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).normal(0, 0.1, 16_000)
        soundfile.write(folder / name, noise, (16_000, 22_050)[number % 2])


def own(folder: Path, head: str, rows: list[str]) -> Path:
    (folder / "manifest.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


def test_own_recordings_are_split_by_speaker(tmp_path: Path) -> None:
    names = [f"{i:02}.{'wav' if i % 3 else 'flac'}" for i in range(24)]
    voices(tmp_path, names)
    rows = [f"{name},it's {i},person{i // 3}" for i, name in enumerate(names)]
    loaded = corpus.load(own(tmp_path, "path,text,speaker", rows), tmp_path / "cache")
    train, dev, test = (speakers(loaded, split) for split in ("train", "dev", "test"))
    assert not (train & dev) | (train & test) | (dev & test)
    assert len(loaded.utterances) == len(train | dev | test) * 3 == 24
    assert [u.id for u in loaded.utterances] == names
    assert loaded.utterances[3].text == "IT'S 3"
    assert loaded.notes[0] == (
        "no test split given: 3 of 24 utterances held out, all those of 1 speakers"
    )
    assert loaded.notes[1].startswith("no dev split given: ")


def test_where_each_speaker_says_too_much_utterances_are_held_out(tmp_path: Path) -> None:
    names = [f"{i:02}.wav" for i in range(24)]
    voices(tmp_path, names)
    rows = [f"{name},go,{'' if i % 8 else 'dev'},p{i // 8}" for i, name in enumerate(names)]
    loaded = corpus.load(own(tmp_path, "path,text,split,speaker", rows), tmp_path / "cache")
    assert speakers(loaded, "train") == {"p0", "p1", "p2"}
    assert loaded.notes == (
        "no test split given: 3 of 21 utterances held out, "
        "not split by speaker, as none hold about 10.0% of them",
    )


def test_own_recordings_without_speakers_are_split_one_by_one(tmp_path: Path) -> None:
    names = [f"{i:02}.wav" for i in range(20)]
    voices(tmp_path, names)
    rows = [f"{name},go{' no' * (i == 0)},{'test' * (i < 2)}" for i, name in enumerate(names)]
    loaded = corpus.load(own(tmp_path, "path,text,split", rows), tmp_path / "cache")
    assert [u.id for u in loaded.split("test")] == names[:2]
    assert len(loaded.split("dev")) == 3
    assert loaded.notes == (
        "no dev split given: 3 of 18 utterances held out, not split by speaker",
        "never in a training text, so never recognised:   N",
    )


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    voices(tmp_path, [f"{i}.wav" for i in range(6)])
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16_000)
    (tmp_path / "broken.wav").write_text("no audio")
    rows = [f"{i}.wav,fine" for i in range(4)]
    rows += ["4.wav,", f"5.wav,{'a long text ' * 9}", "silent.wav,", "broken.wav,x", "gone.wav,y"]
    with pytest.raises(UserError) as caught:
        corpus.load(own(tmp_path, "path,text", rows), tmp_path / "cache")
    head, *lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert head.startswith(f"{tmp_path}: 5 of 9 recordings cannot be used; mend them")
    assert [line.strip() for line in lines[:3]] == [
        "4.wav (manifest.csv line 6): no transcription",
        "5.wav (manifest.csv line 7): 0.7 s are too short for 107 characters",
        "silent.wav (manifest.csv line 8): silent; no transcription",
    ]
    assert lines[3].startswith("  broken.wav (manifest.csv line 9): broken, or no audio")
    assert lines[4] == "  gone.wav (manifest.csv line 10): missing"


def test_too_few_utterances_are_refused(tmp_path: Path) -> None:
    voices(tmp_path, ["a.wav", "b.wav"])
    own(tmp_path, "path,text", ["a.wav,one", "b.wav,two"])
    with pytest.raises(UserError, match="too few utterances: 1 train, 0 dev, 1 test; at least 8"):
        corpus.load(tmp_path, tmp_path / "cache")
    own(tmp_path, "path,text", [])
    with pytest.raises(UserError, match="too few utterances: 0 train"):
        corpus.load(tmp_path, tmp_path / "cache")


@pytest.fixture
def small_an4(tmp_path: Path) -> Path:
    """Eight speakers in AN4's layout, headerless big-endian as it was first given out."""
    (tmp_path / "etc").mkdir()
    for split, tags, count in (("train", ("<s> ", " </s>"), 16), ("test", ("", ""), 2)):
        ids = [f"an4_{split}/p{i // 2}/an{i}-p{i // 2}-b" for i in range(count)]
        texts = [f"{tags[0]}YES GO{tags[1]} ({Path(name).name})" for name in ids]
        (tmp_path / "etc" / f"an4_{split}.fileids").write_text("\n".join(ids) + "\n")
        (tmp_path / "etc" / f"an4_{split}.transcription").write_text("\n".join(texts) + "\n")
        for seed, name in enumerate(ids):
            noise = np.random.default_rng(seed).normal(0, 3000, 16_000).astype(">i2")
            file = tmp_path / "wav" / f"{name}.raw"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(noise.tobytes())
    return tmp_path


def test_an4_is_read_as_it_was_given_out(small_an4: Path, tmp_path: Path) -> None:
    loaded = corpus.load(small_an4, tmp_path / "cache")
    assert {s: len(loaded.split(s)) for s in ("train", "dev", "test")} == {
        "train": 12,
        "dev": 4,
        "test": 2,
    }
    assert {u.text for u in loaded.utterances} == {"YES GO"}


def test_the_package_is_made_from_the_recordings(small_an4: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_an4.py"))
    script["main"](small_an4, tmp_path / "data")
    raw = corpus.load(small_an4, tmp_path / "cache")
    packaged = corpus.load_an4(tmp_path / "data")
    for one, other in zip(raw.utterances, packaged.utterances, strict=True):
        assert (one.id, one.speaker, one.split, one.text) == (
            other.id,
            other.speaker,
            other.split,
            other.text,
        )
        assert torch.equal(one.levels, other.levels)

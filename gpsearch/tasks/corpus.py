"""Corpora of speech: utterances with features, a text and a split.

`load_an4` reads AN4 from the package, `load` the user's own recordings, or AN4's.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from gpsearch.errors import UserError
from gpsearch.tasks import Split, layouts, packing
from gpsearch.tasks import cache as feature_cache
from gpsearch.tasks.audio import AudioError
from gpsearch.tasks.features import BANDS, HOP, SAMPLE_RATE_HZ, normalise
from gpsearch.tasks.layouts import Recording

DATA = resources.files("gpsearch.tasks.data")
AN4_INDEX, AN4_LEVELS, AN4_CHECKSUMS = "an4.csv", "an4.levels", "an4.sha256"
"""In `gpsearch/tasks/data`: who says what, the packed levels, and the checksums of both."""

DEV_SHARE, TEST_SHARE = 0.135, 0.1
"""How much of the training utterances a split takes that is not given; dev: ten speakers of AN4."""
FEWEST = {"train": 8, "dev": 1, "test": 1}
"""The fewest utterances of a split; enough to run, far too few to learn from."""
STRIDE = 4
"""Frames per output step of the speech models; CTC writes at most one character a step."""


@dataclass(frozen=True, eq=False)
class Utterance:
    """A recording's features and what is said in it."""

    id: str
    speaker: str
    """Empty if unknown."""
    split: Split
    text: str
    """Upper case, words separated by one space (see `layouts.plain_text`)."""
    levels: UInt8[Tensor, "frames bands"]
    """The features as they are stored, a quarter of the size (see `features.levels`)."""

    @property
    def features(self) -> Float[Tensor, "frames bands"]:
        """What a network reads, computed at each call (0.05 ms)."""
        return normalise(self.levels)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Utterances, in a fixed order."""

    utterances: tuple[Utterance, ...]
    notes: tuple[str, ...] = ()
    """What the user should know: splits that were made for them, characters never trained."""

    def split(self, name: Split) -> tuple[Utterance, ...]:
        """Return the utterances of one split."""
        return tuple(u for u in self.utterances if u.split == name)

    @cached_property
    def alphabet(self) -> tuple[str, ...]:
        """What a network can write: "", CTC's blank, and the training texts' characters."""
        return ("", *sorted(set("".join(u.text for u in self.split("train")))))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {character: place for place, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> Int64[Tensor, " characters"]:
        """Return the characters' places in `alphabet`, without those never seen in training."""
        return torch.tensor([self._places[c] for c in text if c in self._places]).long()

    def decode(self, places: Iterable[int]) -> str:
        """Return the text of places in `alphabet`; blanks vanish, repeats stay."""
        return "".join(self.alphabet[place] for place in places)


def load_an4(data: Traversable = DATA) -> Corpus:
    """Return AN4 from the package: 819 utterances to train, 129 for development, 130 to test.

    Args:
        data: The folder of the three files that `scripts/make_an4.py` writes.

    Raises:
        UserError: The package's files are damaged.
    """
    index, packed = _checked(data, AN4_INDEX), _checked(data, AN4_LEVELS)
    rows = list(csv.DictReader(io.StringIO(index.decode())))
    frames = [int(row["frames"]) for row in rows]
    levels = torch.split(torch.from_numpy(packing.unpack(packed, sum(frames), BANDS)), frames)
    recordings = [
        Recording(Path(), row["id"], row["text"], AN4_INDEX, _split(row["split"]), row["speaker"])
        for row in rows
    ]
    return _corpus(recordings, levels)


def load(folder: Path, cache: Path | None = None) -> Corpus:
    """Return the corpus in ``folder``, its features computed, or read from the cache.

    Splits that the folder does not give are taken out of its training utterances: whole
    speakers, if at least three are known and some hold about as many, else utterances (see
    `hold_out`).

    Args:
        folder: AN4 as it was given out (wav, sphere or headerless), or a folder with
            `manifest.csv`: a line `path,text[,split][,speaker]`, then one for each recording.
        cache: Where features are kept; by default `gpsearch` in the user's cache folder.

    Raises:
        UserError: The index is unclear, or recordings cannot be used: all of them are named.
    """
    recordings = layouts.read(folder)
    found = feature_cache.levels_of(
        [recording.path for recording in recordings],
        name=str(folder.resolve()),
        folder=cache or feature_cache.default_folder(),
    )
    problems = list(_problems(recordings, found))
    layouts.refuse(
        f"{folder}: {len(problems)} of {len(recordings)} recordings cannot be used; mend them, "
        "or take them out of the list:",
        problems,
    )
    corpus = _corpus(recordings, [levels for levels in found if isinstance(levels, Tensor)])
    counts = {split: len(corpus.split(_split(split))) for split in FEWEST}
    if any(counts[split] < fewest for split, fewest in FEWEST.items()):
        have = ", ".join(f"{count} {split}" for split, count in counts.items())
        need = ", ".join(f"{count} {split}" for split, count in FEWEST.items())
        raise UserError(f"{folder} has too few utterances: {have}; at least {need} are needed")
    return corpus


def hold_out(groups: Sequence[str], share: float, split: str) -> frozenset[str]:
    """Choose groups (speakers, say) that together hold about ``share`` of the utterances.

    They are taken in the order of a hash of their names, which looks random but is the same
    everywhere, and in which an utterance more or less changes little. What would make them more
    than twice the share is passed over, and one group always stays: they may hold less.

    Args:
        groups: Each utterance's group.
        share: The part of the utterances to choose.
        split: The name of the split, so that each has its own order.
    """
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: hashlib.sha256(f"{split}/{group}".encode()).digest())
    wanted = share * len(groups)
    most = max(2 * wanted, 1)  # of very few utterances one is still taken
    chosen: list[str] = []
    held = 0
    for group in order:
        if held >= wanted or len(chosen) == len(sizes) - 1:
            break
        if held + sizes[group] <= most:
            chosen.append(group)
            held += sizes[group]
    return frozenset(chosen)


def _corpus(recordings: Sequence[Recording], levels: Sequence[UInt8[Tensor, "_ bands"]]) -> Corpus:
    """Put recordings and their levels together, and make the splits that are not given."""
    notes: list[str] = []
    for split, share in (("test", TEST_SHARE), ("dev", DEV_SHARE)):
        if all(recording.split != split for recording in recordings):
            recordings, note = _take(recordings, _split(split), share)
            notes.append(note)
    corpus = Corpus(
        tuple(
            Utterance(r.id, r.speaker or "", r.split or "train", r.text, each)
            for r, each in zip(recordings, levels, strict=True)
        )
    )
    unknown = set("".join(u.text for u in corpus.utterances)) - set(corpus.alphabet)
    if unknown:
        notes.append(f"never in a training text, so never recognised: {' '.join(sorted(unknown))}")
    return replace(corpus, notes=tuple(notes))


def _take(
    recordings: Sequence[Recording], split: Split, share: float
) -> tuple[list[Recording], str]:
    """Move part of the training recordings to ``split``, whole speakers if that can be; say how."""
    pool = [r for r in recordings if r.split in (None, "train")]
    moved, whose = _whole_speakers(pool, split, share)
    if not moved:
        chosen = hold_out([r.id for r in pool], share, split)
        moved = [r for r in pool if r.id in chosen]
    note = f"no {split} split given: {len(moved)} of {len(pool)} utterances held out, {whose}"
    places = {id(r) for r in moved}
    return [replace(r, split=split) if id(r) in places else r for r in recordings], note


def _whole_speakers(
    pool: Sequence[Recording], split: Split, share: float
) -> tuple[list[Recording], str]:
    """Choose all recordings of some speakers, or none if that cannot be; say whose they are."""
    speakers = {r.speaker for r in pool}
    if None in speakers or len(speakers) < 3:
        return [], "not split by speaker"
    chosen = hold_out([str(r.speaker) for r in pool], share, split)
    moved = [r for r in pool if r.speaker in chosen]
    if len(moved) < share * len(pool):
        return [], f"not split by speaker, as none hold about {share:.1%} of them"
    return moved, f"all those of {len(chosen)} speakers"


def _problems(
    recordings: Sequence[Recording],
    found: Sequence[UInt8[Tensor, "_ bands"] | AudioError],
) -> Iterator[str]:
    """Yield a line for each recording that cannot be used: which, where it is listed, and why."""
    for recording, levels in zip(recordings, found, strict=True):
        reasons = [str(levels)] if isinstance(levels, AudioError) else []
        if not recording.text:
            reasons.append("no transcription")
        elif isinstance(levels, Tensor) and _steps(recording.text) > len(levels) // STRIDE:
            duration_s = len(levels) * HOP / SAMPLE_RATE_HZ
            reasons.append(f"{duration_s:.1f} s are too short for {len(recording.text)} characters")
        if reasons:
            yield f"{recording.path} ({recording.place}): {'; '.join(reasons)}"


def _steps(text: str) -> int:
    """Return the output steps CTC needs: one a character, and a blank between equal ones."""
    return len(text) + sum(a == b for a, b in pairwise(text))


def _split(name: str) -> Split:
    """Return ``name``, known to be a split."""
    assert name in ("train", "dev", "test")
    return name  # type: ignore[return-value]


def _checked(data: Traversable, name: str) -> bytes:
    """Read a file of the package's data and check it."""
    try:
        content = (data / name).read_bytes()
        checksums = (data / AN4_CHECKSUMS).read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{data / name} cannot be read ({error}); reinstall gpsearch") from None
    if f"{hashlib.sha256(content).hexdigest()}  {name}" not in checksums:
        raise UserError(f"{data / name} is damaged: its SHA-256 is wrong; reinstall gpsearch")
    return content

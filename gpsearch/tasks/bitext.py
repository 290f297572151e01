"""Parallel text: sentences of one language with their translations, from a user's own files.

Three forms are read. A folder with `train.de` and `train.en`, `valid.de` and so on, one sentence a
line; IWSLT's original folder, with `train.tags.de-en.de` and XML development and test sets; a table
of sentence pairs as Tatoeba and Anki give them out.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from gpsearch.errors import UserError
from gpsearch.tasks import Split

TATOEBA = "tatoeba_deu_eng.tsv"
"""The package's pairs (scripts/make_tatoeba.py)."""
LONGEST = 5_000
"""Characters of a line; the longest of the 330,000 lines of IWSLT's German-English has 1,100."""
HELD_OUT = 20
"""Of a table without splits, one sentence in so many is for development, and one for testing."""
PIECES = 0.05
"""The share of lines with a word in pieces from which on a text counts as cut by BPE."""
_FORMS = (
    "a folder with train.SRC, train.TGT, valid.SRC, valid.TGT, test.SRC and test.TGT (SRC and TGT "
    "for the languages), IWSLT's folder, or a table of pairs (.tsv, .txt or .zip)"
)
_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",), "dev": ("valid", "dev"), "test": ("test",)
}  # fmt: skip


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


class Line(NamedTuple):
    """A line of a file, with its number from 1."""

    number: int
    text: str


class Columns(NamedTuple):
    """Which columns of a table have the sentences, from 0."""

    source: int
    target: int
    languages: tuple[str, str]
    """What the columns are called, as nothing tells their languages."""
    line: str
    """What a line should be."""


_ANKI = Columns(1, 0, ("second column", "first column"), "TRANSLATION, tab, SENTENCE")
_TATOEBA = Columns(
    3, 1, ("fourth column", "second column"), "ID, tab, TRANSLATION, tab, ID, tab, SENTENCE"
)


@dataclass(frozen=True)
class Bitext:
    """A corpus of pairs."""

    languages: tuple[str, str]
    """From which language into which."""
    splits: dict[Split, list[Pair]]
    """The pairs of every split; no side of any is empty."""
    notes: tuple[str, ...] = ()
    """What was decided for the user."""


def load(data: Path | None = None) -> Bitext:
    """Read and check a corpus.

    Args:
        data: A folder or a table; None is the package's Tatoeba, German into English.

    Raises:
        UserError: Something is missing, broken or does not fit together: names file and line.
    """
    if data is None:
        content = files("gpsearch.tasks.data").joinpath(TATOEBA).read_bytes()
        pairs = _aligned((TATOEBA, TATOEBA), *_sides(TATOEBA, _rows(TATOEBA, content), _ANKI), [])
        # Its splits stay as they are: models were trained and compared with them.
        return Bitext(("de", "en"), _split(pairs))
    if not data.exists():
        raise UserError(f"--data {data}: there is no such file or folder; it should be {_FORMS}")
    if data.is_file():
        return _of_table(str(data), _table(data))
    is_iwslt = any(data.glob("*.xml")) or any(data.glob("train.tags.*"))
    return _of_iwslt(data) if is_iwslt else _of_folder(data)


# A folder of plain files


def _of_folder(folder: Path) -> Bitext:
    endings = sorted(p.suffix[1:] for p in folder.glob("train.*") if p.suffix and p.is_file())
    if len(endings) != 2:
        found = ", ".join(f"train.{one}" for one in endings) or "no train.*"
        raise UserError(f"{folder}: holds {found}; it should be {_FORMS}")
    languages, note = _direction(folder, endings)
    notes = [note]
    splits: dict[Split, list[Pair]] = {}
    for split, names in _NAMES.items():
        name = next((n for n in names if (folder / f"{n}.{endings[0]}").exists()), names[0])
        sides = [folder / f"{name}.{language}" for language in languages]
        splits[split] = _pairs(sides, _plain, notes)
    return Bitext(languages, splits, tuple(notes))


def _direction(folder: Path, endings: list[str]) -> tuple[tuple[str, str], str]:
    """Return from which language into which, and how that was decided."""
    first, second = endings
    named = folder.resolve().name
    if named.endswith(f"{second}-{first}"):
        first, second = second, first
    note = f"translating from {first} into {second}"
    if not named.endswith(f"{first}-{second}"):
        note += f" (a folder whose name ends in {second}-{first} is read the other way)"
    return (first, second), note


def _plain(path: Path) -> list[Line]:
    if not path.is_file():
        raise UserError(f"{path}: is missing; --data should be {_FORMS}")
    rows = lines(str(path), path.read_bytes())
    return [Line(number, text.strip()) for number, text in rows]


# IWSLT's folder


def _of_iwslt(folder: Path) -> Bitext:
    """Read IWSLT's folder: sets named dev... are for development, those named tst... for tests."""
    named = [p.name for p in [*folder.glob("train.tags.*"), *folder.glob("*.xml")]]
    ways = sorted({m[1] for name in named if (m := re.search(r"\.(\w+-\w+)\.\w+(\.xml)?$", name))})
    if len(ways) != 1:
        raise UserError(
            f"{folder}: holds the pairs {', '.join(ways) or 'of no'} languages, not one"
        )
    (languages, note), notes = _direction(folder, ways[0].split("-")), list[str]()
    notes.append(note)
    splits: dict[Split, list[Pair]] = {"train": _iwslt_train(folder, ways[0], languages, notes)}
    held_out: tuple[tuple[Split, str], ...] = (("dev", "dev"), ("test", "tst"))
    for split, kind in held_out:
        sets = sorted(folder.glob(f"*.{kind}*.{ways[0]}.{languages[0]}.xml"))
        if not sets:
            raise UserError(f"{folder}: holds no *.{kind}*.{ways[0]}.{languages[0]}.xml")
        splits[split] = []
        for path in sets:
            ending = f".{languages[0]}.xml"
            other = path.with_name(path.name.removesuffix(ending) + f".{languages[1]}.xml")
            splits[split] += _pairs([path, other], _segments, notes)
    return Bitext(languages, splits, tuple(notes))


def _iwslt_train(
    folder: Path, way: str, languages: tuple[str, str], notes: list[str]
) -> list[Pair]:
    tagged = [folder / f"train.tags.{way}.{language}" for language in languages]
    if tagged[0].exists():
        return _pairs(tagged, _untagged, notes)
    sides = [folder / f"train.{language}" for language in languages]
    if not sides[0].exists():
        raise UserError(f"{folder}: holds neither {tagged[0].name} nor {sides[0].name}")
    return _pairs(sides, _plain, notes)


def _untagged(path: Path) -> list[Line]:
    """Return the sentences between the lines of tags (<title>, <url> and the like)."""
    return [line for line in _plain(path) if not line.text.lstrip().startswith("<")]


def _segments(path: Path) -> list[Line]:
    """Return the segments of an mteval file; many of IWSLT's are no well-formed XML."""
    segment = re.compile(r"<seg\b[^>]*>(.*?)</seg>")
    found = [(line, segment.search(line.text)) for line in _plain(path)]
    return [Line(line.number, html.unescape(m[1]).strip()) for line, m in found if m]


# A table of pairs


def _table(path: Path) -> bytes:
    """Return a table's bytes; in Anki's .zip it lies beside a file about itself."""
    if path.suffix != ".zip":
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not Path(n).name.startswith("_")]
            if len(names) != 1:
                raise UserError(f"{path}: holds {len(names)} tables; it should hold one")
            return archive.read(names[0])
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is a damaged .zip ({error})") from error


def _of_table(where: str, content: bytes) -> Bitext:
    """Read a user's table, without splits of its own."""
    rows = _rows(where, content)
    columns = _TATOEBA if _has_ids(rows) else _ANKI
    source, target = columns.languages
    notes = [f"translating the {source} of {where} into the {target}"]
    if columns is _TATOEBA:
        notes[0] += ", without the ids of tatoeba.org's export"
    splits = _split(_aligned((where, where), *_sides(where, rows, columns), notes))
    _keep_apart(where, splits, notes)
    for split, pairs in splits.items():
        if not pairs:
            raise UserError(f"{where}: is too small, no sentence falls into the {split} split")
    return Bitext(columns.languages, splits, tuple(notes))


def _rows(where: str, content: bytes) -> list[list[str]]:
    return [[cell.strip() for cell in text.split("\t")] for _, text in lines(where, content)]


def _has_ids(rows: list[list[str]]) -> bool:
    """Say whether sentences come with their numbers: ID, TRANSLATION, ID, SENTENCE."""
    found = [len(row) > 3 and row[0].isdecimal() and row[2].isdecimal() for row in rows]
    return sum(found) > len(found) / 2


def _sides(where: str, rows: list[list[str]], columns: Columns) -> tuple[list[Line], list[Line]]:
    """Return a table's sources and targets.

    Raises:
        UserError: A line has too few columns, or a column has no sentences but numbers.
    """
    places = (columns.source, columns.target)
    for number, row in enumerate(rows, start=1):
        if len(row) <= max(places):
            raise UserError(
                f"{where}:{number}: has {len(row)} of {max(places) + 1} columns; a line should be "
                f"{columns.line}"
            )
    for place, name in zip(places, columns.languages, strict=True):
        if all(row[place].isdecimal() for row in rows):
            raise UserError(
                f"{where}: has only numbers in its {name}; keep the two columns of sentences, for "
                "instance with `cut -f2,3`"
            )
    source, target = ([Line(i, row[at]) for i, row in enumerate(rows, start=1)] for at in places)
    return source, target


def _split(pairs: list[Pair]) -> dict[Split, list[Pair]]:
    splits: dict[Split, list[Pair]] = {"train": [], "dev": [], "test": []}
    for pair in pairs:
        splits[split_of(pair.target)].append(pair)
    return splits


def split_of(target: str) -> Split:
    """Say which split a table's translation is for: all its sentences go there together.

    Case and punctuation make no difference, so that "Hi!" cannot be tested on after "Hi." was
    learnt.
    """
    share = int(hashlib.sha256(_words(target).encode()).hexdigest()[:8], 16) % HELD_OUT
    return "dev" if share == 0 else "test" if share == 1 else "train"


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _keep_apart(where: str, splits: dict[Split, list[Pair]], notes: list[str]) -> None:
    """Leave out of training what is said in the other splits, and of development what is tested.

    A sentence has several translations, and `split_of` keeps only the translations apart.
    """
    said: set[str] = set()
    left_out: dict[Split, int] = {}
    order: tuple[Split, ...] = ("test", "dev", "train")
    for split in order:
        keys = [_words(pair.source) for pair in splits[split]]
        kept = [key not in said for key in keys]
        splits[split] = list(compress(splits[split], kept))
        left_out[split] = kept.count(False)
        said.update(keys)
    if any(left_out.values()):
        notes.append(
            f"{left_out['train']:,} training and {left_out['dev']:,} development pairs of {where} "
            "left out: the same sentences, case and punctuation aside, are in development or test"
        )


# What all forms have in common


def lines(where: str, content: bytes) -> list[Line]:
    """Return the lines of a text file, each letter in its one composed form (NFC).

    Raises:
        UserError: The file is empty, no UTF-8, or has a line that cannot be one sentence.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}:{number}: is no UTF-8 (byte 0x{content[error.start]:02x}); convert the file, "
            "for instance with `iconv -f latin1 -t utf-8`"
        ) from error
    # Not str.splitlines, which also splits at characters that stand within sentences.
    rows = io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")
    if not text.strip():
        raise UserError(f"{where}: is empty")
    for number, row in enumerate(rows, start=1):
        if len(row) > LONGEST:
            raise UserError(
                f"{where}:{number}: has {len(row):,} characters; a line should be one sentence, of "
                f"at most {LONGEST:,}"
            )
    composed = (unicodedata.normalize("NFC", row) for row in rows)
    return [Line(number, row) for number, row in enumerate(composed, start=1)]


def _pairs(sides: list[Path], read: Callable[[Path], list[Line]], notes: list[str]) -> list[Pair]:
    sources, targets = map(read, sides)
    return _aligned((str(sides[0]), str(sides[1])), sources, targets, notes)


def _aligned(
    names: tuple[str, str], sources: list[Line], targets: list[Line], notes: list[str]
) -> list[Pair]:
    """Put two sides together, without the pairs that lack one.

    Raises:
        UserError: The sides differ in length, one is cut into pieces, or no pair is left.
    """
    where, other = names
    for name, side in zip(names, (sources, targets), strict=True):
        _refuse_pieces(name, side)
    if len(sources) != len(targets):
        raise UserError(
            f"{where} has {len(sources):,} sentences and {other} {len(targets):,}: line "
            f"{min(len(sources), len(targets)) + 1:,} of the longer one has no translation"
        )
    both = list(zip(sources, targets, strict=True))
    whole = [_is_seen(s.text) and _is_seen(t.text) for s, t in both]
    broken = [s.number for (s, _), fit in zip(both, whole, strict=True) if not fit]
    if broken:
        notes.append(
            f"{len(broken):,} pairs of {where} left out for an empty side, the first in line "
            f"{broken[0]:,}"
        )
    found = [Pair(s.text, t.text) for s, t in compress(both, whole)]
    if not found:
        raise UserError(f"{where}: holds no sentence with a translation")
    return found


def _refuse_pieces(where: str, side: list[Line]) -> None:
    """Refuse text in pieces: BLEU would count the pieces."""
    cut = [line.number for line in side if "@@ " in f"{line.text} "]
    if len(cut) > PIECES * len(side):
        raise UserError(
            f"{where}:{cut[0]}: has words cut into BPE's pieces, as {len(cut):,} of "
            f"{len(side):,} lines have; join them, for instance with `sed -E 's/@@( |$)//g'`"
        )


def _is_seen(text: str) -> bool:
    """Say whether a text has anything but spaces and what no reader sees, such as U+200B.

    Neither U+FFFD, where a letter was lost, nor U+2581, SentencePiece's own space, is a word.
    """
    return any(
        unicodedata.category(letter)[0] not in "CZ" and letter not in "\ufffd\u2581"
        for letter in text
    )


def looks_tokenised(texts: Iterable[str]) -> bool:
    """Say whether punctuation is set apart in most of the sentences that end in it."""
    ends = [text[:-1] for text in texts if text.endswith((".", "?", "!"))]
    return sum(end.endswith(" ") for end in ends) > len(ends) / 2

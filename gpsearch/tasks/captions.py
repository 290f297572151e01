"""What stands in a file of captions: which images, what people wrote of each, and its split.

Two layouts are read: Karpathy's `dataset.json` (images with split and tokenised sentences) and
COCO's own captions (images and annotations), both also gzipped.
"""

from __future__ import annotations

import gzip
import json
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpsearch.errors import UserError
from gpsearch.tasks import Split
from gpsearch.tasks.layouts import refuse

KARPATHY_SPLITS: dict[str, Split] = {
    "train": "train", "restval": "train", "val": "dev", "test": "test"
}  # fmt: skip
"""COCO's "restval" are the validation images that Karpathy gave to the training."""
FORMS = (
    "Karpathy's dataset.json (images, each with split and tokenised sentences) or COCO's captions "
    "(images with id, annotations with image_id and caption)"
)
Caption = tuple[str, ...]


@dataclass(frozen=True)
class Image:
    """An image's captions, and where its features are."""

    name: str
    """Its file's name, or its id, for messages."""
    row: int
    """Its place in the features, from 0."""
    captions: tuple[Caption, ...]
    """Words without punctuation."""
    split: Split | None = None
    """None: the file does not say."""


def read(file: Path) -> list[Image]:
    """Return the images of a file of captions, in the order of their features.

    Raises:
        UserError: The file is broken or of neither layout, or images cannot be used: names them.
    """
    content = _json(file)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise UserError(f"{file}: holds no images; it should be {FORMS}")
    try:
        found = _coco(content) if "annotations" in content else _karpathy(images)
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: cannot be understood ({what}); it should be {FORMS}") from error
    problems = list(_problems(found))
    refuse(f"{file}: {len(problems)} of {len(found)} images cannot be used:", problems)
    return sorted(found, key=lambda image: image.row)


def words(text: str) -> Caption:
    """Return a caption's words: lower case, without punctuation.

    >>> words("A man's dog -- it's WET.")
    ('a', "man's", 'dog', "it's", 'wet')
    """
    lower = unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'")
    kept = re.sub(r"[^\w\s']|_", _if_mark, lower)
    # A mark alone, as of an emoji, is no word.
    return tuple(re.findall(r"\w[^\s']*(?:'\w[^\s']*)*", kept))


def _if_mark(found: re.Match[str]) -> str:
    """Return a combining mark, a part of its letter that is no word character; else a space."""
    return found[0] if unicodedata.category(found[0]).startswith("M") else " "


def _json(file: Path) -> Any:
    try:
        content = file.read_bytes()
        return json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None


def _karpathy(images: list[Any]) -> list[Image]:
    """Read Karpathy's images; their features are in the order of `imgid`, where there is one."""
    unknown = sorted({str(image["split"]) for image in images} - KARPATHY_SPLITS.keys())
    if unknown:
        raise ValueError(f"split {unknown[0]!r} is none of {', '.join(KARPATHY_SPLITS)}")
    rows = [image.get("imgid", place) for place, image in enumerate(images)]
    if sorted(rows) != list(range(len(images))):
        raise ValueError(f"the imgid are not 0 to {len(images) - 1}, each once")
    return [
        Image(
            str(image.get("filename", row)),
            row,
            tuple(_tokens(sentence) for sentence in image["sentences"]),
            KARPATHY_SPLITS[image["split"]],
        )
        for row, image in zip(rows, images, strict=True)
    ]


def _tokens(sentence: dict[str, Any]) -> Caption:
    tokens = sentence.get("tokens")
    if tokens is None:
        return words(sentence["raw"])
    if not isinstance(tokens, list):  # a text would be taken for a list of letters
        raise ValueError(f"tokens {tokens!r} are no list of words")
    return tuple(map(str, tokens))


def _coco(content: dict[str, Any]) -> list[Image]:
    """Read COCO's images; their features are in the order of `images`."""
    captions: dict[Any, list[Caption]] = defaultdict(list)
    for note in content["annotations"]:
        captions[note["image_id"]].append(words(note["caption"]))
    ids = [image["id"] for image in content["images"]]
    if len(set(ids)) < len(ids):
        raise ValueError("an image's id occurs twice")
    strangers = captions.keys() - set(ids)
    if strangers:
        raise ValueError(f"{len(strangers)} image_id are of no image, such as {min(strangers)}")
    return [
        Image(str(image.get("file_name", image["id"])), row, tuple(captions[image["id"]]))
        for row, image in enumerate(content["images"])
    ]


def _problems(images: list[Image]) -> Iterator[str]:
    for image in images:
        if not image.captions:
            yield f"{image.name}: no captions"
        elif not all(image.captions):
            yield f"{image.name}: a caption without words"

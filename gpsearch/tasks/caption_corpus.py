"""A corpus of captioned images: captions and features of a user's folder, put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gpsearch.errors import UserError
from gpsearch.tasks import Split, image_features
from gpsearch.tasks import captions as layouts
from gpsearch.tasks.captions import Caption, Image
from gpsearch.tasks.corpus import hold_out
from gpsearch.tasks.neuraltalk import BOUNDARY

RAREST = 5
"""Times that a word has to occur in the training captions to be learnt, as in NeuralTalk."""
HELD_OUT = 0.1
"""Share of the images that a split takes that is not given."""
FEWEST: dict[Split, int] = {"train": 8, "dev": 2, "test": 2}
"""The fewest images of a split; CIDEr weighs words by how few images have them."""
WANTED = (
    "a folder with dataset.json in Karpathy's layout (images with split, filename and tokenised "
    "sentences) and the images' features in its order, vgg_feats.mat (feats, 4096 x images) or "
    ".npy, .npz, .h5 (images x size), such as Flickr8k, Flickr30k or COCO from "
    "cs.stanford.edu/people/karpathy/deepimagesent; or COCO's captions_train2014.json and "
    "captions_val2014.json (cocodataset.org), each with a file of features of the same name"
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Captioned images, in the order of their features."""

    images: tuple[Image, ...]
    features: Float[Tensor, "images size"]
    notes: tuple[str, ...] = ()

    def split(self, name: Split) -> tuple[Image, ...]:
        """Return the images of one split."""
        return tuple(image for image in self.images if image.split == name)

    def features_of(self, images: Sequence[Image]) -> Float[Tensor, "batch size"]:
        """Return the features of some images in single precision."""
        return self.features[[image.row for image in images]].float()

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """What a network can write: "", the `BOUNDARY`, and the words common in training."""
        captions = (caption for image in self.split("train") for caption in image.captions)
        counts = Counter(word for caption in captions for word in caption)
        return ("", *sorted(word for word, count in counts.items() if count >= RAREST))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.vocabulary)}

    def encode(self, caption: Caption) -> list[int]:
        """Return the tokens of a caption; rare words are left out, as NeuralTalk does."""
        return [self._places[word] for word in caption if word in self._places]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the words of some tokens, up to the first `BOUNDARY`."""
        known = list(tokens)
        end = known.index(BOUNDARY) if BOUNDARY in known else len(known)
        return " ".join(self.vocabulary[token] for token in known[:end])


def load(data: Path | None) -> Corpus:
    """Read and check a folder of captions and features, or a file of captions beside its features.

    Raises:
        UserError: Something is missing, broken, or does not fit together.
    """
    if data is None:
        raise UserError(f"captioning needs --data, as no images come with the package: {WANTED}")
    if not data.exists():
        raise UserError(f"--data {data}: there is no such folder; it should be {WANTED}")
    folder = data if data.is_dir() else data.parent
    files = _caption_files(folder) if data.is_dir() else [data]
    found = [layouts.read(file) for file in files]
    pairs = zip(files, found, strict=True)
    features = [_features(folder, *one, alone=len(files) == 1) for one in pairs]
    sizes = sorted({each.shape[1] for each in features})
    if len(sizes) > 1:
        raise UserError(f"{folder}: features of different sizes, {sizes}; use those of one network")
    images, notes = _with_splits(files, found)
    rows = [replace(image, row=row) for row, image in enumerate(images)]
    return _checked(folder, Corpus(tuple(rows), torch.cat(features), tuple(notes)))


def _caption_files(folder: Path) -> list[Path]:
    """Find Karpathy's file, else COCO's captions, else the only JSON there is."""
    there = sorted(
        path
        for part in (folder, folder / "annotations")
        if part.is_dir()
        for path in part.iterdir()
        if path.name.endswith((".json", ".json.gz"))
    )
    karpathy = [path for path in there if path.name.startswith("dataset")]
    found = karpathy or [path for path in there if "captions" in path.name] or there
    if not found:
        raise UserError(f"{folder}: no captions; it should be {WANTED}")
    if len(found) > 1 and (karpathy or not all("captions" in path.name for path in found)):
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder}: several files of captions, {names}; give one as --data")
    return found


def _features(
    folder: Path, captions: Path, images: list[Image], *, alone: bool
) -> Float[Tensor, "images size"]:
    """Read the features that belong to a file of captions: of its name, or the only ones."""
    there = sorted(p for p in folder.iterdir() if p.suffix.lower() in image_features.SUFFIXES)
    stem = captions.name.partition(".")[0]
    found = [path for path in there if path.stem == stem] or (there if alone else [])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no"
        raise UserError(
            f"{folder}: {names} features for {captions.name}; there should be one file of them, "
            f"{stem} with one of {', '.join(image_features.SUFFIXES)}, a row (in .mat: a column) "
            "an image in the order of its images"
        )
    return image_features.read(found[0], [image.name for image in images])


def _with_splits(files: list[Path], found: list[list[Image]]) -> tuple[list[Image], list[str]]:
    """Give a split to the images that have none, as COCO's: by the file's name, or held out."""
    images, notes = [image for each in found for image in each], list[str]()
    if all(image.split for image in images):
        return images, notes
    if len(files) > 1:
        pairs = zip(files, found, strict=True)
        images = [replace(i, split=i.split or _named(file)) for file, each in pairs for i in each]
    else:
        images = [replace(image, split="train") for image in images]
    for split in ("test", "dev"):
        if all(image.split != split for image in images):
            images, note = _take(images, split)
            notes.append(note)
    return images, notes


def _named(file: Path) -> Split:
    splits: dict[str, Split] = {"train": "train", "val": "dev", "test": "test"}
    found = [split for part, split in splits.items() if part in file.name]
    if len(found) != 1:
        raise UserError(f"{file}: its name should say train, val or test, to tell its split")
    return found[0]


def _take(images: list[Image], split: Literal["dev", "test"]) -> tuple[list[Image], str]:
    """Move images to ``split``: half of the development's to the test, else a share of training."""
    halved = split == "test" and any(image.split == "dev" for image in images)
    source, share = ("dev", 0.5) if halved else ("train", HELD_OUT)
    pool = [image.name for image in images if image.split == source]
    chosen = hold_out(pool, share, split)
    moved = [
        replace(image, split=split) if image.split == source and image.name in chosen else image
        for image in images
    ]
    return moved, f"no {split} split given: {len(chosen)} of {len(pool)} {source} images taken"


def _checked(folder: Path, corpus: Corpus) -> Corpus:
    """Refuse a corpus that nothing can be learnt from."""
    counts = {split: len(corpus.split(split)) for split in FEWEST}
    if any(counts[split] < fewest for split, fewest in FEWEST.items()):
        have = ", ".join(f"{count} {split}" for split, count in counts.items())
        need = ", ".join(f"{count} {split}" for split, count in FEWEST.items())
        raise UserError(f"{folder} has too few images: {have}; at least {need} are needed")
    if len(corpus.vocabulary) == 1:
        raise UserError(f"{folder}: no word occurs {RAREST} times in the training captions")
    return corpus

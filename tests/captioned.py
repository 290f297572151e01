"""A small made corpus of captioned images, written in the formats that people have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

SIZE = 7
COLOURS, THINGS = ("red", "blue", "green"), ("dog", "cat", "boat", "tree")
SPLITS = ("train",) * 24 + ("val",) * 6 + ("test",) * 6


def captions(place: int) -> list[str]:
    """Return two captions of the image at this place: a colour and a thing, told in two ways."""
    colour, thing = COLOURS[place % 3], THINGS[place % 4]
    return [f"a {colour} {thing}", f"there is a {thing} that is {colour}"]


def features() -> ndarray[Any, Any]:
    """Return features that tell colour and thing, a row an image."""
    places = np.arange(len(SPLITS))
    rows = np.zeros((len(SPLITS), SIZE), np.float32)
    rows[places, places % 3] = 2
    rows[places, 3 + places % 4] = 2
    return rows


def karpathy() -> dict[str, Any]:
    return {
        "dataset": "made",
        "images": [
            {
                "imgid": place,
                "split": split,
                "filename": f"{place:02}.jpg",
                "sentences": [
                    {"tokens": text.split(), "raw": text.capitalize() + " ."}
                    for text in captions(place)
                ],
            }
            for place, split in enumerate(SPLITS)
        ],
    }


def coco(places: range = range(len(SPLITS))) -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "images": [{"id": 1000 + p, "file_name": f"{p:02}.jpg"} for p in places],
        "annotations": [
            {"image_id": 1000 + p, "id": 10 * p + n, "caption": text.capitalize() + "."}
            for p in reversed(places)
            for n, text in enumerate(captions(p))
        ],
    }


def write_json(path: Path, content: Any) -> Path:
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def _mat(path: Path, rows: ndarray[Any, Any]) -> None:
    import scipy.io

    scipy.io.savemat(path, {"feats": rows.T})


def _h5(path: Path, rows: ndarray[Any, Any]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["feats"] = rows


def _mat73(path: Path, rows: ndarray[Any, Any]) -> None:
    """Write as MATLAB 7.3 does: HDF5 behind a header of 512 bytes, the axes the other way round."""
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        file["feats"] = rows
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    with path.open("r+b") as opened:
        opened.write(head)


WRITERS: dict[str, Callable[[Path, ndarray[Any, Any]], None]] = {
    "vgg_feats.mat": _mat,
    "matlab73.mat": _mat73,
    "feats.npy": np.save,
    "feats.npz": lambda path, rows: np.savez(path, feats=rows),
    "feats.h5": _h5,
}


def folder(path: Path, name: str = "feats.npy") -> Path:
    """Write the corpus in Karpathy's layout."""
    path.mkdir(exist_ok=True)
    write_json(path / "dataset.json", karpathy())
    WRITERS[name](path / name, features())
    return path

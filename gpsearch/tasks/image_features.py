"""Features of images in a user's file: MATLAB's .mat, numpy's .npy and .npz, HDF5."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from gpsearch.errors import UserError

NAMES = ("feats", "features")
"""What the array is called in a file that holds several."""
ROWS_AT_ONCE = 4096
"""So many are widened to single precision at a time: all of them may not fit in memory twice."""


def read(file: Path, names: list[str]) -> Float[Tensor, "images size"]:
    """Return the features of some images, a row each, in half or single precision as stored.

    A matrix is taken as it fits the number of images: NeuralTalk's `vgg_feats.mat` has a column an
    image, other files a row; where it would fit both ways, as its format usually has it.

    Args:
        file: A file with a suffix of `SUFFIXES`.
        names: The images' names, in the order of the features.

    Raises:
        UserError: The file cannot be read, holds no such matrix, or values that are no numbers or
            all 0.
    """
    try:
        found = _READERS[file.suffix.lower()](file)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{file}: reading it needs {error.name}: pip install {error.name}"
        ) from None
    except Exception as error:  # every library has errors of its own for a broken file
        raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    features = _by_row(file, found, len(names))
    if features.dtype != np.float16:
        with np.errstate(over="ignore"):  # what is too large is named below
            features = features.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise UserError(
            f"{file}: the features of {len(bad)} of {len(names)} images hold NaN or infinity, such "
            f"as row {bad[0]}, {names[bad[0]]}; compute them again"
        )
    if not features.any():
        raise UserError(f"{file}: all features are 0, which tell nothing; compute them again")
    return torch.from_numpy(np.ascontiguousarray(features))


def digest(features: Float[Tensor, "images size"]) -> str:
    """Return what tells these features from others, in half or single precision alike.

    A gigabyte of single precision takes about a second.
    """
    found = hashlib.sha256()
    for rows in torch.split(features, ROWS_AT_ONCE):
        found.update(rows.float().flatten().numpy().data)
    return found.hexdigest()[:16]


def _by_row(file: Path, array: Shaped[ndarray, ...], count: int) -> Shaped[ndarray, "images size"]:
    """Turn a matrix so that it has a row for each image."""
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        shape = " x ".join(map(str, array.shape))
        raise UserError(f"{file}: holds {shape} of {array.dtype}, not a matrix of numbers")
    by_column = file.suffix.lower() == ".mat"
    fitting = [turned for turned in (by_column, not by_column) if array.shape[turned] == count]
    if not fitting:
        height, width = array.shape
        raise UserError(
            f"{file}: a matrix of {height} x {width} for {count} images; it should have a row (in "
            f".mat: a column) for each of the images, in the order in which their file lists them"
        )
    return array.T if fitting[0] else array


def _mat(file: Path) -> Shaped[ndarray, ...]:
    import scipy.io

    try:
        return _only(file, scipy.io.loadmat(file))
    except NotImplementedError:  # MATLAB 7.3 writes HDF5, whose axes are the other way round
        return _hdf5(file).T


def _numpy(file: Path) -> Shaped[ndarray, ...]:
    array: Shaped[ndarray, ...] = np.load(file)
    return array


def _zipped(file: Path) -> Shaped[ndarray, ...]:
    with np.load(file) as arrays:
        return _only(file, arrays)


def _hdf5(file: Path) -> Shaped[ndarray, ...]:
    import h5py

    with h5py.File(file) as arrays:
        return _only(file, {n: a for n, a in arrays.items() if isinstance(a, h5py.Dataset)})


def _only(file: Path, arrays: Mapping[str, Any]) -> Shaped[ndarray, ...]:
    """Choose the array called as in `NAMES`, or the only one."""
    names = [name for name in arrays if not name.startswith("__")]
    chosen = [name for name in NAMES if name in names] or names
    if len(chosen) != 1 and not set(chosen) <= set(NAMES):
        have = ", ".join(names)
        raise UserError(f"{file}: holds {have}; the features should be called {NAMES[0]!r}")
    if not chosen:
        raise UserError(f"{file}: holds no array; the features should be called {NAMES[0]!r}")
    return np.asarray(arrays[chosen[0]])


_READERS: dict[str, Callable[[Path], Shaped[ndarray, ...]]] = {
    ".mat": _mat, ".npy": _numpy, ".npz": _zipped, ".h5": _hdf5, ".hdf5": _hdf5
}  # fmt: skip
SUFFIXES = tuple(_READERS)

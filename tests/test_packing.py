from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpsearch.tasks import packing


@settings(max_examples=40)
@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(1, 1300), st.integers(1, 7)),
        elements=st.integers(0, 255),
    )
)
def test_what_is_packed_comes_back(levels: np.ndarray) -> None:
    assert np.array_equal(packing.unpack(packing.pack(levels), *levels.shape), levels)


@pytest.mark.parametrize("frames", [1, 511, 512, 513, 5000])
def test_the_pieces_need_not_be_full(frames: int) -> None:
    levels = np.random.default_rng(0).integers(0, 58, (frames, 64)).astype(np.uint8)
    assert np.array_equal(packing.unpack(packing.pack(levels), frames, 64), levels)


def test_smooth_levels_pack_small() -> None:
    time, band = np.mgrid[:4000, :64]
    levels = (28 + 20 * np.sin(time / 30) * np.cos(band / 15)).round().astype(np.uint8)
    assert len(packing.pack(levels)) < levels.size / 3

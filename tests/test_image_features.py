import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gpsearch.errors import UserError
from gpsearch.tasks import image_features
from gpsearch.tasks.image_features import digest, read
from tests import captioned

NAMES = [f"{place:02}.jpg" for place in range(len(captioned.SPLITS))]


@pytest.mark.parametrize("name", captioned.WRITERS)
def test_every_format_gives_a_row_an_image(tmp_path, name):
    captioned.WRITERS[name](tmp_path / name, captioned.features())

    found = read(tmp_path / name, NAMES)

    assert found.equal(torch.from_numpy(captioned.features()))


@settings(max_examples=25)
@given(
    st.sampled_from([np.float16, np.float32, np.float64, np.uint8]).flatmap(
        lambda kind: arrays.arrays(
            kind,
            arrays.array_shapes(min_dims=2, max_dims=2, max_side=6),
            elements=st.integers(0, 9).map(kind),
        ).filter(np.any)
    )
)
def test_numpys_own_forms_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "f.npy"
    np.save(path, rows)

    found = read(path, [str(place) for place in range(len(rows))])

    assert found.dtype == (torch.float16 if rows.dtype == np.float16 else torch.float32)
    assert found.tolist() == rows.tolist()


@pytest.mark.parametrize(("name", "by_row"), [("f.npy", True), ("f.mat", False)])
def test_a_square_is_read_as_its_format_has_it(tmp_path, name, by_row):
    rows = np.arange(9, dtype=np.float32).reshape(3, 3)
    writer = {"f.npy": np.save, "f.mat": captioned.WRITERS["vgg_feats.mat"]}[name]
    writer(tmp_path / name, rows)

    assert read(tmp_path / name, ["a", "b", "c"]).equal(torch.from_numpy(rows))


def test_a_transposed_matrix_is_turned(tmp_path):
    np.save(tmp_path / "f.npy", captioned.features().T)
    assert read(tmp_path / "f.npy", NAMES).equal(torch.from_numpy(captioned.features()))


def _spoilt(row, value):
    rows = captioned.features().astype(float)
    rows[row, 2] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (captioned.features()[:-1], "a matrix of 35 x 7 for 36 images"),
        (captioned.features()[None], "holds 1 x 36 x 7 of float32, not a matrix"),
        (_spoilt(4, np.nan), "1 of 36 images hold NaN or infinity, such as row 4, 04.jpg"),
        (_spoilt(9, np.inf), "such as row 9, 09.jpg"),
        (_spoilt(9, 1e300), "such as row 9, 09.jpg"),
        (1e-300 * captioned.features().astype(float), "all features are 0"),
        (0 * captioned.features(), "all features are 0, which tell nothing; compute them again"),
        (np.array([["a"]]), "not a matrix of numbers"),
    ],
)
def test_faults_are_named(tmp_path, rows, message):
    np.save(tmp_path / "f.npy", rows)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "f.npy", NAMES)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["f.mat", "f.npy", "f.npz", "f.h5"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no such file")
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        read(tmp_path / name, NAMES)


def test_of_several_arrays_one_has_to_be_called_feats(tmp_path):
    rows = captioned.features()
    np.savez(tmp_path / "good.npz", feats=rows, ids=np.arange(36))
    np.savez(tmp_path / "bad.npz", vgg=rows, resnet=rows)
    np.savez(tmp_path / "one.npz", vgg=rows)

    assert len(read(tmp_path / "good.npz", NAMES)) == len(read(tmp_path / "one.npz", NAMES)) == 36
    with pytest.raises(UserError, match=r"holds vgg, resnet; .* called 'feats'"):
        read(tmp_path / "bad.npz", NAMES)


def test_a_digest_tells_features_apart_but_not_their_files(tmp_path):
    told = set()
    for name, write in captioned.WRITERS.items():
        write(tmp_path / name, captioned.features())
        told.add(digest(read(tmp_path / name, NAMES)))
    for kind in (np.float16, np.float64, np.uint8):
        np.save(tmp_path / "f.npy", captioned.features().astype(kind))
        told.add(digest(read(tmp_path / "f.npy", NAMES)))

    assert len(told) == 1
    assert digest(torch.from_numpy(captioned.features()[::-1].copy())) not in told


def test_a_digest_is_that_of_all_rows_however_many_are_taken_at_once(monkeypatch):
    rows = torch.from_numpy(captioned.features())
    whole = digest(rows)
    monkeypatch.setattr(image_features, "ROWS_AT_ONCE", 5)
    assert digest(rows) == whole
    assert digest(rows[:35]) != whole

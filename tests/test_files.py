import os

import pytest

from gpsearch.files import write_atomically, write_text


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "two")

    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_content_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half of the ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)

    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]

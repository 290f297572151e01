import errno
import fcntl
import json
import math
import os
import subprocess
import tomllib

import pytest
import torch

from gpsearch.errors import UserError
from gpsearch.files import (
    locked,
    make_folder,
    read_json,
    read_toml,
    toml_literal,
    write_atomically,
    write_json,
    write_pickled,
    write_text,
)


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one")
    write_text(path, "two")

    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_json_has_no_number_for_what_is_none(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "a.json"
    write_json(path, {"latency_s": 0.5, "bleu": math.nan, "limits": (math.inf, 2, "nan")})

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"latency_s": 0.5, "bleu": None, "limits": [None, 2, "nan"]}


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


def test_a_file_that_cannot_be_written_is_named_as_the_user_does(tmp_path):
    def fail(temporary):
        temporary.open("rb")  # which is not there, as in a folder that cannot be written

    def full(temporary):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does, without a name

    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '.*/a\.txt'$"):
        write_atomically(tmp_path / "a.txt", fail)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/a\.txt'$"):
        write_atomically(tmp_path / "a.txt", full)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []

    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(UserError, match=r"file.*: cannot be written \(.+\)"):
            make_folder(folder)
    absent = locked(tmp_path / "none")
    with pytest.raises(UserError, match=r"none: cannot be written \(.+\)"), absent:
        pass


def test_a_toml_file_may_begin_as_some_editors_begin_it(tmp_path):
    (tmp_path / "a.toml").write_bytes("key = 1\n".encode("utf-8-sig"))
    assert read_toml(tmp_path / "a.toml") == {"key": 1}


def test_a_folder_is_locked_once_and_again_when_it_is_free(tmp_path):
    with locked(tmp_path):
        make_folder(tmp_path)  # which is no way in
        with pytest.raises(UserError, match="another gpsearch works there"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", '{"b": 2}', b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"a\.json: damaged \(.+\); restore it from a backup$"):
        read_json(path, "a")

    write_text(path, '{"a": 1}')
    assert read_json(path, "a") == {"a": 1}


@pytest.mark.parametrize(
    "value",
    ["plain", 'a "quote" \\', "\x00\x1f\x7f\n", "data😀", 3, 0.1, 1e300, -2, True, ["a", 1]],
)
def test_what_is_written_as_toml_comes_back(value):
    assert tomllib.loads(f"value = {toml_literal(value)}")["value"] == value


def test_what_no_file_can_hold_is_refused():
    with pytest.raises(UserError, match="no text that a file can hold"):
        toml_literal("\udcff")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False
    ).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        with pytest.raises(OSError, match="No space left"):
            write_pickled(disk / "model.pt", torch.zeros(1 << 16))
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_whose_system_has_no_locks_is_named(tmp_path, monkeypatch):
    def none(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(UserError, match=r"cannot be locked \(No locks available\)"),
        locked(tmp_path),
    ):
        pass

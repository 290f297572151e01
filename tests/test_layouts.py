from __future__ import annotations

from pathlib import Path

import pytest

from gpsearch.errors import UserError
from gpsearch.tasks import layouts
from gpsearch.tasks.layouts import plain_text


def manifest(folder: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "manifest.csv").write_bytes(data)
    return folder


def trouble(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        layouts.read(folder)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rubout g m e f three nine", "RUBOUT G M E F THREE NINE"),
        ("It\u2019s  half-past ten, isn't it?", "IT'S HALF PAST TEN ISN'T IT"),
        ("  Gr\u00fc\u00dfe\taus K\u00f6ln! ", "GR\u00dcSSE AUS K\u00d6LN"),
        ("cafe\u0301", "CAF\u00c9"),
        (" ... ", ""),
    ],
)
def test_text_is_made_plain(text: str, expected: str) -> None:
    assert plain_text(text) == expected


def test_a_manifest_needs_only_path_and_text(tmp_path: Path) -> None:
    (one,) = layouts.read(manifest(tmp_path, "path,text\nsub/a.wav,hello\n"))
    assert one.path == tmp_path / "sub" / "a.wav"
    assert (one.id, one.text, one.split, one.speaker) == ("sub/a.wav", "HELLO", None, None)
    assert one.place == "manifest.csv line 2"


def test_a_manifest_may_have_more_columns_in_any_order_and_a_byte_order_mark(
    tmp_path: Path,
) -> None:
    rows = (
        '\ufeffSpeaker, Text ,note,split,path\r\nann,"yes, no",x,test,a.wav\r\nbob,go,,,/b.wav\r\n'
    )
    first, second = layouts.read(manifest(tmp_path, rows) / "manifest.csv")
    assert (first.text, first.split, first.speaker) == ("YES NO", "test", "ann")
    assert (second.path, second.split) == (Path("/b.wav"), None)


def test_every_bad_line_of_a_manifest_is_named_at_once(tmp_path: Path) -> None:
    rows = """path,text,split
a.wav,one,train
b.wav,two,valid
./a.wav,three,dev
,four,test
c.wav,five, six,test
d.wav
"""
    assert trouble(manifest(tmp_path, rows)).splitlines() == [
        "manifest.csv has lines that cannot be used:",
        "  line 3: split 'valid' is none of train, dev, test (or empty)",
        "  line 4: a.wav stands in line 2 too",
        "  line 5: no path",
        "  line 6: 4 fields, 3 columns (quote texts with commas)",
        "  line 7: 1 fields, 3 columns (quote texts with commas)",
    ]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    lines = trouble(manifest(tmp_path, "path,text\n" + "a.wav,one\n" * 31)).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  ... and 10 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: needs the columns path and text once each"),
        ("file,text\na.wav,one\n", "found file,text"),
        ("path,text,text\na.wav,one,two\n", "once each"),
        (b"path,text\na.wav,one\nb.wav,caf\xe9\n", "line 3: not in UTF-8; save it as UTF-8"),
        ('path,text\na.wav,"one\nb.wav,two\n', "line 3: unexpected end of data; mend its quotes"),
    ],
)
def test_an_unreadable_manifest_is_one_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    line = trouble(manifest(tmp_path, content))
    assert message in line
    assert "\n" not in line


def test_a_folder_without_an_index_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has neither manifest"):
        layouts.read(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        layouts.read(tmp_path / "nowhere")


def test_an4_is_read_from_its_folder_and_the_one_above(tmp_path: Path) -> None:
    etc = tmp_path / "an4" / "etc"
    etc.mkdir(parents=True)
    (etc / "an4_train.fileids").write_text("an4_clstk/fash/an251-fash-b\nan4_clstk/fash/x\n")
    (etc / "an4_train.transcription").write_text("<s> YES </s> (an251-fash-b)\n")
    (etc / "an4_test.fileids").write_text("an4test_clstk/fcaw/an406-fcaw-b\n")
    (etc / "an4_test.transcription").write_text("RUBOUT G M (an406-fcaw-b)\n")
    sphere = tmp_path / "an4" / "wav" / "an4_clstk" / "fash" / "an251-fash-b.sph"
    sphere.parent.mkdir(parents=True)
    sphere.touch()

    first, untranscribed, test = layouts.read(tmp_path)
    assert layouts.read(tmp_path / "an4") == [first, untranscribed, test]
    assert (first.id, first.text, first.split) == ("an251-fash-b", "YES", "train")
    assert (first.speaker, first.path) == ("fash", sphere)
    assert (untranscribed.text, untranscribed.path.suffix) == ("", ".wav")
    assert (test.text, test.split, test.speaker) == ("RUBOUT G M", "test", "fcaw")

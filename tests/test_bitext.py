from __future__ import annotations

import runpy
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpsearch.errors import UserError
from gpsearch.tasks import bitext, digest_of
from gpsearch.tasks.bitext import LONGEST, Pair, load, looks_tokenised, split_of

ROOT = Path(__file__).resolve().parent.parent
SHARED = [place / "shared" / "data" for place in (ROOT, ROOT.parent)]
PLAIN = {
    "train.cs": "ano\nne\n", "train.sk": "áno\nnie\n",
    "valid.cs": "dobře\n", "valid.sk": "dobre\n",
    "test.cs": "díky\r\n", "test.sk": "vďaka\n",
}  # fmt: skip


def folder(path: Path, **changes: str | bytes | None) -> Path:
    """Write the files of `PLAIN` with some changed (``train_sk="..."``) or, if None, left out."""
    path.mkdir(exist_ok=True)
    renamed = {name.replace("_", ".", 1): content for name, content in changes.items()}
    for name, content in {**PLAIN, **renamed}.items():
        if content is not None:
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as told:
        load(path)
    return str(told.value).removeprefix(f"{path}/")


def test_a_folder_of_plain_files(tmp_path):
    found = load(folder(tmp_path / "data"))
    assert found.languages == ("cs", "sk")
    assert found.splits["train"] == [Pair("ano", "áno"), Pair("ne", "nie")]
    assert found.splits["test"] == [Pair("díky", "vďaka")]
    [note] = found.notes
    assert note.startswith("translating from cs into sk")


def test_the_folders_name_turns_the_direction(tmp_path):
    found = load(folder(tmp_path / "mine.sk-cs"))
    assert found.languages == ("sk", "cs")
    assert found.splits["dev"] == [Pair("dobre", "dobře")]
    assert load(folder(tmp_path / "cs-sk")).notes == ("translating from cs into sk",)


def test_sides_of_different_length_are_refused(tmp_path):
    told = refusal(folder(tmp_path / "data", train_sk="áno\nnie\nnie\n"))
    assert told.startswith("train.cs has 2 sentences and ")
    assert "train.sk 3: line 3 of the longer one has no translation" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_sk": b"\xe1no\nnie\n"}, "train.sk:1: is no UTF-8 (byte 0xe1)"),
        ({"train_sk": b"ano\nn\xe9e\n"}, "train.sk:2: is no UTF-8 (byte 0xe9)"),
        ({"test_cs": ""}, "test.cs: is empty"),
        ({"test_cs": " \n"}, "test.cs: is empty"),
        ({"valid_cs": "x" * (LONGEST + 1)}, "valid.cs:1: has 5,001 characters"),
        ({"valid_sk": None}, "valid.sk: is missing"),
        ({"train_pl": "tak\nnie\n"}, ": holds train.cs, train.pl, train.sk; it should be a folder"),
        ({"train_sk": "\n\n "}, "train.sk: is empty"),
    ],
)
def test_what_is_broken_is_named_with_its_line(tmp_path, changes, told):
    assert told in refusal(folder(tmp_path / "data", **changes))


def test_what_is_not_there_is_named(tmp_path):
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere")
    assert "holds no train.*" in refusal(tmp_path)


def test_pairs_with_an_empty_side_are_left_out_and_told(tmp_path):
    found = load(folder(tmp_path / "data", train_cs="ano\n\nne\n", train_sk="áno\nnie\nnie\n"))
    assert found.splits["train"] == [Pair("ano", "áno"), Pair("ne", "nie")]
    assert "1 pairs of" in found.notes[-1]
    assert found.notes[-1].endswith("the first in line 2")


def test_a_side_that_nobody_sees_is_empty(tmp_path):
    unseen = "\u200b\ufeff \x01"
    found = load(folder(tmp_path / "d", train_cs=f"ano\n{unseen}\nne\n", train_sk="a\nb\nc\n"))
    assert [pair.source for pair in found.splits["train"]] == ["ano", "ne"]
    assert found.notes[-1].endswith("the first in line 2")


@pytest.mark.parametrize("lost", ["\ufffd", "\u2581", " \ufffd\u2581 \ufffd"])
def test_a_side_of_lost_letters_or_sentencepieces_spaces_is_empty(tmp_path, lost):
    found = load(folder(tmp_path / "d", train_cs=f"ano\n{lost}\nne\n", train_sk="a\nb\nc\n"))
    assert [pair.source for pair in found.splits["train"]] == ["ano", "ne"]


def test_letters_are_read_in_their_composed_form(tmp_path):
    found = load(folder(tmp_path / "data", train_sk="a\u0301no\nnie\n"))
    assert found.splits["train"][0] == Pair("ano", "\u00e1no")


@pytest.mark.parametrize("side", ["cs", "sk"])
def test_text_in_pieces_of_bpe_is_refused_with_the_mend(tmp_path, side):
    told = refusal(folder(tmp_path / "data", **{f"train_{side}": "ano\nd@@ ob@@ ře\n"}))
    assert told == (
        f"train.{side}:2: has words cut into BPE's pieces, as 1 of 2 lines have; join them, for "
        "instance with `sed -E 's/@@( |$)//g'`"
    )
    assert "cut into BPE" in refusal(folder(tmp_path / "data", **{f"train_{side}": "an@@\nne\n"}))


def test_a_line_that_speaks_of_pieces_is_none(tmp_path):
    text = "ano\n" * 99 + "the mark @@ joins\n"
    found = load(folder(tmp_path / "data", train_cs=text, train_sk=text))
    assert found.splits["train"][-1].source == "the mark @@ joins"


def test_characters_that_only_look_like_line_ends_split_no_sentence(tmp_path):
    found = load(folder(tmp_path / "data", train_cs="a\u2028b\nc\x85d\n"))
    assert [pair.source for pair in found.splits["train"]] == ["a\u2028b", "c\x85d"]


# IWSLT

MTEVAL = """<?xml version="1.0" encoding="UTF-8"?>
<mteval><srcset setid="s"><doc docid="1">
<title>Not a sentence</title>
{}
</doc></srcset></mteval>
"""


def iwslt(path: Path) -> Path:
    path.mkdir()
    for language, words in {"de": ("Tee & Bier", "Ja &amp; nein"), "en": ("Tea", "Yes")}.items():
        (path / f"train.tags.de-en.{language}").write_text(
            f"<url>http://x</url>\n{words[0]}\n<title>T</title>\n{words[1]}\n"
        )
        for name in ("dev2010", "tst2010", "tst2011"):
            segments = "\n".join(
                f'<seg id="{i}"> {word} </seg>' for i, word in enumerate(words, start=1)
            )
            (path / f"IWSLT14.TED.{name}.de-en.{language}.xml").write_text(MTEVAL.format(segments))
    return path


def test_iwslts_folder(tmp_path):
    found = load(iwslt(tmp_path / "de-en"))
    assert found.languages == ("de", "en")
    assert found.splits["train"][0] == Pair("Tee & Bier", "Tea")
    assert found.splits["dev"] == [Pair("Tee & Bier", "Tea"), Pair("Ja & nein", "Yes")]
    assert len(found.splits["test"]) == 4
    assert load(iwslt(tmp_path / "en-de")).splits["dev"][0] == Pair("Tea", "Tee & Bier")


def test_iwslt_takes_its_training_side_from_plain_files_too(tmp_path):
    path = iwslt(tmp_path / "de-en")
    for language in ("de", "en"):
        (path / f"train.tags.de-en.{language}").rename(path / f"train.{language}")
        (path / f"train.{language}").write_text("eins\nzwei\n")
    assert len(load(path).splits["train"]) == 2
    (path / "train.de").unlink()
    assert "holds neither train.tags.de-en.de nor train.de" in refusal(path)


def test_a_missing_segment_is_refused(tmp_path):
    path = iwslt(tmp_path / "de-en")
    broken = path / "IWSLT14.TED.dev2010.de-en.en.xml"
    broken.write_text(broken.read_text().replace('<seg id="2"> Yes </seg>', ""))
    assert "has 2 sentences and" in refusal(path)


@pytest.mark.data
def test_the_original_development_and_test_sets_of_iwslt_14(tmp_path):
    import tarfile

    archive = next((p for d in SHARED if (p := d / "iwslt14_de_en.tar.gz").exists()), None)
    if archive is None:
        pytest.skip("needs shared/data/iwslt14_de_en.tar.gz beside the checkout")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    path = tmp_path / "iwslt14_de_en" / "xml"
    for language in ("de", "en"):
        tokens = path.parent / "tok" / f"train_partial.{language}"
        (path / f"train.{language}").write_bytes(tokens.read_bytes())
    found = load(path)
    # One of the 42,423 pairs of the part lacks a side.
    assert {split: len(pairs) for split, pairs in found.splits.items()} == {
        "train": 42_422, "dev": 887 + 1165, "test": 1565 + 1433 + 1700,
    }  # fmt: skip
    assert looks_tokenised(p.target for p in found.splits["train"])
    # So is the original's TEDX.dev2012, more than half of dev, but none of the test sets.
    assert looks_tokenised(p.target for p in found.splits["dev"])
    assert not looks_tokenised(p.target for p in found.splits["test"])


# Tables


def table(path: Path, pairs: int = 400) -> Path:
    rows = [f"word {i}\tWort {i}\tCC-BY 2.0 (France)" for i in range(pairs)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_table_is_read_as_anki_has_it(tmp_path):
    found = load(table(tmp_path / "deu.txt"))
    assert Pair("Wort 7", "word 7") in [pair for pairs in found.splits.values() for pair in pairs]
    assert sum(map(len, found.splits.values())) == 400
    with zipfile.ZipFile(tmp_path / "deu-eng.zip", "w") as archive:
        archive.write(tmp_path / "deu.txt", "deu.txt")
        archive.writestr("_about.txt", "about")
    assert load(tmp_path / "deu-eng.zip").splits == found.splits


def test_tatoebas_own_export_is_read_without_its_ids(tmp_path):
    path = tmp_path / "export.tsv"
    rows = [f"{i}\tword {i}\t{1000 + i}\tWort {i}" for i in range(400)]
    path.write_text("\ufeff" + "\n".join(rows) + "\n")
    found = load(path)
    assert found.languages == ("fourth column", "second column")
    assert found.notes == (
        f"translating the fourth column of {path} into the second column, without the ids of "
        "tatoeba.org's export",
    )
    assert found.splits == load(table(tmp_path / "deu.txt")).splits
    path.write_text("\n".join([*rows, "400\tword\t1400\t"]))  # one lacks its sentence
    assert "left out for an empty side, the first in line 401" in load(path).notes[1]
    path.write_text("\n".join([*rows, "400\tword\t1400"]))
    assert f"{path}:401: has 3 of 4 columns; a line should be ID, tab, TRANSL" in refusal(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{}\tword {}\tWort {}", "has only numbers in its first column; "),
        ("word {}\t{}\tWort {}", "has only numbers in its second column; "),
        ("{}\t{}\t{}\tWort {}", "has only numbers in its second column; "),
    ],
)
def test_a_column_of_numbers_holds_no_sentences(tmp_path, line, told):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(line.format(i, i, i, i) + "\n" for i in range(400)))
    assert refusal(path) == (
        f"{path}: {told}keep the two columns of sentences, for instance with `cut -f2,3`"
    )


def test_no_sentence_that_is_judged_by_was_learnt(tmp_path):
    path = table(tmp_path / "pairs.tsv")
    whole = load(path).splits
    [tested, developed] = [whole[split][0].source for split in ("test", "dev")]
    into = {split: whole[split][1].target for split in whole}
    added = [
        (into["train"], f"{tested.upper()}!"), (into["train"], developed), (into["dev"], tested)
    ]  # fmt: skip
    path.write_text(path.read_text() + "".join(f"{t}.\t{s}\n" for t, s in added))
    found = load(path)
    assert found.splits == whole
    assert found.notes[-1] == (
        f"2 training and 1 development pairs of {path} left out: the same sentences, case and "
        "punctuation aside, are in development or test"
    )


def test_a_table_whose_sentences_are_all_alike_is_too_small(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"word {i}\tWort\n" for i in range(400)))
    assert "is too small, no sentence falls into the train split" in refusal(path)


@given(st.text(), st.sampled_from([str.upper, str.title, lambda text: f"  {text} ?!"]))
def test_case_and_punctuation_do_not_change_a_translations_split(text, change):
    if change(text).casefold().strip(" ?!") == text.casefold().strip(" ?!"):
        assert split_of(change(text)) == split_of(text)


def test_a_broken_table_is_named_with_its_line(tmp_path):
    path = table(tmp_path / "pairs.tsv")
    path.write_text(path.read_text() + "no tab here\n")
    assert f"{path}:401: has 1 of 2 columns; a line should be TRANSLATION, tab, SE" in refusal(path)
    assert "is too small" in refusal(table(path, pairs=3))
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    assert "is a damaged .zip" in refusal(tmp_path / "broken.zip")


def test_the_packages_splits_stay_those_that_models_were_trained_with():
    assert digest_of(load().splits.items()) == "1f6098ae06b08a08"


def test_the_packages_pairs_are_whole_and_no_test_translation_was_learnt():
    found = load()
    sizes = {split: len(pairs) for split, pairs in found.splits.items()}
    assert sizes == {"train": 12_272, "dev": 668, "test": 704}
    learnt = {p.target.casefold().strip(" .!?") for p in found.splits["train"]}
    for split in ("dev", "test"):
        assert not learnt & {p.target.casefold().strip(" .!?") for p in found.splits[split]}
    assert (ROOT / "gpsearch" / "tasks" / "data" / bitext.TATOEBA).stat().st_size < 2_000_000
    assert not looks_tokenised(p.target for p in found.splits["dev"])


@pytest.mark.data
def test_the_packages_pairs_are_made_from_the_original_byte_for_byte(tmp_path):
    archive = next(
        (p for d in SHARED if (p := d / "tatoeba_deu_eng" / "deu-eng.zip").exists()), None
    )
    if archive is None:
        pytest.skip("needs shared/data/tatoeba_deu_eng/deu-eng.zip beside the checkout")
    script = runpy.run_path(str(ROOT / "scripts" / "make_tatoeba.py"))
    script["main"](archive, tmp_path)
    own = ROOT / "gpsearch" / "tasks" / "data" / bitext.TATOEBA
    assert (tmp_path / bitext.TATOEBA).read_bytes() == own.read_bytes()

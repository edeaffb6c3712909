"""What all rooms share: the check of options, the door for paths, the reader of metadata, digests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt_dance.storage import options
from pt_dance.storage.digests import add_texts, file_digest, frame_id, new_digest, texts_digest
from pt_dance.storage.folders import write_json
from pt_dance.storage.meta import TEXT, TEXT_OR_NONE, check_sizes, list_entry, read_meta, whole_entry


@pytest.mark.parametrize("kind", [int, np.int8, np.int32, np.int64, np.uint16])
def test_whole_numbers_of_numpy_are_whole_numbers(kind):
    value = options.whole("depth", kind(3))
    assert value == 3 and type(value) is int


@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64, int, np.int64])
def test_numbers_of_numpy_are_numbers(kind):
    value = options.number("rate", kind(2), above=0)
    assert value == 2.0 and type(value) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, "1", None, 0, -1, np.float32(1), np.array([1])])
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^depth=.* must be a whole number of at least 1$"):
        options.whole("depth", value)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "1", None, 0, 1, np.float64(1)])
def test_what_is_no_number_of_the_range_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^share=.* must be a number above 0 and below 1$"):
        options.number("share", value, above=0, below=1)


def test_none_is_an_option_only_where_it_is_said():
    assert options.whole("k", None, or_none=True) is None and options.number("k", None, or_none=True) is None
    assert options.choice("k", None, ("a",), or_none=True) is None
    with pytest.raises(ValueError, match="of at least 2, or None"):
        options.whole("k", 1, 2, or_none=True)
    with pytest.raises(ValueError, match="k='c' is unknown; choose one of 'a', 'b', None"):
        options.choice("k", "c", ("a", "b"), or_none=True)
    with pytest.raises(ValueError, match="from 0 to 5"):
        options.whole("k", 6, 0, 5)
    for value in ("", 3, None):
        with pytest.raises(ValueError, match="must be the name of a column"):
            options.column("text_field", value)


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..") and not name.startswith("~")
)


@given(st.lists(names, min_size=1, max_size=4), st.booleans())
def test_a_path_is_the_same_wherever_the_process_goes_afterwards(tmp_path_factory, parts, as_path):
    here, there = tmp_path_factory.getbasetemp(), Path("/")
    given_path = os.path.join(*parts)
    before = os.getcwd()
    try:
        os.chdir(here)
        path = options.path_of(Path(given_path) if as_path else given_path)
        assert path == here.joinpath(*parts) and path.is_absolute()
        os.chdir(there)
        assert options.path_of(path) == path == options.path_of(str(path))
    finally:
        os.chdir(before)


@given(st.lists(names, max_size=3))
def test_a_tilde_is_the_home_folder(parts):
    assert options.path_of(os.path.join("~", *parts)) == Path.home().joinpath(*parts)
    assert options.path_of(os.path.join(".", "~", *parts)) == Path.cwd().joinpath("~", *parts)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (None, TypeError, "folder=None must be a path"),
        (3, TypeError, "must be a path"),
        (b"x", TypeError, "must be a path"),
        ("", ValueError, "is empty"),
        ("a\0b", ValueError, "null character"),
        ("~nobody of that name/x", ValueError, "home folder that is not known"),
    ],
)
def test_what_is_no_path_is_refused(value, error, says):
    with pytest.raises(error, match=says):
        options.path_of(value, "folder")


def test_one_string_is_not_a_list():
    for value in ("42", b"42", 42, None):
        with pytest.raises(TypeError, match=r"Corpus.texts takes a list of docnos, not"):
            options.list_of("docnos", value, "Corpus.texts")
    for values in (["4", "2"], ("4", "2"), np.array(["4", "2"]), pd.Series(["4", "2"]), iter(["4", "2"])):
        assert options.list_of("docnos", values, "Corpus.texts") == ["4", "2"]


ENTRIES = {"count": whole_entry(1), "names": list_entry(str, "a list of texts", least=1), "a": TEXT, "b": TEXT_OR_NONE}
GOOD = {"type": "thing", "format": "x", "count": 2, "names": ["n"], "a": "", "b": None}


def read(folder):
    return read_meta(folder, "thing", type="thing", formats=("x",), entries=ENTRIES, advice="make one")


def test_metadata_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "pt_meta.json", GOOD)
    assert read(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "corpus"}, "is no thing: its pt_meta.json says type 'corpus', format 'x'"),
        ({"format": ["x"]}, "is no thing"),
        ({"count": 0}, "'count' is 0 where a whole number of at least 1 belongs"),
        ({"count": True}, "'count' is True where a whole number"),
        ({"count": 2.0}, "'count' is 2.0 where a whole number"),
        ({"names": []}, "where a list of texts belongs"),
        ({"names": "n"}, "where a list of texts belongs"),
        ({"a": None}, "'a' is None where a text belongs"),
        ({"b": 3}, "'b' is 3 where a text belongs"),
        ({"b": [0] * 5000}, r"\.\.\. where a text belongs"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, change, says):
    write_json(tmp_path / "pt_meta.json", GOOD | change)
    with pytest.raises(ValueError, match=says) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_is_not_there_is_told_from_what_is_damaged(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder, there in (("no", "nothing"), ("file", "a file"), (".", "a folder without pt_meta.json")):
        with pytest.raises(FileNotFoundError, match=rf"there is no thing at .* \({there} is there\): make one"):
            read(tmp_path / folder)
    (tmp_path / "pt_meta.json").write_text("[")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read(tmp_path)


def test_sizes_of_files_are_compared(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    check_sizes(tmp_path, {"file": 5}, "thing", "make it again")
    check_sizes(tmp_path, {"file": None}, "thing", "make it again")
    for sizes, says in (
        ({"file": 6}, "has 5 bytes where 6 belong: the thing is damaged; make it again"),
        ({"other": None}, "is missing: the thing is damaged; make it again"),
        ({"file": "5"}, "the size of 'file' is '5'"),
    ):
        with pytest.raises(ValueError, match=says):
            check_sizes(tmp_path, sizes, "thing", "make it again")


texts = st.lists(st.text(st.characters(exclude_categories=[])), max_size=4)


@given(texts, texts)
def test_digests_of_texts_are_equal_only_if_the_texts_are(first, second):
    assert (texts_digest(*first) == texts_digest(*second)) == (first == second)


def test_digests_do_not_depend_on_how_the_content_came(tmp_path):
    digest = new_digest()
    for text in ("a", "bc"):
        add_texts(digest, [text])
    assert digest.digest() == texts_digest("a", "bc")
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == new_digest(b"abc").hexdigest()
    frame = pd.DataFrame({"qid": ["1", "2"], "label": [1, 2]})
    assert frame_id(frame) == frame_id(frame.copy()) != frame_id(frame[::-1])
    assert frame_id(frame.astype({"qid": "category"})) == frame_id(frame)

"""Corpus: what goes in comes out, in any order, and nothing half-written or damaged passes for a corpus."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pt_dance import Corpus
from pt_dance.corpus.docnos import DocnoRows, check_docno, docno_hashes
from pt_dance.corpus.sorting import SeenNumbers
from pt_dance.storage.digests import short_text_digest

DOCUMENTS = [
    {"docno": "1", "title": "Tides", "text": "The moon pulls the sea."},
    {"docno": "01", "title": "", "text": "Zero one is not one."},
    {"docno": "été-1", "title": None, "text": "Un docno avec des accents."},
    {"docno": "a very long docno, much longer than twenty characters", "title": "Long", "text": ""},
    {"docno": "5", "text": "No title at all."},
]


@pytest.fixture
def corpus(tmp_path):
    return Corpus.build(DOCUMENTS, tmp_path / "corpus", verbose=False)


def test_what_goes_in_comes_out(corpus):
    assert len(corpus) == 5
    assert corpus.fields == ("title", "text")
    assert list(corpus.get_corpus_iter(verbose=False)) == [
        {"docno": "1", "title": "Tides", "text": "Tides The moon pulls the sea."},
        {"docno": "01", "title": "", "text": "Zero one is not one."},
        {"docno": "été-1", "title": "", "text": "Un docno avec des accents."},
        {"docno": DOCUMENTS[3]["docno"], "title": "Long", "text": "Long"},
        {"docno": "5", "title": "", "text": "No title at all."},
    ]
    assert [d["docno"] for d in corpus.get_corpus_iter(verbose=False, start=3)] == [DOCUMENTS[3]["docno"], "5"]
    assert corpus.rows(["5", "nothing", "01", "1", "", 1]).tolist() == [4, -1, 1, 0, -1, -1]
    assert corpus.docno(np.array([4, 0])).tolist() == ["5", "1"]
    assert corpus.texts(["5", "1", "5"]) == ["No title at all.", "Tides The moon pulls the sea.", "No title at all."]
    assert "été-1" in corpus and "ete-1" not in corpus
    with pytest.raises(KeyError, match="'6' is not in the corpus"):
        corpus.texts(["1", "6"])
    with pytest.raises(IndexError, match="row -1"):
        corpus.texts_at(np.array([0, -1]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_documents_in_any_order(tmp_path_factory, data):
    docnos = data.draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=30),
            min_size=1,
            max_size=40,
            unique=True,
        )
    )
    texts = data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=len(docnos), max_size=len(docnos))
    )
    corpus = Corpus.build(
        [{"docno": d, "body": t} for d, t in zip(docnos, texts, strict=True)],
        tmp_path_factory.mktemp("corpora") / "c",
        fields=["body"],
        verbose=False,
    )
    rows = data.draw(st.lists(st.integers(0, len(docnos) - 1)))
    assert corpus.texts_at(rows) == [texts[r] for r in rows]
    assert corpus.docno(rows).tolist() == [docnos[r] for r in rows]
    assert corpus.rows([docnos[r] for r in rows]).tolist() == rows


def test_many_blocks_and_random_rows(tmp_path):
    corpus = Corpus.build(
        ({"docno": f"d{i}", "text": f"text {i} " * (i % 7)} for i in range(5000)),
        tmp_path / "c",
        fields=["text"],
        verbose=False,
    )
    assert len(corpus.dataset.data.column("text").chunks) == 5
    rows = np.random.default_rng(1).integers(0, 5000, 300)
    assert corpus.texts_at(rows) == [f"text {i} " * (i % 7) for i in rows]
    assert (corpus.rows([f"d{i}" for i in rows]) == rows).all()


def test_sources_give_equal_corpora(tmp_path, corpus):
    frame = Corpus.build(pd.DataFrame(DOCUMENTS), tmp_path / "frame", verbose=False)
    again = Corpus.build(corpus, tmp_path / "again", fields=["title", "text"], verbose=False)
    assert frame == corpus and hash(frame) == hash(corpus)
    assert again == corpus
    # Of other fields, a corpus's own text has the title already.
    assert Corpus.build(corpus, tmp_path / "text", fields=["text"], verbose=False).texts(["1"]) == corpus.texts(["1"])
    assert Corpus.build(iter(DOCUMENTS), tmp_path / "iter", verbose=False) == corpus
    swapped = [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]
    assert Corpus.build(swapped, tmp_path / "swapped", verbose=False) != corpus
    assert pickle.loads(pickle.dumps(corpus)) == corpus
    assert pt.Artifact.load(str(corpus.path)) == corpus


def test_real_collection(tmp_path, shared_data):
    with gzip.open(shared_data("cranfield") / "corpus.jsonl.gz", "rt") as lines:
        documents = [json.loads(line) for line in lines]
    corpus = Corpus.build(({"docno": d["_id"], **d} for d in documents), tmp_path / "c", verbose=False)
    assert len(corpus) == 1400
    expected = [" ".join(v for v in (d["title"], d["text"]) if v) for d in documents]
    assert corpus.texts([d["_id"] for d in documents]) == expected


def test_text_loader(corpus):
    frame = pd.DataFrame({"qid": ["q", "q", "r"], "docno": ["5", "1", "5"], "score": [3.0, 2.0, 1.0]}, index=[7, 3, 9])
    before = frame.copy()
    loaded = pt.text.get_text(corpus, "text")(frame)
    assert loaded["text"].tolist() == ["No title at all.", "Tides The moon pulls the sea.", "No title at all."]
    assert list(loaded.index) == [7, 3, 9] and list(loaded.columns) == ["qid", "docno", "score", "text"]
    pd.testing.assert_frame_equal(frame, before)
    everything = pt.text.get_text(corpus)(frame)
    assert everything["title"].tolist() == ["", "Tides", ""]
    empty = pt.text.get_text(corpus)(frame.iloc[:0])
    assert list(empty.columns) == list(everything.columns) and len(empty) == 0
    with pytest.raises(KeyError, match="'x9' is not in the corpus"):
        corpus.text_loader()(pd.DataFrame({"docno": ["x9"]}))
    with pytest.raises(ValueError, match="fields='body' must name fields"):
        corpus.text_loader("body")
    assert str((corpus.text_loader("text") % 3).compile()).startswith("(RankCutoff(3) >> ")
    assert corpus.text_loader("text") == corpus.text_loader(["text"]) != corpus.text_loader()


class TestTextLoaderContract(pt.testing.transformer_test_class(lambda: None)):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def make(cls, tmp_path_factory):
        corpus = Corpus.build(DOCUMENTS, tmp_path_factory.mktemp("contract") / "c", verbose=False)
        cls.transformer = corpus.text_loader()


@pytest.mark.parametrize(
    ("documents", "error", "says"),
    [
        (
            [{"docno": "1", "text": "a"}, {"docno": "2", "text": "b"}, {"docno": "1", "text": "c"}],
            ValueError,
            "docno '1'",
        ),
        ([{"docno": "1", "text": None}], ValueError, "document '1' has None as its 'text'"),
        ([{"docno": "1", "text": math.nan}], ValueError, "document '1' has nan"),
        ([{"docno": "7", "body": "a"}], ValueError, r"document '7' has only \['body', 'docno'\] and no 'text'"),
        ([{"docno": "1", "text": 5}], TypeError, "document '1' has a int"),
        ([{"docno": "1", "text": "a", "title": ["x"]}], TypeError, "document '1' has a list as its 'title'"),
        ([{"docno": 1, "text": "a"}], TypeError, "document number 0 has the docno 1"),
        ([{"text": "a"}], TypeError, "document number 0 has the docno None"),
        ([{"docno": "", "text": "a"}], ValueError, "document number 0 has an empty docno"),
        ([{"docno": "a\nb", "text": "a"}], ValueError, "control characters"),
        ([{"docno": "a\0", "text": "a"}], ValueError, "control characters"),
        ([{"docno": "\ud800", "text": "a"}], ValueError, "surrogates"),
        ([{"docno": "x" * 2000, "text": "a"}], ValueError, "2,000 characters"),
        ([{"docno": "1", "text": "\ud800"}], ValueError, "document '1' holds a lone surrogate"),
        ([{"docno": "1", "text": "a"}, "b"], TypeError, "document number 1 is a str"),
        ([], ValueError, "no documents"),
        ("corpus.jsonl", TypeError, "not as a str"),
        ({"docno": "1", "text": "a"}, TypeError, "not as a dict"),
        (7, TypeError, "not as a int"),
    ],
)
def test_bad_documents(tmp_path, documents, error, says):
    with pytest.raises(error, match=says):
        Corpus.build(documents, tmp_path / "c", verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_bad_fields_and_paths(tmp_path, corpus):
    for fields, says in (
        ([], "at least one"),
        (["docno"], "cannot be one"),
        (["a", "a"], "each once"),
        ([1], "at least one"),
    ):
        with pytest.raises(ValueError, match=says):
            Corpus.build(DOCUMENTS, tmp_path / "c", fields=fields, verbose=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "important.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="exists and is no corpus"):
            Corpus.build(DOCUMENTS, foreign, overwrite=overwrite, verbose=False)
    assert (foreign / "important.txt").read_text() == "keep me"
    with pytest.raises(FileNotFoundError, match="no corpus at"):
        Corpus(foreign)
    with pytest.raises(FileNotFoundError, match="no corpus at"):
        Corpus(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pt_meta.json", b"{"),
        ("pt_meta.json", b"\xff\xfe"),
        ("pt_meta.json", b"[" * 100_000),
        ("pt_meta.json", b"[]"),
        ("pt_meta.json", b'{"type": "dense_index", "format": "flex"}'),
        (
            "pt_meta.json",
            b'{"type": "corpus", "format": "arrow", "doc_count": "5", "fields": ["text"], "fingerprint": "x"}',
        ),
        ("pt_meta.json", b'{"type": "corpus", "format": "arrow", "doc_count": 5, "fields": 3, "fingerprint": "x"}'),
        ("corpus.arrow", b"cut"),
        ("corpus.arrow", None),
        ("docnos.hash", b"cut"),
    ],
)
def test_damaged_corpus(corpus, name, content):
    if content is None:
        raw = (corpus.path / name).read_bytes()
        content = b"\0" * len(raw)
    (corpus.path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Corpus(corpus.path)


def changed(position: int, **values) -> list[dict]:
    return [dict(d, **values) if i == position else d for i, d in enumerate(DOCUMENTS)]


def test_the_same_documents_again_are_not_written_again(corpus):
    before = (corpus.path / "corpus.arrow").stat()
    for source in (DOCUMENTS, iter(DOCUMENTS), pd.DataFrame(DOCUMENTS), corpus):
        assert Corpus.build(source, corpus.path, verbose=False) == corpus
    after = (corpus.path / "corpus.arrow").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("documents", "options", "says"),
    [
        (changed(2, text="Other."), {}, "its document number 2, docno 'été-1', is another one"),
        (changed(0, docno="1 "), {}, "document number 0, docno '1'"),
        (changed(3, title="Short"), {}, "document number 3"),
        (DOCUMENTS[::-1], {}, "document number 0"),
        (DOCUMENTS[:-1], {}, "it has 5 documents and 4 were given"),
        ([*DOCUMENTS, {"docno": "6", "text": ""}], {}, "it has 5 documents and more were given"),
        (DOCUMENTS, {"fields": ["text"]}, "its fields are"),
        (DOCUMENTS, {"separator": "\n"}, "joined by ' '"),
    ],
)
def test_other_documents_are_refused_unless_they_are_to_replace(corpus, documents, options, says):
    with pytest.raises(FileExistsError, match=says) as caught:
        Corpus.build(documents, corpus.path, verbose=False, **options)
    assert "overwrite=True" in str(caught.value) and "\n" not in str(caught.value).replace("\\n", "")
    assert Corpus(corpus.path) == corpus
    other = Corpus.build(documents, corpus.path, overwrite=True, verbose=False, **options)
    assert other == Corpus(corpus.path) != corpus and len(other) == len(documents)
    assert corpus.texts(["1"]) == ["Tides The moon pulls the sea."]  # whoever has the old one open reads on
    assert [p.name for p in corpus.path.parent.iterdir()] == ["corpus"]


def test_a_failing_source_does_not_replace_anything(corpus):
    with pytest.raises(ValueError, match=r"has only .* and no 'text'"):
        Corpus.build([{"docno": "1"}], corpus.path, overwrite=True, verbose=False)
    assert Corpus(corpus.path) == corpus and [p.name for p in corpus.path.parent.iterdir()] == ["corpus"]


def test_a_damaged_corpus_can_be_replaced(corpus):
    (corpus.path / "corpus.arrow").write_bytes(b"cut")
    with pytest.raises(ValueError, match="overwrite=True"):
        Corpus.build(DOCUMENTS, corpus.path, verbose=False)
    assert Corpus.build(DOCUMENTS, corpus.path, overwrite=True, verbose=False) == corpus


def test_threads_that_want_the_same_corpus_wait_for_it(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def slow():
        started.set()
        assert go_on.wait(30)
        yield from DOCUMENTS

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(Corpus.build, slow(), tmp_path / "c", verbose=False)
        assert started.wait(30)
        others = [pool.submit(Corpus.build, DOCUMENTS, tmp_path / "c", verbose=False) for _ in range(2)]
        go_on.set()
        made = {id(corpus.result()): corpus.result() for corpus in (first, *others)}
    assert len(made) == 3 and len(set(made.values())) == 1


def test_one_string_is_not_a_list(corpus):
    for call in (corpus.texts, corpus.known_rows, corpus.rows, corpus.docno, corpus.texts_at):
        for value in ("5", b"5"):
            with pytest.raises(TypeError, match="not"):
                call(value)
    with pytest.raises(TypeError, match="rows are whole numbers"):
        corpus.texts_at(["5"])


def test_a_corpus_is_found_after_the_process_went_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    near, home = Corpus.build(DOCUMENTS, "c", verbose=False), Corpus.build(DOCUMENTS, "~/c", verbose=False)
    passages = near.to_passages("p", verbose=False)
    monkeypatch.chdir("/")
    assert near.path == tmp_path / "here" / "c" and home.path == tmp_path / "home" / "c"
    for corpus in (near, home, passages):
        assert pickle.loads(pickle.dumps(corpus)) == corpus and type(corpus)(corpus.path) == corpus
    assert Corpus("~/c") == near


def test_documents_from_and_to_a_place(corpus):
    docnos = [d["docno"] for d in DOCUMENTS]
    for start, count in ((0, None), (2, None), (1, 2), (3, 9), (0, 0), (5, 1), (np.int64(1), np.int64(3))):
        found = [d["docno"] for d in corpus.get_corpus_iter(verbose=False, start=start, count=count)]
        assert found == docnos[start:][:count]
    with pytest.raises(ValueError, match="count=-1"):
        next(corpus.get_corpus_iter(verbose=False, count=-1))


def test_a_failing_source_leaves_nothing(tmp_path):
    def documents():
        yield {"docno": "1", "text": "a"}
        raise OSError("the network is down")

    with pytest.raises(OSError, match="network is down"):
        Corpus.build(documents(), tmp_path / "c", verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from pt_dance import Corpus
        import datasets
        def build(count, name):
            Corpus.build(({"docno": f"d{i}", "text": "x" * 4000} for i in range(count)), sys.argv[1] + name,
                         fields=["text"], verbose=False)
            # Of this program alone: what getrusage says begins with the one that started it.
            peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
            return int(peak.split()[1]) // 1024
        small = build(2000, "/small")
        print(small, build(60000, "/large"))
        """
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    small, large = map(int, out.split())
    # 60,000 documents are 240 MB of text; the docnos' hashes take 16 bytes each.
    assert large - small < 60


def test_duplicate_docnos_in_blocks():
    rng = np.random.default_rng(0)
    for count, size in ((1, 1), (50, 7), (3000, 64)):
        docnos = [f"d{i}" for i in rng.permutation(count)]
        seen = SeenNumbers()
        for start in range(0, count, size):
            assert seen.add(docno_hashes(docnos[start : start + size])) == []
        assert seen.add(docno_hashes(["new", docnos[0], "newer"])) == [1]
        assert seen.add(docno_hashes(["x", "y", "x"])) == [2]
        assert len(seen.all()) == count + 6


def test_equal_hashes_of_different_docnos_are_told_apart():
    docnos = ["a", "b", "c", "a2"]
    rows = DocnoRows(
        np.array([short_text_digest("a")] * 3 + [2**64 - 1], dtype=np.uint64),
        np.array([1, 2, 0, 3], dtype=np.uint32),
        lambda rows: [docnos[r] for r in rows],
    )
    assert rows(["a", "zzz"]).tolist() == [0, -1]


def test_a_corpus_tells_docnos_of_equal_hashes_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("pt_dance.corpus.docnos.short_text_digest", len)
    corpus = Corpus.build([{"docno": docno, "text": "x"} for docno in ("a", "b", "cc", "d")], tmp_path / "c",
                          fields=["text"], verbose=False)  # fmt: skip
    assert corpus.rows(["d", "a", "e"]).tolist() == [3, 0, -1]
    with pytest.raises(ValueError, match="docno 'b' occurs more than once"):
        Corpus.build([{"docno": docno, "text": "x"} for docno in ("a", "b", "cc", "b")], tmp_path / "twice",
                     fields=["text"], verbose=False)  # fmt: skip
    assert not (tmp_path / "twice").exists()


def test_docnos_may_be_any_string_class():
    assert type(check_docno(np.str_("x"), 0)) is str

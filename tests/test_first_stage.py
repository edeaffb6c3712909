"""BM25 in one line: quiet, complete, used again for the same documents and refused for others."""

from __future__ import annotations

import importlib.util
import pickle

import pandas as pd
import pytest

from pt_dance import Corpus, bm25
from pt_dance.corpus import first_stage

DOCUMENTS = [{"docno": f"d{n}", "text": f"common words and number{n}"} for n in range(40)]
TOPICS = pd.DataFrame({"qid": ["a", "b"], "query": ["common number7?", "Number23: (common)"], "mark": [1, 2]})


@pytest.fixture(params=["pisa", "terrier"])
def backend(request):
    """Each of the engines that there is."""
    if request.param == "terrier":
        request.getfixturevalue("terrier")
    else:
        pytest.importorskip("pyterrier_pisa", reason="pyterrier_pisa is not installed (it has wheels for Linux only)")
    return request.param


@pytest.fixture
def corpus(tmp_path):
    return Corpus.build([*DOCUMENTS, {"docno": "empty", "text": ""}], tmp_path / "corpus", verbose=False)


def best(pipeline) -> list[str]:
    return (pipeline % 1)(TOPICS).sort_values("qid")["docno"].tolist()


def test_it_retrieves_without_a_word(corpus, backend, tmp_path, capfd):
    pipeline = bm25(corpus, tmp_path / "index", backend=backend, verbose=False)
    results = (pipeline % 5).compile()(TOPICS)
    assert best(pipeline) == ["d7", "d23"]
    assert results.groupby("qid").size().tolist() == [5, 5]
    assert results["query"].tolist() == results["qid"].map(TOPICS.set_index("qid")["query"]).tolist()
    assert set(results["mark"]) == {1, 2}
    assert capfd.readouterr() == ("", "")


def test_options_reach_the_engine(corpus, backend, tmp_path):
    scores = [
        bm25(corpus, tmp_path / "index", backend=backend, num_results=3, verbose=False, **options)(TOPICS)["score"]
        for options in ({}, {"k1": 0.9, "b": 0.4}, {"k1": 2.0})
    ]
    assert [len(s) for s in scores] == [6, 6, 6]
    assert scores[0].tolist() == scores[1].tolist() != scores[2].tolist()


def test_it_is_used_again_for_the_same_documents_only(corpus, backend, tmp_path):
    path = tmp_path / "index"
    bm25(corpus, path, backend=backend, verbose=False)
    before = {p: p.stat().st_ino for p in path.rglob("*")}
    assert best(bm25(corpus, path, verbose=False)) == best(bm25(corpus, str(path), backend=backend, verbose=False))
    assert {p: p.stat().st_ino for p in path.rglob("*")} == before
    other = Corpus.build([*DOCUMENTS[::-1], {"docno": "x", "text": "number7"}], tmp_path / "other", verbose=False)
    with pytest.raises(FileExistsError, match=r"of 41 other documents: overwrite=True replaces it"):
        bm25(other, path, verbose=False)
    assert best(bm25(other, path, backend=backend, overwrite=True, verbose=False)) == ["x", "d23"]
    with pytest.raises(FileExistsError, match="other documents"):
        bm25(corpus, path, verbose=False)
    others = {"pisa": "terrier", "terrier": "pisa"}
    with pytest.raises(FileExistsError, match=f"an index by {backend} of 41 documents"):
        bm25(other, path, backend=others[backend], verbose=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "index", "other"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_index_that_lacks_documents_is_refused(corpus, backend, tmp_path, monkeypatch):
    def broken(self, verbose=True):
        yield from DOCUMENTS[:10]
        raise OSError("the disk of the corpus is gone")

    monkeypatch.setattr(Corpus, "get_corpus_iter", broken)
    with pytest.raises((RuntimeError, OSError), match=r"indexed 10 of 41 documents|is gone"):
        bm25(corpus, tmp_path / "index", backend=backend, verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_docnos_that_an_engine_would_cut(tmp_path):
    docnos = ["two words", "w" * 60, "é" * 40]
    documents = [{"docno": docno, "text": f"alpha number{n}"} for n, docno in enumerate(docnos)]
    corpus = Corpus.build(documents, tmp_path / "corpus", verbose=False)
    if importlib.util.find_spec("pyterrier_pisa"):
        with pytest.raises(ValueError, match=r"docno 'two words' holds white space.*backend='terrier'"):
            bm25(corpus, tmp_path / "pisa", backend="pisa", verbose=False)
    if importlib.util.find_spec("jnius"):
        found = bm25(corpus, tmp_path / "auto", verbose=False)(TOPICS.assign(query="alpha"))
        assert set(found["docno"]) == set(docnos)


def test_pisa_can_be_pickled(corpus, tmp_path):
    pytest.importorskip("pyterrier_pisa")
    pipeline = bm25(corpus, tmp_path / "index", backend="pisa", verbose=False)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(pipeline))(TOPICS), pipeline(TOPICS))
    assert repr(pipeline) == f"bm25({str(tmp_path / 'index')!r}, 1000, k1=0.9, b=0.4)"


def test_bad_input(corpus, tmp_path):
    (tmp_path / "foreign").mkdir()
    for arguments, options, error, says in (
        ((DOCUMENTS, tmp_path / "x"), {}, TypeError, "must be a pt_dance.Corpus"),
        ((corpus, 3), {}, TypeError, "path=3"),
        ((corpus, tmp_path / "x"), {"backend": "lucene"}, ValueError, "choose one of 'auto', 'pisa', 'terrier'"),
        ((corpus, tmp_path / "x"), {"k1": -1}, ValueError, "k1=-1"),
        ((corpus, tmp_path / "x"), {"b": 2}, ValueError, "b=2"),
        ((corpus, tmp_path / "x"), {"num_results": 0}, ValueError, "num_results=0"),
        ((corpus, tmp_path / "x"), {"threads": "2"}, ValueError, "threads='2'"),
        ((corpus, tmp_path / "foreign"), {}, FileExistsError, "is no index of pt_dance.bm25"),
        ((corpus, tmp_path / "foreign"), {"overwrite": True}, FileExistsError, "is no index of pt_dance.bm25"),
    ):
        with pytest.raises(error, match=says):
            bm25(*arguments, verbose=False, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "foreign"]


@pytest.mark.parametrize("backend", ["auto", "pisa"])
def test_what_is_not_installed_is_said(corpus, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(first_stage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pt_dance\[pisa\]'"):
        bm25(corpus, tmp_path / "x", backend=backend)

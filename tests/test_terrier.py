"""The estimator behind BM25 of Terrier and of PISA alike: fit, retrieve and re-score on real collections."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from ir_measures import R, nDCG

from pt_dance import Corpus, DanceRetriever, DenseIndex, DualEncoder, bm25, recipes
from pt_dance.training.run_folder import RunFolder
from small_collection import standard_library

FAST = dict(batch_size=32, learning_rate=0.02)


@pytest.fixture(params=["terrier", "pisa"])
def engine(request):
    """Each of the engines that there is."""
    if request.param == "terrier":
        request.getfixturevalue("terrier")
    else:
        pytest.importorskip("pyterrier_pisa", reason="pyterrier_pisa is not installed (it has wheels for Linux only)")
    return request.param


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The docstrings of a part of the standard library, half of whose docnos are longer than Terrier's usual 20."""
    folder = tmp_path_factory.mktemp("small")
    collection = standard_library()
    topics = collection.topics[collection.topics["qid"].isin(collection.qrels["qid"])]
    held_out = np.arange(len(topics)) % 4 == 0
    corpus = Corpus.build(collection, folder / "corpus", verbose=False)
    return folder, corpus, topics[~held_out], topics[held_out], collection.qrels


@pytest.fixture(scope="module")
def vaswani(shared_data, tmp_path_factory):
    """NPL, its topics split into two thirds to train on and one third held out."""
    folder = tmp_path_factory.mktemp("vaswani")
    dataset = pt.get_dataset(f"dance:{shared_data('vaswani')}")
    topics, qrels = dataset.get_topics("test"), dataset.get_qrels("test")
    held_out = np.arange(len(topics)) % 3 == 0
    corpus = Corpus.build(dataset, folder / "corpus", verbose=False)
    return folder, corpus, topics[~held_out], topics[held_out], qrels


def fit_behind(engine, collection, tmp_path, recipe, **tower):
    """BM25 of the engine, and a retriever that was fitted behind it, with the retriever it was before."""
    folder, corpus, train, dev, qrels = collection
    first_stage = bm25(corpus, folder / f"bm25-{engine}", backend=engine, threads=1)
    texts = [document["text"] for document in corpus.get_corpus_iter(verbose=False)]
    encoder = DualEncoder.static(texts, seed=1, **tower)
    dance = DanceRetriever(encoder, corpus, tmp_path / "run", recipe=recipe, verbose=False)
    before = dance.retriever(round=0)
    (first_stage % 50 >> dance).fit(train, qrels, dev, qrels)
    return first_stage, before, dance


def check(first_stage, before, dance, collection):
    """What holds whatever the engine: better than before, negatives from BM25, re-scored by docno alone."""
    _, corpus, train, dev, qrels = collection
    qrels = qrels[qrels["qid"].isin(dev["qid"])]
    negatives, report = RunFolder(dance.path).read_frame(1, "negatives")
    found = (first_stage % 50)(train).merge(negatives[["qid", "docno"]], on=["qid", "docno"])
    assert len(found) == len(negatives) > 0 and report["none"] < len(train) / 10

    candidates = (first_stage % 50)(dev)
    docnos = {document["docno"] for document in corpus.get_corpus_iter(verbose=False)}
    assert set(candidates["docno"]) <= docnos
    assert candidates["query"].equals(candidates["qid"].map(dev.set_index("qid")["query"]))
    rescored = dance(candidates)
    pd.testing.assert_frame_equal(rescored[["qid", "query", "docno"]], candidates[["qid", "query", "docno"]])
    assert "docid" not in rescored.columns
    # the vectors of the docnos, not of the rows that another index's docid would point at
    queries = dict(zip(dev["qid"], dance.encoder.encode_queries(dev["query"].tolist()), strict=True))
    documents = dance.encoder.encode_docs(corpus.texts(candidates["docno"].tolist()))
    expected = [queries[qid] @ vector for qid, vector in zip(candidates["qid"], documents, strict=True)]
    np.testing.assert_allclose(rescored["score"], expected, atol=1e-5)
    mixed = candidates.assign(docid=np.random.default_rng(0).permutation(len(candidates)))
    assert dance(mixed)["score"].equals(rescored["score"])

    # "tree" runs the first stage once for both pipelines that begin with it
    systems = [before, dance, first_stage % 50, first_stage % 50 >> dance]
    table = pt.Experiment(systems, dev, qrels, [nDCG @ 10, R @ 50], plan="tree")
    assert table["nDCG@10"][1] > table["nDCG@10"][0] and table["nDCG@10"][3] > table["nDCG@10"][0]
    assert table["R@50"][3] == pytest.approx(table["R@50"][2])
    return candidates


def test_fit_retrieve_and_rescore_docstrings(engine, small, tmp_path):
    recipe = recipes.ance(1, **FAST)
    first_stage, before, dance = fit_behind(engine, small, tmp_path, recipe, dim=64, vocab_size=2000)
    candidates = check(first_stage, before, dance, small)
    assert ("docid" in candidates.columns) == (engine == "terrier")
    assert candidates["docno"].str.len().max() > 50 and (candidates["docno"].str.len() > 20).mean() > 0.2
    retrieved = (dance % 3)(small[3])
    assert len(retrieved) == 3 * len(small[3]) and set(retrieved["docno"]) <= set(small[1].docno(range(len(small[1]))))


def test_fit_retrieve_and_rescore_vaswani(engine, vaswani, tmp_path):
    recipe = recipes.ance(0, **FAST)
    first_stage, before, dance = fit_behind(engine, vaswani, tmp_path, recipe, dim=64, vocab_size=8000)
    check(first_stage, before, dance, vaswani)


def test_terrier_keeps_long_docnos_whole_and_questions_as_they_are(terrier, tmp_path):
    docnos = ["d" * 60, "é" * 40, "文" * 40, "😀" * 40, "two words and more than twenty characters", "d"]
    documents = [{"docno": docno, "text": f"alpha beta number{n}"} for n, docno in enumerate(docnos)]
    corpus = Corpus.build(documents, tmp_path / "corpus", verbose=False)
    terrier_bm25 = bm25(corpus, tmp_path / "bm25", backend="terrier")
    questions = ['What is "alpha": (beta OR number2)?', "alpha^2 +number3 -number1", "title:beta", "AND (", "🙂"]
    topics = pd.DataFrame({"qid": ["1", "2", "3", "4", "5"], "query": questions, "mark": list("abcde")})
    results = terrier_bm25(topics)
    assert set(results["docno"]) == set(docnos)
    assert set(results["qid"]) == {"1", "2", "3"}
    assert results["query"].equals(results["qid"].map(topics.set_index("qid")["query"]))
    assert results["mark"].equals(results["qid"].map(topics.set_index("qid")["mark"]))
    again = bm25(corpus, tmp_path / "bm25", backend="terrier")
    pd.testing.assert_frame_equal(again(topics), results)


def test_a_terrier_index_with_stored_text_is_a_source_of_documents(terrier, tmp_path):
    documents = [{"docno": f"d{n}", "title": f"Title {n}", "text": f"alpha été number{n}"} for n in range(5)]
    expected = Corpus.build(documents, tmp_path / "corpus", verbose=False)
    indexer = pt.IterDictIndexer(str(tmp_path / "terrier"), meta={"docno": 20, "title": 200, "text": 4096})
    reference = indexer.index(documents)
    index = pt.terrier.TerrierIndex(str(tmp_path / "terrier"))
    sources = (index, str(index.path), index.path, reference, pt.IndexFactory.of(reference), index.index_ref())
    for number, source in enumerate(sources):
        assert Corpus.build(source, tmp_path / f"c{number}", verbose=False) == expected
    encoder = DualEncoder.static(["alpha number"], dim=4, vocab_size=50)
    assert len(DenseIndex(tmp_path / "dense", encoder, verbose=False).index(index)) == 5
    plain = pt.IterDictIndexer(str(tmp_path / "plain")).index(documents)
    for source in (plain, tmp_path / "plain"):
        with pytest.raises(ValueError, match="stores no texts: index again with"):
            Corpus.build(source, tmp_path / "no", verbose=False)
    with pytest.raises(TypeError, match="or a Terrier index with stored text, not as a str"):
        Corpus.build(str(tmp_path / "nowhere"), tmp_path / "no", verbose=False)

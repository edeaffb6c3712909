"""A DenseIndex stands where pyterrier_dr's FlexIndex stands: what is built on that works, to the same values."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pyterrier as pt
import pyterrier_dr
import pytest
import torch
from pyterrier_dr import FlexIndex

from pt_dance import Corpus, DenseIndex, DenseRetriever, DualEncoder
from pt_dance.retriever.search.arrays import ArrayBlock

WORDS = ["apple", "river", "stone", "cloud", "piano", "tiger", "lemon", "bridge", "candle", "forest"]
DOCUMENTS = [
    {"docno": f"d{i:03}", "text": f"{WORDS[i % 10]} {WORDS[i * 7 // 10 % 10]} {WORDS[(3 * i + 1) % 10]} w{i % 23}"}
    for i in range(120)
]
TOPICS = pd.DataFrame({"qid": ["q1", "q2", "q3"], "query": ["apple river", "tiger w3", "candle forest stone"]})


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.static([d["text"] for d in DOCUMENTS], dim=16, vocab_size=200)


@pytest.fixture(scope="module")
def index(tmp_path_factory, encoder):
    return DenseIndex(tmp_path_factory.mktemp("flex") / "index", encoder, verbose=False).index(DOCUMENTS)


@pytest.fixture(scope="module")
def theirs(index):
    return FlexIndex(str(index.index_path), verbose=False)


@pytest.fixture(scope="module")
def queries(encoder):
    return encoder.query_encoder()(TOPICS)


def exact(index, queries):
    """The score of every query and document, by docno."""
    scores = np.stack(queries["query_vec"]).astype(float) @ np.asarray(index.open().vectors).astype(float).T
    return {
        (qid, docno): scores[q, row]
        for q, qid in enumerate(queries["qid"])
        for row, docno in enumerate(index.docno(range(len(index))))
    }


def same(found, expected):
    """Whether two result frames hold the same documents for every query, with the same scores."""
    both = found.merge(expected, on=["qid", "docno"], suffixes=("", "_expected"), validate="one_to_one")
    assert len(both) == len(found) == len(expected) > 0
    assert np.abs(both["score"] - both["score_expected"]).max() < 1e-6


def graph_of(index, k):
    vectors = np.asarray(index.open().vectors)
    similar = vectors @ vectors.T / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors, axis=1)[:, None]
    np.fill_diagonal(similar, -2)
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("method", ["ladr", "pre_ladr", "ada_ladr", "gar"])
def test_adaptive_retrieval_over_the_corpus_graph(index, theirs, queries, method):
    seeds = index.retriever(3)(queries)
    options = {"num_results": 40} if method == "gar" else {"num_results": 40, "drop_query_vec": True}
    found = getattr(index, method)(4, **options)(seeds)
    scores = exact(index, queries)
    assert (
        np.abs(found["score"] - [scores[q, d] for q, d in zip(found["qid"], found["docno"], strict=True)]).max() < 1e-5
    )
    same(found, getattr(theirs, method)(4, **options)(seeds))
    if method == "pre_ladr":
        neighbours = graph_of(index, 4)
        for _, mine in found.groupby("qid"):
            rows = index.rows(seeds[seeds["qid"] == mine["qid"].iloc[0]]["docno"])
            reached = set(rows) | set(neighbours[rows].ravel())
            assert set(index.rows(mine["docno"])) == reached and mine["score"].is_monotonic_decreasing
    assert (found.groupby("qid").size() > 3).all()


def test_pseudo_relevance_feedback(index, theirs, queries):
    dense = index.retriever(20)
    for feedback in (pyterrier_dr.VectorPrf(alpha=1, beta=0.5, k=3), pyterrier_dr.AveragePrf(k=3)):
        found = (dense >> index.vec_loader() >> feedback >> dense)(queries)
        vectors = np.asarray(index.open().vectors)
        for qid, mine in found.groupby("qid"):
            query = queries[queries["qid"] == qid]["query_vec"].iloc[0]
            best = vectors[index.rows(dense(queries[queries["qid"] == qid])["docno"][:3])]
            is_rocchio = isinstance(feedback, pyterrier_dr.VectorPrf)
            moved = query + 0.5 * best.mean(0) if is_rocchio else np.concatenate([[query], best]).mean(0)
            expected = np.sort(vectors @ moved)[::-1][:20]
            assert np.abs(mine["score"] - expected).max() < 1e-5
            assert np.abs(np.stack(mine["query_vec"]) - moved).max() < 1e-6
    # The retriever encodes the queries itself and hands their vectors on.
    encoding = index.retriever(20, drop_query_vec=False)
    feedback = pyterrier_dr.VectorPrf(beta=0.5)
    same(
        (encoding >> index.vec_loader() >> feedback >> dense)(TOPICS),
        (dense >> index.vec_loader() >> feedback >> dense)(queries),
    )
    compiled = (dense >> index.vec_loader() >> feedback >> (dense % 2)).compile()
    assert compiled[0].num_results == 3 and compiled[-1].num_results == 2


def test_diversity(index, theirs, queries):
    seeds = index.retriever(15)(queries)
    found, expected = index.mmr(Lambda=0.6)(seeds), theirs.mmr(Lambda=0.6)(seeds)
    assert found["docno"].tolist() == expected["docno"].tolist() and found["docno"].tolist() != seeds["docno"].tolist()
    same(found, expected)
    ils = dict(pyterrier_dr.ils(seeds, index))
    assert ils == pytest.approx(dict(pyterrier_dr.ils(seeds, theirs))) and 0 < min(ils.values()) < 1


def test_vectors_by_docno_and_by_docid(index):
    stored = np.asarray(index.open().vectors)
    loader = index.vec_loader()
    by_docno = loader(pd.DataFrame({"docno": ["d007", "d000", "d119"]}))
    assert (np.stack(by_docno["doc_vec"]) == stored[[7, 0, 119]]).all()
    assert (np.stack(loader(pd.DataFrame({"docid": [3, 1]}))["doc_vec"]) == stored[[3, 1]]).all()
    assert (index.np_vecs() == stored).all() and (index.torch_vecs(device="cpu").numpy() == stored).all()
    assert index.docnos().fwd[np.array([7])].tolist() == ["d007"]
    assert [d["docno"] for d in index.get_corpus_iter(start_idx=5, stop_idx=7)] == ["d005", "d006"]


def test_the_scorer_scores_rows(index, queries):
    rows = np.array([5, 0, 5, 119])
    scores = index.scorer().score(np.stack(queries["query_vec"]), rows)
    expected = np.stack(queries["query_vec"]).astype(float) @ np.asarray(index.open().vectors)[rows].astype(float).T
    assert scores.shape == (3, 4) and scores.dtype == np.float32 and np.abs(scores - expected).max() < 1e-6


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"batch_size": np.int64(1)}, {"num_results": np.int32(12)}])
def test_options_of_their_retrievers_are_taken(index, queries, options):
    expected = index.retriever(12)(queries)
    found = index.retriever(**{"num_results": 12, **options})(queries)
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        index.retriever(batch_size=0)


@pytest.mark.parametrize("passages", [False, True])
def test_batch_size_is_how_many_documents_are_multiplied_at_a_time(
    index, encoder, queries, tmp_path, monkeypatch, passages
):
    """Given to the retriever or set later; without one, the index is small enough to be one block."""
    if passages:
        corpus = Corpus.build(DOCUMENTS, tmp_path / "corpus", fields=["text"], verbose=False)
        corpus = corpus.to_passages(tmp_path / "passages", length=3, stride=2, verbose=False)
        index = DenseIndex(tmp_path / "index", encoder, device="cpu", verbose=False).index(corpus)
    else:
        index = DenseIndex(index.index_path, encoder, device="cpu", verbose=False)
    blocks, add = set(), ArrayBlock.add
    monkeypatch.setattr(ArrayBlock, "add", lambda self, first, end: blocks.add((first, end)) or add(self, first, end))
    later = index.retriever(5)
    expected = later(queries)
    assert blocks == {(0, len(index))}
    later.batch_size = 50
    for dense in (index.retriever(5, batch_size=50), DenseRetriever(index, num_results=5, batch_size=50), later):
        blocks.clear()
        pd.testing.assert_frame_equal(dense(queries), expected)
        assert blocks == {(first, min(first + 50, len(index))) for first in range(0, len(index), 50)}


def test_other_retrievers_over_the_same_vectors(index, queries):
    best = index.retriever(10)(queries)
    for retriever in (
        index.np_retriever(num_results=10),
        index.torch_retriever(num_results=10, device="cpu"),
        index.faiss_flat_retriever() % 10,
        index.faiss_hnsw_retriever(num_results=10, ef_search=200),
        index.faiss_ivf_retriever(num_results=10, n_list=2, n_probe=2),
    ):
        found = retriever(queries)
        assert np.abs(np.sort(found["score"]) - np.sort(best["score"])).max() < 1e-5


def test_caches_hold_what_the_retriever_and_the_scorer_gave(index, queries, tmp_path, monkeypatch):
    caching = pytest.importorskip("pyterrier_caching", reason="pyterrier-caching is not installed")
    dense, topics, answered = index.retriever(10), TOPICS[["qid", "query"]], []
    transform = type(dense).transform
    monkeypatch.setattr(type(dense), "transform", lambda self, inp: answered.append(len(inp)) or transform(self, inp))
    with caching.RetrieverCache(str(tmp_path / "retriever"), dense) as cache:
        first = cache(topics)
        same(first, dense(topics))
        count = sum(answered)
        pd.testing.assert_frame_equal(cache(topics), first)
        assert sum(answered) == count == 6
    with caching.ScorerCache(str(tmp_path / "scorer"), dense) as cache:
        same(cache(first), first)
        same(cache(first), first)
        assert sum(answered) == count + 30


def test_drawings(index, encoder):
    """Each stage is in the picture under its name, with the columns that it gives, and without what it is made of."""
    dense, feedback = index.retriever(10), pyterrier_dr.VectorPrf()
    retrieved = ["qid", "query", "query_vec", "docno", "score", "rank"]
    rescored = ["qid", "docno", "query_vec", "score", "rank"]
    for pipeline, labels, columns in (
        (encoder.query_encoder() >> dense, ["Query Encoder", "DenseRetriever"], retrieved),
        (
            dense >> index.vec_loader() >> feedback >> dense,
            ["DenseRetriever", "DenseRetriever"],
            ["qid", "query_vec", "docno", "score", "rank"],
        ),
        (dense >> index.scorer(), ["DenseRetriever", "DenseScorer"], rescored),
        (index.ann_retriever(10), ["AnnRetriever"], rescored),
        (encoder >> index, ["DualEncoder", "DenseIndex"], retrieved),
        (encoder >> index.indexer(mode="overwrite"), ["DualEncoder", "DenseIndexer"], None),
        (dense >> index.ladr(4), ["DenseRetriever"], rescored),
    ):
        schematic = pt.schematic.transformer_schematic(pipeline)
        stages = schematic.get("transformers", [schematic])
        ours = [stage for stage in stages if stage["name"].startswith("pt_dance.")]
        assert [stage["label"] for stage in ours] == labels
        assert ours[-1]["output_columns"] == columns
        assert not any("inner_pipelines" in stage for stage in ours)
        drawn = pt.schematic.draw(pipeline)
        assert all(label in drawn for label in labels)


def test_joint_product_quantization(index, encoder, queries, tmp_path):
    jpq = pytest.importorskip("pyterrier_dr.jpq", reason="this pyterrier_dr has no JPQ")
    options = {"device": torch.device("cpu"), "pq_impl": "sklearn", "train_query_encoder": False}
    trainer = jpq.JPQTrainer(encoder, index, M=4, nbits=4, **options)
    pairs = [{"query": d["text"], "doc_id_a": d["docno"], "doc_id_b": "d050"} for d in DOCUMENTS[:40]]
    trainer.fit(training_docpairs=pairs, total_steps=2)
    found = trainer.jpq_index(str(tmp_path / "jpq")).retriever_flat()(queries)
    # Codes of 2 bytes for vectors of 64: close to the vectors' own order, not the same.
    ours = index.retriever(120)(queries).merge(found, on=["qid", "docno"])
    assert len(ours) == 360 and ours["score_x"].corr(ours["score_y"]) > 0.7


OPEN = """
import sys
from pt_dance import DenseIndex
import pyterrier as pt
print(*(type(pt.Artifact.load(path)).__name__ for path in sys.argv[1:]))
"""


def test_artifacts_are_opened_as_what_wrote_them(index, theirs, tmp_path):
    plain = FlexIndex(str(tmp_path / "plain"), verbose=False)
    plain.index([{"docno": n, "doc_vec": np.ones(3, np.float32)} for n in "ab"])
    half = DenseIndex(tmp_path / "half", index.given_encoder, vec_dtype="float16", verbose=False).index(DOCUMENTS)
    paths = [str(path) for path in (index.index_path, half.index_path, plain.index_path)]
    assert [type(pt.Artifact.load(path)) for path in paths] == [DenseIndex, DenseIndex, FlexIndex]
    assert len(pt.Artifact.load(paths[0])) == 120
    command = [sys.executable, "-c", OPEN, *paths]  # where nothing else was imported first
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert said.split() == ["DenseIndex", "DenseIndex", "FlexIndex"]

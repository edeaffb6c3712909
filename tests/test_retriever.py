"""DenseRetriever: queries in, the best documents out; results in, the same scores out; in every PyTerrier pipeline."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ir_measures import R, nDCG

from pt_dance import Corpus, DenseIndex, DenseRetriever, DualEncoder
from pt_dance.storage.queries import _say_once
from small_collection import standard_library


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory):
    """A real collection with its index: encoder, index, topics, qrels."""
    small = standard_library(None)
    base = tmp_path_factory.mktemp("docstrings")
    corpus = Corpus.build(small, base / "corpus", verbose=False)
    encoder = DualEncoder.static(corpus.texts_at(range(len(corpus))), dim=64, vocab_size=4000)
    index = DenseIndex(base / "index", encoder, verbose=False).index(corpus)
    return {"encoder": encoder, "index": index, "topics": small.topics, "qrels": small.qrels}


DOCUMENTS = [{"docno": f"d{i:03}", "text": f"word{i % 13} word{i % 7} other{i % 5}"} for i in range(200)]
TOPICS = pd.DataFrame(
    {"qid": ["q1", "q2", "q3"], "query": ["word1 word2", "other3", "word5 other1"], "extra": [1, 2, 3]}
)


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.static([d["text"] for d in DOCUMENTS], dim=16, vocab_size=100)


@pytest.fixture(scope="module")
def index(tmp_path_factory, encoder):
    # Documents with the same words, so there are ties everywhere; docnos out of order.
    order = np.random.default_rng(0).permutation(200)
    path = tmp_path_factory.mktemp("small") / "index"
    return DenseIndex(path, encoder, verbose=False).index([DOCUMENTS[i] for i in order])


def test_retrieves_the_best_in_docno_order(index, encoder):
    before = TOPICS.copy()
    found = index.retriever(50)(TOPICS)
    pd.testing.assert_frame_equal(TOPICS, before)
    assert list(found.columns) == ["qid", "query", "extra", "docno", "score", "rank"]
    assert found["qid"].tolist() == ["q1"] * 50 + ["q2"] * 50 + ["q3"] * 50
    assert found["rank"].tolist() == list(range(50)) * 3
    vectors = encoder.encode_docs([d["text"] for d in DOCUMENTS]).astype(np.float64)
    for qid, query in zip(TOPICS["qid"], TOPICS["query"], strict=True):
        scores = (vectors @ encoder.encode_queries([query])[0].astype(np.float64)).astype(np.float32)
        # Texts that differ in nothing get equal vectors only up to the encoder's rounding, so scores are compared, and
        # the order wherever scores are equal.
        mine = found[found["qid"] == qid]
        assert np.abs(mine["score"].to_numpy() - np.sort(scores)[::-1][:50]).max() < 1e-6
        for _, tied in mine.groupby("score", sort=False):
            assert tied["docno"].is_monotonic_increasing
    assert found.duplicated(["qid", "score"]).any()


def test_query_vectors_instead_of_queries(index, encoder):
    expected = index.retriever(20)(TOPICS)
    vectors = encoder.query_encoder()(TOPICS)
    alone = DenseIndex(index.index_path, verbose=False)
    found = alone.retriever(20, drop_query_vec=True)(vectors.drop(columns="query"))
    assert "query_vec" not in found.columns
    pd.testing.assert_frame_equal(found, expected.drop(columns="query"))
    # The vector counts, not the query beside it.
    swapped = vectors.assign(query=["a", "b", "c"])
    assert alone.retriever(20)(swapped)["docno"].tolist() == expected["docno"].tolist()


def test_query_vectors_that_came_in_stay_and_others_come_if_asked_for(index, encoder):
    expected, vectors = index.retriever(20)(TOPICS), encoder.query_encoder()(TOPICS)
    repeated = vectors["query_vec"].repeat(20).tolist()
    for option, encodes_itself, came_in in ((None, False, True), (False, True, True), (True, False, False)):
        dense = index.retriever(20, drop_query_vec=option)
        for frame, stays in ((TOPICS, encodes_itself), (vectors, came_in)):
            found, rescored = dense(frame), dense(dense(frame))
            for result in (found, rescored):
                columns = ["qid", "query", "extra", *(["query_vec"] if stays else []), "docno", "score", "rank"]
                assert sorted(result.columns) == sorted(columns)
                pd.testing.assert_frame_equal(result[expected.columns], expected)
                if stays:
                    assert np.abs(np.stack(result["query_vec"]) - np.stack(repeated)).max() < 1e-6
            blocks = pd.concat(dense.iter_blocks(frame), ignore_index=True)
            assert list(blocks.columns) == list(found.columns)


def test_rescoring_gives_the_same_scores_by_docno(index):
    dense = index.retriever(200)
    full = dense(TOPICS)
    other = full.sample(frac=0.4, random_state=1).assign(score=-1.0, rank=7, docid=3, text="t")
    other.index = other.index + 1000
    before = other.copy()
    found = dense(other)
    pd.testing.assert_frame_equal(other, before)
    assert set(found.columns) == {"qid", "query", "extra", "docno", "score", "rank", "text"}
    assert len(found) == len(other)
    both = found.merge(full, on=["qid", "docno"], suffixes=("", "_full"))
    assert len(both) == len(found) and (both["score"] == both["score_full"]).all()
    for _, mine in both.groupby("qid"):
        ordered = mine.sort_values("rank")
        assert ordered["rank"].tolist() == list(range(len(mine)))
        assert ordered["rank_full"].is_monotonic_increasing
    # The rows stay where they were.
    assert found["docno"].tolist() == other["docno"].tolist() and found["qid"].tolist() == other["qid"].tolist()


def test_rescoring_keeps_double_rows_and_interleaved_queries(index):
    rows = pd.DataFrame(
        {
            "qid": ["b", "a", "b", "b"],
            "query": ["word1", "word2", "word1", "word1"],
            "docno": ["d003", "d001", "d001", "d003"],
        }
    )
    found = index.retriever()(rows)
    assert found["docno"].tolist() == rows["docno"].tolist()
    assert sorted(found[found["qid"] == "b"]["rank"]) == [0, 1, 2] and found["rank"][1] == 0
    assert found["score"][0] == found["score"][3] and found["rank"][0] < found["rank"][3]


def test_real_candidates_of_bm25(docstrings, tmp_path):
    pisa = pytest.importorskip("pyterrier_pisa", reason="pyterrier_pisa is not installed")
    corpus, topics = docstrings["index"], docstrings["topics"]
    dense = corpus.retriever(len(corpus))
    texts = pisa.PisaIndex(str(tmp_path / "pisa"), threads=1, overwrite=True)
    texts.index([{"docno": d, "text": f"{d} return file"} for d in corpus.docno(range(len(corpus)))])
    candidates = texts.bm25(num_results=50)(topics.head(40))
    found = dense(candidates)
    full = dense(topics.head(40))
    both = found.merge(full, on=["qid", "docno"], suffixes=("", "_full"))
    assert len(both) == len(found) == len(candidates) and (both["score"] == both["score_full"]).all()


def test_no_rows(index):
    dense = index.retriever(10)
    for frame in (
        TOPICS,
        dense(TOPICS),
        dense(TOPICS).assign(docid=1),
        index.retriever(10, drop_query_vec=False)(TOPICS),
    ):
        full, empty = dense(frame), dense(frame.iloc[:0])
        assert len(empty) == 0 and list(empty.columns) == list(full.columns)
        assert empty.dtypes.tolist() == full.dtypes.tolist()


def test_fewer_documents_than_results(index):
    assert len(index.retriever(1000)(TOPICS)) == 600


def test_block_by_block(index):
    topics = pd.DataFrame(
        {"qid": [f"q{i}" for i in range(700)], "query": [f"word{i % 17} other{i % 3}" for i in range(700)]}
    )
    dense = index.retriever(5)
    blocks = list(dense.iter_blocks(topics))
    assert len(blocks) > 1
    pd.testing.assert_frame_equal(pd.concat(blocks, ignore_index=True), dense(topics))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.integers(1, 250), min_size=1, max_size=3))
def test_num_results_set_later_is_as_good_as_given(index, chosen):
    for make in (index.retriever, lambda num_results: index.ann_retriever(num_results, candidates=200)):
        dense = make(num_results=7)
        for number in chosen:
            dense.num_results = number
        given_at_once = make(num_results=chosen[-1])
        assert dense == given_at_once and dense.num_results == chosen[-1]
        pd.testing.assert_frame_equal(dense(TOPICS), given_at_once(TOPICS))
        assert dense(TOPICS).groupby("qid").size().tolist() == [min(chosen[-1], 200)] * 3
        with pytest.raises(ValueError, match="num_results=0 must be a whole number"):
            dense.num_results = 0
        assert dense.num_results == chosen[-1]


def test_a_grid_over_num_results(index):
    dense = index.retriever(1)
    qrels = index.retriever(3)(TOPICS).query("rank == 2").assign(label=1)[["qid", "docno", "label"]]
    grid = {dense: {"num_results": [1, 2, 3, np.int64(10)]}}
    _, best, settings = pt.GridSearch(dense, grid, TOPICS[["qid", "query"]], qrels, "recall_10", return_type="both")
    assert best == 1.0 and settings[0][2] in (3, 10)


# --- in pipelines -----------------------------------------------------------------------------------------------------


def test_cut_off_is_fused_and_means_the_same(index):
    dense = index.retriever(100)
    fused = (dense % 7).compile()
    assert isinstance(fused, DenseRetriever) and fused.num_results == 7
    pd.testing.assert_frame_equal(fused(TOPICS), (dense % 7)(TOPICS))
    results = dense(TOPICS)[["qid", "query", "docno", "score", "rank"]]
    pd.testing.assert_frame_equal(fused(results), (dense % 7)(results))
    assert (dense % 500).compile().num_results == 100
    assert ((dense % 20) % 7).compile() == fused == ((dense % 7) % 20).compile()
    for bad in (-1, 0, True, 2.5):
        with pytest.raises(ValueError, match="makes no sense: the number of results to keep must be at least 1"):
            dense % bad


def test_operators(index):
    dense = index.retriever(30)
    topics = TOPICS[["qid", "query"]]
    single = dense(topics)
    doubled = (dense + dense)(topics)
    assert np.allclose(
        doubled.sort_values(["qid", "docno"])["score"], 2 * single.sort_values(["qid", "docno"])["score"]
    )
    assert len((dense | (dense % 5))(topics)) == 90
    features = (dense >> (dense**dense))(topics)
    assert all(np.allclose(f, s) for f, s in zip(features["features"], features["score"], strict=True))
    assert (dense >> dense)(topics)["score"].tolist() == single["score"].tolist()
    assert (0.5 * dense)(topics)["score"].tolist() == (single["score"] * 0.5).tolist()


def test_experiment_in_both_plans(docstrings):
    index, encoder = docstrings["index"], docstrings["encoder"]
    dense = index.retriever(100)
    again = DenseIndex(index.index_path, encoder, verbose=False).retriever(100)
    # Two stages that are equal are run once; PyTerrier 1.1's tree fails for pipelines that are equal as a whole.
    systems = {"dense": dense, "cut": again % 10, "rescored": dense >> again, "shallow": index.retriever(5)}
    topics, qrels = docstrings["topics"].head(60), docstrings["qrels"]
    tables = [pt.Experiment(systems, topics, qrels, [nDCG @ 5, R @ 100], plan=plan) for plan in ("linear", "tree")]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["nDCG@5"].nunique() == 1 and tables[0]["nDCG@5"][0] > 0.02
    assert tables[0]["R@100"].nunique() == 3


def test_before_and_after_training_are_never_mixed_up(tmp_path, encoder):
    # The same path, the same settings, other weights.
    documents = [{"docno": str(i), "text": d["text"]} for i, d in enumerate(DOCUMENTS)]
    topics = TOPICS[["qid", "query"]]
    before = DenseIndex(tmp_path / "before", encoder, verbose=False).index(documents).retriever(20)
    trained = encoder.copy()
    weights = trained.model[0].embedding.weight.data
    weights[:] = weights.flip(0).clone()
    after = DenseIndex(tmp_path / "after", trained, verbose=False).index(documents).retriever(20)
    qrels = after(topics).query("rank < 3").assign(label=1)[["qid", "docno", "label"]]
    tables = [pt.Experiment([before % 15, after % 14], topics, qrels, [nDCG @ 3], plan=p) for p in ("linear", "tree")]
    pd.testing.assert_frame_equal(*tables)
    assert tables[0]["nDCG@3"][1] > 0.9 and tables[0]["nDCG@3"][0] < 0.5


def test_equality(tmp_path, encoder, index):
    a, b = index.retriever(10), DenseIndex(index.index_path, encoder, verbose=False).retriever(10)
    assert a == b and hash(a) == hash(b)
    assert a != index.retriever(11) and a != index.retriever(10, drop_query_vec=False) and a != "a"
    # The same place, indexed again: what was open answers from the old vectors and is no longer the same.
    mine = DenseIndex(tmp_path / "i", encoder, verbose=False).index(DOCUMENTS)
    old = DenseIndex(tmp_path / "i", encoder, verbose=False).retriever(10)
    assert old == mine.retriever(10)
    expected = old(TOPICS)
    mine.indexer(mode="overwrite").index(DOCUMENTS[:50])
    assert old != mine.retriever(10)
    pd.testing.assert_frame_equal(old(TOPICS), expected)
    # Equal document vectors, but queries are encoded otherwise.
    other = DualEncoder.static([d["text"] for d in DOCUMENTS], dim=16, vocab_size=100, seed=3)
    records = [{"docno": d["docno"], "doc_vec": np.ones(16)} for d in DOCUMENTS]
    x = DenseIndex(tmp_path / "x", encoder, verbose=False).index(records)
    first = x.retriever(10)
    assert first == x.retriever(10)
    y = DenseIndex(tmp_path / "x", other, verbose=False)
    y.indexer(mode="overwrite").index(records)
    assert first != y.retriever(10)


def test_pickles_without_what_is_open(index):
    # This is what .parallel() needs of it; its processes take too long to start for a test.
    dense = index.retriever(10)
    expected = dense(TOPICS)
    raw = pickle.dumps(dense)
    again = pickle.loads(raw)
    assert again == dense
    pd.testing.assert_frame_equal(again(TOPICS), expected)


def test_name_and_drawing(index):
    dense = index.retriever(10)
    assert repr(dense) == f"DenseRetriever('{index.index_path}', 10)"
    assert pt.inspect.subtransformers(dense) == {}
    assert "DenseRetriever" in pt.schematic.draw(dense)
    assert {a.name for a in pt.inspect.transformer_attributes(dense)} >= {
        "index",
        "encoder",
        "num_results",
        "drop_query_vec",
    }
    assert pt.inspect.transformer_apply_attributes(dense, num_results=3).num_results == 3
    outputs = pt.inspect.transformer_outputs(dense, ["qid", "query"])
    assert outputs == ["qid", "query", "docno", "score", "rank"]


@pytest.mark.usefixtures("index")
class TestContract(pt.testing.transformer_test_class(lambda: None)):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def make(cls, index):
        cls.transformer = index.retriever(10)


@pytest.mark.usefixtures("index")
class TestContractOfTheIndex(pt.testing.transformer_test_class(lambda: None)):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def make(cls, index):
        cls.transformer = index


def test_the_users_words_are_encoded_not_what_rewriters_made_of_them(index):
    dense = index.retriever(40)
    expected = dense(TOPICS)
    rewrite = pt.apply.query(lambda row: f"applypipeline:off {row['query']}^0.3")
    _say_once.cache_clear()
    with pytest.warns(UserWarning, match="the queries were rewritten .* it reads what the user asked") as said:
        once, twice = (rewrite >> dense)(TOPICS), (rewrite >> rewrite >> dense)(TOPICS)
        rescored = dense(rewrite(expected))
        alike = dense(rewrite(expected).assign(query="applypipeline:off what all were made into"))
    assert len(said) == 1
    for found in (once, twice, rescored, alike):
        assert found["docno"].tolist() == expected["docno"].tolist()
        assert np.abs(found["score"] - expected["score"]).max() < 1e-6
        assert found["query"].str.startswith("applypipeline:off ").all(), "columns that came in stay"
    # In a frame of rewritten and other queries every row has its own; without the column there is nothing to know.
    some = rewrite(TOPICS).assign(query_0=[None, "other3", float("nan")], query=TOPICS["query"])
    assert dense(some)["docno"].tolist() == expected["docno"].tolist()
    told = dense(rewrite(TOPICS).drop(columns="query_0"))
    assert told["score"].tolist() != expected["score"].tolist()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "error", "says"),
    [
        ({"qid": ["1"]}, KeyError, "DenseRetriever.*missing.*query"),
        ({"query": ["x"]}, KeyError, "DenseRetriever.*missing.*qid"),
        ({"docno": ["d001"], "query": ["x"]}, KeyError, "DenseRetriever.*missing.*qid"),
        ({"qid": ["1"], "docno": ["d001"]}, KeyError, "DenseRetriever.*missing.*query"),
        ({"qid": ["q7", "q8"], "query": ["x", None]}, TypeError, "query 'q8' is .*not a string"),
        ({"qid": ["q7", "q8"], "query": ["x", float("nan")]}, TypeError, "query 'q8' is nan, not a string"),
        ({"qid": ["q7", "q8"], "query": pd.Series(["x", 5], dtype=object)}, TypeError, "query 'q8' is 5, not a string"),
        (
            {"qid": ["q7", "q8"], "query": pd.Series(["x", "half \ud83d"], dtype=object)},
            ValueError,
            "query 'q8' is no valid Unicode",
        ),
        ({"qid": ["q7"], "docno": ["d001"], "query": [None]}, TypeError, "query 'q7' is .*not a string"),
        ({"qid": ["q7"], "docno": ["nope"], "query": ["x"]}, KeyError, "docno 'nope' is not in the index"),
        ({"qid": ["q7"], "docno": [None], "query": ["x"]}, KeyError, "is not in the index"),
        (
            {"qid": ["q7"], "docno": ["nope"], "query": ["x"], "docid": [0]},
            KeyError,
            "docno 'nope' is not in the index",
        ),
        ({"qid": ["q7"], "query_vec": [np.ones(3)]}, ValueError, "query 'q7' has a query_vec with shape .3,. where"),
        ({"qid": ["q7"], "query_vec": [np.ones((16, 1))]}, ValueError, "query 'q7' has a query_vec with shape"),
        ({"qid": ["q7"], "query_vec": [None]}, ValueError, "query 'q7' has a query_vec with no numbers"),
        ({"qid": ["q7"], "query_vec": ["x" * 16]}, ValueError, "query 'q7' has a query_vec with no numbers"),
        ({"qid": ["q7"], "query_vec": [np.full(16, np.nan)]}, ValueError, "query 'q7' has NaN, infinity"),
        ({"qid": ["q7"], "query_vec": [np.full(16, 1e30)]}, ValueError, "query 'q7' has NaN, infinity"),
        (
            {"qid": ["q7"], "docno": ["d001"], "query_vec": [np.full(16, np.inf)]},
            ValueError,
            "query 'q7' has NaN, infinity",
        ),
    ],
)
def test_bad_frames(index, frame, error, says):
    with pytest.raises(error, match=says):
        index.retriever(5)(pd.DataFrame(frame))


def test_bad_options(index, tmp_path):
    for bad in (0, -1, 2.5, True, "10", None):
        with pytest.raises(ValueError, match=r"num_results=.* must be a whole number of at least 1"):
            index.retriever(bad)
    with pytest.raises(ValueError, match="rescore_cutoff=0 must be"):
        DenseRetriever(index, rescore_cutoff=0)
    with pytest.raises(TypeError, match=r"index must be a pt_dance.DenseIndex, not a str"):
        DenseRetriever(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no dense index at"):
        DenseIndex(tmp_path / "nowhere", verbose=False).retriever(5)(TOPICS)


def test_weights_that_changed_since(tmp_path, encoder):
    mine = encoder.copy()
    dense = DenseIndex(tmp_path / "i", mine, verbose=False).index(DOCUMENTS).retriever(5)
    dense(TOPICS)
    mine.model[0].embedding.weight.data += 0.1
    for frame in (TOPICS, TOPICS.assign(docno="d001")):
        with pytest.raises(ValueError, match=r"the encoder's weights are not those the index .* was made with"):
            dense(frame)


def test_silent(index, capfd):
    index.retriever(5)(TOPICS)
    index.retriever(5)(index.retriever(5)(TOPICS))
    index.search(np.ones((2, 16), np.float32), 3)
    assert capfd.readouterr() == ("", "")

"""Mining: positives never come back, draws are uniform and do not depend on blocks, filters remove what they should."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pt_dance import Corpus, mining
from pt_dance.mining import (
    NearDuplicate,
    PositiveMargin,
    RankRange,
    TeacherScore,
    mine_documents,
    mine_queries,
    reduce_results,
)

TOPICS = pd.DataFrame({"qid": ["a", "b", "c"], "query": ["red fox", "blue sky", "red fox"]})
QRELS = pd.DataFrame(
    [("a", "d1", 1), ("a", "d2", 0), ("b", "d3", 2), ("c", "d4", 1)], columns=["qid", "docno", "label"]
)


def results(topics=TOPICS, documents=40):
    """Every document for every topic, d0 first."""
    docnos = [f"d{i}" for i in range(documents)]
    frame = pd.DataFrame({"qid": np.repeat(topics["qid"], documents), "docno": docnos * len(topics)})
    frame["score"] = np.tile(np.arange(documents, 0, -1, dtype=float), len(topics))
    frame["rank"] = np.tile(np.arange(documents), len(topics))
    return frame.reset_index(drop=True)


class Fixed(pt.Transformer):
    """A real pipeline stage with results known beforehand, that counts what it is asked."""

    def __init__(self, frame):
        self.frame, self.asked = frame, []

    def transform(self, inp):
        pt.validate.query_frame(inp, ["query"])
        self.asked += inp["qid"].tolist()
        return inp.merge(self.frame, on="qid")


def test_topics_of_one_text_share_their_positives():
    pairs = mining.positive_pairs(TOPICS, QRELS)
    assert set(zip(pairs["qid"], pairs["docno"], strict=False)) == {
        ("a", "d1"), ("a", "d4"), ("b", "d3"), ("c", "d1"), ("c", "d4")
    }  # fmt: skip


@pytest.mark.parametrize("sampling", ["uniform", "top"])
def test_no_positive_is_mined_and_depth_holds(sampling):
    mined = mine_documents(Fixed(results()), TOPICS, QRELS, depth=10, negatives=20, sampling=sampling)
    assert mined[mined["qid"] == "a"]["docno"].tolist() == [f"d{i}" for i in range(10) if i not in (1, 4)]
    assert mined[mined["qid"] == "b"]["docno"].tolist() == [f"d{i}" for i in range(10) if i != 3]
    report = mined.attrs["mining"]
    assert report["short"] == 3 and report["none"] == 0 and report["removed"]["positives"] == 5
    assert mined["qid"].drop_duplicates().tolist() == ["a", "b", "c"]


def test_report_says_where_the_best_positive_stood():
    without = results().query("qid != 'b' or docno != 'd3'")
    without = without.assign(rank=without.groupby("qid").cumcount())
    mined = mine_documents(Fixed(without), TOPICS, QRELS, depth=10, rank_range=(5, 10), query_block=2)
    # a and c find d1 at rank 1, above which is one candidate; for b nothing is found, and all ten stand above it
    assert mined.attrs["mining"]["positives"] == {
        "searches": 3, "found": 2, "median_rank": 1.0, "above": 1 + 1 + 10, "candidates": 8 + 10 + 8
    }  # fmt: skip
    two = mine_documents([Fixed(results()), Fixed(without)], TOPICS, QRELS, depth=10)
    assert two.attrs["mining"]["positives"] == {
        "searches": 6, "found": 5, "median_rank": 1.0, "above": 4 + 3 + 10, "candidates": 25 + 26
    }  # fmt: skip
    assert "_positive" not in mined.columns


def test_top_takes_the_best_and_rank_range_cuts():
    mined = mine_documents(Fixed(results()), TOPICS, QRELS, depth=30, negatives=3, sampling="top", rank_range=(3, 30))
    assert mined[mined["qid"] == "b"]["docno"].tolist() == ["d4", "d5", "d6"]
    assert mined[mined["qid"] == "b"]["rank"].tolist() == [4, 5, 6]


def test_a_document_that_a_pipeline_gives_twice_is_one_candidate():
    """Its better place counts, and the ranks of those behind it close up."""
    once = results(documents=6)
    again = once[once["docno"].isin(["d0", "d2"])].assign(rank=3, score=0.5)
    for twice in (pd.concat([once, again]), pd.concat([again, once]).drop(columns="rank")):
        mined = mine_documents(twice, TOPICS, QRELS, depth=5, negatives=9)
        assert mined[mined["qid"] == "b"]["docno"].tolist() == ["d0", "d1", "d2", "d4"]
        assert mined[mined["qid"] == "b"]["rank"].tolist() == [0, 1, 2, 4]


def test_the_draw_depends_on_the_seed_alone():
    source = results()
    whole = mine_documents(Fixed(source), TOPICS, QRELS, negatives=5, seed=1)
    blocks = mine_documents(Fixed(source), TOPICS, QRELS, negatives=5, seed=1, query_block=1)
    shuffled = mine_documents(Fixed(source.sample(frac=1, random_state=0)), TOPICS, QRELS, negatives=5, seed=1)
    frame = mine_documents(source, TOPICS, QRELS, negatives=5, seed=1)
    for other in (blocks, shuffled, frame):
        pd.testing.assert_frame_equal(whole, other)
    assert not whole["docno"].equals(mine_documents(Fixed(source), TOPICS, QRELS, negatives=5, seed=2)["docno"])


def test_uniform_draws_are_uniform():
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(3000)], "query": [f"text {i}" for i in range(3000)]})
    qrels = pd.DataFrame({"qid": topics["qid"], "docno": "d0", "label": 1})
    mined = mine_documents(results(topics, 21), topics, qrels, depth=21, negatives=4, seed=7)
    counts = mined["docno"].value_counts().reindex([f"d{i}" for i in range(1, 21)], fill_value=0)
    expected = 3000 * 4 / 20
    # 19 degrees of freedom: chi² above 43.8 happens in one of a thousand seeds
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_a_pipeline_that_finds_nothing_gives_no_negatives():
    empty = results().iloc[:0]
    mined = mine_documents(Fixed(empty), TOPICS, QRELS)
    assert len(mined) == 0 and list(mined.columns) == ["qid", "docno", "score", "rank"]
    assert mined.attrs["mining"]["none"] == 3


def test_sources_are_mixed_by_weight_and_fill_up_for_each_other():
    first = results()
    second = results().assign(docno=lambda f: "x" + f["docno"])
    mined = mine_documents([(Fixed(first), 3.0), (Fixed(second), 1.0)], TOPICS, QRELS, negatives=8)
    per_query = mined.assign(second=mined["docno"].str.startswith("x")).groupby("qid")["second"].agg(["size", "sum"])
    assert (per_query["size"] == 8).all() and (per_query["sum"] == 2).all()
    short = mine_documents([(Fixed(first.iloc[:0]), 3.0), (Fixed(second), 1.0)], TOPICS, QRELS, negatives=8)
    assert (short.groupby("qid").size() == 8).all() and short["docno"].str.startswith("x").all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rule_one_for_document_mining(data):
    """Whatever the qrels and however queries and documents share each other, no positive is ever mined."""
    texts = data.draw(st.lists(st.sampled_from(["one", "two", "three", "four"]), min_size=1, max_size=6))
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(len(texts))], "query": texts})
    judged = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(texts) - 1), st.integers(0, 14), st.integers(0, 2)), min_size=1, max_size=30
        )
    )
    qrels = pd.DataFrame([(f"q{q}", f"d{d}", label) for q, d, label in judged], columns=["qid", "docno", "label"])
    mined = mine_documents(
        [Fixed(results(topics, 15)), Fixed(results(topics, 15))], topics, qrels,
        depth=data.draw(st.integers(1, 15)), negatives=data.draw(st.integers(1, 15)),
        sampling=data.draw(st.sampled_from(["uniform", "top"])), seed=data.draw(st.integers(0, 5)), query_block=2,
    )  # fmt: skip
    text_of = dict(zip(topics["qid"], topics["query"], strict=False))
    relevant = {(text_of[q], d) for q, d, label in qrels.itertuples(index=False) if label > 0}
    assert not relevant & {(text_of[q], d) for q, d in zip(mined["qid"], mined["docno"], strict=False)}


def test_rank_range_and_teacher_score_filters():
    mined = mine_documents(results(), TOPICS, QRELS, depth=20, sampling="top", filters=[RankRange(2, 6)])
    assert mined["rank"].between(2, 5).all()
    scorer = pt.apply.doc_score(lambda row: float(row["docno"][1:]))
    mined = mine_documents(results(), TOPICS, QRELS, depth=20, negatives=20, filters=[TeacherScore(scorer, below=7)])
    assert set(mined["docno"]) == {f"d{i}" for i in range(7)}
    assert mined.attrs["mining"]["removed"][repr(TeacherScore(scorer, below=7))] == 39


def test_positive_margin_compares_with_the_best_positive():
    scorer = pt.apply.doc_score(lambda row: 40.0 - float(row["docno"][1:]))
    relative = mine_documents(
        results(), TOPICS, QRELS, depth=40, negatives=40, filters=[PositiveMargin(scorer, relative=0.9)]
    )
    # b's positive d3 scores 37: d7 (33) is below 33.3, d6 (34) is not
    assert relative[relative["qid"] == "b"]["docno"].tolist() == [f"d{i}" for i in range(7, 40)]
    absolute = mine_documents(
        results(), TOPICS, QRELS, depth=40, negatives=40, filters=[PositiveMargin(scorer, absolute=10)]
    )
    assert absolute[absolute["qid"] == "b"]["docno"].tolist() == [f"d{i}" for i in range(13, 40)]
    with pytest.raises(ValueError, match="exactly one"):
        PositiveMargin(scorer)


def corpus_of(texts: dict[str, str], folder) -> Corpus:
    documents = [{"docno": docno, "text": text} for docno, text in texts.items()]
    return Corpus.build(documents, folder / "corpus", fields=["text"], verbose=False)


def test_near_duplicates_of_a_positive_are_removed(tmp_path):
    words = "a long enough text about foxes that run over hills and fields in the morning sun of a day"
    texts = {f"d{i}": f"document {i} has words {i * 7} of its own {i * 13}" for i in range(40)}
    texts |= {"d3": words, "d5": words + " again", "d6": "not at all " + texts["d6"]}
    mined = mine_documents(
        results(), TOPICS, QRELS, corpus_of(texts, tmp_path), depth=40, negatives=40, filters=[NearDuplicate(0.8)]
    )
    of_b = set(mined[mined["qid"] == "b"]["docno"])
    assert "d5" not in of_b and "d6" in of_b and len(of_b) == 38
    with pytest.raises(ValueError, match="corpus="):
        mine_documents(results(), TOPICS, QRELS, filters=[NearDuplicate(0.8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "best"}, "sampling='best'"),
        ({"depth": 0}, "depth=0"),
        ({"negatives": -1}, "negatives=-1"),
        ({"rank_range": (5, 5)}, "rank_range"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        mine_documents(results(), TOPICS, QRELS, **options)


def test_sources_that_are_none():
    with pytest.raises(TypeError, match="no negative source"):
        mine_documents(3, TOPICS, QRELS)
    with pytest.raises(TypeError, match="gave back a int"):
        mining.resolve_source(lambda dense: 3, dense=None)


def test_a_source_is_described_by_its_code_not_its_address():
    def make(k):
        return lambda dense: dense % k

    assert mining.describe_source(make(3)) == mining.describe_source(make(3))
    assert mining.describe_source(make(3)) != mining.describe_source(make(4))
    assert mining.describe_source(lambda dense: dense) != mining.describe_source(lambda dense: dense % 5)


@pytest.fixture(scope="module")
def static_encoder():
    from pt_dance import DualEncoder

    texts = [f"word{i} word{i + 1} word{i + 2}" for i in range(200)]
    return DualEncoder.static(texts * 3, dim=32, vocab_size=500, seed=0)


def test_query_negatives_are_the_nearest_queries_that_are_not_relevant(static_encoder, tmp_path):
    rng = np.random.default_rng(0)
    topics = pd.DataFrame(
        {"qid": [f"q{i}" for i in range(60)], "query": [f"word{i % 50} word{i % 50 + 1}" for i in range(60)]}
    )
    documents = {f"d{i}": f"word{i} word{i + 1} word{i + 2}" for i in range(50)}
    qrels = pd.DataFrame(
        [(f"q{q}", f"d{d}", 1) for q in range(60) for d in {q % 50, *rng.integers(0, 50, 2).tolist()}],
        columns=["qid", "docno", "label"],
    )
    corpus = corpus_of(documents, tmp_path)
    mined = mine_queries(
        static_encoder, topics, qrels, corpus, depth=12, negatives=12, sampling="top", document_block=7
    )
    text_of = dict(zip(topics["qid"], topics["query"], strict=False))
    relevant = {(text_of[q], d) for q, d, _ in qrels.itertuples(index=False)}
    assert not relevant & {(text_of[q], d) for d, q in zip(mined["docno"], mined["qid"], strict=False)}
    distinct = topics.drop_duplicates("query")
    vectors = static_encoder.encode_queries(distinct["query"].tolist())
    for docno, found in mined.groupby("docno"):
        scores = vectors @ static_encoder.encode_docs([documents[docno]])[0]
        best = distinct["qid"].to_numpy()[np.argsort(-scores, kind="stable")[:12]]
        expected = [q for q in best if (text_of[q], docno) not in relevant]
        assert set(found["qid"]) == set(expected)
    frame = mine_queries(static_encoder, topics, qrels, corpus, depth=12, negatives=4, seed=3)
    again = mine_queries(static_encoder, topics, qrels, corpus, depth=12, negatives=4, seed=3, document_block=3)
    pd.testing.assert_frame_equal(frame, again)


def test_query_negatives_from_a_pipeline_with_documents_as_queries(tmp_path):
    corpus = corpus_of({f"d{i}": f"text {i}" for i in range(40)}, tmp_path)
    found = pd.DataFrame({"qid": ["d1"] * 3 + ["d3"] * 3, "docno": ["a", "b", "zz"] * 2})
    found = found.assign(score=[3.0, 2.0, 1.0] * 2, rank=[0, 1, 2] * 2)
    pairs = QRELS[QRELS["docno"].isin(["d1", "d3"])]
    mined = mine_queries(Fixed(found), TOPICS, pairs, corpus)
    # zz is no training query; a and c are one text, for which d1 is relevant
    assert list(zip(mined["docno"], mined["qid"], strict=False)) == [("d1", "b"), ("d3", "a")]
    with pytest.raises(ValueError, match="corpus="):
        mine_queries(Fixed(found), TOPICS, pairs)
    with pytest.raises(KeyError, match="has to give columns 'qid', the document that it was asked with, and 'docno'"):
        mine_queries(Fixed(found.drop(columns="docno")), TOPICS, pairs, corpus)


def test_reduced_results_give_the_same_negatives_in_a_fraction_of_the_memory():
    random = np.random.default_rng(0)
    qids = [f"query {i:05}" for i in range(300)]
    docnos = np.array([f"document {i:06}" for i in range(5000)], dtype=object)
    frame = pd.DataFrame(
        {
            "qid": np.repeat(np.array(qids, dtype=object), 100),
            "query": np.repeat(np.array([f"the words of {qid}" for qid in qids], dtype=object), 100),
            "docno": docnos[random.integers(0, 5000, 30_000)],
            "score": random.normal(size=30_000).astype(np.float32),
            "rank": np.tile(np.arange(100), 300),
        }
    ).drop_duplicates(["qid", "docno"])
    topics = frame[["qid", "query"]].drop_duplicates()
    qrels = frame[frame["rank"] == 3][["qid", "docno"]].assign(label=1)
    small = reduce_results(frame)
    assert list(small.columns) == ["qid", "docno", "rank", "score"] and len(small) == len(frame)
    per_row = (small.memory_usage(deep=True).sum() - small["docno"].cat.categories.memory_usage(deep=True)) / len(small)
    assert per_row < 15 < frame.memory_usage(deep=True).sum() / len(frame) / 5
    for columns in (list(frame), ["qid", "query", "docno", "score"], ["qid", "query", "docno", "rank"]):
        given = frame[columns]
        mined, again = (mine_documents(f, topics, qrels, depth=50) for f in (given, reduce_results(given)))
        pd.testing.assert_frame_equal(mined, again)
    assert len(mined) > 5000


def test_pipelines_are_told_apart_by_their_functions():
    def stage(number):
        return pt.apply.doc_score(lambda row: number) >> pt.apply.generic(lambda frame: [x + 0 for x in frame])

    same, other = (mining.describe_source(stage(number)) for number in (1, 2))
    assert mining.describe_source(stage(1)) == same != other
    assert mining.describe_source(pt.apply.generic(lambda frame: [x + 1 for x in frame])) != mining.describe_source(
        pt.apply.generic(lambda frame: [x + 2 for x in frame])
    )


DESCRIBED = """
import pyterrier as pt
from pt_dance.mining import describe_source
def make(words):
    return lambda dense: dense % len(words)
words = {"a", "b", "c", "d", "e"}
print(describe_source(make(words)))
print(describe_source(pt.apply.doc_score(make(words)) >> pt.rewrite.reset()))
"""


def test_descriptions_are_the_same_in_every_process(capsys):
    exec(compile(DESCRIBED, "<string>", "exec"), {})
    said = capsys.readouterr().out
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", DESCRIBED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert done.stdout == said and "<lambda>#" in said and "0x" not in said


def test_weights_of_sources_may_be_numbers_of_numpy():
    weighted = [(results(), np.float32(2)), (results(), np.int64(1))]
    plain = [(results(), 2), (results(), 1)]
    mined, again = (mine_documents(source, TOPICS, QRELS, depth=40, negatives=6) for source in (weighted, plain))
    pd.testing.assert_frame_equal(mined, again)

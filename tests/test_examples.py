"""Training rows: every pair once an epoch, negatives from the right pools, texts as the corpus has them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformerTrainer

from pt_dance import Corpus
from pt_dance.encoder.token_memory import TokenMemory
from pt_dance.mining import positive_pairs
from pt_dance.training.batches import batches_of_pass
from pt_dance.training.examples import build_examples, columns_of
from pt_dance.training.teacher import TeacherScores
from pt_dance.training.token_cache import TokenCache

DOCUMENTS = 30
ASKED = []  # by teachers; not in a closure, whose values would tell one from another


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    documents = [{"docno": f"d{i}", "title": f"title {i}", "text": f"text {i}"} for i in range(DOCUMENTS)]
    return Corpus.build(documents, tmp_path_factory.mktemp("corpus") / "c", verbose=False)


@st.composite
def training_sets(draw):
    """Topics (some of one text), qrels (queries share documents), and pools without positives."""
    texts = draw(st.lists(st.sampled_from([f"text {i}" for i in range(8)]), min_size=2, max_size=10))
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(len(texts))], "query": texts})
    number = st.integers(0, len(texts) - 1)
    judged = draw(st.lists(st.tuples(number, st.integers(0, DOCUMENTS - 1)), min_size=2, max_size=25, unique=True))
    qrels = pd.DataFrame([(f"q{q}", f"d{d}", 1) for q, d in judged], columns=["qid", "docno", "label"])
    pairs = positive_pairs(topics, qrels)
    known = set(zip(pairs["qid"], pairs["docno"], strict=True))
    pool = draw(st.lists(st.tuples(number, st.integers(0, DOCUMENTS - 1)), max_size=60, unique=True))
    negatives = [(f"q{q}", f"d{d}") for q, d in pool if (f"q{q}", f"d{d}") not in known]
    positives = pairs["docno"].unique().tolist()
    pool = draw(st.lists(st.tuples(st.sampled_from(positives), number), max_size=40, unique=True))
    text_of = dict(zip(topics["qid"], topics["query"], strict=True))
    relevant = {(text_of[q], d) for q, d in known}
    query_negatives = [(d, f"q{q}") for d, q in pool if (text_of[f"q{q}"], d) not in relevant]
    return (
        topics,
        pairs,
        pd.DataFrame(negatives, columns=["qid", "docno"]),
        pd.DataFrame(query_negatives, columns=["docno", "qid"]),
        relevant,
    )


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=training_sets(), per_row=st.integers(1, 3), epochs=st.integers(1, 3), seed=st.integers(0, 3))
def test_rows_hold_every_pair_once_an_epoch_and_never_a_relevant_negative(corpus, data, per_row, epochs, seed):
    topics, pairs, negatives, query_negatives, relevant = data
    examples = build_examples(
        topics, pairs, corpus, negatives=negatives, query_negatives=query_negatives, negatives_per_row=per_row,
        query_negatives_per_row=per_row, epochs=epochs, seed=seed,
    )  # fmt: skip
    distinct = {(text, docno) for text, docno in relevant}
    text_of = {f"title {i} text {i}": f"d{i}" for i in range(DOCUMENTS)}
    pools = {q: set(f["docno"]) for q, f in negatives.merge(topics, on="qid").groupby("query")}
    query_pools = {d: set(f["query"]) for d, f in query_negatives.merge(topics, on="qid").groupby("docno")}
    seen_negatives = Counter()
    for epoch in range(epochs):
        listed = list(batches_of_pass(examples, epoch, 4, seed=[seed, epoch]))
        assert len(listed) == -(-examples.pairs // 4)
        rows = [row for batch in listed for row in examples.dataset[batch]["query"]]
        assert len(rows) == examples.pairs == len(distinct)
        batch_rows = examples.dataset[[row for batch in listed for row in batch]]
        found = {(q, text_of[p]) for q, p in zip(batch_rows["query"], batch_rows["positive"], strict=True)}
        assert found == distinct
        for i, (query, positive) in enumerate(zip(batch_rows["query"], batch_rows["positive"], strict=True)):
            drawn = [batch_rows[f"negative_{n + 1}"][i] for n in range(per_row)]
            docnos = [text_of[text] for text in drawn if text]
            pool = pools.get(query, set())
            assert set(docnos) <= pool and len(set(docnos)) == len(docnos) == min(per_row, len(pool))
            assert not {(query, docno) for docno in docnos} & relevant
            seen_negatives.update((query, docno) for docno in docnos)
            mined = [batch_rows[f"negative_query_{n + 1}"][i] for n in range(per_row)]
            mined = [text for text in mined if text]
            assert set(mined) <= query_pools.get(text_of[positive], set())
            assert not {(text, text_of[positive]) for text in mined} & relevant
    # going round the pool: no negative of a query comes twice more often than another
    for query in {q for q, _ in seen_negatives}:
        counts = [seen_negatives[query, docno] for docno in pools[query]]
        assert max(counts) - min(counts) <= 1 or per_row > len(pools[query])


def test_batches_avoid_a_query_or_positive_twice_and_depend_on_seed_and_epoch(corpus):
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(40)], "query": [f"text {i}" for i in range(40)]})
    qrels = pd.DataFrame(
        [(f"q{i}", f"d{d}", 1) for i in range(40) for d in (i % 20, (i + 7) % 20)], columns=["qid", "docno", "label"]
    )
    examples = build_examples(topics, positive_pairs(topics, qrels), corpus, epochs=1)
    first = list(batches_of_pass(examples, 0, 8, seed=1))
    for batch in first[:-2]:
        assert len(set(examples.rows.query[batch])) == len(set(examples.rows.positive[batch])) == len(batch)
    assert first == list(batches_of_pass(examples, 0, 8, seed=1))
    assert first != list(batches_of_pass(examples, 0, 8, seed=2))
    assert len(list(batches_of_pass(examples, 0, 12, drop_last=True, seed=2))) == 6


def test_training_on_some_topics_keeps_all_judgements(corpus):
    topics = pd.DataFrame({"qid": ["a", "b"], "query": ["text 1", "text 2"]})
    qrels = pd.DataFrame([("a", "d1", 1), ("b", "d1", 1), ("b", "d2", 1)], columns=["qid", "docno", "label"])
    examples = build_examples(topics, positive_pairs(topics, qrels), corpus, qids=pd.Series(["b"]))
    assert examples.pairs == 2 and examples.rows.relevance.nnz == 3
    assert columns_of(examples.rows) == {"query": "query", "positive": "document"}


def test_token_cache_gives_what_the_model_gives(corpus):
    from pt_dance import DualEncoder

    texts = [f"some words number {i} and others" for i in range(50)] + [""]
    tower = DualEncoder.static(texts, dim=8, vocab_size=200)
    towers = DualEncoder.two_towers(tower, DualEncoder.static(texts[:20], dim=8, vocab_size=100))
    for model, tasks in ((tower.model, [None]), (towers.model, ["query", "document"])):
        cache = TokenCache(model, TokenMemory(100))
        for task in tasks:
            for start in (0, 20, 10, 0):
                part = texts[start : start + 25]
                cached, plain = (
                    cache.preprocess(part, prompt="x ", task=task),
                    model.preprocess(part, prompt="x ", task=task),
                )
                assert np.array_equal(cached["input_ids"], plain["input_ids"])
                assert np.array_equal(cached["offsets"], plain["offsets"])
                assert cached.get("task") == plain.get("task")


@pytest.mark.parametrize("passages", [1, 11])
def test_no_column_takes_the_tokens_of_another_for_its_own(passages):
    """The trainer finds a column's features by the beginning of their names."""
    rows = SimpleNamespace(
        negatives=np.zeros((1, 12)), query_negatives=np.zeros((1, 12)), passages_per_document=passages
    )
    columns = list(columns_of(rows))
    names = [f"{column}_{feature}" for column in columns for feature in ("input_ids", "attention_mask")]
    inputs = {name: torch.zeros(1) for name in names}
    features, _ = SentenceTransformerTrainer.collect_features(None, inputs)
    assert len(features) == len(columns) == 1 + 13 * passages + 12
    assert all(set(feature) == {"input_ids", "attention_mask"} for feature in features)


def test_teachers_that_differ_in_their_function_only_keep_their_scores_apart(corpus, tmp_path, monkeypatch):
    topics = pd.DataFrame({"qid": ["1", "2"], "query": ["a", "b"]})
    pairs = pd.DataFrame({"qid": ["1", "2"], "docno": ["d1", "d2"]})
    ASKED.clear()

    def scores(factor, path):
        def score(row):
            ASKED.append(factor)
            return factor * float(row["docno"][1:])

        teacher = TeacherScores(pt.apply.doc_score(score), path)
        return build_examples(topics, pairs, corpus, teacher=teacher).rows.teacher_positive.tolist()

    monkeypatch.chdir(tmp_path)
    assert scores(2, "teacher.sqlite") == [2, 4] and scores(3, tmp_path / "teacher.sqlite") == [3, 6]
    assert scores(2, "teacher.sqlite") == [2, 4]
    assert ASKED == [2, 2, 3, 3]
    kept = TeacherScores(pt.apply.doc_score(len), "teacher.sqlite")
    monkeypatch.chdir("/")
    assert kept.path == tmp_path / "teacher.sqlite"

"""What an encoder reads decides what is the same: copies of what is relevant, and queries it cannot tell apart."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_dance import Corpus, DenseIndex, DualEncoder, mining
from pt_dance.training.examples import build_examples
from small_models import small_bert
from test_losses_rule1 import build, influence

WORDS = ["apple", "river", "stone", "cloud", "piano", "tiger", "lemon", "bridge"]
DOCUMENTS = [f"{a} {b}" for a in WORDS for b in WORDS if a != b]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, DualEncoder]:
    folder = tmp_path_factory.mktemp("bert")
    return {
        "static": DualEncoder.static(DOCUMENTS, dim=16, vocab_size=300),
        "bert": DualEncoder(small_bert(DOCUMENTS, folder)),
        "short bert": DualEncoder(small_bert(DOCUMENTS, folder / "2"), max_length=4),
    }


texts = st.lists(st.sampled_from([*WORDS, "Apple", "RIVER", "unheard", "of,", " ", "\t"]), max_size=5).map(" ".join)


@pytest.mark.parametrize("name", ["static", "bert", "short bert"])
@settings(max_examples=40, deadline=None)
@given(pair=st.tuples(texts, texts))
def test_texts_have_equal_hashes_exactly_if_their_vectors_are_equal(encoders, name, pair):
    encoder = encoders[name]
    first, second = encoder.encode_docs(list(pair))
    equal = encoder.reading_digests(list(pair))
    assert (equal[0] == equal[1]) == bool(np.allclose(first, second, atol=1e-5)), pair


def test_what_a_transformer_reads_has_an_order_and_a_mean_has_none(encoders):
    pair = ["apple river", "river apple"]
    assert len(set(encoders["static"].reading_digests(pair))) == 1
    assert len(set(encoders["bert"].reading_digests(pair))) == 2
    # Cut at four tokens, two of them special.
    assert len(set(encoders["short bert"].reading_digests(["apple river stone", "apple river cloud"]))) == 1


def test_prompts_and_towers_are_those_of_the_task(encoders):
    other = DualEncoder.static(DOCUMENTS, dim=16, vocab_size=60, seed=3)
    both = DualEncoder.two_towers(encoders["static"], other)
    for task, tower in (("query", encoders["static"]), ("document", other)):
        np.testing.assert_array_equal(both.reading_digests(["tiger"], task), tower.reading_digests(["tiger"]))


def collection(tmp_path, *, copies):
    """Documents d0.., and each of them again as c0.., as ``copies`` changes its text."""
    documents = [{"docno": f"d{i}", "text": text} for i, text in enumerate(DOCUMENTS)]
    documents += [{"docno": f"c{i}", "text": copies(text)} for i, text in enumerate(DOCUMENTS)]
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(12)], "query": DOCUMENTS[:12]})
    qrels = pd.DataFrame({"qid": topics["qid"], "docno": [f"d{i}" for i in range(12)], "label": 1})
    return Corpus.build(documents, tmp_path / "corpus", fields=["text"], verbose=False), topics, qrels


def copies_mined(corpus, topics, qrels, index, **options):
    mined = mining.mine_documents(
        index.retriever(), topics, qrels, corpus, depth=20, negatives=20, sampling="top", **options
    )
    own = dict(zip(qrels["qid"], qrels["docno"], strict=True))
    return sum(docno == "c" + own[qid][1:] for qid, docno in zip(mined["qid"], mined["docno"], strict=True)), mined


def test_a_copy_of_a_positive_is_never_mined(tmp_path, encoders):
    corpus, topics, qrels = collection(tmp_path, copies=str)
    index = DenseIndex(tmp_path / "index", encoders["static"], verbose=False).index(corpus)
    count, mined = copies_mined(corpus, topics, qrels, index)
    assert count == 0 and mined.attrs["mining"]["removed"]["positives"] >= 2 * len(topics)
    # Without the texts a copy is not known to be one, so the index does rank them that high.
    assert copies_mined(None, topics, qrels, index)[0] == len(topics)


def test_what_only_the_encoder_reads_the_same_needs_the_encoder(tmp_path, encoders):
    corpus, topics, qrels = collection(tmp_path, copies=str.upper)
    index = DenseIndex(tmp_path / "index", encoders["static"], verbose=False).index(corpus)
    assert copies_mined(corpus, topics, qrels, index)[0] == len(topics)
    assert copies_mined(corpus, topics, qrels, index, reads=encoders["static"])[0] == 0
    readings = mining.Readings(corpus, encoders["static"])
    assert copies_mined(corpus, topics, qrels, index, reads=readings)[0] == 0


def test_documents_of_passages_are_the_same_if_their_passages_are(tmp_path, encoders):
    long = " ".join(WORDS)
    documents = [
        {"docno": "a", "text": long},
        {"docno": "b", "text": long.upper()},
        {"docno": "c", "text": long + " tiger"},
        {"docno": "d", "text": "tiger " + long},
    ]
    corpus = Corpus.build(documents, tmp_path / "corpus", fields=["text"], verbose=False)
    passages = corpus.to_passages(tmp_path / "passages", length=3, stride=3, most=2, verbose=False)
    for encoder, same in ((None, [0, 1, 0, 2]), (encoders["bert"], [0, 0, 0, 1])):
        found = mining.Readings(passages, encoder).documents(["a", "b", "c", "d"])
        assert pd.factorize(found)[0].tolist() == same


def test_each_document_is_read_once(tmp_path):
    class Counting:
        read = 0

        def reading_digests(self, texts, task):
            self.read += len(texts)
            return np.arange(len(texts), dtype=np.uint64)

    corpus, _, _ = collection(tmp_path, copies=str)
    readings, docnos = mining.Readings(corpus, counting := Counting()), ["d1", "d2", "d1", "nowhere"]
    first = readings.documents(docnos)
    assert counting.read == 2 and first[0] == first[2] and len(set(first)) == 3
    np.testing.assert_array_equal(readings.documents(docnos), first)
    assert counting.read == 2
    with pytest.raises(TypeError, match=r"must be a pt_dance\.DualEncoder or mining\.Readings"):
        mining.Readings(corpus, "bert")


ALIKE = pd.DataFrame({"qid": ["1", "2", "3"], "query": ["apple river", "Apple River", "stone"]})
JUDGED = pd.DataFrame({"qid": ["1", "2", "3"], "docno": ["d0", "d1", "d2"], "label": 1})


def test_queries_that_read_the_same_share_their_positives(encoders):
    assert len(mining.positive_pairs(ALIKE, JUDGED)) == 3
    pairs = mining.positive_pairs(ALIKE, JUDGED, encoders["static"])
    assert pairs.values.tolist() == [["1", "d0"], ["1", "d1"], ["2", "d0"], ["2", "d1"], ["3", "d2"]]


@pytest.mark.parametrize("kind", ["vectors", "pipeline"])
def test_queries_that_read_the_same_are_no_negatives_of_each_other_s_documents(tmp_path, encoders, kind):
    corpus, _, _ = collection(tmp_path, copies=str)
    encoder = encoders["static"]
    found = [(docno, qid, 3.0 - rank, rank) for docno in ("d0", "d1", "d2") for rank, qid in enumerate("123")]
    everything = pt.Transformer.from_df(pd.DataFrame(found, columns=["qid", "docno", "score", "rank"]))
    mined = mining.mine_queries(encoder if kind == "vectors" else everything, ALIKE, JUDGED, corpus, reads=encoder)
    assert mined[["docno", "qid"]].values.tolist() == [["d0", "3"], ["d1", "3"], ["d2", "1"]]
    if kind == "vectors":  # the encoder that is searched with reads the texts, too
        pd.testing.assert_frame_equal(mined, mining.mine_queries(encoder, ALIKE, JUDGED, corpus))


def rows_of(tmp_path, reads, **mined):
    corpus, topics, _ = collection(tmp_path, copies=str.upper)
    topics = pd.DataFrame({"qid": list("abcd"), "query": ["about apple", "About APPLE", "about river", "stone"]})
    qrels = pd.DataFrame({"qid": list("abcd"), "docno": ["d0", "d1", "c0", "d9"], "label": 1})
    pairs = mining.positive_pairs(topics, qrels, reads)
    return build_examples(topics, pairs, corpus, reads=reads, **mined).rows


def test_masks_of_training_know_copies_and_queries_that_read_the_same(tmp_path, encoders):
    negatives = pd.DataFrame({"qid": ["a", "a", "d"], "docno": ["c1", "d20", "c9"]})
    query_negatives = pd.DataFrame({"docno": ["d0", "d0", "d9"], "qid": ["b", "c", "a"]})
    mined = {"negatives": negatives, "query_negatives": query_negatives, "negatives_per_row": 2}
    rows = rows_of(tmp_path, encoders["static"], query_negatives_per_row=2, **mined)
    # a and b are one query with d0 and d1; c0 reads as d0, so c shares d0 with it.
    assert rows.relevance.shape[0] == 3
    row = {(int(q), int(p)): i for i, (q, p) in enumerate(zip(rows.query, rows.positive, strict=True))}
    assert set(row) == {(0, 0), (0, 1), (1, 0), (2, 9)}
    queries = np.array([0, 1, 2])
    assert rows.relevant(queries, np.array([0, 1, 9])).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert rows.related_queries(queries, queries).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert rows.related_documents(np.array([0, 9]), np.array([1, 9])).tolist() == [[1, 0], [0, 1]]
    # Mined: c1 is a copy of a's d1 and c9 one of d's d9: masked. d20 is a negative.
    own = rows.relevant_to_own(rows.query, rows.negatives)
    assert {int(n) for n in rows.negatives[~own & (rows.negatives >= 0)]} == {20}
    dual = rows.mirrored.relevant_to_own(rows.positive, rows.query_negatives)
    assert {int(n) for n in rows.query_negatives[~dual & (rows.query_negatives >= 0)]} == {0}


# --- whatever the texts are ------------------------------------------------------------------------------------------

TEXTS = DOCUMENTS[:3]
SPELLINGS = [str, str.upper, str.title, lambda text: f" {text}\n", lambda text: text.replace(" ", "  \t")]
SPELT = [spelling(text) for text in TEXTS for spelling in SPELLINGS]
numbers_of_texts = st.integers(0, len(SPELT) - 1)


def words(text):
    """What the encoders here read of a text."""
    return " ".join(text.lower().split())


@pytest.fixture(scope="module")
def spelt(tmp_path_factory):
    """Every text in every spelling, twice, each under a docno of its own."""
    documents = [{"docno": f"d{i}", "text": text} for i, text in enumerate(SPELT * 2)]
    return Corpus.build(documents, tmp_path_factory.mktemp("spelt") / "corpus", fields=["text"], verbose=False)


@st.composite
def judged(draw):
    """Topics, of which many read the same, and a few judgements."""
    queries = draw(st.lists(numbers_of_texts, min_size=1, max_size=5))
    pairs = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, 2 * len(SPELT) - 1))
    found = sorted(draw(st.sets(pairs, min_size=1, max_size=4)))
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(len(queries))], "query": [SPELT[i] for i in queries]})
    return topics, pd.DataFrame([{"qid": f"q{q}", "docno": f"d{d}", "label": 1} for q, d in found])


def relevant_texts(topics, qrels, corpus):
    """What is read of the two texts of each judged pair."""
    queries = topics.set_index("qid")["query"].loc[qrels["qid"]]
    return {(words(q), words(d)) for q, d in zip(queries, corpus.texts(qrels["docno"].tolist()), strict=True)}


@settings(max_examples=40, deadline=None)
@given(drawn=judged(), name=st.sampled_from(["static", "bert"]))
def test_texts_decide_what_is_mined(spelt, encoders, drawn, name):
    """All is ranked, and exactly what does not read as a judged pair is mined, of documents and of queries."""
    topics, qrels = drawn
    docnos, encoder = spelt.docno(range(len(spelt))).tolist(), encoders[name]
    relevant = relevant_texts(topics, qrels, spelt)
    text, query = dict(zip(docnos, spelt.texts(docnos), strict=True)), topics.set_index("qid")["query"]
    options = dict(depth=99, negatives=99, sampling="top", reads=encoder)
    ranked = pd.DataFrame([(q, d, rank) for q in topics["qid"] for rank, d in enumerate(docnos)])
    ranked = ranked.set_axis(["qid", "docno", "rank"], axis=1).assign(score=lambda rows: -rows["rank"])
    mined = mining.mine_documents(ranked, topics, qrels, spelt, **options)
    assert set(zip(mined["qid"], mined["docno"], strict=True)) == {
        (q, d) for q in topics["qid"] for d in docnos if (words(query[q]), words(text[d])) not in relevant
    }
    ranked = pd.DataFrame([(d, q, rank) for d in docnos for rank, q in enumerate(topics["qid"])])
    ranked = ranked.set_axis(["qid", "docno", "rank"], axis=1).assign(score=lambda rows: -rows["rank"])
    mined = mining.mine_queries(pt.Transformer.from_df(ranked), topics, qrels, spelt, **options)
    first = topics.assign(read=topics["query"].map(words)).drop_duplicates("read")["qid"]
    assert set(zip(mined["docno"], mined["qid"], strict=True)) == {
        (d, q) for d in qrels["docno"] for q in first if (words(query[q]), words(text[d])) not in relevant
    }


def share(pairs, firsts):
    """Whether two texts read the same, or have a text in common that is relevant to both."""
    others = {first: {second for one, second in pairs if one == first} for first in firsts}
    return np.array([[a == b or bool(others[a] & others[b]) for b in firsts] for a in firsts])


@settings(max_examples=40, deadline=None)
@given(drawn=judged(), name=st.sampled_from(["static", "bert"]), seed=st.integers(0, 99))
def test_texts_decide_what_a_loss_pushes_apart(spelt, encoders, drawn, name, seed):
    """In the batch, in the same tower and in the dual direction, whatever was given as mined."""
    topics, qrels = drawn
    docnos, encoder = spelt.docno(range(len(spelt))).tolist(), encoders[name]
    every = pd.DataFrame([(q, d) for q in topics["qid"] for d in docnos], columns=["qid", "docno"])
    pairs = mining.positive_pairs(topics, qrels, encoder)
    options = dict(negatives=every, query_negatives=every, negatives_per_row=4, query_negatives_per_row=2, seed=seed)
    made = build_examples(topics, pairs, spelt, reads=encoder, **options)
    numbers = np.arange(len(made.rows))
    batch = made.dataset[numbers.tolist()]
    texts = {
        kind: [words(text) for name in ("", *map(str, range(1, 5))) for text in batch.get(column.format(name), [])]
        for kind, column in (("query", "negative_query_{}"), ("document", "negative_{}"))
    }
    queries = [words(text) for text in batch["query"]] + texts["query"]
    documents = [words(text) for text in batch["positive"]] + texts["document"]
    known = relevant_texts(topics, qrels, spelt)
    relevant = np.array([[(q, d) in known for d in documents] for q in queries])
    own = np.zeros_like(relevant)
    own[numbers, numbers] = True
    there = np.array([bool(q) for q in queries])[:, None] & np.array([bool(d) for d in documents])
    related = {"query": share(known, queries), "document": share({(d, q) for q, d in known}, documents)}
    size = len(numbers)
    mined = np.zeros_like(relevant)
    for place in range(1, 5):
        mined[numbers, place * size + numbers] = True
    for name, dual in (
        ("contrastive", False), ("contrastive", True), ("samtone-both", False), ("samtone-query", True),
        ("pairwise", False), ("pairwise", True),
    ):  # fmt: skip
        across, same_query, same_document, *_ = influence(
            build(name, made.rows, dual), made.rows, numbers, np.random.default_rng(seed)
        )
        assert (np.abs(across[(relevant | ~there) & ~own]) < 1e-12).all(), (name, dual)
        pushed = (mined if name == "pairwise" else True) & there & ~relevant
        assert (across[:size][pushed[:size]] > 1e-12).all(), (name, dual)
        if dual and name != "pairwise":
            assert (across[:, :size][(there & ~relevant)[:, :size]] > 1e-12).all(), (name, dual)
        for products, texts_of in ((same_query, "query"), (same_document, "document")):
            others = related[texts_of] & ~np.eye(len(products), dtype=bool)
            assert (np.abs(products[others]) < 1e-12).all(), (name, dual, texts_of)
        if name.startswith("samtone"):
            apart = ~related["query"][:size, :size]
            assert (same_query[:size, :size][apart] > 1e-12).all(), (name, dual)


def test_without_the_encoder_only_equal_texts_are_the_same(tmp_path):
    rows = rows_of(tmp_path, None)
    assert rows.relevance.shape[0] == 4 and sorted(rows.positive.tolist()) == [0, 1, 9, len(DOCUMENTS)]

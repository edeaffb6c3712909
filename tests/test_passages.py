"""MaxP: a document's score is that of its best passage, in retrieval, mining and training alike."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from ir_measures import nDCG

from losses_reference import LOSSES, Texts, make, random_rows
from pt_dance import (
    Corpus,
    DanceRetriever,
    DenseIndex,
    DualEncoder,
    PassageCorpus,
    Round,
    mining,
    recipes,
)
from pt_dance.storage import writing
from pt_dance.training.examples import build_examples, columns_of
from pt_dance.training.schedule import plan
from pt_dance.training.validation import documents_to_queries
from small_collection import standard_library
from small_models import small_bert

WORDS, STRIDE = 12, 6


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Some real documents, their passages (up to 4), and an index of these."""
    folder = tmp_path_factory.mktemp("passages")
    collection = standard_library()
    corpus = Corpus.build(collection.documents, folder / "corpus", verbose=False)
    passages = corpus.to_passages(folder / "passages", length=WORDS, stride=STRIDE, most=4, verbose=False)
    texts = corpus.texts_at(range(len(corpus)))
    encoder = DualEncoder.static(texts, dim=24, vocab_size=2000, seed=3)
    index = DenseIndex(folder / "index", encoder, verbose=False).index(passages)
    return collection, corpus, passages, encoder, index, folder


def brute_force(encoder, passages: PassageCorpus, queries: list[str]) -> np.ndarray:
    """The score of every query and document, (queries, documents), in float64."""
    vectors = encoder.encode_docs(passages.passages.texts_at(range(len(passages.passages)))).astype(float)
    products = encoder.encode_queries(queries).astype(float) @ vectors.T
    ends = np.cumsum(passages.passage_counts)
    return np.stack([products[:, e - c : e].max(axis=1) for e, c in zip(ends, passages.passage_counts, strict=True)], 1)


# --- the corpus


def test_passages_are_those_of_pyterriers_sliding_window(small):
    collection, corpus, passages, *_ = small
    frame = pd.DataFrame({"docno": collection.documents["docno"], "text": corpus.texts_at(range(len(corpus)))})
    cut = pt.text.sliding(text_attr="text", length=WORDS, stride=STRIDE, prepend_attr=None)(frame)
    cut = dict(zip(cut["docno"], cut["text"], strict=True))
    stored = {d["docno"]: d["text"] for d in passages.passages.get_corpus_iter(verbose=False)}
    first = {docno for docno in cut if int(docno.rpartition("%p")[2]) < 4}
    assert first <= set(stored) and all(stored[docno] == cut[docno] for docno in first)
    # PyTerrier's own leaves out what is left after the last full window
    assert set(stored) - first
    for docno in set(stored) - first:
        document, _, number = docno.rpartition("%p")
        words = corpus.texts([document])[0].split()
        assert stored[docno].split() == words[int(number) * STRIDE :] and len(stored[docno].split()) < WORDS
    assert 1 in passages.passage_counts and 4 in passages.passage_counts
    # whole documents are what everything else sees
    assert passages.texts_at([3]) == corpus.texts_at([3])
    assert len(passages) == len(corpus) and passages.fingerprint != corpus.fingerprint


def test_all_words_of_a_document_are_in_a_passage_without_a_limit(tmp_path, small):
    _, corpus, *_ = small
    passages = corpus.to_passages(tmp_path / "all", length=WORDS, stride=STRIDE, most=None, verbose=False)
    for row in range(0, len(corpus), 17):
        texts = passages.passages.texts_at([r for r in passages.passage_rows([row])[0] if r >= 0])
        assert set(corpus.texts_at([row])[0].split()) == {word for text in texts for word in text.split()}
    assert passages.passage_counts.max() > 4


def test_a_field_is_put_before_every_passage_once(tmp_path):
    corpus = Corpus.build(
        [{"docno": "a", "title": "On trees", "text": "one two three four five"}, {"docno": "b", "text": "six"}],
        tmp_path / "corpus",
        separator=" | ",
        verbose=False,
    )
    passages = corpus.to_passages(tmp_path / "p", length=2, stride=2, most=None, prepend="title", verbose=False)
    texts = {d["docno"]: d["text"] for d in passages.passages.get_corpus_iter(verbose=False)}
    assert list(texts.values()) == ["On trees | one two", "On trees | three four", "On trees | five", "six"]


def test_white_space_at_the_end_costs_no_words(tmp_path):
    corpus = Corpus.build([{"docno": "a", "text": "one two three four five\n"}], tmp_path / "corpus", verbose=False)
    passages = corpus.to_passages(tmp_path / "p", length=3, stride=2, most=None, verbose=False)
    texts = [d["text"].split() for d in passages.passages.get_corpus_iter(verbose=False)]
    assert texts == [["one", "two", "three"], ["three", "four", "five"], ["five"]]


def test_rows_of_passages(small):
    *_, passages, _, _, _ = small
    rows = passages.passage_rows(np.array([1, -1, 0]))
    assert rows.shape[1] == passages.passage_counts[[0, 1]].max()
    assert (rows[1] == -1).all()
    assert (rows[2] >= 0).sum() == passages.passage_counts[0] and rows[2, 0] == 0
    assert rows[0, 0] == passages.passage_counts[0]


def test_reopened_and_pickled(small):
    *_, passages, _, _, folder = small
    for again in (PassageCorpus(folder / "passages"), pickle.loads(pickle.dumps(passages))):
        assert again == passages and again.texts_at([5]) == passages.texts_at([5])
        assert (again.passage_counts == passages.passage_counts).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length"),
        ({"stride": 1.5}, "stride"),
        ({"length": 5, "stride": 6}, "stride=6 is more than length=5"),
        ({"most": 0}, "most"),
        ({"prepend": "author"}, "prepend"),
        ({"prepend": "text"}, "must be the first"),
    ],
)
def test_options_that_make_no_sense(tmp_path, small, options, message):
    with pytest.raises(ValueError, match=message):
        small[1].to_passages(tmp_path / "p", verbose=False, **options)
    assert not list(tmp_path.iterdir())


def test_damage_is_named(tmp_path, small):
    documents = [{"docno": "a", "text": "b c"}, {"docno": "b", "text": "d"}]
    corpus = Corpus.build(documents, tmp_path / "corpus", fields=["text"], verbose=False)
    path = tmp_path / "p"
    assert corpus.to_passages(path, length=1, stride=1, verbose=False).passage_counts.tolist() == [2, 1]
    before = (path / "counts.u4").stat().st_ino
    assert corpus.to_passages(path, length=1, stride=1, verbose=False) == PassageCorpus(path)
    assert (path / "counts.u4").stat().st_ino == before
    other = Corpus.build(documents[:1], tmp_path / "other", fields=["text"], verbose=False)
    for source, options, says in (
        (corpus, {"length": 2, "stride": 1}, "length=1"),
        (corpus, {"length": 1, "stride": 1, "most": None}, "most=8"),
        (other, {"length": 1, "stride": 1}, "those of"),
    ):
        with pytest.raises(FileExistsError, match=f"holds other passages .{says}.*overwrite=True"):
            source.to_passages(path, verbose=False, **options)
    with pytest.raises(FileExistsError, match="is no corpus of passages"):
        corpus.to_passages(corpus.path, overwrite=True, verbose=False)
    assert corpus.to_passages(path, length=2, stride=2, overwrite=True, verbose=False).passage_counts.tolist() == [1, 1]
    assert corpus.to_passages(path, length=1, stride=1, overwrite=True, verbose=False).passage_counts.tolist() == [2, 1]
    with pytest.raises(TypeError, match="holds passages already"):
        PassageCorpus(path).to_passages(tmp_path / "q", verbose=False)
    with pytest.raises(ValueError, match="no corpus of passages"):
        PassageCorpus(tmp_path / "corpus")
    with pytest.raises(FileNotFoundError, match="to_passages"):
        PassageCorpus(tmp_path / "nowhere")
    counts = (path / "counts.u4").read_bytes()
    for damaged in (counts[4:] + counts[:4], counts[:-1], counts + b"\0"):
        (path / "counts.u4").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"counts\.u4"):
            PassageCorpus(path)
    meta = json.loads((path / "pt_meta.json").read_text())
    for wrong, message in [
        ({"documents_fingerprint": "other"}, "not the one that"),
        ({"documents": "a\0b"}, "relative path"),
        ({"documents": str(corpus.path.resolve())}, "relative path"),
        ({"documents": 7}, "damaged"),
    ]:
        (path / "pt_meta.json").write_text(json.dumps(meta | wrong))
        with pytest.raises(ValueError, match=message):
            PassageCorpus(path)


def test_what_a_killed_call_left_is_made_anew(tmp_path, small, monkeypatch):
    publish = writing.publish_folder

    def killed(building, final):
        if final.name == "p":
            raise KeyboardInterrupt
        publish(building, final)

    monkeypatch.setattr(writing, "remove_folder", lambda path: None)  # nobody clears up after a SIGKILL
    monkeypatch.setattr(writing, "publish_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        small[1].to_passages(tmp_path / "p", verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == [".p.building"]
    assert len(list((tmp_path / ".p.building").iterdir())) == 3
    monkeypatch.undo()
    made = small[1].to_passages(tmp_path / "p", verbose=False)
    assert made.passages == PassageCorpus(tmp_path / "p").passages
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


# --- retrieval


@pytest.mark.parametrize("k", [1, 7, 60, 10_000])
def test_retrieval_finds_the_documents_with_the_best_passages(small, k):
    collection, corpus, passages, encoder, index, _ = small
    topics = collection.topics.head(40)
    scores = brute_force(encoder, passages, topics["query"].tolist())
    found = index.retriever(num_results=k)(topics)
    docnos = corpus.docno(range(len(corpus)))
    for number, (qid, part) in enumerate(found.groupby("qid", sort=False)):
        assert qid == topics["qid"].iloc[number]
        # within float32's last bit documents may change places
        order = np.argsort(-scores[number], kind="stable")[: len(part)]
        np.testing.assert_allclose(part["score"], scores[number][order], atol=1e-6)
        own = scores[number][[int(np.flatnonzero(docnos == d)[0]) for d in part["docno"]]]
        np.testing.assert_allclose(part["score"], own, atol=1e-6)
        assert part["docno"].is_unique and len(part) == min(k, len(corpus))
        assert part["rank"].tolist() == list(range(len(part)))


def test_the_same_as_pyterriers_max_passage_over_an_index_of_plain_passages(small, tmp_path):
    collection, _, passages, encoder, index, _ = small
    plain = DenseIndex(tmp_path / "plain", encoder, verbose=False).index(passages.passages)
    topics = collection.topics.head(20)
    expected = (plain.retriever(num_results=len(plain)) >> pt.text.max_passage())(topics)
    found = index.retriever(num_results=len(passages))(topics)
    merged = found.merge(expected, on=["qid", "docno"], suffixes=("", "_expected"))
    assert len(merged) == len(found) == len(expected)
    assert (merged["score"] == merged["score_expected"]).all()


def test_one_document_with_all_the_best_passages_does_not_crowd_out_the_others(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    query = vectors[0]
    documents = [{"docno": f"a%p{i}", "doc_vec": query * (2 + i / 1000)} for i in range(200)]
    documents += [{"docno": f"d{n:02d}%p{i}", "doc_vec": vectors[1 + n + i]} for n in range(40) for i in range(2)]
    index = DenseIndex(tmp_path / "index", verbose=False).index(documents)
    as_passages(index)
    found = index.retriever(num_results=30)(pd.DataFrame({"qid": ["1"], "query_vec": [query]}))
    assert found["docno"].tolist()[0] == "a" and found["docno"].is_unique and len(found) == 30
    best = {f"d{n:02d}": max(float(vectors[1 + n + i] @ query) for i in range(2)) for n in range(40)}
    assert found["docno"].tolist()[1:] == sorted(best, key=best.get, reverse=True)[:29]


def test_many_queries_that_have_to_look_deeper(tmp_path, monkeypatch):
    from pt_dance.index import documents as index_documents

    monkeypatch.setattr(index_documents, "_CELLS", 1000)  # so that they do it a few at a time
    rng = np.random.default_rng(1)
    documents = [{"docno": f"a%p{i}", "doc_vec": np.array([3.0, 0, 0, 0])} for i in range(100)]
    documents += [{"docno": f"d{n:03d}%p{i}", "doc_vec": rng.normal(size=4)} for n in range(60) for i in range(2)]
    index = DenseIndex(tmp_path / "index", verbose=False).index(documents)
    as_passages(index)
    vectors = rng.normal(size=(50, 4)).astype(np.float32)
    queries = pd.DataFrame({"qid": [str(i) for i in range(50)], "query_vec": list(vectors)})
    stored = np.stack([d["doc_vec"] for d in documents]).astype(np.float32)
    products = vectors @ stored.T
    best = np.stack([products[:, :100].max(1), *(products[:, 100 + 2 * n : 102 + 2 * n].max(1) for n in range(60))], 1)
    names = np.array(["a", *(f"d{n:03d}" for n in range(60))])
    found = index.retriever(num_results=20)(queries)
    for row, (_, part) in enumerate(found.groupby("qid", sort=False)):
        assert part["docno"].tolist() == names[np.argsort(-best[row], kind="stable")[:20]].tolist()


def test_ties_are_ordered_by_the_documents_docnos(tmp_path):
    # "a!" sorts before "a", but "a!%p0" after "a%p0" would be wrong the other way round
    documents = [{"docno": f"{d}%p{i}", "doc_vec": [1.0, 0.0]} for d in ("b", "a", "a!", "c") for i in range(3)]
    index = DenseIndex(tmp_path / "index", verbose=False).index(documents)
    as_passages(index)
    queries = pd.DataFrame({"qid": ["1"], "query_vec": [np.array([1.0, 0.0])]})
    for k in (1, 2, 3, 4):
        assert index.retriever(num_results=k)(queries)["docno"].tolist() == ["a", "a!", "b", "c"][:k]


def as_passages(index: DenseIndex) -> None:
    """Say in an index's metadata that its documents are passages, as indexing a PassageCorpus does."""
    from pathlib import Path

    meta = Path(index.index_path) / "pt_meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"passages": True}))
    index.forget()


def test_rescoring_gives_the_scores_of_retrieval(small):
    collection, _, passages, _, index, _ = small
    topics = collection.topics.head(15)
    retriever = index.retriever(num_results=len(passages))
    found = retriever(topics)
    shuffled = found.sample(frac=0.3, random_state=1)[["qid", "query", "docno"]]
    again = retriever(shuffled)
    assert again["docno"].tolist() == shuffled["docno"].tolist()
    merged = again.merge(found, on=["qid", "docno"], suffixes=("", "_found"))
    assert (merged["score"] == merged["score_found"]).all()
    with pytest.raises(KeyError, match="nobody"):
        retriever(shuffled.assign(docno="nobody"))


def test_approximate_retrieval_gives_documents(small):
    collection, _, _, _, index, _ = small
    ann = index.ann_retriever(num_results=40, method="hnsw")
    topics = collection.topics.head(30)
    assert (ann(topics).groupby("qid").size() == 40).mean() > 0.6, "as many documents as were asked for, mostly"
    ann = index.ann_retriever(num_results=10, method="hnsw", candidates=100)
    found, exact = ann(topics), index.retriever(num_results=10)(topics)
    assert ann.recall(topics, 10) > 0.95
    merged = found.merge(exact, on=["qid", "docno"], suffixes=("", "_exact"))
    assert len(merged) > 0.95 * len(exact) and (merged["score"] == merged["score_exact"]).all()


def test_passages_and_whole_documents_are_not_mixed_in_an_index(tmp_path, small):
    _, corpus, passages, encoder, *_ = small
    whole = DenseIndex(tmp_path / "whole", encoder, verbose=False).index(corpus)
    with pytest.raises(ValueError, match="whole documents"):
        whole.append(passages)
    cut = DenseIndex(tmp_path / "cut", encoder, verbose=False).index(passages)
    with pytest.raises(ValueError, match="passages"):
        cut.append([{"docno": "new", "text": "text"}])


def test_docnos_that_are_no_passages_are_refused(tmp_path):
    index = DenseIndex(tmp_path / "index", verbose=False).index([{"docno": "a", "doc_vec": [1.0]}])
    as_passages(index)
    with pytest.raises(ValueError, match="'a' is none"):
        index.retriever()(pd.DataFrame({"qid": ["1"], "query_vec": [np.array([1.0])]}))


# --- mining and evaluation from documents to queries


def test_query_negatives_are_found_by_the_best_passage(small):
    collection, corpus, passages, encoder, index, _ = small
    topics, qrels = collection.topics, collection.qrels
    options = dict(depth=15, negatives=5, sampling="top", seed=1)
    mined = mining.mine_queries(encoder, topics, qrels, passages, index=index, **options)
    encoded = mining.mine_queries(encoder, topics, qrels, passages, **options)
    pd.testing.assert_frame_equal(mined[["docno", "qid"]], encoded[["docno", "qid"]])
    distinct = topics.drop_duplicates("query").sort_values("qid", kind="stable")
    scores = brute_force(encoder, passages, distinct["query"].tolist())
    relevant = set(zip(qrels["qid"], qrels["docno"], strict=True))
    rows = dict(zip(corpus.docno(range(len(corpus))), range(len(corpus)), strict=True))
    for docno, part in list(mined.groupby("docno"))[:25]:
        own = scores[:, rows[docno]]
        best = [distinct["qid"].iloc[i] for i in np.argsort(-own, kind="stable")[:15]]
        best = [qid for qid in best if (qid, docno) not in relevant][:5]
        np.testing.assert_allclose(part["score"], [own[distinct["qid"].tolist().index(q)] for q in best], atol=1e-6)


def test_documents_to_queries_by_the_best_passage(small):
    collection, corpus, passages, encoder, index, _ = small
    topics, qrels = collection.topics.head(50), collection.qrels
    found, reverse = documents_to_queries(index, topics, qrels, 10)
    scores = brute_force(encoder, passages, topics["query"].tolist())
    rows = dict(zip(corpus.docno(range(len(corpus))), range(len(corpus)), strict=True))
    assert set(found["qid"]) == set(reverse["qid"])
    for docno, part in found.groupby("qid"):
        np.testing.assert_allclose(part["score"], np.sort(scores[:, rows[docno]])[::-1][:10], atol=1e-6)


# --- training


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("seed", range(3))
def test_losses_with_passages_equal_their_formula_with_the_best_passage(name, seed):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 9, 2, 2)
    # every document has its own number of passages, some of which no batch column is left for
    rows = replace(rows, passages=rng.integers(1, 4, rows.relevance.shape[1]))
    numbers = rng.permutation(len(rows))[:6]
    queries = rng.normal(size=(rows.relevance.shape[0] + 1, 5))
    passages = [rng.normal(size=(count, 5)) for count in rows.passages] + [np.ones((1, 5))]
    most = rows.passages_per_document

    def objects(ids: np.ndarray) -> np.ndarray:
        made = np.empty(ids.shape, dtype=object)
        for place in np.ndindex(ids.shape):
            made[place] = passages[ids[place]]
        return made

    reference = Texts(
        queries[rows.query[numbers]],
        objects(rows.positive[numbers]),
        objects(rows.negatives[numbers]),
        queries[rows.query_negatives[numbers]],
        rows.query[numbers],
        rows.positive[numbers],
        rows.negatives[numbers],
        rows.query_negatives[numbers],
        frozenset(zip(*(ids.tolist() for ids in rows.relevance.nonzero()), strict=True)),
        *(scores[numbers].astype(float) for scores in
          (rows.teacher_positive, rows.teacher_negatives, rows.teacher_query_negatives)),
    )  # fmt: skip

    def columns_of_documents(ids: np.ndarray) -> list[np.ndarray]:
        # what stands in for passages that a document has not is noise that must not count
        texts = rng.normal(10, 5, size=(most, len(ids), 5))
        for row, number in enumerate(ids):
            texts[: len(passages[number]), row] = passages[number]
        return list(texts)

    arrays = [queries[rows.query[numbers]], *columns_of_documents(rows.positive[numbers])]
    for k in range(2):
        arrays += columns_of_documents(rows.negatives[numbers, k])
    arrays += [queries[rows.query_negatives[numbers, k]] for k in range(2)]
    columns = [torch.tensor(array, requires_grad=True) for array in arrays]
    loss = make(name, torch.nn.Identity(), rows)
    labels = torch.tensor(numbers)
    assert float(loss.compute_loss_from_embeddings(columns, labels)) == pytest.approx(LOSSES[name][1](reference))

    def values(*embeddings):
        return loss.compute_loss_from_embeddings(list(embeddings), labels)

    assert torch.autograd.gradcheck(values, columns, fast_mode=True)


def test_training_texts_are_the_passages(small):
    collection, _, passages, *_ = small
    topics, qrels = collection.topics, collection.qrels
    pairs = mining.positive_pairs(topics, qrels)
    negatives = pd.DataFrame({"qid": topics["qid"], "docno": passages.docno(np.arange(len(topics)) % len(passages))})
    examples = build_examples(topics, pairs, passages, negatives=mined_only(negatives, pairs), negatives_per_row=1)
    names = list(columns_of(examples.rows))
    assert names[:5] == ["query", "positive", *(f"passage_{n}_of_positive" for n in (2, 3, 4))]
    assert names[5:] == ["negative_1", *(f"passage_{n}_of_negative_1" for n in (2, 3, 4))]
    of_passages = {d["docno"]: d["text"] for d in passages.passages.get_corpus_iter(verbose=False)}
    batch = examples.dataset[:20]
    assert list(batch) == [*names, "label"]
    for row in range(20):
        docno = passages.docno([examples.rows.positive[batch["label"][row]]])[0]
        texts = [batch[name][row] for name in names[1:5]]
        stored = [text for name, text in of_passages.items() if name.startswith(f"{docno}%p")]
        assert texts == stored + [""] * (4 - len(stored))


def mined_only(negatives: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    known = pd.MultiIndex.from_frame(pairs[["qid", "docno"]])
    return negatives[~pd.MultiIndex.from_frame(negatives[["qid", "docno"]]).isin(known)]


def test_a_transformer_is_trained_with_each_passage_as_it_is_retrieved(small, tmp_path):
    """The loss gets, column by column, what ``encode_docs`` gives for the passages: no column is taken for another."""
    collection, corpus, passages, *_ = small
    texts = corpus.texts_at(range(len(corpus)))
    encoder = DualEncoder(small_bert(texts, tmp_path), verbose=False)
    topics, qrels = collection.topics.head(30), collection.qrels
    pairs = mining.positive_pairs(topics, qrels)
    examples = build_examples(topics, pairs, passages)
    seen: list[list[torch.Tensor]] = []
    from pt_dance.losses import ContrastiveLoss

    original = ContrastiveLoss.compute_loss_from_embeddings

    def spy(self, embeddings, labels=None):
        seen.append(([e.detach().clone() for e in embeddings], labels.clone()))
        return original(self, embeddings, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContrastiveLoss, "compute_loss_from_embeddings", spy)
        from pt_dance.training.trainer import train

        for module in encoder.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = encoder.copy()
        round_ = Round(batch_size=8, learning_rate=1e-12, steps=1)
        (span,) = plan([round_], [examples.pairs], [1])
        train(encoder, examples, round_, span, tmp_path / "checkpoints")
    embeddings, labels = seen[-1]  # before the step, the loss is asked for a gradient of random vectors
    batch = examples.dataset[labels.tolist()]
    for name, column in zip(columns_of(examples.rows), embeddings, strict=True):
        encode = before.encode_queries if name == "query" else before.encode_docs
        there = [row for row, text in enumerate(batch[name]) if text]
        expected = encode([batch[name][row] for row in there])
        np.testing.assert_allclose(column.numpy()[there], expected, atol=2e-6)


def test_an_index_of_another_kind_of_corpus_is_not_taken(small, tmp_path):
    collection, corpus, passages, encoder, *_ = small
    DanceRetriever(encoder, corpus, tmp_path / "run", verbose=False).retriever(round=0)(collection.topics.head(2))
    with pytest.raises(ValueError, match="another corpus"):
        DanceRetriever(encoder, passages, tmp_path / "run", verbose=False)(collection.topics.head(2))


@pytest.mark.parametrize("recipe", ["ance", "dance"])
def test_a_fit_over_passages_learns_and_is_loaded_again(small, tmp_path, recipe):
    collection, _, passages, encoder, _, _ = small
    topics, qrels = collection.topics, collection.qrels
    fast = dict(batch_size=32, learning_rate=0.02)
    rounds = {
        "ance": recipes.ance(rounds=1, warm_up=2, **fast),
        "dance": recipes.dance(rounds=1, warm_up=2, ance_rounds=0, temperature=0.05, **fast),
    }[recipe]
    dance = DanceRetriever(encoder, passages, tmp_path / "run", recipe=rounds, measure=[nDCG @ 10], verbose=False)
    before = pt.Evaluate(dance.retriever(round=0)(topics), qrels, metrics=[nDCG @ 10])["nDCG@10"]
    dance.fit(topics, qrels, topics, qrels)
    found = dance(topics)
    after = pt.Evaluate(found, qrels, metrics=[nDCG @ 10])["nDCG@10"]
    assert after > before + 0.1
    assert set(found["docno"]) <= set(passages.docno(range(len(passages))))
    assert dance.history["nDCG@10"].max() == pytest.approx(after, abs=1e-9)
    again = DanceRetriever.load(tmp_path / "run")
    assert isinstance(again.corpus, PassageCorpus)
    pd.testing.assert_frame_equal(again(topics), found)
    rescored = again(found[["qid", "query", "docno"]])
    assert (rescored["score"] == found["score"]).all()

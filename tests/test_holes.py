"""The holes H1 to H14 of pyterrier_dr that were found by running it, each shown closed here, beside what it was.

H15 is about a training script.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from ir_measures import nDCG
from pyterrier_dr import FlexIndex, SimFn

from pt_dance import DenseIndex, DualEncoder
from pt_dance.index.indexing import StreamError

DOCUMENTS = [{"docno": f"d{i}", "text": f"word{i} word{i % 5} word{i % 3}"} for i in range(40)]
TOPICS = pd.DataFrame({"qid": ["a", "b"], "query": ["word3 word1", "word30"]})


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.static([d["text"] for d in DOCUMENTS], dim=16, vocab_size=200)


@pytest.fixture
def index(tmp_path, encoder):
    return DenseIndex(tmp_path / "index", encoder, shard_size=8, verbose=False)


def failing(count):
    yield from DOCUMENTS[:count]
    raise OSError("gone")


def test_h1_half_an_index_is_none_and_nothing_is_lost(index, tmp_path):
    with pytest.raises(StreamError):
        index.index(failing(20))
    assert not index.built() and not index.index_path.exists()
    with pytest.raises(FileNotFoundError, match="there is no dense index at"):
        index.retriever()(TOPICS)
    assert len(index.index(DOCUMENTS)) == 40
    # What an interrupted FlexIndex leaves passes for no index here either.
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "vecs.f4").write_bytes(bytes(64))
    half = DenseIndex(tmp_path / "half", verbose=False)
    assert FlexIndex(str(tmp_path / "half")).built() and not half.built()


def test_h2_overwriting_needs_a_whole_new_index_and_an_old_one(index, tmp_path):
    index.index(DOCUMENTS)
    with pytest.raises(StreamError):
        index.indexer(mode="overwrite").index(failing(20))
    assert len(DenseIndex(index.index_path, verbose=False)) == 40
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "important.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no dense index"):
        DenseIndex(tmp_path / "thesis", index.given_encoder, verbose=False).indexer(mode="overwrite").index(DOCUMENTS)
    assert (tmp_path / "thesis" / "important.txt").read_text() == "years of work"


def test_h3_nothing_stale_after_indexing_again(index):
    dense = index.index(DOCUMENTS[:20]).retriever(40)
    assert len(dense(TOPICS)) == 40
    index.np_retriever(), index.docnos(), index.payload()
    index.indexer(mode="overwrite").index(DOCUMENTS[20:])
    assert len(index) == 20 and set(dense(TOPICS)["docno"]) == {d["docno"] for d in DOCUMENTS[20:]}
    vectors = index.given_encoder.query_encoder()(TOPICS)
    theirs = index.np_retriever()(vectors).merge(dense(TOPICS), on=["qid", "docno"])
    assert len(theirs) == 40 and np.abs(theirs["score_x"] - theirs["score_y"]).max() < 1e-6
    assert index.docnos().fwd[0] == "d20"


def test_h4_an_unknown_docno_is_an_error_everywhere(index, encoder):
    index.index(DOCUMENTS)
    frame = pd.DataFrame({"qid": ["a", "a"], "query": ["word1", "word1"], "docno": ["d3", "nope"], "docid": [3, 4]})
    frame = encoder.query_encoder()(frame)
    for transformer in (index.retriever(), index.scorer(), index.np_scorer(), index.torch_scorer(), index.vec_loader()):
        with pytest.raises(KeyError, match="docno 'nope' is not in the index"):
            transformer(frame)
    # A docid of another index does not count, not even in pyterrier_dr's own loader.
    foreign = pd.DataFrame({"docno": ["d3"], "docid": [39]})
    assert np.allclose(
        index.vec_loader()(foreign)["doc_vec"][0], encoder.encode_docs([DOCUMENTS[3]["text"]])[0], atol=1e-6
    )
    with pytest.raises(KeyError, match="docid -1 is not in the index"):
        index.vec_loader()(pd.DataFrame({"docid": [0, -1]}))


def test_h5_duplicate_docnos_are_refused(index):
    with pytest.raises(ValueError, match="docno 'd2' occurs more than once"):
        index.index([*DOCUMENTS, DOCUMENTS[2]])
    assert not index.built()


def test_h6_missing_texts_and_vectors_that_are_no_numbers(index, tmp_path):
    for text in (None, float("nan"), pd.NA):
        with pytest.raises(ValueError, match="document 'bad' has no text"):
            index.index([*DOCUMENTS, {"docno": "bad", "text": text}])
    index.index(DOCUMENTS)
    for query in (None, float("nan")):
        with pytest.raises(TypeError, match=r"query 'b' is .* not a string"):
            index.retriever()(TOPICS.assign(query=["x", query]))
    records = [{"docno": "ok", "doc_vec": np.ones(3)}, {"docno": "bad", "doc_vec": np.array([1, np.nan, 0])}]
    with pytest.raises(ValueError, match="document 'bad' has NaN or infinity"):
        DenseIndex(tmp_path / "v", verbose=False).index(records)
    # Made by pyterrier_dr, with the NaN in it: refused when it is searched, not silently ranked.
    FlexIndex(str(tmp_path / "flex"), verbose=False).index(records)
    with pytest.raises(ValueError, match="document vectors must be finite"):
        DenseIndex(tmp_path / "flex", verbose=False).retriever()(
            pd.DataFrame({"qid": ["a"], "query_vec": [np.ones(3)]})
        )


def test_h6_an_encoder_that_gives_nan_is_found_out(index, tmp_path):
    broken = index.given_encoder.copy()
    broken.model[0].embedding.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="document 'd0' has NaN or infinity in its vector"):
        DenseIndex(tmp_path / "broken", broken, verbose=False).index(DOCUMENTS)


def test_h7_no_documents_and_docnos_that_are_no_strings(index, tmp_path):
    with pytest.raises(ValueError, match="no documents to index"):
        index.index([])
    with pytest.raises(TypeError, match="document number 0 has the docno 5"):
        index.index([{"docno": 5, "text": "x"}])
    assert list(tmp_path.iterdir()) == []


def test_h8_no_rows_and_no_unasked_output(index, capfd):
    index.index(DOCUMENTS)
    dense = index.retriever()
    full = dense(TOPICS)
    for frame in (TOPICS, full):
        empty = dense(frame.iloc[:0])
        assert len(empty) == 0 and list(empty.columns) == list(dense(frame).columns)
    assert len((dense % 3).compile()(full)) == 6
    with_vectors = index.given_encoder.query_encoder()(full)
    expected = dense(full).set_index(["qid", "docno"])["score"]
    for method in (index.scorer, index.np_scorer, index.torch_scorer):
        assert len(method()(with_vectors.iloc[:0])) == 0
        best = method(num_results=3)(with_vectors)
        assert len(best) == 6 and best["rank"].max() == 2
        assert best["score"].tolist() == expected[list(zip(best["qid"], best["docno"], strict=True))].tolist()
        with pytest.raises(pt.validate.InputValidationError):
            method()(TOPICS)  # nothing to score
    assert len(index.torch_scorer(device="cpu")(with_vectors)) == len(full)
    by_docid = with_vectors.assign(docid=index.rows(with_vectors["docno"])).drop(columns="docno")
    assert index.scorer()(by_docid)["score"].tolist() == full["score"].tolist()
    assert len((index.scorer() % 2).compile()(with_vectors)) == 4
    with pytest.raises(ValueError, match="scores are exact"):
        index.torch_scorer(fp16=True)
    assert capfd.readouterr() == ("", "")


def test_h9_cosine_is_cosine_in_every_retriever(index, encoder):
    assert encoder.similarity == "cosine"
    index.index(DOCUMENTS)
    assert index.sim_fn == SimFn.dot
    vectors = encoder.model.encode([d["text"] for d in DOCUMENTS])
    queries = encoder.model.encode(TOPICS["query"].tolist())
    cosines = (queries @ vectors.T) / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    with_vectors = encoder.query_encoder()(TOPICS)
    for retriever in (index.retriever(40), index.np_retriever(num_results=40), index.torch_retriever(num_results=40)):
        with contextlib.redirect_stderr(io.StringIO()):
            found = retriever(with_vectors)
        for number, qid in enumerate(TOPICS["qid"]):
            scores = found[found["qid"] == qid].set_index("docno")["score"]
            assert np.abs(scores[[d["docno"] for d in DOCUMENTS]].to_numpy() - cosines[number]).max() < 1e-5
    scorer = encoder.scorer()(
        pd.DataFrame({"qid": ["a"], "query": ["word3 word1"], "docno": ["d1"], "text": [DOCUMENTS[1]["text"]]})
    )
    assert scorer["score"][0] == pytest.approx(cosines[0][1], abs=1e-5)


def test_h10_masked_documents_never_come_first(tmp_path):
    values = {"a": -1.0, "b": -2.0, "c": 0.5}
    records = [{"docno": docno, "doc_vec": np.array([value, 0], np.float32)} for docno, value in values.items()]
    index = DenseIndex(tmp_path / "index", verbose=False).index(records)
    query = pd.DataFrame({"qid": ["1"], "query": ["x"], "query_vec": [np.array([1, 0], np.float32)]})
    mask = np.array([1, 0, 0])
    theirs = FlexIndex(str(tmp_path / "flex"), verbose=False)
    theirs.index(records)
    assert theirs.np_retriever(mask=mask)(query)["docno"][0] != "a", "the fault is gone, and so may be our refusal"
    with pytest.raises(ValueError, match="masked documents before those with negative scores"):
        index.np_retriever(mask=mask)
    masked = index.torch_retriever(mask=mask, num_results=2)
    found = masked(query)
    assert found["docno"].tolist() == ["a"] and found["score"].tolist() == [-1.0] and type(found["docno"][0]) is str
    assert list(found.dtypes) == list(index.torch_retriever(num_results=2)(query).dtypes)
    assert len(index.torch_retriever(mask=0 * mask)(query)) == 0
    for one in (index.torch_retriever(num_results=1), index.np_retriever(num_results=1)):
        twice = pd.concat([query, query.assign(qid="2")], ignore_index=True)
        assert one(twice)[["qid", "docno", "score"]].to_numpy().tolist() == [["1", "c", 0.5], ["2", "c", 0.5]]
    for bad in (mask[:2], np.ones(4), np.ones((3, 1))):
        with pytest.raises(ValueError, match="mask must hold 0 or 1 for each of 3 documents"):
            index.torch_retriever(mask=bad)
    other = index.torch_retriever(mask=1 - mask, num_results=2)
    assert other(query)["docno"].tolist() == ["c", "b"]
    assert masked == index.torch_retriever(mask=mask, num_results=2) and hash(masked) != hash(other)
    assert masked != other and masked != index.torch_retriever(num_results=2)
    assert [type(d) for d in (masked % 1).compile()(query)["docno"]] == [str]
    assert (other % 1).compile() != (masked % 1).compile()


def test_h11_other_weights_are_never_equal(index, encoder, tmp_path):
    trained = encoder.copy()
    assert trained == encoder and hash(trained) == hash(encoder)
    trained.model[0].embedding.weight.data += torch.randn(
        trained.model[0].embedding.weight.shape, generator=torch.manual_seed(1)
    )
    assert trained != encoder and trained.query_encoder() != encoder.query_encoder()
    assert trained.doc_encoder() != encoder.doc_encoder() and trained.scorer() != encoder.scorer()
    before = index.index(DOCUMENTS).retriever(10)
    after = DenseIndex(tmp_path / "after", trained, verbose=False).index(DOCUMENTS).retriever(10)
    assert before != after
    qrels = pd.DataFrame({"qid": ["a", "b"], "docno": ["d1", "d30"], "label": [1, 1]})
    systems = [before % 9, after % 8, encoder.query_encoder() >> before, trained.query_encoder() >> after]
    linear, tree = (pt.Experiment(systems, TOPICS, qrels, [nDCG @ 8], plan=plan) for plan in ("linear", "tree"))
    pd.testing.assert_frame_equal(linear, tree)
    assert linear["nDCG@8"][0] != linear["nDCG@8"][1]


def test_h12_prompts_and_folders_of_sentence_transformers(tmp_path, encoder):
    model = encoder.copy().model
    model.prompts = {"query": "word1 ", "document": ""}
    prompted = DualEncoder(model)
    expected = encoder.encode_queries(["word1 word7"])
    assert np.allclose(prompted.encode_queries(["word7"]), expected, atol=1e-6)
    assert np.allclose(prompted.encode_docs(["word7"]), encoder.encode_docs(["word7"]), atol=1e-6)
    prompted.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    assert np.allclose(DualEncoder(str(tmp_path / "saved")).encode_queries(["word7"]), expected, atol=1e-6)


def test_h13_encoding_uses_no_dropout_and_leaves_the_mode_as_it_was(minilm_path):
    encoder = DualEncoder(minilm_path, device="cpu")
    texts = ["The moon pulls the sea.", "Twice a day."]
    expected = encoder.model.eval() and encoder.encode_docs(texts)
    encoder.model.train()
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for encode in (encoder.encode_docs, encoder.encode_queries):
        assert np.allclose(encode(texts), expected, atol=1e-5)
        assert encoder.model.training and all(m.training for m in encoder.model.modules())


def test_h14_results_of_another_system_are_rescored(index, encoder):
    index.index(DOCUMENTS)
    dense = index.retriever()
    full = dense(TOPICS)
    results = pd.DataFrame(
        {
            "qid": ["a", "a", "b"],
            "query": [TOPICS["query"][i] for i in (0, 0, 1)],
            "docno": ["d5", "d1", "d30"],
            "score": [3.0, 2.0, 9.0],
            "rank": [0, 1, 0],
        }
    )
    expected = full.set_index(["qid", "docno"])["score"]
    for extra in ({}, {"text": "anything"}, {"docid": 17}):
        found = dense(results.assign(**extra))
        assert found["score"].tolist() == [expected[q, d] for q, d in zip(found["qid"], found["docno"], strict=True)]
    with_text = results.assign(text="anything")
    assert index(encoder.query_encoder()(with_text))["score"].tolist() == dense(results)["score"].tolist()

"""CrossEncoderScorer: raw logits of a real cross-encoder, each pair once, in any pipeline."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification

from pt_dance import CrossEncoderScorer
from small_models import small_bert

TEXTS = ["red fox blue sky", "foxes are red", "the sky is blue"] * 5
FRAME = pd.DataFrame(
    {
        "qid": ["1", "1", "2", "2"],
        "query": ["red fox", "red fox", "blue sky", "blue sky"],
        "docno": ["a", "b", "a", "c"],
        "text": ["foxes are red", "the sky is blue", "foxes are red", "the sky is blue"],
        "title": ["kept"] * 4,
        "score": [9.0, 8.0, 7.0, 6.0],
    }
)


def bert(folder, labels):
    """The folder of a small BERT that classifies pairs of texts."""
    small_bert(TEXTS, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder / "bert", num_labels=labels)
    model.save_pretrained(folder / "bert")
    return str(folder / "bert")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return CrossEncoderScorer(bert(tmp_path_factory.mktemp("bert"), 1), device="cpu")


def test_scores_are_the_raw_logits_and_columns_are_kept(scorer):
    before = FRAME.copy()
    scored = scorer(FRAME)
    pd.testing.assert_frame_equal(FRAME, before)
    expected = scorer.model.predict(
        list(zip(FRAME["query"], FRAME["text"], strict=True)), activation_fn=torch.nn.Identity()
    )
    np.testing.assert_allclose(scored["score"], expected.reshape(-1), atol=1e-5)
    assert (scored["title"] == "kept").all() and len(scored) == 4
    for _, rows in scored.groupby("qid"):
        assert rows.sort_values("rank")["score"].is_monotonic_decreasing and set(rows["rank"]) == {0, 1}


def test_no_rows_and_missing_or_wrong_text(scorer):
    assert list(scorer(FRAME.iloc[:0]).columns) == list(scorer(FRAME).columns)
    with pytest.raises(KeyError, match="text"):
        scorer(FRAME.drop(columns="text"))
    with pytest.raises(TypeError, match=r"docno 'b' is (None|nan), not a text"):
        scorer(FRAME.assign(text=["x", None, "y", "z"]))


def test_identity_is_that_of_the_weights(scorer):
    fresh = CrossEncoderScorer(str(scorer.model.config._name_or_path), device="cpu")
    unused = fresh.fingerprint
    fresh(FRAME)
    assert fresh.fingerprint == unused == scorer.fingerprint
    same = CrossEncoderScorer(scorer.model)
    assert same == scorer and hash(same) == hash(scorer) and same.fingerprint == scorer.fingerprint
    with torch.no_grad():
        before = scorer.fingerprint
        weight = next(scorer.model.parameters())
        weight.add_(1.0)
        assert scorer.fingerprint != before
        weight.sub_(1.0)


def test_models_with_several_labels_are_refused(tmp_path):
    model = CrossEncoder(bert(tmp_path, 3), num_labels=3, device="cpu")
    with pytest.raises(ValueError, match="3 labels"):
        CrossEncoderScorer(model)


def test_transformer_contract(scorer):
    assert set(pt.inspect.transformer_outputs(scorer, ["qid", "query", "docno", "text"])) == {
        "qid", "query", "docno", "text", "score", "rank"
    }  # fmt: skip
    assert len(scorer.schematic["label"]) <= 20


def test_bfloat16_scores_are_close_and_another_teachers(scorer):
    half = CrossEncoderScorer(scorer.model, dtype="bfloat16")
    exact, rounded = scorer(FRAME)["score"].to_numpy(), half(FRAME)["score"].to_numpy()
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert not np.array_equal(rounded, exact), "it has to be computed in bfloat16"
    assert half.fingerprint != scorer.fingerprint and half != scorer
    taken = CrossEncoderScorer(scorer.model, batch_size=np.int64(4), max_length=np.int32(20))
    assert type(taken.batch_size) is int and type(taken.max_length) is int
    for options in ({"batch_size": 0}, {"max_length": 1.5}, {"text_field": ""}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            CrossEncoderScorer(scorer.model, **options)
    with pytest.raises(ValueError, match="dtype='float16'"):
        CrossEncoderScorer(scorer.model, dtype="float16")

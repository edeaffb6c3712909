"""analysis.mining: what a run's record says of its negatives, and which of them look relevant."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pt_dance import analysis
from pt_dance.analysis.mined import text_similarity
from pt_dance.training.record import read_negatives
from pt_dance.training.run_folder import RunFolder

TEXTS = {
    "good": "the quick brown fox jumps over the lazy dog by the river",
    "copy": "The quick brown fox jumps over the lazy dog, by the river!",
    "near": "the quick brown fox jumps over the lazy cat by the river",
    "far": "an entirely different text about something else altogether",
    "short": "fox",
}


class Texts:
    def texts(self, docnos):
        return [TEXTS[docno] for docno in docnos]


class Run(SimpleNamespace):
    """A run's folder with two rounds, and a retriever whose scores are known."""

    def __init__(self, path):
        run = RunFolder(path)
        run.begin({"round 1 negatives": "first_stage", "round 2 negatives": "current_model#0123abcd"})
        positives = pd.DataFrame({"qid": ["q1", "q2"], "docno": ["good", "far"], "query": ["fox?", "else?"]})
        run.write_frame(0, "positives", positives, {})
        first = [("q1", "copy", 9.0, 0), ("q1", "far", 1.0, 7), ("q2", "short", 2.0, 3), ("q2", "near", 1.0, 4)]
        second = [("q1", "near", 9.0, 1), ("q1", "far", 1.0, 2), ("q2", "short", 2.0, 3), ("q2", "good", 1.0, 5)]
        report = {"searches": 2, "found": 1, "median_rank": 3.0, "above": 12, "candidates": 16}
        for number, rows, about in ((1, first, {}), (2, second, {"new": 0.5, "positives": report, "sources": 2})):
            run.write_frame(number, "negatives", pd.DataFrame(rows, columns=["qid", "docno", "score", "rank"]), about)
        super().__init__(
            path=path,
            corpus=Texts(),
            history=pd.DataFrame({"round": [1, 2, 3], "name": ["warm-up", "ance", "last"]}),
            scores={("q1", "good"): 1.0, ("q2", "far"): 0.5, ("q1", "copy"): 0.97, ("q1", "near"): 0.94},
        )

    def __call__(self, frame):
        assert "text" not in frame.columns  # stored vectors are enough
        return frame.assign(
            score=[self.scores.get(pair, 0.1) for pair in zip(frame["qid"], frame["docno"], strict=True)]
        )


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_rounds_and_suspects(run):
    told = analysis.mining(run)
    rounds = told.rounds.set_index("round")
    assert rounds.index.tolist() == [1, 2]  # the third mined nothing
    assert rounds["source"].tolist() == ["first_stage", "current_model"]
    assert rounds["queries"].tolist() == [2, 2] and rounds["negatives"].tolist() == [4, 4]
    assert np.isnan(rounds.loc[1, "new"]) and rounds.loc[2, "new"] == 0.5
    assert rounds.loc[1, "rank 50 %"] == 3.5
    assert np.isnan(rounds.loc[1, "above positive"]) and rounds.loc[2, "above positive"] == 0.75
    assert rounds.loc[2, "positive found"] == 0.5 and rounds.loc[2, "positive rank"] == 3
    assert rounds["near-duplicate"].tolist() == [0.25, 0]  # the copy; "near" shares 5 of 13 shingles
    assert rounds["margin"].tolist() == [0.25, 0]  # .97 is above .95 of 1, .94 is not
    assert rounds["teacher"].isna().all()
    assert len(told.examples) == 2 and set(told.examples["docno"]) == {"copy"}
    example = told.examples.query("reason == 'near-duplicate'").iloc[0]
    assert (example["query"], example["positive_text"], example["value"]) == ("fox?", TEXTS["good"], 1.0)


def test_negatives_of_a_round_with_texts_and_what_is_new(run):
    frame = read_negatives(RunFolder(run.path), 2, run.corpus)
    assert list(frame.columns) == ["qid", "query", "docno", "text", "rank", "score", "source", "new"]
    assert frame["docno"].tolist() == ["near", "far", "short", "good"]
    assert frame["query"].tolist() == ["fox?", "fox?", "else?", "else?"]
    assert frame["text"].tolist() == [TEXTS[docno] for docno in frame["docno"]]
    assert frame["rank"].tolist() == [1, 2, 3, 5] and frame["score"].tolist() == [9, 1, 2, 1]
    assert frame["new"].tolist() == [True, False, False, True] and set(frame["source"]) == {"current_model"}
    first = read_negatives(RunFolder(run.path), 1)
    assert "text" not in first and first["new"].all() and set(first["source"]) == {"first_stage"}
    with pytest.raises(ValueError, match=r"round 3 of .* has no mined negatives"):
        read_negatives(RunFolder(run.path), 3)


def test_options_move_the_limits(run):
    told = analysis.mining(run, threshold=0.3, margin=0.9, examples=1).rounds
    assert told["near-duplicate"].tolist() == [0.25, 0.25]
    assert told["margin"].tolist() == [0.25, 0.25]
    assert analysis.mining(run, sample=1).sampled == 1
    none = analysis.mining(run, sample=0)
    assert none.rounds["margin"].isna().all() and none.examples.empty and none.rounds["negatives"].tolist() == [4, 4]


def test_teacher_reads_texts(run):
    def teacher(frame):
        return frame.assign(score=frame["text"].str.len().astype(float) - 100 * (frame["qid"] == "q1"))

    told = analysis.mining(run, teacher=teacher)
    # longer texts than the positive's: copy for q1 in round 1; none in round 2 but "near", which is as long
    longer = {q: len(TEXTS[d]) for q, d in (("q1", "good"), ("q2", "far"))}
    expected = [
        np.mean([len(TEXTS[d]) > longer[q] for q, d in pairs])
        for pairs in (
            [("q1", "copy"), ("q1", "far"), ("q2", "short"), ("q2", "near")],
            [("q1", "near"), ("q1", "far"), ("q2", "short"), ("q2", "good")],
        )
    ]
    assert told.rounds["teacher"].tolist() == expected and max(expected) > 0


def test_margin_means_nothing_below_zero(run):
    run.scores = {("q1", "good"): -0.5, ("q1", "copy"): -0.49, ("q1", "far"): -0.51, ("q2", "far"): 9.0}
    suspects = analysis.mining(run).examples.query("reason == 'margin'")
    found = set(zip(suspects["round"], suspects["docno"], strict=True))
    assert found == {(1, "copy"), (2, "near")}  # near gets the .1 of all others


def test_similarity_equals_jaccard_by_hand(monkeypatch):
    def jaccard(a, b):
        sets = []
        for text in (a, b):
            words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
            sets.append({tuple(words[i : i + 4]) for i in range(max(len(words) - 3, 1))})
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    monkeypatch.setattr("pt_dance.analysis.mined._BLOCK_ROWS", 4)
    told = text_similarity(pd.Series([a for a, _ in pairs]), pd.Series([b for _, b in pairs]), Texts().texts)
    assert told == pytest.approx([jaccard(TEXTS[a], TEXTS[b]) for a, b in pairs])
    assert told[pairs.index(("good", "copy"))] == 1


def test_long_texts_are_cut_and_shown_as_text(run):
    told = analysis.mining(run)
    told.examples.loc[0, "text"] = "<script>alert(1)</script>"
    assert "<script>" not in told._repr_html_() and "&lt;script&gt;" in told._repr_html_()
    assert repr(told) == "<MiningReport: 2 rounds, 2 examples>"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sample": -1}, "sample=-1 must be"), ({"margin": 0}, "margin=0 must be"), ({"threshold": 2}, "threshold=2")],
)
def test_options_that_make_no_sense(run, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.mining(run, **options)


def test_a_folder_without_a_record_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no record of training"):
        analysis.mining(SimpleNamespace(path=tmp_path / "nothing", history=pd.DataFrame()))

"""What experiments/quickstart.py says of a run is right."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round
from small_collection import standard_library


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend("experiments")
    import quickstart

    return quickstart


def test_rounds_are_shown_with_their_worth_and_near_copies_of_positives_are_counted(quickstart, tmp_path, capsys):
    collection = standard_library()
    copied = dict(zip(collection.documents["docno"], collection.documents["text"], strict=True))
    positive = collection.qrels.drop_duplicates("qid").set_index("qid")["docno"]
    copies = pd.DataFrame({"docno": "copy of " + positive, "text": [f"{copied[docno]} once" for docno in positive]})
    documents = pd.concat([collection.documents[["docno", "text"]], copies]).reset_index(drop=True)
    corpus = Corpus.build(documents, tmp_path / "corpus", fields=["text"], verbose=False)
    encoder = DualEncoder.static(corpus, dim=32, vocab_size=1000)
    others = positive.sort_index().to_numpy()[::-1]
    first_stage = pd.concat(
        [
            pd.DataFrame({"qid": positive.index, "docno": "copy of " + positive.to_numpy(), "rank": 0, "score": 1.0}),
            pd.DataFrame({"qid": positive.sort_index().index, "docno": others, "rank": 1, "score": 0.0}),
        ]
    ).merge(collection.topics, on="qid")
    dance = DanceRetriever(encoder, corpus, tmp_path / "run", recipe=[Round(name="ance")], verbose=False)
    dance.fit(first_stage, collection.qrels, collection.topics.head(60), collection.qrels)
    mined = dance.negatives(1, texts=False)
    expected = mined["docno"].str.startswith("copy of ").mean()
    assert 0.3 < expected < 0.9
    assert quickstart.copies_among(dance, collection.qrels, 1, least=0.95) == pytest.approx(expected, abs=0.02)
    quickstart.show_rounds(dance, collection.qrels, "nDCG@10")
    header, untrained, trained = capsys.readouterr().out.strip().splitlines()[-3:]
    columns = ["dev nDCG@10", "loss", "new negatives", "copies of a positive"]
    assert re.split(r"\s{2,}", header.strip()) == ["round", *columns]
    worth = dance.history["nDCG@10"].round(4).tolist()
    assert [float(line.split()[2]) for line in (untrained, trained)] == worth and worth[0] != worth[1]
    assert float(trained.split()[-1]) == round(quickstart.copies_among(dance, collection.qrels, 1), 4)
    quickstart.draw(dance, "nDCG@10", {"BM25": 0.5}, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("history.png", "time.png"))


def test_what_is_printed_is_kept_as_it_is(quickstart, tmp_path, capsys):
    topics = pd.DataFrame({"qid": ["1", "2"], "query": ["apple", "pear"]})
    qrels = pd.DataFrame({"qid": ["1", "2"], "docno": ["a", "p"], "label": [1, 0]})
    ranked = pd.DataFrame({"qid": ["1", "1", "2"], "docno": ["b", "a", "p"], "rank": [0, 1, 0]})
    examples = quickstart.show_examples({"BM25": lambda chosen: ranked}, topics, qrels, number=2)
    assert examples == {"apple": ["  BM25          b  *a"], "pear": ["  BM25          p"]}
    assert capsys.readouterr().out == "\napple\n  BM25          b  *a\n\npear\n  BM25          p\n"
    table = pd.DataFrame({"name": ["BM25", "dense"], "nDCG@10": [0.5, 0.6], "RR@10": [0.5, 0.6], "R@100": [0.9, 1.0],
                          "nDCG@10 p-value corrected": [None, 1.25e-123]})  # fmt: skip
    rounds = pd.DataFrame({"round": ["warm-up"], "loss": [0.123456]})
    quickstart.save(tmp_path / "new" / "numbers.json", {"documents": 3}, table, rounds, examples)
    kept = json.loads((tmp_path / "new" / "numbers.json").read_text())
    assert kept["documents"] == 3 and kept["examples"] == examples and kept["rounds"][0]["loss"] == 0.1235
    assert [row["nDCG@10 p-value corrected"] for row in kept["table"]] == [None, 1.25e-123]

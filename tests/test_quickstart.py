"""What experiments/quickstart.py says of a run is right."""

from __future__ import annotations

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
    encoder = DualEncoder.static(corpus, dim=8, vocab_size=300)
    others = positive.sort_index().to_numpy()[::-1]
    first_stage = pd.concat(
        [
            pd.DataFrame({"qid": positive.index, "docno": "copy of " + positive.to_numpy(), "rank": 0, "score": 1.0}),
            pd.DataFrame({"qid": positive.sort_index().index, "docno": others, "rank": 1, "score": 0.0}),
        ]
    ).merge(collection.topics, on="qid")
    dance = DanceRetriever(encoder, corpus, tmp_path / "run", recipe=[Round(name="ance")], verbose=False)
    dance.fit(first_stage, collection.qrels, collection.topics.head(9), collection.qrels)
    mined = dance.negatives(1, texts=False)
    expected = mined["docno"].str.startswith("copy of ").mean()
    assert 0.3 < expected < 0.9
    assert quickstart.copies_among(dance, collection.qrels, 1, least=0.95) == pytest.approx(expected, abs=0.02)
    quickstart.show_rounds(dance, collection.qrels, "nDCG@10")
    shown = capsys.readouterr().out
    assert f"{dance.history['nDCG@10'].iloc[1]:.4f}".rstrip("0") in shown and "copies of a positive" in shown
    quickstart.draw(dance, "nDCG@10", {"BM25": 0.5}, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("history.png", "time.png"))

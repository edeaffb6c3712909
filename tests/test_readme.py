"""README's code runs as it stands on a small collection; ``make lint`` checks its types."""

from __future__ import annotations

import pyterrier as pt
import pytest

from pt_dance import DanceRetriever
from readme_types import BLOCKS
from small_collection import SmallCollection, standard_library


class Parts:
    """The small collection as a PyTerrier data set whose topics are in three parts."""

    def __init__(self, collection: SmallCollection) -> None:
        self.collection = collection
        self.get_corpus_iter = collection.get_corpus_iter

    def get_topics(self, part: str):
        topics = self.collection.topics
        share = {"train": (0, 1, 2, 3), "dev": (4,), "test": (5,)}[part]
        return topics[[number % 6 in share for number in range(len(topics))]].reset_index(drop=True)

    def get_qrels(self, part: str):
        qrels = self.collection.qrels
        return qrels[qrels["qid"].isin(self.get_topics(part)["qid"])].reset_index(drop=True)


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("pyterrier_pisa", reason="PISA has wheels for Linux on x86-64 only")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pt, "get_dataset", lambda name: {"dance:pydocs": Parts(standard_library())}[name])
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["dance"], DanceRetriever)
    table = names["table"].set_index("name")
    assert list(table.index) == ["BM25", "dense", "BM25 % 100 >> dense"]
    assert (table[["nDCG@10", "RR@10"]] > 0.1).all(axis=None)

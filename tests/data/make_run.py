"""Fit a small run and pack its folder: run_of_version_0_1.tar.gz is what version 0.1 wrote (commit b93af77).

PYTHONPATH=<a checkout of that version> python tests/data/make_run.py run_of_version_0_1.tar.gz
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

import pandas as pd
from ir_measures import nDCG

from pt_dance import Corpus, DanceRetriever, DualEncoder, recipes

WORDS = ["apple", "river", "stone", "cloud", "piano", "tiger", "lemon", "bridge", "candle", "forest"]
DOCUMENTS = [
    {"docno": f"d{i}", "title": "", "text": f"{WORDS[i % 10]} {WORDS[i // 10]} {WORDS[(3 * i + 1) % 10]}"}
    for i in range(30)
]
TOPICS = pd.DataFrame(
    {"qid": [f"q{i}" for i in range(20)], "query": [f"{WORDS[i % 10]} and {WORDS[i // 10]}" for i in range(20)]}
)
QRELS = pd.DataFrame({"qid": TOPICS["qid"], "docno": [f"d{i}" for i in range(20)], "label": 1})
OPTIONS = dict(measure=nDCG @ 10, verbose=False)


def fit(dance: DanceRetriever) -> None:
    """Fit behind the untrained encoder's own results."""
    ((dance.retriever(round=0) % 10) >> dance).fit(TOPICS.head(15), QRELS, TOPICS.tail(5), QRELS)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = Corpus.build(DOCUMENTS, folder / "corpus", verbose=False)
        texts = [document["text"] for document in DOCUMENTS] + TOPICS["query"].tolist()
        encoder = DualEncoder.static(texts, dim=8, vocab_size=60)
        dance = DanceRetriever(encoder, corpus, folder / "run", recipe=recipes.mnrl_dual(batch_size=8), **OPTIONS)
        fit(dance)
        found = (dance % 3)(TOPICS.tail(5))
        found[["qid", "docno", "score"]].to_csv(folder / "results.csv", index=False)
        with tarfile.open(sys.argv[1], "w:gz") as packed:
            packed.add(folder, ".")


if __name__ == "__main__":
    main()

"""A cross-encoder that never scores a pair of a query it learnt from: two, each trained on one half of the clusters."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt

from evidence.data import Collection, clusters, some_of, stable_hash
from pt_dance import CrossEncoderScorer, mining
from train_teacher import train, training_pairs

FOLDS = 2
_OPTIONS = dict(
    layers=3, max_length=64, negatives=1, epochs=1, batch_size=32, learning_rate=7e-5, bf16=True, seed=0,
)  # fmt: skip


class CrossFitted(pt.Transformer):
    """Scores (query, text) rows with the model that did not learn from the query.

    Args:
        models: a cross-encoder for each fold, trained on all other folds.
        fold_of: fold of each query text.
    """

    schematic = {"label": "Cross-fitted", "help_url": None}

    def __init__(self, models: list[CrossEncoderScorer], fold_of: dict[str, int]) -> None:
        super().__init__()
        self.models, self.fold_of = models, fold_of

    @property
    def fingerprint(self) -> str:
        """Identifies all models."""
        return "-".join(model.fingerprint for model in self.models)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score each row; see :class:`pt_dance.CrossEncoderScorer`."""
        fold = inp["query"].map(self.fold_of)
        scores = np.zeros(len(inp))
        for number, model in enumerate(self.models):
            mine = (fold == number).to_numpy()
            if mine.any():
                answer = model(inp[mine].assign(_row=np.flatnonzero(mine)))
                scores[answer["_row"].to_numpy()] = answer["score"].to_numpy()
        return pt.model.add_ranks(inp.drop(columns=["score", "rank"], errors="ignore").assign(score=scores))

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return no transformers: the models are parts of this one."""
        return {}


def cross_fitted(collection: Collection) -> CrossFitted:
    """The teacher of a collection; trained on the first use, and how it did is kept beside it."""
    topics, qrels = collection.train
    cluster = clusters(collection.name, topics, qrels)
    fold = cluster.map(lambda name: stable_hash(f"fold {name}") % FOLDS)
    models = []
    for number in range(FOLDS):
        folder = collection.folder / "teacher" / str(number)
        if not (folder / "model" / "config.json").exists():
            learnt = some_of(fold[fold != number].index, collection.protocol.teacher_queries)
            _train(collection, topics[topics["qid"].isin(learnt)], folder)
        models.append(
            CrossEncoderScorer(
                str(folder / "model"), max_length=_OPTIONS["max_length"], batch_size=64, dtype="bfloat16"
            )
        )
    of_text = dict(zip(topics["query"], topics["qid"].map(fold), strict=True))
    return CrossFitted(models, of_text)


def _train(collection: Collection, topics: pd.DataFrame, folder: Path) -> None:
    qrels = collection.train[1]
    mined = mining.mine_documents(
        collection.bm25, topics, qrels, collection.corpus, depth=50, rank_range=(2, 50), negatives=1, seed=0
    )
    own = qrels[qrels["qid"].isin(topics["qid"])]
    # One relevant document a query is enough to learn from, and keeps collections of many affordable.
    own = own[own["label"] > 0].drop_duplicates("qid")
    pairs = training_pairs(topics, own, mined, collection.corpus)
    folder.mkdir(parents=True, exist_ok=True)
    model = train(pairs, Namespace(out=folder, **_OPTIONS))
    model.save_pretrained(str(folder / "model"))


def spread(collection: Collection, teacher: CrossFitted, *, queries: int = 500) -> dict[str, float]:
    """How the teacher did on queries it did not learn from: its margins, and nDCG@10 beside BM25's."""
    file = collection.folder / "teacher" / "spread.json"
    if file.exists():
        return json.loads(file.read_text())
    topics, qrels = collection.train
    qids = some_of(pd.Index(topics["qid"]), queries)
    pool = collection.document_pool[collection.document_pool["qid"].isin(qids)]
    pairs = mining.positive_pairs(topics, qrels)
    pairs = pairs[pairs["qid"].isin(qids)].merge(topics[["qid", "query"]], on="qid")
    scored = [
        teacher(frame.assign(text=collection.corpus.texts(frame["docno"].tolist()))).groupby("qid")["score"]
        for frame in (pairs[["qid", "query", "docno"]], pool[["qid", "query", "docno"]])
    ]
    margins = (scored[0].mean() - scored[1].mean()).dropna()
    about = {
        "margin_mean": float(margins.mean()),
        "margin_sd": float(margins.std()),
        "margins_above_0": float((margins > 0).mean()),
        "queries": len(margins),
    }
    file.write_text(json.dumps(about))
    return about

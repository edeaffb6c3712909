"""A cross-encoder that never scores a pair of a query it learnt from: two, each trained on one half of the clusters."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt

from evidence.data import Collection, clusters, some_of, stable_hash
from evidence.protocol import SMALL
from pt_dance import CrossEncoderScorer, mining
from train_teacher import train, training_pairs

FOLDS = 2
_BLOCK = 8192
_LEAST_MARGIN = 0.1  # of raw scores; a cross-encoder for MS MARCO has some ten
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


class TeacherError(ValueError):
    """A teacher that has nothing to teach: the rest of the study goes on without its methods."""


class Scored(pt.Transformer):
    """Look up what a teacher said of the pairs that some hundred fits ask for, and ask it for the few others.

    Others are there because queries that an encoder cannot tell apart are one to a fit, by the text of the first.

    Args:
        scores: ``query``, ``docno``, ``score``.
        teacher: who said so.
    """

    schematic = {"label": "Scored", "help_url": None}

    def __init__(self, scores: pd.DataFrame, teacher: CrossFitted) -> None:
        super().__init__()
        self.scores, self.teacher = scores.set_index(["query", "docno"])["score"], teacher

    @property
    def fingerprint(self) -> str:
        """That of the teacher."""
        return self.teacher.fingerprint

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score (query, docno, text) rows."""
        known = self.scores.reindex(pd.MultiIndex.from_frame(inp[["query", "docno"]])).to_numpy()
        scored = inp.assign(score=known)
        if (missing := np.isnan(known)).any():
            parts = [scored[~missing], self.teacher(inp[missing])]
            scored = pd.concat([part for part in parts if len(part)])
        return pt.model.add_ranks(scored)

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return no transformers: the teacher is a part of this one."""
        return {}


def scored(collection: Collection) -> Scored:
    """The teacher of a collection, asked once for all relevant pairs and all pairs of the two pools.

    Raises:
        TeacherError: If the teacher has no margins.
    """
    teacher, file = cross_fitted(collection), collection.folder / "teacher" / "scores.parquet"
    told = file.with_name("spread.json")
    if not file.exists():
        text_of = collection.train[0].set_index("qid")["query"]
        pairs = [mining.positive_pairs(*collection.train), collection.document_pool, collection.query_pool]
        asked = pd.concat([frame[["qid", "docno"]] for frame in pairs])
        asked = asked.assign(query=asked["qid"].map(text_of)).drop_duplicates(["query", "docno"])
        parts = [asked.iloc[first : first + _BLOCK] for first in range(0, len(asked), _BLOCK)]
        answers = [teacher(part.assign(text=collection.corpus.texts(part["docno"].tolist()))) for part in parts]
        answered = pd.concat(answers)
        own = answered.merge(pd.concat(pairs[:2])[["qid", "docno"]])
        told.write_text(json.dumps(spread(own, pairs[0])))
        answered[["query", "docno", "score"]].to_parquet(file.with_suffix(".new"), index=False)
        file.with_suffix(".new").rename(file)
    about = json.loads(told.read_text())
    if about["margin_mean"] < _LEAST_MARGIN and collection.protocol.name != SMALL.name:
        raise TeacherError(
            f"the teacher of {collection.name} has learnt nothing that a student could learn from it: its margins are "
            f"{about['margin_mean']:.5f} ± {about['margin_sd']:.5f}"
        )
    return Scored(pd.read_parquet(file), teacher)


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


def spread(asked: pd.DataFrame, relevant: pd.DataFrame) -> dict[str, float]:
    """How the teacher did on pairs that it did not learn from: the margins that a student is to learn.

    Args:
        asked: ``qid``, ``docno``, ``score`` of the relevant pairs and of the queries' negatives.
        relevant: ``qid``, ``docno`` of the relevant pairs.
    """
    pairs = pd.MultiIndex.from_frame(asked[["qid", "docno"]])
    positive = pairs.isin(pd.MultiIndex.from_frame(relevant[["qid", "docno"]]))
    means = [part.groupby("qid")["score"].mean() for part in (asked[positive], asked[~positive])]
    margins = (means[0] - means[1]).dropna()
    return {
        "margin_mean": float(margins.mean()),
        "margin_sd": float(margins.std()),
        "margins_above_0": float((margins > 0).mean()),
        "queries": len(margins),
    }

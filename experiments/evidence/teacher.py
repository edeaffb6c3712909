"""A cross-encoder that never scores a pair of a query it learnt from.

It is two, each trained on one half of the clusters of all training collections: of one collection alone, a few hundred
or thousand queries are too few for a cross-encoder that starts from a bi-encoder.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
from datasets import concatenate_datasets

from evidence.data import Collection, clusters, some_of, stable_hash
from evidence.protocol import SMALL, Protocol
from pt_dance import CrossEncoderScorer, mining
from pt_dance.storage.folders import read_json, write_json
from train_teacher import train, training_pairs

FOLDS = 2
_BLOCK = 8192
_LEAST_MARGIN = 0.1  # of raw scores; a cross-encoder for MS MARCO has some ten
_POSITIVES, _NEGATIVES = 3, 4  # of a query at most
_OPTIONS = dict(  # of train_teacher.py, where negatives is what a relevant document weighs
    layers=6, max_length=128, negatives=2, epochs=2, batch_size=32, learning_rate=7e-5, freeze_embeddings=True,
    bf16=True, seed=0,
)  # fmt: skip

_SMALL = dict(_OPTIONS, layers=1, max_length=64)


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
            answered = self.teacher(inp[missing])
            answers = answered.drop_duplicates(["query", "docno"]).set_index(["query", "docno"])["score"]
            self.scores = pd.concat([self.scores, answers])
            scored = pd.concat([part for part in (scored[~missing], answered) if len(part)])
        return pt.model.add_ranks(scored)

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return no transformers: the teacher is a part of this one."""
        return {}


def scored(collection: Collection, all_collections: Sequence[Collection]) -> Scored:
    """The teacher of a collection, asked once for all relevant pairs and all pairs of the two pools.

    Args:
        collection: whose pairs are scored.
        all_collections: what the teacher is trained on, this one among them.

    Raises:
        TeacherError: If the teacher has no margins.
    """
    teacher, file = cross_fitted(collection, all_collections), collection.folder / "teacher" / "scores.parquet"
    told = file.with_name("spread.json")
    if not told.exists() or read_json(told).get("teacher") != teacher.fingerprint:
        file.parent.mkdir(exist_ok=True)
        text_of = collection.train[0].set_index("qid")["query"]
        pairs = [mining.positive_pairs(*collection.train), collection.document_pool, collection.query_pool]
        asked = pd.concat([frame[["qid", "docno"]] for frame in pairs])
        asked = asked.assign(query=asked["qid"].map(text_of)).drop_duplicates(["query", "docno"])
        parts = [asked.iloc[first : first + _BLOCK] for first in range(0, len(asked), _BLOCK)]
        answers = [teacher(part.assign(text=collection.corpus.texts(part["docno"].tolist()))) for part in parts]
        answered = pd.concat(answers)
        own = answered.merge(pd.concat(pairs[:2])[["qid", "docno"]])
        answered[["query", "docno", "score"]].to_parquet(file, index=False)
        write_json(told, {"teacher": teacher.fingerprint, **spread(own, pairs[0])})  # whole or not there: the last
    about = read_json(told)
    if about["margin_mean"] < _LEAST_MARGIN and collection.protocol.name != SMALL.name:
        raise TeacherError(
            f"the teacher of {collection.name} has learnt nothing that a student could learn from it: its margins are "
            f"{about['margin_mean']:.5f} ± {about['margin_sd']:.5f}"
        )
    return Scored(pd.read_parquet(file), teacher)


def cross_fitted(collection: Collection, all_collections: Sequence[Collection]) -> CrossFitted:
    """The teacher of all collections, for the queries of one; trained on the first use, in a folder beside theirs."""
    folders = [folder_of(collection) / str(number) for number in range(FOLDS)]
    for number, folder in enumerate(folders):
        if not (folder / "model" / "config.json").exists():
            _train(all_collections, number, folder)
    length = _options(collection.protocol)["max_length"]
    models = [
        CrossEncoderScorer(str(folder / "model"), max_length=length, batch_size=64, dtype="bfloat16")
        for folder in folders
    ]
    return CrossFitted(models, dict(zip(collection.train[0]["query"], folds(collection), strict=True)))


def folder_of(collection: Collection) -> Path:
    """Where the models are: for as many queries of a collection there is one teacher of all."""
    return collection.folder.parent / f"teacher-{collection.budget.queries or 'all'}"


def _options(protocol: Protocol) -> dict:
    return _SMALL if protocol.name == SMALL.name else _OPTIONS


def folds(collection: Collection) -> pd.Series:
    """The fold of each training query, by its cluster."""
    topics, qrels = collection.train
    cluster = clusters(collection.name, topics, qrels)
    return topics["qid"].map(cluster.map(lambda name: stable_hash(f"fold {name}") % FOLDS))


def _train(collections: Sequence[Collection], number: int, folder: Path) -> None:
    """Train the model that scores a fold, on all others: relevant documents against BM25's from the shared pools."""
    parts = []
    for collection in collections:
        topics, qrels = collection.train
        learnt = some_of(pd.Index(topics["qid"][folds(collection) != number]), collection.protocol.teacher_queries)
        # Some of both, so that collections with many relevant documents a query are affordable.
        own = qrels[qrels["qid"].isin(learnt) & (qrels["label"] > 0)].groupby("qid").head(_POSITIVES)
        pool = collection.document_pool.sample(frac=1, random_state=0).groupby("qid").head(_NEGATIVES)
        parts.append(training_pairs(topics, own, pool[pool["qid"].isin(own["qid"])], collection.corpus))
    folder.mkdir(parents=True, exist_ok=True)
    model = train(concatenate_datasets(parts), Namespace(out=folder, **_options(collections[0].protocol)))
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

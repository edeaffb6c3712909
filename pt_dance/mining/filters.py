"""False-negative filters: which mined candidates are too likely to be relevant to serve as negatives.

Each filter is a function of the candidates and a :class:`MiningContext` that gives a boolean array, True for those to
keep. Filters are applied in order, each to what the one before kept, and mining reports how much each removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.mining.readings import Readings


@dataclass
class MiningContext:
    """What a filter may need beyond the candidates.

    Attributes:
        topics: ``qid`` and ``query`` of all queries.
        pairs: All known-relevant (``qid``, ``docno``) pairs.
        corpus: The ``Corpus``, or None where mining was not given one.
        readings: Which texts are the same; those equal letter by letter where nothing else is said.
    """

    topics: pd.DataFrame
    pairs: pd.DataFrame
    corpus: Any = None
    readings: Readings = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.readings = Readings(self.corpus) if self.readings is None else self.readings

    def texts(self, docnos: list[str], needed_by: str) -> list[str]:
        """Return texts of documents.

        Raises:
            ValueError: If mining was not given a corpus.
        """
        if self.corpus is None:
            raise ValueError(f"the filter {needed_by} reads texts; give corpus=... to the mining function")
        return self.corpus.texts(docnos)

    def scored(self, scorer: pt.Transformer, frame: pd.DataFrame, needed_by: str) -> np.ndarray:
        """Return scores of (qid, docno) rows by a pipeline, float64 in the order of the rows.

        Raises:
            ValueError: If the pipeline lost rows.
        """
        rows = frame[["qid", "docno"]].drop_duplicates()
        rows = rows.merge(self.topics[["qid", "query"]].drop_duplicates("qid"), on="qid", how="left")
        if self.corpus is not None:
            rows["text"] = self.corpus.texts(rows["docno"].tolist())
        scores: pd.DataFrame = scorer(rows)
        if len(scores) != len(rows):
            raise ValueError(
                f"the scorer of {needed_by} gave {len(scores)} rows for {len(rows)}; it must score every row"
            )
        known = scores.set_index(["qid", "docno"])["score"]
        return known.loc[pd.MultiIndex.from_frame(frame[["qid", "docno"]])].to_numpy(dtype=np.float64)


Filter = Callable[[pd.DataFrame, MiningContext], np.ndarray]


@dataclass(frozen=True)
class RankRange:
    """Keep candidates with ``first`` <= rank < ``last``; the very best ranks are often unlabelled positives.

    Attributes:
        first: First rank kept, from 0.
        last: First rank not kept any more.
    """

    first: int
    last: int

    def __call__(self, candidates: pd.DataFrame, context: MiningContext) -> np.ndarray:
        """Say which candidates to keep."""
        return candidates["rank"].between(self.first, self.last - 1).to_numpy()


@dataclass(frozen=True)
class PositiveMargin:
    """Keep candidates that score clearly below the query's best positive.

    NV-Retriever (arXiv 2407.15831) compares mining variants: a candidate must score at most ``relative`` (95 % works
    best there) of the positive's score, or at least ``absolute`` below it.

    Attributes:
        scorer: Pipeline that scores (query, docno) rows, such as a dense retriever or a cross-encoder.
        relative: Share of the positive's score that a candidate may reach; meant for positive scores.
        absolute: How far below the positive's score a candidate must be.
    """

    scorer: pt.Transformer
    relative: float | None = None
    absolute: float | None = None

    def __post_init__(self):
        if (self.relative is None) == (self.absolute is None):
            raise ValueError("PositiveMargin takes either relative=... or absolute=..., exactly one of them")

    def __call__(self, candidates: pd.DataFrame, context: MiningContext) -> np.ndarray:
        """Say which candidates to keep."""
        if not len(candidates):
            return np.zeros(0, dtype=bool)
        positives = context.pairs[context.pairs["qid"].isin(candidates["qid"])]
        scores = pd.Series(context.scored(self.scorer, positives, "PositiveMargin"))
        best = scores.groupby(positives["qid"].to_numpy()).max()
        ceiling = best.reindex(candidates["qid"]).to_numpy()
        # a query without any positive has nothing to be compared with
        ceiling = np.where(np.isnan(ceiling), np.inf, ceiling)
        ceiling = ceiling * self.relative if self.relative is not None else ceiling - self.absolute
        return context.scored(self.scorer, candidates, "PositiveMargin") <= ceiling


@dataclass(frozen=True)
class TeacherScore:
    """Keep candidates that a teacher scores below a threshold (as RocketQA does, arXiv 2010.08191).

    Attributes:
        teacher: Pipeline that scores (query, text) rows.
        below: Candidates must score below this.
    """

    teacher: pt.Transformer
    below: float

    def __call__(self, candidates: pd.DataFrame, context: MiningContext) -> np.ndarray:
        """Say which candidates to keep."""
        if not len(candidates):
            return np.zeros(0, dtype=bool)
        return context.scored(self.teacher, candidates, "TeacherScore") < self.below


@dataclass(frozen=True)
class NearDuplicate:
    """Remove candidates whose text all but repeats that of one of the query's positives.

    Two texts are compared by the Jaccard similarity of their word ``n``-grams (Broder 1997).

    Attributes:
        threshold: Candidates of at least this similarity to a positive are removed.
        n: Words in a shingle.
    """

    threshold: float = 0.8
    n: int = 4

    def __post_init__(self):
        if not 0 < self.threshold <= 1 or self.n < 1:
            raise ValueError(
                f"NearDuplicate takes 0 < threshold <= 1 and n >= 1, not {self.threshold!r} and {self.n!r}"
            )

    def __call__(self, candidates: pd.DataFrame, context: MiningContext) -> np.ndarray:
        """Say which candidates to keep."""
        positives = context.pairs[context.pairs["qid"].isin(candidates["qid"])]
        docnos = pd.unique(pd.concat([candidates["docno"], positives["docno"]]))
        texts = context.texts(docnos.tolist(), "NearDuplicate")
        shingles = {docno: shingles_of(text, self.n) for docno, text in zip(docnos, texts, strict=True)}
        positive_of = positives.groupby("qid")["docno"].apply(list).to_dict()
        return np.array(
            [
                all(jaccard(shingles[docno], shingles[p]) < self.threshold for p in positive_of.get(qid, ()))
                for qid, docno in zip(candidates["qid"], candidates["docno"], strict=True)
            ],
            dtype=bool,
        )


def shingles_of(text: str, words: int) -> frozenset[int]:
    """Return hashes of a text's shingles, so many words each; a shorter text is one shingle."""
    found = re.findall(r"\w+", text.lower())
    return frozenset(hash(tuple(found[i : i + words])) for i in range(max(len(found) - words + 1, 1)))


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Return how alike two texts are: the Jaccard similarity of their shingles."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)

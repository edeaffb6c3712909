"""What is measured after a round: queries to documents, and documents to queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.mining.judgements import positive_pairs
from pt_dance.retriever.nearest_queries import nearest_queries
from pt_dance.storage.texts import first_line
from pt_dance.training.inputs import TrainingInput

REVERSED = "d→q {}"
_MOST = 1000


def measure_index(index: Any, validation: TrainingInput, measures: Sequence, *, engine: Any = None) -> dict[str, float]:
    """Measure an index, and so the encoder that made it, on validation topics, in both directions.

    Backwards (``"d→q nDCG@10"``), every relevant document is a query for the validation queries, against the reversed
    qrels with their grades: the dual evaluation of DANCE (arXiv 2107.07773). Its release logs the forward value under
    that name; this does not.

    Args:
        index: ``DenseIndex``; searched to the largest cutoff of the measures, or to 1,000 where one has none.
        validation: Checked validation topics and qrels.
        measures: ir_measures measures.
        engine: Has workers that search; this process does where None.

    Returns:
        The mean of each measure by its name, forwards and then backwards.
    """
    cutoffs = [measure.params.get("cutoff") for measure in measures]
    depth = _MOST if None in cutoffs else max(cutoffs)
    forwards = index.retriever(depth, engine=engine)(validation.topics)
    backwards, qrels = documents_to_queries(index, validation.topics, validation.qrels, depth)
    return _values(forwards, validation.qrels, backwards, qrels, measures)


def try_measures(validation: TrainingInput, measures: Sequence) -> None:
    """Compute each measure of two results in both directions, to see that it can be computed here.

    Raises:
        ValueError: If a measure cannot be computed; names it and says why.
    """
    qrels = validation.qrels[validation.qrels["label"] > 0].head(2)
    results = qrels[["qid", "docno"]].assign(score=1.0, rank=0)
    for measure in measures:
        try:
            _values(results, qrels, _reversed(results), _reversed(qrels), [measure])
        except Exception as error:  # whatever a measure's own program raises, the user gets one line
            reason = first_line(error)
            raise ValueError(
                f"measure={measure} cannot be computed here ({type(error).__name__}: {reason}); give another one"
            ) from None


def _values(forwards, qrels, backwards, reversed_qrels, measures: Sequence) -> dict[str, float]:
    forwards = pt.Evaluate(forwards, qrels, metrics=list(measures))
    backwards = pt.Evaluate(backwards, reversed_qrels, metrics=list(measures))
    named = {str(measure): float(value) for measure, value in forwards.items()}
    return named | {REVERSED.format(measure): float(value) for measure, value in backwards.items()}


def _reversed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.rename(columns={"qid": "docno", "docno": "qid"})


def documents_to_queries(index, topics: pd.DataFrame, qrels: pd.DataFrame, k: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Search the queries, at most ``k`` a document, with the stored vectors of the relevant documents of the index.

    Returns:
        A result frame whose ``qid`` is a document's docno and whose ``docno`` is a query's qid, and the reversed qrels:
        relevant pairs with their labels (the highest one where several topics have the same text).
    """
    pairs = positive_pairs(topics, qrels)
    pairs = pairs.assign(label=_grades(pairs, topics, qrels))
    pairs = pairs[index.open().documents.rows(pairs["docno"].tolist()) >= 0]
    docnos = pairs["docno"].drop_duplicates().tolist()
    qids = topics["qid"].to_numpy(dtype=object)
    queries = index.encoder.encode_queries(topics["query"].tolist(), precision=index.precision)
    vectors, owner = index.stored_vectors(docnos)
    scores, rows = nearest_queries(vectors, owner, queries, k)
    found = pd.DataFrame(
        {
            "qid": np.repeat(np.array(docnos, dtype=object), rows.shape[1]),
            "docno": qids[rows.ravel()],
            "score": scores.ravel(),
            "rank": np.tile(np.arange(rows.shape[1]), len(docnos)),
        }
    )
    return found, _reversed(pairs)


def _grades(pairs: pd.DataFrame, topics: pd.DataFrame, qrels: pd.DataFrame) -> np.ndarray:
    """Return the label of each pair, int64: that of its own topic, or else of one with the same text."""
    text_of = topics.drop_duplicates("qid").set_index("qid")["query"]
    own = qrels.set_index(["qid", "docno"])["label"].reindex(pd.MultiIndex.from_frame(pairs)).to_numpy()
    relevant = qrels[(qrels["label"] > 0) & qrels["qid"].isin(text_of.index)]
    by_text = relevant.groupby([relevant["qid"].map(text_of).to_numpy(), "docno"])["label"].max()
    texts = pd.MultiIndex.from_arrays([pairs["qid"].map(text_of), pairs["docno"]])
    shared = by_text.reindex(texts).to_numpy()
    return np.where(own > 0, own, shared).astype(np.int64)

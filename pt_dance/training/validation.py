"""What is measured after a round: queries to documents, and documents to queries."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.mining.judgements import positive_pairs
from pt_dance.retriever.nearest_queries import nearest_queries
from pt_dance.training.inputs import TrainingInput

REVERSED = "d→q {}"


def validate(dense, validation: TrainingInput, measures: list) -> dict[str, float]:
    """Measures of a dense retriever on validation topics, in both directions.

    Backwards ("d→q nDCG@10"), every relevant document is a query for the validation queries, against the reversed
    qrels: the dual evaluation of DANCE (arXiv 2107.07773). Its release logs the forward value under that name; this
        does not.

    Args:
        dense: ``DenseRetriever`` with stored vectors of the documents.
        validation: checked validation topics and qrels.
        measures: ir_measures measures.

    Returns:
        The mean of each measure by its name, forwards and then backwards.
    """
    depth = depth_of(measures, dense.num_results)
    forwards = pt.Evaluate((dense % depth).compile()(validation.topics), validation.qrels, metrics=measures)
    found, qrels = documents_to_queries(dense.index, validation.topics, validation.qrels, depth)
    backwards = pt.Evaluate(found, qrels, metrics=measures)
    named = {str(measure): float(value) for measure, value in forwards.items()}
    return named | {REVERSED.format(measure): float(value) for measure, value in backwards.items()}


def depth_of(measures: list, most: int) -> int:
    """How many results the measures look at: their largest cutoff, or ``most`` where one has none."""
    cutoffs = [measure.params.get("cutoff") for measure in measures]
    return most if None in cutoffs else min(max(cutoffs), most)


def documents_to_queries(index, topics: pd.DataFrame, qrels: pd.DataFrame, k: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Searches the queries with the stored vectors of the relevant documents that the index holds.

    Args:
        index: ``DenseIndex``.
        topics: the queries to be found, ``qid`` and ``query``.
        qrels: ``qid``, ``docno``, ``label``.
        k: how many queries a document gets at most.

    Returns:
        A result frame whose ``qid`` is a document's docno and whose ``docno`` is a query's qid, and the reversed qrels.
    """
    pairs = positive_pairs(topics, qrels)
    pairs = pairs[index.open().documents.rows(pairs["docno"].tolist()) >= 0]
    docnos = pairs["docno"].drop_duplicates().tolist()
    qids = topics["qid"].to_numpy(dtype=object)
    queries = index.encoder.encode_queries(topics["query"].tolist(), precision=index.precision)
    scores, rows = nearest_queries(*index.stored_vectors(docnos), queries, k)
    found = pd.DataFrame(
        {
            "qid": np.repeat(np.array(docnos, dtype=object), rows.shape[1]),
            "docno": qids[rows.ravel()],
            "score": scores.ravel(),
            "rank": np.tile(np.arange(rows.shape[1]), len(docnos)),
        }
    )
    return found, pairs.rename(columns={"qid": "docno", "docno": "qid"}).assign(label=1)

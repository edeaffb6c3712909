"""What a system finds, query by query, and where it wins and loses against another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ir_measures
import numpy as np
import pandas as pd
from scipy.stats import ttest_rel

_BLOCK_QUERIES = 500


def per_query(
    system: Callable[[pd.DataFrame], pd.DataFrame], topics: pd.DataFrame, qrels: pd.DataFrame, measures: Sequence[Any]
) -> pd.DataFrame:
    """Run a system on judged topics, block by block, and keep little of each query.

    Args:
        system: From topics to results.
        topics: Columns ``qid`` and ``query``.
        qrels: Columns ``qid``, ``docno``, ``label``.
        measures: ir_measures measures.

    Returns:
        A row a judged topic, in their order: ``qid``, ``query``, a column a measure, ``top`` (docno of the best result
        or None), ``found`` (docno of the best relevant result, or None) and its ``rank`` from 1 (NaN).

    Raises:
        ValueError: If no topic is judged.
    """
    topics = topics[["qid", "query"]].drop_duplicates("qid")
    topics = topics[topics["qid"].isin(qrels["qid"])].reset_index(drop=True)
    if not len(topics):
        raise ValueError("none of the topics has qrels; give the qrels of these topics")
    parts = []
    for start in range(0, len(topics), _BLOCK_QUERIES):
        block = topics.iloc[start : start + _BLOCK_QUERIES].reset_index(drop=True)
        judged = qrels[qrels["qid"].isin(block["qid"])]
        results = system(block)
        results = results.sort_values(["qid", "score"], ascending=[True, False], kind="stable")
        results = results.assign(place=results.groupby("qid").cumcount() + 1)
        block = block.assign(**_measured(results, judged, measures, block["qid"]))
        block["top"] = _first(results, block["qid"])["docno"].to_numpy()
        relevant = judged.loc[judged["label"] > 0, ["qid", "docno"]]
        found = _first(results.merge(relevant, on=["qid", "docno"]), block["qid"])
        block["found"], block["rank"] = found["docno"].to_numpy(), found["place"].to_numpy(dtype=float)
        parts.append(block)
    return pd.concat(parts, ignore_index=True)


def _measured(results: pd.DataFrame, judged: pd.DataFrame, measures: Sequence[Any], qids: pd.Series) -> dict:
    qrels = judged.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    run = results.rename(columns={"qid": "query_id", "docno": "doc_id"})[["query_id", "doc_id", "score"]]
    values = {str(measure): pd.Series(0.0, index=qids) for measure in measures}
    for value in ir_measures.iter_calc(list(measures), qrels, run):
        values[str(value.measure)][value.query_id] = value.value
    return {name: column.to_numpy() for name, column in values.items()}


def _first(results: pd.DataFrame, qids: pd.Series) -> pd.DataFrame:
    """Return the first row of each query, NaN where it has none."""
    best = results.sort_values(["qid", "place"], kind="stable").drop_duplicates("qid")
    return best.set_index("qid")[["docno", "place"]].reindex(qids).astype({"docno": object})


def wins_and_losses(before: pd.DataFrame, after: pd.DataFrame, measure: str, number: int) -> dict[str, Any]:
    """Compare two systems query by query.

    Args:
        before: What :func:`per_query` gave for the system compared with.
        after: What it gave for the other, for the same topics.
        measure: Name of the measure.
        number: How many of the largest wins and losses are listed.

    Returns:
        ``wins``, ``ties``, ``losses`` (numbers of queries), ``p`` (paired t-test; 1 where all are equal),
        ``most won`` and ``most lost``: frames with ``qid``, ``query``, ``before``, ``after``, and ``top``, ``found``
        and ``rank`` of both.
    """
    both = before[["qid", "query"]].copy()
    for name, frame in (("before", before), ("after", after)):
        both[name] = frame[measure].to_numpy()
        for column in ("top", "found", "rank"):
            both[f"{column} {name}"] = frame[column].to_numpy()
    difference = both["after"] - both["before"]
    order = difference.sort_values(kind="stable").index
    return {
        "wins": int((difference > 0).sum()),
        "ties": int((difference == 0).sum()),
        "losses": int((difference < 0).sum()),
        "p": float(ttest_rel(both["after"], both["before"]).pvalue) if np.ptp(difference) > 0 else 1.0,
        "most won": both.loc[[i for i in order[::-1] if difference[i] > 0][:number]],
        "most lost": both.loc[[i for i in order if difference[i] < 0][:number]],
    }

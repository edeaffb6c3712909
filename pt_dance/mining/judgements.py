"""Which (query, document) pairs are known to be relevant."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyterrier as pt

from pt_dance.mining.readings import Readings


def positive_pairs(topics: pd.DataFrame, qrels: pd.DataFrame, reads: Any = None) -> pd.DataFrame:
    """Return all known-relevant pairs of these topics, shared between topics that read the same.

    An encoder cannot tell two such topics apart, so what is relevant to one is relevant to the other: without this, one
    topic's positive could be mined as a negative of its twin. Copies of a positive under another docno are not added:
    mining and training recognise them by what is read of them.

    Args:
        topics: Columns ``qid`` and ``query`` (str).
        qrels: Columns ``qid``, ``docno`` and ``label``; a label above 0 means relevant.
        reads: A ``DualEncoder`` or :class:`Readings`, whose reading decides which topics are the same; where None,
            those whose texts are equal letter by letter.

    Returns:
        A new frame with columns ``qid`` and ``docno``, without duplicates, ordered as the topics are and then by
        docno; only topics with at least one relevant document occur in it.
    """
    pt.validate.columns(topics, includes=["qid", "query"])
    pt.validate.columns(qrels, includes=["qid", "docno", "label"])
    topics = topics[["qid", "query"]].drop_duplicates("qid").reset_index(drop=True)
    text_number = pd.Series(pd.factorize(Readings.of(reads).queries(topics["query"]))[0], index=topics["qid"])
    relevant = qrels.loc[qrels["label"] > 0, ["qid", "docno"]]
    relevant = relevant[relevant["qid"].isin(text_number.index)]
    by_text = pd.DataFrame({"text": text_number.loc[relevant["qid"]].to_numpy(), "docno": relevant["docno"].to_numpy()})
    topics = topics.assign(text=text_number.to_numpy(), order=range(len(topics)))
    pairs = topics.merge(by_text.drop_duplicates(), on="text")
    return pairs.sort_values(["order", "docno"], kind="stable")[["qid", "docno"]].reset_index(drop=True)

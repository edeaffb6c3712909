"""What ``fit`` is given, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import pyterrier as pt


@dataclass
class TrainingInput:
    """Checked topics and qrels.

    Attributes:
        topics: ``qid``, ``query`` and whatever other query columns came along, one row a query.
        qrels: ``qid``, ``docno``, ``label`` of these topics.
        first_stage: the result frame that came in, or None where plain topics came in.
    """

    topics: pd.DataFrame
    qrels: pd.DataFrame
    first_stage: pd.DataFrame | None


def check_training_input(topics_or_res: pd.DataFrame, qrels: pd.DataFrame, *, corpus, context, what: str) -> TrainingInput:
    """Checks the frames given to ``fit``; each problem is one plain sentence.

    Args:
        topics_or_res: a query frame (``qid``, ``query``) or a result frame (``qid``, ``query``, ``docno``, ...).
        qrels: ``qid``, ``docno``, ``label``.
        corpus: ``Corpus`` that every relevant document must be in; None leaves that unchecked.
        context: the transformer that validates, named in errors.
        what: "training" or "validation".

    Raises:
        TypeError: if something else than data frames came.
        KeyError: if a column is missing.
        ValueError: if nothing came, a query has no text, there are no qrels for the topics, or the qrels name documents
            that are not in the corpus.
    """
    for name, frame in ((f"{what} topics", topics_or_res), (f"{what} qrels", qrels)):
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"the {name} must be a pandas DataFrame, not {type(frame).__name__}")
    columns = set(topics_or_res.columns)
    if columns & {"score", "rank"} and "docno" not in columns:
        raise KeyError(
            f"the {what} frame has scores or ranks but no column 'docno', so it is neither topics nor a result frame; "
            "keep 'docno' in the stages before this one"
        )
    if len(topics_or_res) == 0:
        raise ValueError(
            f"no {what} rows arrived: the topics are empty, or a stage before this one let nothing through "
            "(such as a rank cutoff of 0 or less)"
        )
    is_results = "docno" in columns
    if is_results:
        pt.validate.result_frame(topics_or_res, ["query"], context=context)
    else:
        pt.validate.query_frame(topics_or_res, ["query"], context=context)
    pt.validate.columns(qrels, includes=["qid", "docno", "label"], context=context)
    topics = topics_or_res
    if is_results:
        topics = topics[[c for c in topics.columns if c in ("qid", "query") or c.startswith("query_")]]
    _check_one_text_per_qid(topics, what)
    # a retriever with several threads gives its queries back in any order, which must not change the training
    topics = topics.drop_duplicates("qid").sort_values("qid", kind="stable").reset_index(drop=True)
    _check_texts(topics, what)
    judged = qrels[qrels["qid"].isin(topics["qid"])]
    if not (judged["label"] > 0).any():
        example = f" (topics: qid {topics['qid'].iloc[0]!r}; qrels: qid {qrels['qid'].iloc[0]!r})" if len(qrels) else ""
        raise ValueError(
            f"the {what} qrels hold no relevant document for any of the {len(topics)} {what} topics{example}; "
            "check that both come from the same split and that qids have the same type"
        )
    if corpus is not None:
        check_in_corpus(judged.loc[judged["label"] > 0, "docno"], corpus, f"{what} qrels")
    judged = judged.sort_values(["qid", "docno"], kind="stable").reset_index(drop=True)
    if not is_results:
        return TrainingInput(topics, judged, None)
    order = ["qid", "rank", "docno"] if "rank" in columns else ["qid", "docno"]
    return TrainingInput(topics, judged, topics_or_res.sort_values(order, kind="stable").reset_index(drop=True))


def _check_one_text_per_qid(topics: pd.DataFrame, what: str) -> None:
    pairs = topics[["qid", "query"]].drop_duplicates()
    twice = pairs["qid"][pairs["qid"].duplicated()]
    if len(twice):
        raise ValueError(f"qid {twice.iloc[0]!r} occurs with two different texts in the {what} topics; give each query its own qid")


def _check_texts(topics: pd.DataFrame, what: str) -> None:
    is_text = topics["query"].map(lambda text: isinstance(text, str) and bool(text.strip()))
    if not is_text.all():
        row = topics[~is_text].iloc[0]
        raise ValueError(f"the {what} topic {row['qid']!r} has no text in column 'query' ({row['query']!r}); remove or mend it")


def check_in_corpus(docnos: pd.Series, corpus, what: str) -> None:
    """Raises ValueError naming a docno that the corpus does not hold."""
    distinct = docnos.drop_duplicates()
    rows = corpus.rows(distinct.tolist())
    if (rows < 0).any():
        missing = distinct.to_numpy()[rows < 0]
        raise ValueError(
            f"the {what} name {len(missing)} document(s) that are not in the corpus, such as docno {missing[0]!r}; "
            "remove these rows or build the corpus with them"
        )

"""What ``fit`` is given, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.mining import Readings, positive_pairs
from pt_dance.mining.candidates import reduce_results
from pt_dance.storage.queries import users_queries
from pt_dance.storage.texts import lone_surrogate
from pt_dance.training.examples import build_examples


@dataclass
class TrainingInput:
    """Checked topics and qrels.

    Attributes:
        topics: ``qid``, ``query`` (the user's words) and whatever other query columns came along, one row a query.
        qrels: ``qid``, ``docno``, ``label`` of these topics.
        pairs: All known-relevant pairs, see :func:`pt_dance.mining.positive_pairs`.
        readings: What the encoder reads of queries and documents, which decides what is the same.
        first_stage: The result frame that came in, reduced to what mining needs; None where plain topics came in.
    """

    topics: pd.DataFrame
    qrels: pd.DataFrame
    pairs: pd.DataFrame
    readings: Readings
    first_stage: pd.DataFrame | None

    def count_pairs(self, corpus, turns: Sequence[pd.Series]) -> list[int]:
        """Return how many (query, positive) pairs there are to train on for each selection of topics."""
        counts: list[int] = []
        for number, qids in enumerate(turns):
            if number and qids.equals(turns[number - 1]):
                counts.append(counts[-1])
                continue
            counts.append(build_examples(self.topics, self.pairs, corpus, qids=qids, reads=self.readings).pairs)
        return counts


def check_fit(
    topics: pd.DataFrame, qrels: pd.DataFrame, validation_topics: pd.DataFrame | None,
    validation_qrels: pd.DataFrame | None, *, corpus, reads, context,
) -> tuple[TrainingInput, TrainingInput | None]:  # fmt: skip
    """Check all that ``fit`` is given; see :func:`check_training_input` for arguments and errors."""
    if corpus is None:
        raise ValueError("training needs the documents: give corpus=... when making the DanceRetriever")
    if (validation_topics is None) != (validation_qrels is None):
        raise ValueError("validation needs both topics and qrels; give both or neither")
    given = dict(corpus=corpus, reads=reads, context=context)
    training = check_training_input(topics, qrels, what="training", **given)
    if validation_topics is None or validation_qrels is None:
        return training, None
    return training, check_training_input(validation_topics, validation_qrels, what="validation", **given)


def check_training_input(
    topics_or_res: pd.DataFrame, qrels: pd.DataFrame, *, corpus, reads, context, what: str
) -> TrainingInput:
    """Check the frames given to ``fit``; each problem is one plain sentence.

    Args:
        topics_or_res: A query frame (``qid``, ``query``) or a result frame (``qid``, ``query``, ``docno``, ...).
        qrels: ``qid``, ``docno``, ``label``.
        corpus: ``Corpus`` that every relevant document and every result must be in; for validation, at least one
            relevant document, since it may well be measured on a part of a collection.
        reads: ``DualEncoder`` whose reading decides which queries and documents are the same.
        context: The transformer that validates, named in errors.
        what: "training" or "validation".

    Raises:
        TypeError: If something else than data frames came, or an id is no string or a label no number.
        KeyError: If a column is missing.
        ValueError: If nothing came, a query has no text, there are no qrels for the topics, or the qrels name documents
            that are not in the corpus; if a column, or a pair of the qrels with another label, is there twice.
    """
    for name, frame in ((f"{what} topics", topics_or_res), (f"{what} qrels", qrels)):
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"the {name} must be a pandas DataFrame, not {type(frame).__name__}")
        _check_columns_once(frame, name)
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
    if is_results:
        _check_ids(topics_or_res, ("qid", "docno"), f"{what} results")
    else:
        _check_ids(topics_or_res, ("qid",), f"{what} topics")
    _check_ids(qrels, ("qid", "docno"), f"{what} qrels")
    topics = topics_or_res
    if is_results:
        topics = topics[[c for c in topics.columns if c in ("qid", "query") or c.startswith("query_")]]
    rewritten = [c for c in topics.columns if re.fullmatch(r"query_\d+", c)]
    if not isinstance(topics["query"].dtype, pd.StringDtype):
        check_query_texts(topics, f"{what} topic")  # what is no text may not be hashable either
    topics = topics.drop_duplicates(["qid", "query", *rewritten])
    # what rewriters left, and vectors of whatever encoder, belong to other texts than those that are learnt from
    topics = topics.assign(query=users_queries(topics)).drop(columns=[*rewritten, "query_vec"], errors="ignore")
    check_query_texts(topics, f"{what} topic")
    _check_one_text_per_qid(topics, what)
    # a retriever with several threads gives its queries back in any order, which must not change the training
    topics = topics.drop_duplicates("qid").sort_values("qid", kind="stable").reset_index(drop=True)
    judged = _checked_labels(qrels[qrels["qid"].isin(topics["qid"])], what)
    if not (judged["label"] > 0).any():
        example = f" (topics: qid {topics['qid'].iloc[0]!r}; qrels: qid {qrels['qid'].iloc[0]!r})" if len(qrels) else ""
        raise ValueError(
            f"the {what} qrels hold no relevant document for any of the {len(topics)} {what} topics{example}; "
            "check that both come from the same split"
        )
    relevant = judged.loc[judged["label"] > 0, "docno"]
    if what == "training":
        check_in_corpus(relevant, corpus, f"{what} qrels")
        if is_results:
            check_in_corpus(topics_or_res["docno"], corpus, f"{what} results")
    elif (corpus.rows(relevant.drop_duplicates().tolist()) < 0).all():
        raise ValueError(
            f"none of the relevant documents that the {what} qrels name is in the corpus, such as docno "
            f"{relevant.iloc[0]!r}; check that both come from the same collection"
        )
    judged = judged.sort_values(["qid", "docno"], kind="stable").reset_index(drop=True)
    readings = Readings.of(reads, corpus)
    first_stage = None
    if is_results:
        order = ["qid", "rank", "docno"] if "rank" in columns else ["qid", "docno"]
        first_stage = reduce_results(topics_or_res).sort_values(order, kind="stable", ignore_index=True)
    return TrainingInput(topics, judged, positive_pairs(topics, judged, readings), readings, first_stage)


def _check_columns_once(frame: pd.DataFrame, name: str) -> None:
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise ValueError(f"the {name} have the column {twice[0]!r} more than once; keep one of them")


def _check_ids(frame: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    for column in columns:
        wrong = frame[column][~_are_strings(frame[column])]
        if len(wrong):
            raise TypeError(
                f"the column {column!r} of the {name} holds {_plain(wrong.iloc[0])}, no string; ids are strings in "
                f"PyTerrier: remove what is missing and turn the rest into strings, frame.astype({{{column!r}: str}})"
            )


def _are_strings(values: pd.Series) -> pd.Series:
    if isinstance(values.dtype, pd.StringDtype):
        return values.notna()
    return values.map(lambda value: isinstance(value, str)).astype(bool)


def _plain(value: object) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)


def _checked_labels(qrels: pd.DataFrame, what: str) -> pd.DataFrame:
    """Return the qrels with labels of type int64 and no pair twice.

    Raises:
        TypeError: If a label is no number.
        ValueError: If a label is no whole number, or a pair has two different ones.
    """
    labels = qrels["label"]
    numbers = (int, float, np.integer, np.floating, np.bool_)
    wrong = labels[~labels.map(lambda label: isinstance(label, numbers)).astype(bool)]
    if len(wrong):
        row = qrels.loc[wrong.index[0]]
        raise TypeError(
            f"the column 'label' of the {what} qrels holds {_plain(wrong.iloc[0])}, no number (qid {row['qid']!r}, "
            f"docno {row['docno']!r}); turn labels into numbers with qrels.astype({{'label': int}})"
        )
    labels = labels.astype(float)
    broken = ~np.isfinite(labels) | (labels % 1 != 0)
    if broken.any():
        row = qrels[broken].iloc[0]
        raise ValueError(
            f"the {what} qrels have the label {_plain(row['label'])} for qid {row['qid']!r}, docno {row['docno']!r}; "
            "labels are whole numbers, above 0 for what is relevant"
        )
    qrels = qrels.assign(label=labels.astype("int64")).drop_duplicates(["qid", "docno", "label"])
    twice = qrels.duplicated(["qid", "docno"])
    if twice.any():
        row = qrels[twice].iloc[0]
        raise ValueError(
            f"the {what} qrels judge docno {row['docno']!r} for qid {row['qid']!r} more than once, with different "
            "labels; keep one"
        )
    return qrels


def _check_one_text_per_qid(topics: pd.DataFrame, what: str) -> None:
    pairs = topics[["qid", "query"]].drop_duplicates()
    twice = pairs["qid"][pairs["qid"].duplicated()]
    if len(twice):
        raise ValueError(
            f"qid {twice.iloc[0]!r} occurs with two different texts in the {what} topics; give each query its own qid"
        )


def check_query_texts(topics: pd.DataFrame, name: str = "query", *, blank: bool = False) -> None:
    """Raise a plain error naming the first qid whose text cannot be encoded.

    Args:
        topics: ``qid`` and ``query``; a query may have several rows.
        name: What an error calls a row.
        blank: Whether texts may be empty, as those that are searched may, unlike those that are learnt from.

    Raises:
        ValueError: If a text is missing, empty, no string, or no valid Unicode.
    """
    texts = topics["query"]
    good = _are_strings(texts)
    if not blank:
        good[good] = texts[good].str.strip() != ""
    if not good.all():
        row = topics[~good].iloc[0]
        raise ValueError(
            f"the {name} {row['qid']!r} has no text in column 'query' ({row['query']!r}); remove or mend it"
        )
    broken = texts.drop_duplicates().map(lambda text: lone_surrogate(text) is not None)
    if broken.any():
        qid = topics.loc[broken.index[broken.to_numpy(dtype=bool)][0], "qid"]
        raise ValueError(
            f"the {name} {qid!r} has a text in column 'query' that is no valid Unicode (a lone surrogate); mend it"
        )


def check_in_corpus(docnos: pd.Series, corpus, what: str) -> None:
    """Raise ValueError naming a docno that the corpus does not hold."""
    distinct = docnos.drop_duplicates()
    rows = corpus.rows(distinct.tolist())
    if (rows < 0).any():
        missing = distinct[rows < 0].tolist()
        raise ValueError(
            f"the {what} name {len(missing)} document(s) that are not in the corpus, such as docno {missing[0]!r}; "
            "remove these rows or build the corpus with them"
        )

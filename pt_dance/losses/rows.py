"""What a loss knows of every training row beyond its texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp


@dataclass(eq=False)
class TrainingRows:
    """The table from a row's number to its query, documents, mined negatives and teacher scores.

    Sentence-transformers' trainer hands a loss the tokenised columns and one tensor of labels, nothing else. Where
    the label of a row is its number in the training set, a loss looks up in this table which of the batch's pairs are
    relevant, and no known-relevant pair is used as a negative, whatever the row it comes from.

    Queries and documents are numbered: a query is a row of ``relevance``, a document a column of it.

    Args:
        query: int (rows,), the query of each row.
        positive: int (rows,), the positive document of each row; relevant by ``relevance``.
        relevance: scipy.sparse matrix (queries, documents), true where **all** training judgements say relevant.
        negatives: int (rows, n), the mined documents of each row; -1 where there is none, and the row's text is then
            the empty string. Default: n = 0.
        query_negatives: int (rows, m), the mined queries of each row, -1 where there is none. Default: m = 0.
        teacher_positive: float (rows,), the teacher's score of (query, positive), or None.
        teacher_negatives: float (rows, n), the teacher's scores of (query, mined document), or None.
        teacher_query_negatives: float (rows, m), the teacher's scores of (mined query, positive), or None.
        passages: int (documents,), how many passages each document has, at least 1, where documents are scored by their
            best passage (MaxP); None where every document is one text.
        later: Gives what was mined for the rows later, by the number of the version, from 1, as arguments of
            :meth:`with_mined`; these rows are version 0. Every label then is version × rows + row, so that a batch
            names the table it was made with, however long ago. None where negatives are not refreshed while training
            goes on.

    Raises:
        ValueError: Shapes that do not fit, numbers out of range, or a row whose positive is not relevant.
    """

    query: np.ndarray
    positive: np.ndarray
    relevance: sp.csr_matrix
    negatives: np.ndarray = None  # type: ignore[assignment]
    query_negatives: np.ndarray = None  # type: ignore[assignment]
    teacher_positive: np.ndarray | None = None
    teacher_negatives: np.ndarray | None = None
    teacher_query_negatives: np.ndarray | None = None
    passages: np.ndarray | None = None
    later: Callable[[int], Mapping[str, np.ndarray]] | None = None
    # Which query each row of ``relevance`` is of, where it has not all of them, in order.
    _judged: np.ndarray | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        relevance = sp.csr_matrix(self.relevance, dtype=bool)
        if relevance.nnz and not relevance.data.all():
            relevance = relevance.copy()
            relevance.eliminate_zeros()
        self.relevance = relevance
        queries, documents = relevance.shape
        self.query = _numbers("query", self.query, queries, lowest=0)
        self.positive = _numbers("positive", self.positive, documents, lowest=0)
        for name, array in (("query", self.query), ("positive", self.positive)):
            if array.ndim != 1 or len(array) != len(self.query):
                raise ValueError(f"{name} must hold one number a row, shape ({len(self.query)},), not {array.shape}")
        for name, count in (("negatives", documents), ("query_negatives", queries)):
            given = getattr(self, name)
            array = _numbers(name, np.empty((len(self), 0), np.int32) if given is None else given, count, lowest=-1)
            if array.ndim != 2 or len(array) != len(self):
                raise ValueError(f"{name} must have shape ({len(self)}, columns), not {array.shape}")
            setattr(self, name, array)
        shapes = {
            "teacher_positive": self.positive.shape,
            "teacher_negatives": self.negatives.shape,
            "teacher_query_negatives": self.query_negatives.shape,
        }
        for name, shape in shapes.items():
            if getattr(self, name) is not None:
                array = np.asarray(getattr(self, name), dtype=np.float32)
                if array.shape != shape:
                    raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
                setattr(self, name, array)
        if self.passages is not None:
            self.passages = np.asarray(self.passages)
            if self.passages.shape != (documents,) or self.passages.dtype.kind not in "iu" or self.passages.min() < 1:
                raise ValueError(f"passages must hold a number of at least 1 for each of the {documents} documents")
        self._check_positives()

    def _check_positives(self) -> None:
        # One sorted key a judgement: a query with many positives has as many rows, so anything per row and judgement
        # would grow with their product.
        documents = np.int64(self.relevance.shape[1])
        judged = np.repeat(np.arange(self.relevance.shape[0], dtype=np.int64), np.diff(self.relevance.indptr))
        keys = judged * documents + self.relevance.indices
        wrong = np.flatnonzero(~np.isin(self.query.astype(np.int64) * documents + self.positive, keys))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"the positive document {self.positive[row]} of row {row} is not relevant to its query "
                f"{self.query[row]}: relevance must hold every training judgement, the rows' own among them"
            )

    def __len__(self) -> int:
        return len(self.query)

    @cached_property
    def passages_per_document(self) -> int:
        """How many text columns stand for one document: the most passages that a document of these rows has.

        Where negatives are refreshed these may be any documents.
        """
        if self.passages is None or not len(self):
            return 1
        if self.later is not None:
            return int(self.passages.max())
        used = np.concatenate([self.positive, self.negatives.ravel()])
        return int(self.passages[used[used >= 0]].max())

    def with_mined(
        self, negatives: np.ndarray, query_negatives: np.ndarray, teacher_negatives: np.ndarray | None = None,
        teacher_query_negatives: np.ndarray | None = None,
    ) -> TrainingRows:  # fmt: skip
        """Return the same rows with other negatives, as many a row as before; arguments are those of the class.

        Raises:
            ValueError: Shapes that are not those of these rows, or numbers out of range.
        """
        other = object.__new__(TrainingRows)  # pairs and judgements are not checked again
        other.__dict__.update({field.name: getattr(self, field.name) for field in fields(self)})
        queries, documents = self.relevance.shape
        other.negatives = _numbers("negatives", negatives, documents, lowest=-1)
        other.query_negatives = _numbers("query_negatives", query_negatives, queries, lowest=-1)
        other.teacher_negatives, other.teacher_query_negatives = teacher_negatives, teacher_query_negatives
        other.later = None
        for name in ("negatives", "query_negatives", "teacher_negatives", "teacher_query_negatives"):
            one, another = (getattr(rows, name) for rows in (self, other))
            if np.shape(one) != np.shape(another):
                raise ValueError(f"{name} must have shape {np.shape(one)}, not {np.shape(another)}")
        other.__dict__["passages_per_document"] = self.passages_per_document  # the columns of a batch stay
        return other

    def of(self, labels: np.ndarray) -> tuple[TrainingRows, np.ndarray]:
        """Return the table that a batch was made with, and its rows' numbers.

        Args:
            labels: int (rows of the batch,); -1 for rows that only fill it up.

        Raises:
            ValueError: If the labels name different tables.
        """
        real = labels >= 0
        if self.later is None or not real.any():
            return self, labels
        versions = labels[real] // len(self)
        if (versions != versions[0]).any():
            raise ValueError(f"a batch has rows of different tables of negatives: {sorted(set(versions.tolist()))}")
        number = int(versions[0])
        return self._opened(number) if number else self, np.where(real, labels % len(self), -1)

    @cached_property
    def _opened(self) -> Callable[[int], TrainingRows]:
        later: Any = self.later  # only asked for where there is one
        # batches are made a few ahead of their use, so that two are in use at a time, and a third while it is opened
        return lru_cache(maxsize=2)(lambda number: self.with_mined(**later(number)))

    def relevant(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Say for every query and every document whether they are a known-relevant pair.

        Args:
            queries: int (a,), query numbers.
            documents: int (b,), document numbers; -1 (no document) is relevant to nothing.

        Returns:
            bool (a, b). Time and memory beyond it grow with the queries' judgements, not with the collection.
        """
        found = np.zeros((len(queries), len(documents)), dtype=bool)
        found[_matches(*self._entries(queries), documents)] = True
        return found

    def relevant_to_own(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Say for every query and each of **its own** documents whether they are a known-relevant pair.

        Args:
            queries: int (a,), query numbers.
            documents: int (a, n), document numbers, n for every query; -1 is relevant to nothing.

        Returns:
            bool (a, n).
        """
        of, judged = self._entries(queries)
        found = np.zeros(documents.shape, dtype=bool)
        entry, column = np.nonzero(judged[:, None] == documents[of])
        found[of[entry], column] = True
        return found

    def related_queries(self, queries: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Say which queries are the same or share a relevant document: no negatives of each other.

        Args:
            queries: int (a,), query numbers.
            others: int (b,), query numbers.

        Returns:
            bool (a, b).
        """
        of, documents = self._entries(queries)
        other_of, other_documents = (of, documents) if others is queries else self._entries(others)
        related = queries[:, None] == others[None, :]
        row, entry = _matches(of, documents, other_documents)
        related[row, other_of[entry]] = True
        return related

    def related_documents(self, documents: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Say which documents are the same or share a query they are relevant to.

        Args:
            documents: int (a,), document numbers.
            others: int (b,), document numbers.

        Returns:
            bool (a, b).
        """
        return self.mirrored.related_queries(documents, others)

    def _entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what is relevant to some queries: position in ``rows`` and document of each."""
        rows = np.asarray(rows)
        there = np.ones(rows.shape, dtype=bool)
        if self._judged is not None:
            there = np.isin(rows, self._judged)
            rows = np.where(there, np.searchsorted(self._judged, rows), 0)
        starts = self.relevance.indptr
        first = starts[rows]
        count = np.where(there, starts[np.minimum(rows + 1, len(starts) - 1)] - first, 0)
        return np.repeat(np.arange(len(count)), count), self.relevance.indices[_runs(first, count)]

    @cached_property
    def mirrored(self) -> TrainingRows:
        """The same rows with the roles of queries and documents swapped: what the dual direction looks up."""
        other = object.__new__(TrainingRows)  # what was checked once is not checked again
        other.query, other.positive = self.positive, self.query
        other.negatives, other.query_negatives = self.query_negatives, self.negatives
        # Only documents that were judged have a row: no array is as long as the collection.
        judged, column = np.unique(self.relevance.indices, return_inverse=True)
        shape = self.relevance.shape[0], len(judged)
        other.relevance = sp.csr_matrix((self.relevance.data, column, self.relevance.indptr), shape=shape).T.tocsr()
        other._judged = judged
        other.__dict__["mirrored"] = self
        other.teacher_positive = self.teacher_positive
        other.teacher_negatives = self.teacher_query_negatives
        other.teacher_query_negatives = self.teacher_negatives
        other.passages = other.later = None
        return other

    def __repr__(self) -> str:
        return (
            f"TrainingRows({len(self)} rows, {self.relevance.nnz} relevant pairs, "
            f"{self.negatives.shape[1]} negatives, {self.query_negatives.shape[1]} query negatives)"
        )


def _numbers(name: str, values: np.ndarray, count: int, lowest: int) -> np.ndarray:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, not {array.dtype}")
    if array.size and (array.min() < lowest or array.max() >= count):
        raise ValueError(
            f"{name} must lie between {lowest} and {count - 1}, by the shape of relevance; "
            f"it holds {array.min()} to {array.max()}"
        )
    return np.ascontiguousarray(array, dtype=np.int32)


def _matches(of: np.ndarray, values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where values occur among others: of each match the value's entry in ``of``, and its position there."""
    order = np.argsort(others, kind="stable")
    ranked = others[order]
    first = np.searchsorted(ranked, values, side="left")
    count = np.searchsorted(ranked, values, side="right") - first
    return np.repeat(of, count), order[_runs(first, count)]


def _runs(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Count up from each first: first[0], first[0] + 1, … (count[0] numbers), first[1], … and so on."""
    total = int(count.sum())
    ends = np.cumsum(count)
    return np.arange(total) + np.repeat(first - (ends - count), count)

"""One batch as a loss sees it: embeddings, and what is known of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pt_dance.losses.rows import TrainingRows


class BatchRows:
    """Which pairs of a batch may be negatives of each other, each mask computed when first asked for.

    Rows that only fill the batch up (row number -1) have no negatives, are nobody's negatives and count in no mean.

    Args:
        rows: The training rows, or None where only the columns are known: then nothing but a row's own pair is hidden.
        numbers: int (W,), the row numbers of the whole batch, over all processes, -1 for rows that fill it up; None
            without ``rows``.
        count: W, the rows of the whole batch.
        local: Which of them are this process's own (L of them).
        device: Where the masks are wanted.
    """

    def __init__(
        self, rows: TrainingRows | None, numbers: np.ndarray | None, count: int, local: slice, device: torch.device
    ) -> None:
        self.rows, self.count, self.local, self.device = rows, count, local, device
        self._given = numbers
        if numbers is not None:
            self.filling = numbers < 0
            self.numbers: Any = np.maximum(numbers, 0)

    @cached_property
    def mirrored(self) -> BatchRows:
        """The same for the dual direction."""
        rows = None if self.rows is None else self.rows.mirrored
        return BatchRows(rows, self._given, self.count, self.local, self.device)

    @cached_property
    def real(self) -> Tensor | None:
        """Bool (W,): the rows that do not only fill the batch up; None: all are real."""
        if self.rows is None or not self.filling.any():
            return None
        return torch.from_numpy(~self.filling).to(self.device)

    @cached_property
    def usable_negatives(self) -> Tensor | None:
        """Bool (W, n): the mined negatives that are there and not relevant to their row's query; None: all are."""
        if self.rows is None:
            return None
        negatives = self._documents[:, 1:]
        usable = (negatives >= 0) & ~self.rows.relevant_to_own(self.rows.query[self.numbers], negatives)
        return torch.from_numpy(usable).to(self.device)

    @cached_property
    def _documents(self) -> np.ndarray:
        """Int (W, 1 + n): the positive and the mined documents of each row, -1 where there is none."""
        rows: Any = self.rows  # only asked for where there are rows
        documents = np.concatenate([rows.positive[self.numbers, None], rows.negatives[self.numbers]], axis=1)
        documents[self.filling] = -1
        return documents

    @cached_property
    def hidden_documents(self) -> Tensor | None:
        """Bool (L, W + W n): documents that are no negatives of a local query: its other positives, and padding.

        Columns: the positives of all rows, then their mined negatives, row after row. The pair of the row itself is
        never hidden. None: nothing is.
        """
        if self.rows is None:
            return None
        documents = np.concatenate([self._documents[:, 0], self._documents[:, 1:].reshape(-1)])
        hidden = self.rows.relevant(self.rows.query[self.numbers[self.local]], documents)
        hidden[:, documents < 0] = True
        hidden[self.filling[self.local]] = True
        own = np.arange(len(hidden))
        hidden[own, own + self.local.start] = False
        return torch.from_numpy(hidden).to(self.device)

    @cached_property
    def hidden_queries(self) -> Tensor:
        """Bool (L, W): queries that are no negatives of a local query: itself, or they share a relevant document."""
        return torch.from_numpy(self._related(self.local)).to(self.device)

    @cached_property
    def distinct_queries(self) -> tuple[Tensor, int]:
        """Bool (W, W) and how many are true: pairs i < j of queries that are neither the same nor related."""
        distinct = np.triu(~self._related(slice(0, self.count)), k=1)
        return torch.from_numpy(distinct).to(self.device), int(distinct.sum())

    def _related(self, of: slice) -> np.ndarray:
        if self.rows is None:
            return np.eye(self.count, dtype=bool)[of]
        queries = self.rows.query[self.numbers]
        related = self.rows.related_queries(queries[of], queries)
        return related | self.filling[of, None] | self.filling

    def passages_filled(self, embeddings: Tensor) -> Tensor:
        """Return documents' passages, (W, columns, d), as (W, 1 + n, passages, d): the positive's, then the negatives'.

        Where a document has fewer passages than there are columns, its first one stands for those it has not: that
        changes no maximum.
        """
        rows: Any = self.rows  # passages are only filled where rows say how many there are
        documents = self._documents
        count = np.where(documents < 0, 1, rows.passages[np.maximum(documents, 0)])
        passages = embeddings.unflatten(1, (documents.shape[1], rows.passages_per_document))
        there = torch.from_numpy(np.arange(passages.shape[2]) < count[:, :, None]).to(self.device)
        return torch.where(there[..., None], passages, passages[:, :, :1])

    def teacher_margins(self) -> Tensor | None:
        """Return the teacher's T(q, d+) - T(q, d-), float32 (L, n), 0 where a negative is missing; None without one."""
        if self.rows is None or self.rows.teacher_positive is None or self.rows.teacher_negatives is None:
            return None
        numbers = self.numbers[self.local]
        margins = self.rows.teacher_positive[numbers][:, None] - self.rows.teacher_negatives[numbers]
        margins[self._documents[self.local, 1:] < 0] = 0
        return torch.from_numpy(margins).to(self.device)


@dataclass(eq=False)
class Batch:
    """The embeddings of a batch; those of all processes where they are gathered (W rows), else this one's (W = L).

    Args:
        queries: (W, d).
        positives: (W, d), row by row the positive document of each query.
        negatives: (W, n, d), the mined documents of each row.
        query_negatives: (W, m, d), the mined queries of each row. Where documents are scored by their best passage,
            those above that are documents have one dimension more before the last, their passages.
        rows: What is known of the rows.
        labels: The trainer's labels of the L local rows where they are no row numbers, else None.
    """

    queries: Tensor
    positives: Tensor
    negatives: Tensor
    query_negatives: Tensor
    rows: BatchRows
    labels: Tensor | None = None
    _units: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def local(self) -> slice:
        """The rows this process computes the loss of."""
        return self.rows.local

    def mirrored(self) -> Batch:
        """Return the batch of the dual direction: positive documents search for their queries."""
        return Batch(
            queries=self.positives,
            positives=self.queries,
            negatives=self.query_negatives,
            query_negatives=self.negatives,
            rows=self.rows.mirrored,
            _units=self._units,
        )

    def unit(self) -> Batch:
        """Return the batch with every embedding divided by its L2 norm; each is computed once for both directions."""
        return replace(
            self,
            queries=self._unit(self.queries),
            positives=self._unit(self.positives),
            negatives=self._unit(self.negatives),
            query_negatives=self._unit(self.query_negatives),
        )

    def _unit(self, embeddings: Tensor) -> Tensor:
        # Kept under the tensor's id, which stays taken while the dictionary also keeps the tensor itself.
        if id(embeddings) not in self._units:
            self._units[id(embeddings)] = (embeddings, unit(embeddings))
        return self._units[id(embeddings)][1]

    def row_scores(self) -> tuple[Tensor, Tensor]:
        """Return the scores of each local query with its positive, (L, 1), and with its mined documents, (L, n)."""
        queries = self.queries[self.local]
        return own_scores(queries, self.positives[self.local, None]), own_scores(queries, self.negatives[self.local])

    def candidate_scores(self) -> Tensor:
        """Return the scores of each local query with all documents, (L, W + W n), -inf where they are hidden."""
        scores = all_scores(self.queries[self.local], torch.cat([self.positives, self.negatives.flatten(0, 1)]))
        hidden = self.rows.hidden_documents
        return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)

    def mean(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """Return the mean of the local values, over what is counted in the whole batch.

        With several processes the mean over them of what this returns is the mean over all that is counted, although
        one process may have more of it than another. Where nothing is counted, exactly 0, with a gradient of 0.

        Args:
            values: (L,), one a local row, or (L, n), one a local row and mined negative.
            counted: bool (W,) or (W, n); None: all.
        """
        if counted is None:
            return values.sum() / max(values.numel(), 1)
        share = self.rows.count / max(len(values), 1)
        return values.masked_fill(~counted[self.local], 0).sum() * share / counted.sum().clamp(min=1)

    def teacher_margins(self) -> Tensor:
        """Return the teacher's margins T(q, d+) - T(q, d-), (L, n), from the training rows or from the labels."""
        margins = self.rows.teacher_margins()
        if margins is not None:
            return margins
        if self.labels is None:
            raise ValueError(
                "the loss needs the teacher's scores: from the training rows, or, in the direction from queries to "
                "documents alone, from a column label with the teacher's margins"
            )
        rows, columns = len(self.queries[self.local]), self.negatives.shape[1]
        if self.labels.shape == (rows, columns + 1):
            return self.labels[:, :1] - self.labels[:, 1:]
        if self.labels.shape == (rows,) and columns == 1:
            return self.labels[:, None]
        if self.labels.shape != (rows, columns):
            raise ValueError(
                f"the column label must hold the teacher's {columns} margins a row, or its {columns + 1} scores, the "
                f"positive's first; its shape is {tuple(self.labels.shape)}"
            )
        return self.labels


def all_scores(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of every text on the left, (a, d), with every one on the right, (b, d), as (a, b).

    Of texts of p passages, (a, p, d) or (b, p, d), the best one counts.
    """
    if left.ndim == right.ndim == 2:
        return left @ right.T
    left, right = (t if t.ndim == 3 else t[:, None] for t in (left, right))
    products = left.flatten(0, 1) @ right.flatten(0, 1).T
    return products.view(*left.shape[:2], *right.shape[:2]).amax(dim=(1, 3))


def own_scores(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products of every text on the left, (a, d), with its own on the right, (a, n, d), as (a, n).

    Of texts of p passages, (a, p, d) or (a, n, p, d), the best one counts.
    """
    if left.ndim == 2 and right.ndim == 3:
        return torch.einsum("ad,and->an", left, right)
    left, right = left if left.ndim == 3 else left[:, None], right if right.ndim == 4 else right[:, :, None]
    return torch.einsum("apd,anqd->anpq", left, right).amax(dim=(2, 3))


def unit(embeddings: Tensor) -> Tensor:
    """Return embeddings divided by their L2 norm; a zero vector stays zero and gets no gradient.

    (Dividing by a clamped norm instead gives a zero vector a gradient of 1e12.)
    """
    norm = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    zero = norm < 1e-12
    return embeddings * norm.masked_fill(zero, 1).reciprocal().masked_fill(zero, 0)

"""The running best k of a block of queries in arrays, for CPUs; see :mod:`pt_dance._search` for what it promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ._search import Vectors


class ArrayBlock:
    """A block of queries on its way through the documents.

    Args:
        queries: ``float32`` (q, d).
        norms: Their lengths, (q,).
        vectors: The documents.
        k: How many documents a query gets, at most as many as there are.
        tie_order: Decides between equal scores; the row number if None.
    """

    def __init__(
        self, queries: np.ndarray, norms: np.ndarray, vectors: Vectors, k: int, tie_order: np.ndarray | None
    ) -> None:
        from ._search import slack_per_norm

        self.queries, self.vectors, self.k, self.tie_order = queries, vectors, k, tie_order
        # Candidates: products in float32, -inf in free slots, in no order; and the k-th best of each query.
        self.slots = min(len(vectors), k + k // 8 + 16)
        self._values = np.full((len(queries), self.slots), -np.inf, dtype=np.float32)
        self._rows = np.zeros((len(queries), self.slots), dtype=np.int64)
        self._kth = np.full(len(queries), -np.inf, dtype=np.float32)
        self._slack_per_norm = slack_per_norm(norms, queries.shape[1])
        self._norm = 0.0
        self._room: tuple[np.ndarray, np.ndarray] | None = None

    def _threshold(self, kth: np.ndarray) -> np.ndarray:
        """What a product must reach where ``kth`` is the k-th best one, as float32 rounded down."""
        exact = kth - (self._slack_per_norm * self._norm + 1e-35)
        return np.nextafter(exact.astype(np.float32), np.float32(-np.inf))

    def add(self, first: int, end: int) -> None:
        """Take in the documents of rows first to end."""
        docs = self.vectors.block(first, end)
        self._norm = max(self._norm, self.vectors.norm(first, docs))
        if self._room is None:
            room = len(self.queries) * len(docs)
            self._room = np.empty(room, dtype=np.float32), np.empty(room, dtype=bool)
        shape = len(self.queries), len(docs)
        products, passed = (room[: shape[0] * shape[1]].reshape(shape) for room in self._room)
        np.matmul(self.queries, docs.T, out=products)
        if first == 0 and len(docs) > self.slots:
            # Nothing is known yet, so this block's own k-th best product counts; and one more than there are slots
            # passes, so that _merge() sees what it cuts off.
            places = len(docs) - self.slots - 1, len(docs) - self.k
            ordered = np.partition(products, places, axis=1)
            threshold = np.minimum(ordered[:, places[0]], self._threshold(ordered[:, places[1]]))
        else:
            threshold = self._threshold(self._kth)
        np.greater_equal(products, threshold[:, None], out=passed)
        # Flat and contiguous: many times quicker than a scan in two dimensions.
        at = np.flatnonzero(passed)
        if not len(at):
            return
        query, column = np.divmod(at, len(docs))
        counts = np.bincount(query, minlength=len(products))
        which = np.flatnonzero(counts)
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
        line = (np.cumsum(counts > 0) - 1)[query]
        values = np.full((len(which), counts.max()), -np.inf, dtype=np.float32)
        rows = np.zeros(values.shape, dtype=np.int64)
        values[line, place] = products[query, column]
        rows[line, place] = column + first
        self._merge(which, values, rows)

    def _merge(self, which: np.ndarray, values: np.ndarray, rows: np.ndarray) -> None:
        """Merge new candidates of some of the queries with those they have."""
        values = np.concatenate([self._values[which], values], axis=1)
        rows = np.concatenate([self._rows[which], rows], axis=1)
        width = values.shape[1]
        # Ascending: what is cut off, the best of it, the slots, among them the k-th best at its place.
        cut, kth = width - self.slots - 1, width - self.k
        order = np.argpartition(values, (cut, kth), axis=1)
        kept = order[:, cut + 1 :]
        self._values[which] = np.take_along_axis(values, kept, 1)
        self._rows[which] = np.take_along_axis(rows, kept, 1)
        lines = np.arange(len(which))
        self._kth[which] = values[lines, order[:, kth]]
        lost = values[lines, order[:, cut]]
        for line in np.flatnonzero((lost >= self._threshold(self._kth)[which]) & (lost > -np.inf)):
            self._decide(which[line], values[line], rows[line])

    def _decide(self, query: int, values: np.ndarray, rows: np.ndarray) -> None:
        """Where too many are too close to tell apart by products, let their scores decide; ties are final then."""
        close = values >= self._threshold(self._kth)[query]
        values, rows = values[close], rows[close]
        scores = self.vectors.score_pairs(self.queries, np.full(len(rows), query), rows)
        best = np.lexsort((self._ties(rows), -scores))[: self.k]
        self._values[query] = -np.inf
        self._values[query, : len(best)] = values[best]
        self._rows[query, : len(best)] = rows[best]
        self._kth[query] = values[best].min()

    def _ties(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.tie_order is None else self.tie_order[rows]

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best k of every query."""
        close = (self._values >= self._threshold(self._kth)[:, None]) & (self._values > -np.inf)
        query, slot = np.nonzero(close)
        found = self._rows[query, slot]
        scores = np.full(close.shape, -np.inf, dtype=np.float32)
        scores[query, slot] = self.vectors.score_pairs(self.queries, query, found)
        ties = np.full(close.shape, np.iinfo(np.int64).max)
        ties[query, slot] = self._ties(found)
        order = np.lexsort((ties, -scores), axis=-1)[:, : self.k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(self._rows, order, 1)

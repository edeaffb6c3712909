"""The running best k of a block of queries in arrays, for CPUs; :mod:`.exact` says what it promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pt_dance.retriever.search.prefilter import HALF_ULP, LEAST_QUERIES, Prefilter, kth_largest

if TYPE_CHECKING:
    from pt_dance.retriever.search.exact import Vectors


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
        from pt_dance.retriever.search.exact import slack_per_norm

        self.queries, self.vectors, self.k, self.tie_order = queries, vectors, k, tie_order
        self._look = Prefilter(queries, norms) if vectors.prefilter and len(queries) >= LEAST_QUERIES else None
        # Candidates: products in float32 (or seen in bfloat16) and rows, in no order, in slots of which the first are
        # used; and the k-th best product of each query. What cannot be told from it by products is a candidate too.
        self.slots = min(len(vectors), 3 * k + 64)
        self._values = np.full((len(queries), self.slots), -np.inf, dtype=np.float32)
        self._rows = np.zeros((len(queries), self.slots), dtype=np.int64)
        self._used = np.zeros(len(queries), dtype=np.int64)
        self._kth = np.full(len(queries), -np.inf, dtype=np.float32)
        self._slack_per_norm = slack_per_norm(norms, queries.shape[1])
        self._norm = self._rounding = 0.0
        self._room: tuple[np.ndarray, np.ndarray] | None = None

    def _threshold(self, kth: np.ndarray) -> np.ndarray:
        """What a product must reach where ``kth`` is the k-th best one, as float32 rounded down."""
        if self._look is None:
            exact = kth - (self._slack_per_norm * self._norm + 1e-35)
        else:
            error = self._look.error(self._norm, self._rounding, self.queries.shape[1])
            exact = kth - np.abs(kth) * HALF_ULP - 2 * error
        return np.nextafter(exact.astype(np.float32), np.float32(-np.inf))

    def add(self, first: int, end: int) -> None:
        """Take in the documents of rows first to end."""
        docs = self.vectors.block(first, end)
        self._norm = max(self._norm, self.vectors.norm(first, docs))
        found = None
        if self._look is not None:
            self._rounding = max(self._rounding, self.vectors.rounding(first, docs))
            kth, products = self._kth, None
            if first == 0 and len(docs) > self.slots:
                # Nothing is known yet, so this block's own k-th best products count.
                products = self._look.products(docs)
                kth = kth_largest(products, self.k)
            found = self._look.passing(docs, self._threshold(kth), products)
        at, products = found or self._passing(docs, first == 0)
        if not len(at):
            return
        query, column = np.divmod(at, len(docs))
        self._take(query, column + first, products)

    def _passing(self, docs: np.ndarray, is_first: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return flat positions and products in float32 of the pairs that reach the threshold."""
        shape = len(self.queries), len(docs)
        if self._room is None or len(self._room[0]) < shape[0] * shape[1]:
            self._room = np.empty(shape[0] * shape[1], dtype=np.float32), np.empty(shape[0] * shape[1], dtype=bool)
        products, passed = (room[: shape[0] * shape[1]].reshape(shape) for room in self._room)
        np.matmul(self.queries, docs.T, out=products)
        if is_first and len(docs) > self.slots:
            # Nothing is known yet, so this block's own k-th best product counts, or that of its first half.
            threshold = self._threshold(self._kth_of(products[:, : max(len(docs) // 2, self.k)]))
        else:
            threshold = self._threshold(self._kth)
        np.greater_equal(products, threshold[:, None], out=passed)
        # Flat and contiguous: many times quicker than a scan in two dimensions.
        at = np.flatnonzero(passed)
        return at, products.reshape(-1)[at]

    def _take(self, query: np.ndarray, rows: np.ndarray, products: np.ndarray) -> None:
        """Take in new candidates, ordered by query."""
        counts = np.bincount(query, minlength=len(self.queries))
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[query]
        full = np.flatnonzero(self._used + counts > self.slots)
        if len(full):
            line = np.full(len(self.queries), -1)
            line[full] = np.arange(len(full))
            mine = line[query] >= 0
            values = np.full((len(full), counts[full].max()), -np.inf, dtype=np.float32)
            new_rows = np.zeros(values.shape, dtype=np.int64)
            values[line[query[mine]], place[mine]] = products[mine]
            new_rows[line[query[mine]], place[mine]] = rows[mine]
            self._prune(full, values, new_rows)
            query, rows, products, place = query[~mine], rows[~mine], products[~mine], place[~mine]
            counts[full] = 0
        at = query * self.slots + self._used[query] + place
        self._values.reshape(-1)[at] = products
        self._rows.reshape(-1)[at] = rows
        self._used += counts
        which = np.flatnonzero(counts)
        self._kth[which] = self._kth_of(self._values[which])

    def _kth_of(self, values: np.ndarray) -> np.ndarray:
        place = values.shape[1] - self.k
        return np.partition(values, place, axis=1)[:, place]

    def _prune(self, which: np.ndarray, values: np.ndarray, rows: np.ndarray) -> None:
        """Keep what can still be among the best of queries whose slots are full, together with new candidates."""
        values = np.concatenate([self._values[which], values], axis=1)
        rows = np.concatenate([self._rows[which], rows], axis=1)
        self._kth[which] = self._kth_of(values)
        kept = (values >= self._threshold(self._kth)[which, None]) & (values > -np.inf)
        used = kept.sum(1)
        undecided = np.flatnonzero(used > self.slots)
        for line in undecided:
            self._decide(which[line], rows[line, kept[line]])
        kept[undecided] = False
        fitting = np.flatnonzero(used <= self.slots)
        line, slot = np.nonzero(kept)
        place = np.arange(len(line)) - (np.cumsum(kept.sum(1)) - kept.sum(1))[line]
        self._values[which[fitting]] = -np.inf
        self._values[which[line], place] = values[line, slot]
        self._rows[which[line], place] = rows[line, slot]
        self._used[which[fitting]] = used[fitting]
        if self._look is not None and len(undecided) > len(self.queries) // 8:
            self._look_closer()

    def _look_closer(self) -> None:
        """Go on in float32, where products in bfloat16 leave too much undecided."""
        self._look = None
        query, slot = np.nonzero(self._values > -np.inf)
        rows = self._rows[query, slot]
        self._values[query, slot] = self.vectors.score_pairs(self.queries, query, rows)
        self._kth = self._kth_of(self._values)

    def _decide(self, query: int, rows: np.ndarray) -> None:
        """Where too many are too close to tell apart by products, let their scores decide; ties are final then."""
        scores = self.vectors.score_pairs(self.queries, np.full(len(rows), query), rows)
        best = np.lexsort((self._ties(rows), -scores))[: self.k]
        self._values[query] = -np.inf
        self._values[query, : len(best)] = scores[best]
        self._rows[query, : len(best)] = rows[best]
        self._used[query] = len(best)
        self._kth[query] = scores[best].min()

    def _ties(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.tie_order is None else self.tie_order[rows]

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best k of every query."""
        close = (self._values >= self._threshold(self._kth)[:, None]) & (self._values > -np.inf)
        query, slot = np.nonzero(close)
        found = self._rows[query, slot]
        scores = np.full(close.shape, -np.inf, dtype=np.float32)
        scores[query, slot] = self.vectors.score_pairs(self.queries, query, found)
        order = np.argsort(-scores, axis=1)
        ordered = np.take_along_axis(scores, order, 1)
        # Sorting by two keys takes many times as long, and equal scores are rare in most collections.
        tied = np.flatnonzero((ordered[:, :-1] == ordered[:, 1:])[:, : self.k].any(1))
        if len(tied):
            ties = np.where(close[tied], self._ties(self._rows[tied]), np.iinfo(np.int64).max)
            order[tied] = np.lexsort((ties, -scores[tied]), axis=-1)
        order = order[:, : self.k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(self._rows, order, 1)

"""The running best k of a block of queries in arrays, for CPUs; :mod:`.exact` says what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np

from pt_dance.retriever.search.prefilter import HALF_ULP, Prefilter, kth_largest
from pt_dance.retriever.search.vectors import product_slack


class Block:
    """A block of queries, ``float32`` (q, d), of lengths ``norms``, on its way through the documents.

    Each gets ``k`` documents, at most as many as there are; of equal scores ``tie_order`` decides, or the row number.
    """

    def __init__(
        self, queries: np.ndarray, norms: np.ndarray, vectors: Any, k: int, tie_order: np.ndarray | None
    ) -> None:
        self.queries, self.norms, self.vectors, self.k, self.tie_order = queries, norms, vectors, k, tie_order
        self.slack = product_slack(norms, queries.shape[1])
        self.norm = 0.0  # of the longest document so far

    def decided(self, which: np.ndarray, query: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows, best first, of the best k candidates of the queries ``which``.

        ``query`` and ``rows`` are those of the candidates, ordered by query, at least k of each.
        """
        line = np.searchsorted(which, query)
        counts = np.bincount(line, minlength=len(which))
        place = np.arange(len(query)) - (np.cumsum(counts) - counts)[line]
        scores = np.full((len(which), counts.max()), -np.inf, dtype=np.float32)
        found = np.zeros(scores.shape, dtype=np.int64)
        scores[line, place], found[line, place] = self.vectors.score_pairs(self.queries, query, rows), rows
        order = best_first(scores, found if self.tie_order is None else self.tie_order[found])[:, : self.k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


class ArrayBlock(Block):
    """A block of queries in arrays, with a first look at products in bfloat16 if ``prefilter`` says so."""

    def __init__(self, *block: Any, prefilter: bool = False) -> None:
        super().__init__(*block)
        self._look = Prefilter(self.queries, self.norms) if prefilter else None
        self._rounding = 0.0
        # The best k products of each query, of which the first is the worst; and candidates: query, row and product
        # (in float32, or seen in bfloat16) of every pair that cannot be told from the k-th best one by products.
        self._top = np.full((len(self.queries), self.k), -np.inf, dtype=np.float32)
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count, self.slots = 0, 2 * self.k + 64
        self._room = np.empty(0, dtype=np.float32)

    def _threshold(self, kth: np.ndarray) -> np.ndarray:
        """Return what a product must reach where ``kth`` is the k-th best one, as float32 rounded down."""
        if self._look is None:
            exact = kth - (self.slack * self.norm + 1e-35)
        else:
            exact = kth - np.abs(kth) * HALF_ULP - 2 * self._look.error(self.norm, self._rounding)
        return np.nextafter(exact.astype(np.float32), np.float32(-np.inf))

    def add(self, first: int, end: int) -> None:
        """Take in the documents of rows first to end."""
        docs = self.vectors.block(first, end)
        self.norm = max(self.norm, self.vectors.norm(first, docs))
        # Where nothing is known yet, a block's own k-th best products count.
        is_first = first == 0 and len(docs) > self.k
        found = None
        if self._look is not None:
            self._rounding = max(self._rounding, self.vectors.rounding(first, docs))
            products = self._look.products(docs)
            kth = kth_largest(products, self.k) if is_first else self._top[:, 0]
            found = self._look.passing(products, self._threshold(kth))
        at, values = found or self._passing(docs, is_first)
        if len(at):
            query, column = np.divmod(at, len(docs))
            self._take(query, column + first, values)

    def _passing(self, docs: np.ndarray, is_first: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return flat positions and products in float32 of the pairs that reach the threshold."""
        shape = len(self.queries), len(docs)
        if len(self._room) < shape[0] * shape[1]:
            self._room = np.empty(shape[0] * shape[1], dtype=np.float32)
        products = np.matmul(self.queries, docs.T, out=self._room[: shape[0] * shape[1]].reshape(shape))
        kth = self._top[:, 0]
        if is_first:
            kth = np.partition(products[:, : max(len(docs) // 2, self.k)], -self.k, axis=1)[:, -self.k]
        # Flat and contiguous: many times quicker than a scan in two dimensions.
        at = np.flatnonzero(products >= self._threshold(kth)[:, None])
        return at, products.reshape(-1)[at]

    def _take(self, query: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
        """Take in new candidates, ordered by query."""
        counts = np.bincount(query, minlength=len(self.queries))
        which = np.flatnonzero(counts)
        line = (np.cumsum(counts > 0) - 1)[query]
        best = np.full((len(which), self.k + counts.max()), -np.inf, dtype=np.float32)
        best[:, : self.k] = self._top[which]
        best[line, self.k + np.arange(len(query)) - (np.cumsum(counts) - counts)[query]] = values
        self._top[which] = np.partition(best, -self.k, axis=1)[:, -self.k :]
        self._found.append((query, rows, values))
        self._count += len(query)
        if self._count > 2 * self.slots * len(self.queries):
            self._prune()

    def _prune(self) -> None:
        """Keep of the candidates those that can still be among the best, ordered by query, and not too many of them."""
        query, rows, values = map(np.concatenate, zip(*self._found, strict=True))
        close = np.flatnonzero(values >= self._threshold(self._top[:, 0])[query])
        close = close[np.argsort(query[close], kind="stable")]
        query, rows, values = query[close], rows[close], values[close]
        crowded = np.bincount(query, minlength=len(self.queries)) > self.slots
        if self._look is not None and crowded.sum() > len(crowded) // 8:
            # Products in bfloat16 leave too much undecided: go on in float32.
            self._look, crowded[:] = None, True
        if crowded.any():
            # Too many are too close to tell apart by products: their scores decide, and ties are final.
            which, mine = np.flatnonzero(crowded), crowded[query]
            scores, found = self.decided(which, query[mine], rows[mine])
            self._top[which] = scores[:, ::-1]
            query = np.concatenate([query[~mine], np.repeat(which, self.k)])
            rows, values = np.append(rows[~mine], found), np.append(values[~mine], scores)
            order = np.argsort(query, kind="stable")
            query, rows, values = query[order], rows[order], values[order]
        self._found, self._count = [(query, rows, values)], len(query)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best k of every query."""
        self._prune()
        query, rows, _ = self._found[0]
        return self.decided(np.arange(len(self.queries)), query, rows)


def best_first(scores: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Return the order of each row's scores, best first, equal ones by ``ties`` (0 to 2**32 - 1)."""
    # One sort of whole numbers is many times quicker than one by two keys. Bits of positive numbers are ordered as the
    # numbers are, those of negative ones the other way round; -0 is made 0.
    bits = (scores + np.float32(0)).view(np.int32)
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return np.argsort((-ordered.astype(np.int64) << 32) + ties, axis=1)

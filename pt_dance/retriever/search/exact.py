"""Exact search over dense vectors in bounded memory, with results that never depend on how it was cut into blocks.

A matrix product in float32 gives other last bits for other block shapes, so it only finds candidates here. The score of
a pair is defined by :func:`score_pairs` alone: exact products in float64, added up in one fixed order, rounded to
float32. (Where another order cannot give other bits, a faster one is used.) Those bits are the same for every block
size, number of threads and device. A document stays a candidate as long as rounding errors of the product could hide
that it belongs to the best k, so nothing is lost; equal scores are ordered by ``tie_order``.

On a CPU, blocks of queries are searched by several threads that share nothing, each with one-threaded products: threads
that wait for each other inside every small operation cost more than they bring when the machine has other work too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from pt_dance.retriever.search import prefilter as _prefilter
from pt_dance.retriever.search.blas_threads import one_threaded_products, product_threads
from pt_dance.retriever.search.prefilter import LEAST_QUERIES
from pt_dance.retriever.search.topk import ArrayBlock

QUERY_BLOCK = 256
DOC_BLOCK = 4096
# Longer vectors could give dot products that float32 does not hold.
MAX_NORM = 1e18
_PAIR_BLOCK = 128  # products in float64 that stay in a core's cache
_RUN_BLOCK = 256  # documents in float64 that do
_LEAST_RUN = 32  # pairs of one query from which on a product of a matrix and a vector is faster
UNIT = 2.0**-24  # relative rounding error of float32


def score_pairs(
    queries: np.ndarray,
    docs: np.ndarray | Vectors,
    query_of: np.ndarray,
    row_of: np.ndarray,
    *,
    device: str | None = None,
) -> np.ndarray:
    """Score pairs of a query and a document.

    Args:
        queries: ``float32`` (q, d).
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        query_of: Query number of each pair, ``int`` (m,).
        row_of: Document row of each pair, ``int`` (m,).
        device: Where to compute; a GPU if there is one by default.

    Returns:
        ``float32`` (m,): dot products, the same bits for a pair whatever the other pairs are.

    Raises:
        IndexError: If a query or row number is negative or too large.
    """
    query_of, row_of = np.asarray(query_of, dtype=np.int64), np.asarray(row_of, dtype=np.int64)
    for what, numbers, count in (("document rows", row_of, len(docs)), ("query numbers", query_of, len(queries))):
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
            raise IndexError(f"{what} must be 0 to {count - 1}, not {numbers.min()} to {numbers.max()}.")
    vectors = Vectors.of(docs, device)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    workers = 1 if vectors.tensors is not None else min(product_threads(), -(-len(row_of) // (32 * _PAIR_BLOCK)))
    if workers <= 1:
        return vectors.score_pairs(queries, query_of, row_of)
    parts = np.array_split(np.arange(len(row_of)), workers)
    with one_threaded_products(), ThreadPoolExecutor(workers) as pool:
        scores = pool.map(lambda part: vectors.score_pairs(queries, query_of[part], row_of[part]), parts)
        return np.concatenate(list(scores))


def exact_search(
    queries: np.ndarray,
    docs: np.ndarray | Vectors,
    k: int,
    *,
    progress: Callable[[int], object] | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the best k documents of every query.

    Args:
        queries: ``float32`` (q, d).
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        k: How many documents a query gets.
        progress: Called with the number of queries that were finished since the last call.
        **options: As for :func:`iter_exact_search`.

    Returns:
        Scores, ``float32`` (q, min(k, n)), and rows, ``int64`` (q, min(k, n)), best first.
    """
    width = min(k, len(docs))
    scores = np.empty((len(queries), width), dtype=np.float32)
    rows = np.empty((len(queries), width), dtype=np.int64)
    for start, block_scores, block_rows in iter_exact_search(queries, docs, k, **options):
        scores[start : start + len(block_scores)] = block_scores
        rows[start : start + len(block_rows)] = block_rows
        if progress is not None:
            progress(len(block_rows))
    return scores, rows


def iter_exact_search(
    queries: np.ndarray,
    docs: np.ndarray | Vectors,
    k: int,
    *,
    tie_order: np.ndarray | None = None,
    query_block: int = QUERY_BLOCK,
    doc_block: int = DOC_BLOCK,
    device: str | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Find the best k documents of every query, one block of queries after the other.

    Memory: about ``query_block * doc_block * 6 + query_block * k * 40`` bytes a thread, whatever the number of queries
    and documents.

    Args:
        queries: ``float32`` (q, d), finite.
        docs: ``float32`` or ``float16`` (n, d), finite; may be memory-mapped.
        k: How many documents a query gets, at least 1.
        tie_order: For every row its place in the order of equal scores, e.g. the rank of its docno; the row number by
            default.
        query_block: Queries searched together, at most.
        doc_block: Documents multiplied with them at a time.
        device: Where to compute; a GPU if there is one by default.

    Yields:
        Number of the first query, scores ``float32`` (b, min(k, n)), rows ``int64`` (b, min(k, n)), best first.

    Raises:
        ValueError: If shapes, k or block sizes make no sense, or a vector is not finite.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or len(docs.shape) != 2 or queries.shape[1] != docs.shape[1]:
        raise ValueError(f"queries of shape {queries.shape} cannot be searched in documents of shape {docs.shape}.")
    if min(k, query_block, doc_block) < 1:
        raise ValueError(f"k, query_block and doc_block must be at least 1, not {k}, {query_block} and {doc_block}.")
    norms = np.sqrt(np.einsum("ij,ij->i", queries, queries, dtype=np.float64))
    if not (norms <= MAX_NORM).all():
        raise ValueError(f"query vectors must be finite and no longer than {MAX_NORM:g}.")
    k = min(k, len(docs))
    vectors = Vectors.of(docs, device)
    # A query's candidates must not take more room than its products.
    query_block = max(1, min(query_block, query_block * doc_block // (3 * k + 1)))
    threads = 1 if vectors.tensors is not None else product_threads()
    if threads > 1:
        query_block = max(1, min(query_block, -(-len(queries) // threads)))

    def search(start: int) -> tuple[int, np.ndarray, np.ndarray]:
        part = slice(start, start + query_block)
        kind = ArrayBlock if vectors.tensors is None else vectors.tensors.block
        block = kind(queries[part], norms[part], vectors, k, tie_order)
        for first in range(0, len(docs), doc_block):
            block.add(first, min(first + doc_block, len(docs)))
        return start, *block.best()

    starts = range(0, len(queries), query_block)
    if threads == 1 or len(starts) <= 1:
        yield from map(search, starts)
        return
    with one_threaded_products(), ThreadPoolExecutor(threads, initializer=_prefilter.use_one_thread) as pool:
        if len(queries) > threads * LEAST_QUERIES and len(docs) > 4 * doc_block:
            vectors.prefilter = pool.submit(_prefilter.pays).result()
        running: deque[Future] = deque()
        try:
            for start in starts:
                if len(running) > threads:
                    yield running.popleft().result()
                running.append(pool.submit(search, start))
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


class Vectors:
    """The documents' vectors, read block by block; on a GPU they are kept there if they take little of its memory.

    One object can serve many searches: it remembers how long the vectors are.

    Args:
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        device: Where to compute; a GPU if there is one by default.

    Attributes:
        tensors: Does the work on other devices than the CPU; None there.
        prefilter: Whether products are looked at in bfloat16 first; set by the search, changes no result.
    """

    def __init__(self, docs: np.ndarray, device: str | None = None) -> None:
        # A plain view: indexing a memmap object costs more for every block.
        self.docs = docs.view(np.ndarray)
        self._norms: dict[tuple[int, int], float] = {}
        self._roundings: dict[tuple[int, int], float] = {}
        self.tensors: Any = None
        self.prefilter = False
        if device != "cpu":
            from pt_dance.retriever.search.gpu import TensorVectors

            self.tensors = TensorVectors.on(docs, device)

    @classmethod
    def of(cls, docs: np.ndarray | Vectors, device: str | None) -> Vectors:
        """Wrap an array; vectors that are wrapped already stay what they are."""
        return docs if isinstance(docs, Vectors) else cls(docs, device)

    def __len__(self) -> int:
        return len(self.docs)

    @property
    def shape(self) -> tuple[int, int]:
        """Documents and numbers in a vector."""
        return self.docs.shape

    def block(self, first: int, end: int) -> np.ndarray:
        """Return rows as float32."""
        return np.asarray(self.docs[first:end], dtype=np.float32)

    def norm(self, first: int, block: Any) -> float:
        """Return an upper bound of the lengths of a block's vectors, which begins with row ``first``.

        Raises:
            ValueError: If a vector is not finite or too long.
        """
        norm = self._norms.get((first, len(block)))
        if norm is None:
            if isinstance(block, np.ndarray):
                with np.errstate(over="ignore", invalid="ignore"):
                    norm = float(np.sqrt(np.einsum("ij,ij->i", block, block).max()))
            else:
                norm = float((block * block).sum(1).max().sqrt())
            if not norm <= MAX_NORM:
                raise ValueError(
                    f"document vectors must be finite and no longer than {MAX_NORM:g}; one of rows {first} to "
                    f"{first + len(block) - 1} is not: index these documents again."
                )
            norm *= 1 + 2 * block.shape[1] * UNIT  # the rounding errors of its own sum
            self._norms[first, len(block)] = norm
        return norm

    def rounding(self, first: int, block: np.ndarray) -> float:
        """Return an upper bound of what rounding a block's vectors to bfloat16 changes, as a length."""
        rest = self._roundings.get((first, len(block)))
        if rest is None:
            rest = self._roundings[first, len(block)] = _prefilter.rounding(block)
        return rest

    def score_pairs(self, queries: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        """Do what :func:`score_pairs` does, in this thread."""
        if self.tensors is not None:
            return self.tensors.score_pairs(queries, query_of, row_of)
        starts = np.flatnonzero(np.diff(query_of, prepend=-1))  # none is negative
        # Of other arrays np.take would make a copy of the whole first.
        if self.docs.flags.c_contiguous and len(starts) and len(row_of) >= _LEAST_RUN * len(starts):
            return self._score_runs(queries, query_of, row_of, starts)
        return self._score_by_definition(queries, query_of, row_of)

    def _score_by_definition(self, queries: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        scores = np.empty(len(row_of), dtype=np.float32)
        for start in range(0, len(row_of), _PAIR_BLOCK):
            part = slice(start, start + _PAIR_BLOCK)
            products = self.docs[row_of[part]].astype(np.float64)
            products *= queries[query_of[part]]
            scores[part] = add_up(products)
        return scores

    def _score_runs(
        self, queries: np.ndarray, query_of: np.ndarray, row_of: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """Score runs of pairs of one query, by BLAS where its order of adding cannot matter.

        Sums in float64 of the same exact products differ by little, in any order, and are then rounded to float32.
        Only the few that are so close to the middle between two float32 numbers that the order could decide are added
        up as the definition says.
        """
        dimension = queries.shape[1]
        docs = np.empty((_RUN_BLOCK, dimension), dtype=self.docs.dtype)
        wide = np.empty((_RUN_BLOCK, dimension), dtype=np.float64)
        sums, errors = np.empty(len(row_of), dtype=np.float64), np.empty(len(row_of), dtype=np.float64)
        for first, end in zip(starts, [*starts[1:], len(row_of)], strict=True):
            query = queries[query_of[first]].astype(np.float64)
            for start in range(first, end, _RUN_BLOCK):
                part = slice(start, min(start + _RUN_BLOCK, end))
                count = part.stop - start
                np.take(self.docs, row_of[part], axis=0, out=docs[:count], mode="clip")
                wide[:count] = docs[:count]
                np.dot(wide[:count], query, out=sums[part])
                # No vector is longer than all of them together, and one long one costs no more than time.
                errors[part] = np.sqrt(np.vdot(query, query) * np.vdot(wide[:count], wide[:count]))
        # Both sums are off by at most (d - 1) u |q| |d|, u = 2^-53, and so much again is for these two lines.
        errors *= 4 * (dimension + 4) * 2.0**-53
        with np.errstate(over="ignore", invalid="ignore"):
            scores, high = (sums - errors).astype(np.float32), (sums + errors).astype(np.float32)
        # Zeros have a sign, which depends on the order, too.
        unsure = np.flatnonzero((scores != high) | (scores == 0))
        if len(unsure):
            scores[unsure] = self._score_by_definition(queries, query_of[unsure], row_of[unsure])
        return scores


def add_up(products: Any) -> Any:
    """Add up the columns of float64 products (m, d), in place, and return the sums (m,).

    Halves are added element by element: no library's choice of order can change a bit.
    """
    width = products.shape[1]
    while width > 1:
        half = (width + 1) // 2
        products[:, : width - half] += products[:, half:width]
        width = half
    return products[:, 0]


def slack_per_norm(norms: np.ndarray, dimension: int) -> np.ndarray:
    """Bound how far products in float32 can mislead about two documents.

    ``|product in any order - exact| <= gamma |q| |d|`` with ``gamma = d u / (1 - d u)``; three more roundings are the
    score's and the comparisons'. Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.

    Args:
        norms: Lengths of the queries, (q,).
        dimension: Numbers in a vector.

    Returns:
        ``float64`` (q,): twice the bound for documents of length 1.
    """
    steps = dimension + 3
    return 2 * steps * UNIT / (1 - steps * UNIT) * norms * (1 + 1e-6)

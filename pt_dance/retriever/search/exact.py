"""Exact search over dense vectors, in bounded memory.

Products in float32 (or, at a first look, in bfloat16) only find candidates: a document stays one as long as rounding
errors of the product could hide that it belongs to the best k, so nothing is lost. What counts are scores in float64,
rounded to float32; equal ones are ordered by ``tie_order``. On one machine the results are the same for any block size
and number of threads.

On a CPU, several threads search a block of queries each, with one-threaded products: threads that wait for each other
inside every small operation cost more than they bring when the machine has other work too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pt_dance.retriever.search.arrays import ArrayBlock
from pt_dance.retriever.search.prefilter import LEAST_QUERIES, pays
from pt_dance.retriever.search.tensors import TensorBlock, TensorVectors
from pt_dance.retriever.search.threads import one_threaded_products, product_threads, use_one_thread
from pt_dance.retriever.search.vectors import MAX_NORM, Vectors
from pt_dance.storage.devices import own_device
from pt_dance.storage.engine import in_order

QUERY_BLOCK = 256
DOC_BLOCK = 4096
_LEAST_PAIRS = 1 << 12  # for a thread of its own


def open_vectors(docs: np.ndarray | Vectors, device: str | None = None) -> Vectors:
    """Return an array's vectors where they are searched, by default on this process's own GPU; open ones stay so."""
    if isinstance(docs, Vectors):
        return docs
    chosen = torch.device(device or own_device())
    return Vectors(docs) if chosen.type == "cpu" else TensorVectors(docs, chosen)


def score_pairs(
    queries: np.ndarray, docs: np.ndarray | Vectors, query_of: np.ndarray, row_of: np.ndarray, device: str | None = None
) -> np.ndarray:
    """Return for pairs of a query number and a row, ``int`` (m,), the score that a search gives them, ``float32`` (m,).

    Raises:
        IndexError: If a query or row number is negative or too large.
    """
    query_of, row_of = np.asarray(query_of, dtype=np.int64), np.asarray(row_of, dtype=np.int64)
    for what, numbers, count in (("document rows", row_of, len(docs)), ("query numbers", query_of, len(queries))):
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= count):
            raise IndexError(f"{what} must be 0 to {count - 1}, not {numbers.min()} to {numbers.max()}")
    vectors = open_vectors(docs, device)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    workers = 1 if isinstance(vectors, TensorVectors) else min(product_threads(), -(-len(row_of) // _LEAST_PAIRS))
    if workers <= 1:
        return vectors.score_pairs(queries, query_of, row_of)
    parts = np.array_split(np.arange(len(row_of)), workers)
    with one_threaded_products(), ThreadPoolExecutor(workers) as pool:
        scores = pool.map(lambda part: vectors.score_pairs(queries, query_of[part], row_of[part]), parts)
        return np.concatenate(list(scores))


def exact_search(
    queries: np.ndarray, docs: np.ndarray | Vectors, k: int, *,
    progress: Callable[[int], object] | None = None, **options: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return scores and rows of the best k documents of every query, (q, min(k, n)); see :func:`iter_exact_search`.

    ``progress`` is called with the number of queries that were finished since the last call.
    """
    shape = len(queries), min(k, len(docs))
    scores, rows = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.int64)
    for start, block_scores, block_rows in iter_exact_search(queries, docs, k, **options):
        part = slice(start, start + len(block_rows))
        scores[part], rows[part] = block_scores, block_rows
        if progress is not None:
            progress(len(block_rows))
    return scores, rows


def iter_exact_search(
    queries: np.ndarray, docs: np.ndarray | Vectors, k: int, *, tie_order: np.ndarray | None = None,
    query_block: int = QUERY_BLOCK, doc_block: int = DOC_BLOCK, device: str | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:  # fmt: skip
    """Find the best k documents of every query, one block of queries after the other.

    Memory: about ``query_block * doc_block * 6 + query_block * k * 100`` bytes a thread, whatever the number of queries
    and documents.

    Args:
        queries: ``float32`` (q, d), finite.
        docs: ``float32`` or ``float16`` (n, d), finite; may be memory-mapped, or open (:func:`open_vectors`).
        k: How many documents a query gets, at least 1.
        tie_order: For every row its place in the order of equal scores, e.g. its docno's rank; else the row number.
        query_block: Queries searched together, at most.
        doc_block: Documents multiplied with them at a time.
        device: Where to compute; a GPU if there is one by default.

    Yields:
        Number of the first query, scores ``float32`` (b, min(k, n)), rows ``int64`` (b, min(k, n)), best first.

    Raises:
        ValueError: If shapes, k or block sizes make no sense, or a vector is not finite.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or len(docs.shape) != 2 or queries.shape[1] != docs.shape[1] or not len(docs):
        raise ValueError(f"queries of shape {queries.shape} cannot be searched in documents of shape {docs.shape}")
    if min(k, query_block, doc_block) < 1:
        raise ValueError(f"k, query_block and doc_block must be at least 1, not {k}, {query_block} and {doc_block}")
    norms = np.sqrt(np.einsum("ij,ij->i", queries, queries, dtype=np.float64))
    if not (norms <= MAX_NORM).all():
        raise ValueError(f"query vectors must be finite and no longer than {MAX_NORM:g}")
    k = min(k, len(docs))
    vectors = open_vectors(docs, device)
    # A query's candidates must not take more room than its products.
    query_block = max(1, min(query_block, query_block * doc_block // (3 * k + 1)))
    threads = 1 if isinstance(vectors, TensorVectors) else product_threads()
    if threads > 1:
        query_block = max(1, min(query_block, -(-len(queries) // threads)))
    prefilter = False

    def search(start: int) -> tuple[int, np.ndarray, np.ndarray]:
        part = slice(start, start + query_block)
        mine, lengths = queries[part], norms[part]
        block: TensorBlock | ArrayBlock
        if isinstance(vectors, TensorVectors):
            block = TensorBlock(mine, lengths, vectors, k, tie_order)
        else:
            look = prefilter and len(mine) >= LEAST_QUERIES
            block = ArrayBlock(mine, lengths, vectors, k, tie_order, prefilter=look)
        for first in range(0, len(docs), doc_block):
            block.add(first, min(first + doc_block, len(docs)))
        return start, *block.best()

    starts = range(0, len(queries), query_block)
    if threads == 1 or len(starts) <= 1:
        yield from map(search, starts)
        return
    with one_threaded_products(), ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
        if len(queries) > threads * LEAST_QUERIES and len(docs) > 4 * doc_block:
            prefilter = pool.submit(pays).result()
        yield from in_order(pool, search, starts, threads + 1)

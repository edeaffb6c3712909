"""The queries nearest to documents, where retrieval is turned round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pt_dance.retriever.search.exact import exact_search


def nearest_queries(
    vectors: np.ndarray, owner: np.ndarray | None, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the best queries for documents, a document's score being that of its best passage.

    Args:
        vectors: float32 (p, d), of documents, or of their passages.
        owner: int (p,), the document each passage is of, 0, 0, 1, ...; None where every document is one vector.
        queries: float32 (q, d).
        k: How many queries a document gets.

    Returns:
        Scores float32 and query numbers int64, both (documents, min(k, q)), best first, equal scores in the order of
        the queries.
    """
    scores, found = exact_search(vectors, queries, k)
    if owner is None:
        return scores, found
    width = found.shape[1]
    document, score, query = np.repeat(owner, width), scores.ravel(), found.ravel()
    order = np.lexsort((-score, document * np.int64(len(queries)) + query))
    document, score, query = document[order], score[order], query[order]
    first = np.flatnonzero(np.diff(document * np.int64(len(queries)) + query, prepend=-1))
    document, score, query = document[first], score[first], query[first]
    order = np.lexsort((query, -score, document))
    # Every passage found so many different queries, so every document has at least as many.
    place = np.arange(len(order)) - np.searchsorted(document[order], document[order], side="left")
    order = order[place < width]
    return score[order].reshape(-1, width), query[order].reshape(-1, width)


def encoded_vectors(
    encode: Callable[[list[str]], np.ndarray], corpus: Any, docnos: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return new vectors of a corpus's documents, or of their passages where it has them, and each passage's owner.

    ``DenseIndex.stored_vectors`` returns the same from an index.
    """
    if getattr(corpus, "passages", None) is None:
        return encode(corpus.texts(docnos)), None
    rows = corpus.passage_rows(corpus.known_rows(docnos))
    owner, place = np.nonzero(rows >= 0)
    return encode(corpus.passages.texts_at(rows[owner, place])), owner

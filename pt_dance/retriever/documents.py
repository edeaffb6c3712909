"""Search and score documents: rows of an index or, in an index of passages, each by its best passage (MaxP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pt_dance.retriever.search.exact import exact_search

if TYPE_CHECKING:
    from pt_dance.index.dense_index import DenseIndex
    from pt_dance.index.documents import PassageDocuments

# Queries times passages that are looked at together, some 80 bytes each.
_CELLS = 1 << 21


def has_passages(index: DenseIndex) -> bool:
    """Whether the index has passages of documents for rows."""
    return bool(index.open().meta.get("passages"))


def best_documents(
    documents: PassageDocuments, scores: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """From the best passages of queries to their best documents.

    Args:
        documents: The documents.
        scores: float32 (q, p), best first.
        rows: int64 (q, p), passages, -1 where there are fewer.
        k: How many documents a query gets.

    Returns:
        Scores float32 and document numbers int64, both (q, k), best first, equal scores in the order of docnos; -inf
        and -1 where the passages are of fewer documents.
    """
    query, slot = np.nonzero(rows >= 0)
    score, found = scores[query, slot], documents.of(rows[query, slot])
    # Best first: the first passage of a document is its best.
    first = np.unique(query * np.int64(len(documents)) + found, return_index=True)[1]
    query, score, found = query[first], score[first], found[first]
    order = np.lexsort((documents.ranks[found], -score, query))
    query, score, found = query[order], score[order], found[order]
    place = np.arange(len(query)) - np.searchsorted(query, query, side="left")
    kept = place < k
    best = np.full((len(rows), k), -np.inf, dtype=np.float32)
    numbers = np.full((len(rows), k), -1, dtype=np.int64)
    best[query[kept], place[kept]] = score[kept]
    numbers[query[kept], place[kept]] = found[kept]
    return best, numbers


def iter_document_search(
    index: DenseIndex, vectors: np.ndarray, k: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Search documents exactly, block by block.

    Args:
        index: The index.
        vectors: float32 (q, d).
        k: How many documents a query gets.

    Yields:
        Number of the first query, scores float32 and document numbers int64 as :func:`best_documents` gives them.
    """
    documents = index.open().documents
    if not has_passages(index):
        yield from index.iter_search(vectors, k)
        return
    k = min(k, len(documents))
    total = int(documents.start[-1])
    depth = min(total, 2 * k * -(-total // len(documents)))
    for first, scores, rows in index.iter_search(vectors, depth):
        best, found = best_documents(documents, scores, rows, k)
        # As long as a passage that was not seen could be as good as the last document, it has to be looked for.
        short = np.flatnonzero((found[:, -1] < 0) | (best[:, -1] <= scores[:, -1]))
        deeper = depth
        while len(short) and deeper < total:
            deeper = min(total, 4 * deeper)
            left = []
            for some in np.array_split(short, -(-len(short) * deeper // _CELLS)):
                scores, rows = index.search(vectors[first + some], deeper)
                best[some], found[some] = best_documents(documents, scores, rows, k)
                left.append(some[(found[some, -1] < 0) | (best[some, -1] <= scores[:, -1])])
            short = np.concatenate(left)
        yield first, best, found


def score_documents(index: DenseIndex, vectors: np.ndarray, query_of: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Score pairs of a query vector and a document number, float32 (m,): the same bits as searching gives."""
    documents = index.open().documents
    if not has_passages(index):
        return index.score_pairs(vectors, query_of, numbers)
    rows, owner = documents.passages(numbers)
    scores = index.score_pairs(vectors, np.asarray(query_of)[owner], rows)
    return np.maximum.reduceat(scores, np.searchsorted(owner, np.arange(len(numbers)))) if len(numbers) else scores


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


def stored_vectors(index: DenseIndex, docnos: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the stored vectors of documents, float32, and of each passage its document's position (or None).

    Raises:
        KeyError: Naming a docno that is not in the index.
    """
    numbers = index.known_documents(docnos)
    documents = index.open().documents
    rows, owner = documents.passages(numbers) if has_passages(index) else (numbers, None)
    return np.asarray(index.np_vecs()[rows], dtype=np.float32), owner


def encoded_vectors(
    encode: Callable[[list[str]], np.ndarray], corpus: Any, docnos: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Encode documents of a corpus, or their passages where it has them; returns what :func:`stored_vectors` does."""
    if getattr(corpus, "passages", None) is None:
        return encode(corpus.texts(docnos)), None
    rows = corpus.passage_rows(corpus.known_rows(docnos))
    owner, place = np.nonzero(rows >= 0)
    return encode(corpus.passages.texts_at(rows[owner, place])), owner

"""What the documents of an index are: its rows, or whole documents scored by the best of their passages (MaxP).

An index of passages has one vector a passage, with docnos as :func:`pyterrier.text.sliding` makes them: the document's,
``%p``, and the passage's number from 0. The passages of a document are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pt_dance.corpus.docnos import DocnoColumn, DocnoRows

_FIRST = "%p0"
# Queries times passages that are looked at together, some 80 bytes each.
_CELLS = 1 << 21


class RowDocuments:
    """Every row is a document.

    Attributes:
        docnos: Docnos by number.
        rows: Numbers by docno.
        ranks: The place of every document's docno in docno order, ``uint32``.
        rows_each: How many rows a document has on average, rounded up.
    """

    rows_each = 1

    def __init__(self, docnos: DocnoColumn, rows: DocnoRows, ranks: np.ndarray) -> None:
        self.docnos, self.rows, self.ranks = docnos, rows, ranks

    def __len__(self) -> int:
        return len(self.ranks)

    def rows_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the rows of some documents and the position in ``numbers`` each belongs to; None if it is its own."""
        return numbers, None

    def best(self, scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the best documents of queries from their best rows, int64 (q, r), -1 where there are fewer.

        Returns:
            Scores float32 and document numbers int64, (q, min(k, documents)), best first, equal scores in the order of
            docnos; -inf and -1 where the rows are of fewer documents.
        """
        return scores[:, :k], rows[:, :k]

    def iter_search(
        self, index: Any, vectors: np.ndarray, k: int, batch_size: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Search documents exactly in an index of rows, with ``float32`` (q, d) vectors, block by block.

        Yields:
            Number of the first query, scores and document numbers as :meth:`best` gives them.
        """
        yield from index.iter_search(vectors, k, batch_size=batch_size)

    def score_pairs(self, index: Any, vectors: np.ndarray, query_of: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Score pairs of a query vector and a document number as a search does, float32 (m,)."""
        return index.score_pairs(vectors, query_of, numbers)


class PassageDocuments(RowDocuments):
    """Whole documents, each with the score of its best passage, from the docnos of all passages in row order.

    Attributes:
        start: int64 (documents + 1,), the first row of each document, and the number of rows.

    Raises:
        ValueError: If the docnos are not those of passages.
    """

    def __init__(self, docnos: DocnoColumn, count: int, source: Any) -> None:
        start: list[int] = []
        lines: list[str] = []
        document = None
        for row, docno in enumerate(docnos):
            if docno.endswith(_FIRST):
                document = docno[: -len(_FIRST)]
                start.append(row)
                lines.append(f"{document}\n")
            elif document is None or docno.rpartition("%p")[0] != document:
                raise ValueError(f"{source} says that it holds passages, but {docno!r} is none: index again")
        self.start = np.array([*start, count], dtype=np.int64)
        column = DocnoColumn("".join(lines).encode("utf-8", "surrogatepass"), len(start), source)
        super().__init__(column, DocnoRows.of(column, column.at), column.ranks())
        self.rows_each = -(-count // len(start))

    def rows_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of some documents' passages and the position in ``numbers`` each belongs to."""
        first = self.start[numbers]
        count = self.start[np.asarray(numbers) + 1] - first
        owner = np.repeat(np.arange(len(count)), count)
        ends = np.cumsum(count)
        return np.arange(int(count.sum())) + np.repeat(first - (ends - count), count), owner

    def best(self, scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the best documents of queries from their best passages; see :meth:`RowDocuments.best`."""
        k = min(k, len(self))
        query, slot = np.nonzero(rows >= 0)
        score, found = scores[query, slot], np.searchsorted(self.start, rows[query, slot], side="right") - 1
        # Best first: the first passage of a document is its best.
        first = np.unique(query * np.int64(len(self)) + found, return_index=True)[1]
        query, score, found = query[first], score[first], found[first]
        order = np.lexsort((self.ranks[found], -score, query))
        query, score, found = query[order], score[order], found[order]
        place = np.arange(len(query)) - np.searchsorted(query, query, side="left")
        kept = place < k
        best = np.full((len(rows), k), -np.inf, dtype=np.float32)
        numbers = np.full((len(rows), k), -1, dtype=np.int64)
        best[query[kept], place[kept]] = score[kept]
        numbers[query[kept], place[kept]] = found[kept]
        return best, numbers

    def iter_search(
        self, index: Any, vectors: np.ndarray, k: int, batch_size: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Search documents exactly, block by block; see :meth:`RowDocuments.iter_search`."""
        total = int(self.start[-1])
        depth = min(total, 2 * min(k, len(self)) * self.rows_each)
        for first, scores, rows in index.iter_search(vectors, depth, batch_size=batch_size):
            best, found = self.best(scores, rows, k)
            # As long as a passage that was not seen could be as good as the last document, it has to be looked for.
            short = np.flatnonzero((found[:, -1] < 0) | (best[:, -1] <= scores[:, -1]))
            deeper = depth
            while len(short) and deeper < total:
                deeper = min(total, 4 * deeper)
                left = []
                for some in np.array_split(short, -(-len(short) * deeper // _CELLS)):
                    scores, rows = index.search(vectors[first + some], deeper)
                    best[some], found[some] = self.best(scores, rows, k)
                    left.append(some[(found[some, -1] < 0) | (best[some, -1] <= scores[:, -1])])
                short = np.concatenate(left)
            yield first, best, found

    def score_pairs(self, index: Any, vectors: np.ndarray, query_of: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Score pairs of a query vector and a document number by the document's best passage, float32 (m,)."""
        rows, owner = self.rows_of(numbers)
        scores = index.score_pairs(vectors, np.asarray(query_of)[owner], rows)
        return np.maximum.reduceat(scores, np.searchsorted(owner, np.arange(len(numbers)))) if len(numbers) else scores

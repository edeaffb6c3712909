"""MaxP: documents that are stored as passages, and scored by the best of them.

An index of passages has one vector a passage, with docnos as :func:`pyterrier.text.sliding` makes them: the document's,
``%p``, and the passage's number from 0. The passages of a document are neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pt_dance.corpus.docnos import DocnoColumn, DocnoRows

_FIRST = "%p0"


class PassageDocuments:
    """The documents of an index of passages: their docnos, and which rows each has.

    Args:
        docnos: The docnos of all passages, in row order.
        count: How many passages there are.
        source: What messages call the index.

    Attributes:
        start: int64 (documents + 1,), the first row of each document, and the number of rows.
        docnos, rows, ranks: As those of an index, of documents instead of passages.

    Raises:
        ValueError: If the docnos are not those of passages.
    """

    def __init__(self, docnos: Any, count: int, source: Any) -> None:
        start: list[int] = []
        lines: list[str] = []
        document = None
        for row, docno in enumerate(docnos):
            if docno.endswith(_FIRST):
                document = docno[: -len(_FIRST)]
                start.append(row)
                lines.append(f"{document}\n")
            elif document is None or docno.rpartition("%p")[0] != document:
                raise ValueError(f"{source} says that it holds passages, but {docno!r} is none: index again.")
        self.start = np.array([*start, count], dtype=np.int64)
        text = "".join(lines).encode("utf-8", "surrogatepass")
        self.docnos = DocnoColumn(text, len(start), source)
        self.rows = DocnoRows.of(self.docnos, self.docnos.at)
        self.ranks = self.docnos.ranks()

    def __len__(self) -> int:
        return len(self.start) - 1

    def passages(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of some documents' passages, and of each the position in ``documents`` it belongs to."""
        first = self.start[documents]
        count = self.start[np.asarray(documents) + 1] - first
        owner = np.repeat(np.arange(len(count)), count)
        ends = np.cumsum(count)
        return np.arange(int(count.sum())) + np.repeat(first - (ends - count), count), owner

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the document that each row is a passage of."""
        return np.searchsorted(self.start, rows, side="right") - 1

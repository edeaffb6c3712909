"""Vectors of documents, read block by block, and the score of a query and a document.

The score is the dot product in float64, rounded to float32, of every pair by itself: on one machine it is the same
whatever other pairs, blocks or threads there are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pt_dance.storage.pages import Pages

# Longer vectors could give dot products that float32 does not hold.
MAX_NORM = 1e18
UNIT = 2.0**-24  # relative rounding error of float32
_PAIR_BLOCK = 256  # pairs in float64 that stay in a core's cache
_LEAST_RUN = 16  # pairs of one query from which on it pays to take its vector out of the loop


class Vectors:
    """The vectors of documents, ``float32`` or ``float16`` (n, d), in an array that may be memory-mapped.

    One object can serve many searches: it remembers how long the vectors are.
    """

    def __init__(self, docs: np.ndarray) -> None:
        # A plain view: indexing a memmap object costs more for every block.
        self.docs = docs.view(np.ndarray)
        self._pages = Pages.of(docs)
        self.shape = docs.shape
        self._row_bytes = docs.shape[1] * docs.dtype.itemsize
        self._norms: dict[tuple[int, int], float] = {}  # of blocks, by first row and length
        self._roundings: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        return len(self.docs)

    def block(self, first: int, end: int) -> Any:
        """Return rows as float32."""
        self._pages.read((end - first) * self._row_bytes)
        return np.asarray(self.docs[first:end], dtype=np.float32)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows that lie apart, as float32."""
        found = np.empty((len(numbers), self.shape[1]), dtype=np.float32)
        for start in range(0, len(numbers), _PAIR_BLOCK):
            part = slice(start, start + _PAIR_BLOCK)
            self._pages.read(0, places=len(numbers[part]))
            found[part] = self.docs[numbers[part]]
        return found

    def norm(self, first: int, block: Any) -> float:
        """Return an upper bound of the lengths of a block's vectors, which begins with row ``first``.

        Raises:
            ValueError: If a vector is not finite or too long.
        """
        key = first, len(block)
        if key not in self._norms:
            norm = self._longest(block)
            if not norm <= MAX_NORM * 1.01:
                raise ValueError(
                    f"document vectors must be finite and no longer than {MAX_NORM:g}; one of rows {first} to "
                    f"{first + len(block) - 1} is not: index these documents again"
                )
            self._norms[key] = norm
        return self._norms[key]

    def _longest(self, block: Any) -> float:
        return float(lengths(block).max())

    def rounding(self, first: int, block: np.ndarray) -> float:
        """Return an upper bound of what rounding a block's vectors to bfloat16 changes, as a length."""
        key = first, len(block)
        if key not in self._roundings:
            parts = (block[start : start + 256] for start in range(0, len(block), 256))  # pieces fit a core's cache
            self._roundings[key] = max(float(lengths(part - half(part).float().numpy()).max()) for part in parts)
        return self._roundings[key]

    def score_pairs(self, queries: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        """Return the scores of pairs of a query number and a row, ``float32`` (m,), in this thread."""
        scores = np.empty(len(row_of), dtype=np.float32)
        starts = np.flatnonzero(np.diff(query_of, prepend=-1)).tolist()
        in_runs = len(row_of) >= _LEAST_RUN * len(starts)
        for first, end in pairwise([*(starts if in_runs else [0]), len(row_of)]):
            query = queries[query_of[first]].astype(np.float64)[:, None] if in_runs else None
            for start in range(first, end, _PAIR_BLOCK):
                part = slice(start, min(start + _PAIR_BLOCK, end))
                self._pages.read(0, places=part.stop - part.start)
                docs = self.docs[row_of[part]].astype(np.float64)
                mine = queries[query_of[part]].astype(np.float64)[:, :, None] if query is None else query
                # A matrix of one row each: NumPy takes the dot product of every pair by itself.
                scores[part] = np.matmul(docs[:, None, :], mine)[:, 0, 0]
        return scores


def lengths(rows: np.ndarray) -> np.ndarray:
    """Return upper bounds of the lengths of ``float32`` rows, the rounding of their own sum included, ``float64``."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
    return np.sqrt(squares.astype(np.float64)) * (1 + 2 * rows.shape[1] * UNIT)


def half(rows: np.ndarray) -> torch.Tensor:
    """Return ``float32`` rows in bfloat16."""
    # Torch takes no memory that must not be written; an index's files are mapped so that writing would not reach them.
    return torch.from_numpy(rows if rows.flags.writeable else np.array(rows)).bfloat16()


def product_slack(norms: np.ndarray, dimension: int) -> np.ndarray:
    """Return how far products in float32 can mislead about two documents of length 1, ``float64`` (q,).

    ``|product in any order - exact| <= gamma |q| |d|`` with ``gamma = d u / (1 - d u)``; three more roundings are the
    score's and the comparisons'. Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    steps = dimension + 3
    return 2 * steps * UNIT / (1 - steps * UNIT) * norms * (1 + 1e-6)

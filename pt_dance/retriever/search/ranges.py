"""Exact search by an engine's workers: each has a range of the rows, and what they find is put together.

The score of a query and a document depends on nothing else, so the best of all are among the best of each range, and
equal scores are ordered by the same rule: the results are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pt_dance.retriever.search.arrays import best_first
from pt_dance.retriever.search.exact import exact_search, open_vectors
from pt_dance.storage.engine import Engine

_CELLS = 1 << 22  # queries times results that a worker sends at a time, 12 bytes each
_QUERIES = 1024  # at a time, at most


@dataclass(frozen=True)
class FileRows:
    """An array in a file, which other processes map instead of being sent it."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stamp: tuple[int, int]

    @classmethod
    def of(cls, array: np.ndarray) -> FileRows | np.ndarray:
        """Return where an array lies, or the array itself where it is in no file."""
        if not isinstance(array, np.memmap) or array.filename is None:
            return array
        path = Path(array.filename)
        return cls(path, array.offset, array.dtype.str, array.shape, _stamp(path))

    def part(self, first: int, end: int) -> np.ndarray:
        """Map rows.

        Raises:
            ValueError: If there is another file by now.
        """
        # It may have grown: documents are appended to the file that this index, too, has its vectors in.
        (file, size), (known, least) = _stamp(self.path), self.stamp
        if file != known or size < least:
            raise ValueError(f"{self.path} was replaced while it was searched: make the retriever again")
        # Mapped so that writing would stay in memory: torch takes no arrays that cannot be written.
        return np.memmap(self.path, self.dtype, "c", self.offset, self.shape)[first:end]


@dataclass(frozen=True)
class RangeSearch:
    """Searches a range of rows, in a worker.

    Attributes:
        vectors: All vectors, (n, d); also those of several files, which are sent as their names.
        ranks: Decide between equal scores, (n,).
        parts: How many ranges there are.
        device: Where to search; a GPU, if the worker has one, where None.
    """

    vectors: Any
    ranks: FileRows | np.ndarray
    parts: int
    device: str | None

    def __call__(self, number: int) -> Any:
        """Open a range, in the worker; return what searches it."""
        count = self.vectors.shape[0]
        first, end = (count * edge // self.parts for edge in (number, number + 1))
        if first == end:
            return lambda task: (np.empty((len(task[0]), 0), np.float32), np.empty((len(task[0]), 0), np.int64))
        vectors = open_vectors(_part(self.vectors, first, end), self.device)
        ranks = _part(self.ranks, first, end)

        def search(task: tuple[np.ndarray, int]) -> tuple[np.ndarray, np.ndarray]:
            queries, k = task
            scores, rows = exact_search(queries, vectors, k, tie_order=ranks)
            return scores, rows + first

        return search


class EngineSearch:
    """Searches the rows of an opened index by an engine; in the place of the index where documents are searched.

    Args:
        engine: Has the workers.
        opened: The index's files.
        device: Where workers search; a GPU, if they have one, where None.
    """

    def __init__(self, engine: Engine, opened: Any, device: str | None) -> None:
        self.engine, self.identity, self.device = engine, opened.identity, device
        self._count = len(opened.vectors)
        self._ranks = opened.ranks
        self._work = RangeSearch(FileRows.of(opened.vectors), FileRows.of(opened.ranks), engine.workers, device)

    def iter_search(
        self, query_vecs: np.ndarray, k: int, *, batch_size: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Search block by block; see :meth:`pt_dance.DenseIndex.iter_search`. Results do not depend on batch_size."""
        k = min(k, self._count)
        step = max(1, min(_QUERIES, _CELLS // k))
        starts = range(0, len(query_vecs), step)
        tasks = ((np.ascontiguousarray(query_vecs[start : start + step], np.float32), k) for start in starts)
        for start, found in zip(starts, self.engine.broadcast(self._work, tasks, "the index"), strict=True):
            scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
            order = best_first(scores, self._ranks[rows].astype(np.int64))[:, :k]
            yield start, np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def search(self, query_vecs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best rows of every query; see :meth:`pt_dance.DenseIndex.search`."""
        _, *found = zip(*self.iter_search(query_vecs, k), strict=True)
        scores, rows = map(np.concatenate, found)
        return scores, rows


def _part(array: Any, first: int, end: int) -> Any:
    return array.part(first, end) if hasattr(array, "part") else array[first:end]


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size

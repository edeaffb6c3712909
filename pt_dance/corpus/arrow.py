"""Columns of strings in Arrow files: written as a stream, read by row number without touching other rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def table_writer(path: str | Path, names: Sequence[str]) -> Iterator[Callable[[Any], None]]:
    """Write an Arrow file of string columns through ``datasets``; yields a function that writes an Arrow batch."""
    import pyarrow as pa
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    writer = ArrowWriter(path=str(path), features=Features({name: Value("large_string") for name in names}))
    try:
        yield lambda batch: writer.write_table(pa.Table.from_batches([batch]))
        writer.finalize()
    finally:
        writer.close()


def open_table(path: str | Path) -> Any:
    """Open an Arrow file as a ``datasets.Dataset``, memory-mapped.

    Raises:
        ValueError: If the file is damaged.
    """
    import pyarrow as pa
    from datasets import Dataset

    try:
        return Dataset.from_file(str(path))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} is no Arrow file of ours, or damaged ({type(err).__name__})") from err


class TextColumn:
    """Random access to one string column, without nulls, of a table that :func:`open_table` opened.

    Takes 1-2 microseconds a row: ``Table.take`` over many chunks copies or concatenates them, here the offsets of the
    chunk are read directly.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self._chunks = dataset.data.column(name).chunks
        lengths = np.fromiter((len(chunk) for chunk in self._chunks), dtype=np.int64, count=len(self._chunks))
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._views: dict[int, tuple[np.ndarray, memoryview]] = {}

    def _view(self, number: int) -> tuple[np.ndarray, memoryview]:
        if number not in self._views:
            chunk = self._chunks[number]
            _, offsets, data = chunk.buffers()
            positions = np.frombuffer(offsets, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            self._views[number] = positions, memoryview(b"" if data is None else data)
        return self._views[number]

    def take(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Return the strings of row numbers.

        Raises:
            IndexError: If a row number is negative or too large.
            TypeError: If they are no whole numbers.
        """
        wanted = np.asarray(rows).reshape(-1)
        if not len(wanted):
            return []
        if wanted.dtype.kind not in "iu":
            raise TypeError(f"rows are whole numbers, not {rows!r}: Corpus.rows() gives those of docnos")
        count = int(self._ends[-1])
        if wanted.min() < 0 or wanted.max() >= count:
            bad = wanted[(wanted < 0) | (wanted >= count)][0]
            raise IndexError(f"there is no document in row {bad}: rows are 0 to {count - 1}")
        chunks = np.searchsorted(self._ends, wanted, side="right")
        local = wanted - self._starts[chunks]
        texts = []
        for number, at in zip(chunks.tolist(), local.tolist(), strict=True):
            positions, data = self._view(number)
            texts.append(str(data[positions[at] : positions[at + 1]], "utf-8"))
        return texts

    def bytes(self, rows: range) -> int:
        """Return how many bytes the strings of consecutive rows take."""
        count, start = 0, rows.start
        while start < rows.stop:
            number = int(np.searchsorted(self._ends, start, side="right"))
            end = min(rows.stop, int(self._ends[number]))
            positions, _ = self._view(number)
            begin = int(self._starts[number])
            count += int(positions[end - begin] - positions[start - begin])
            start = end
        return count

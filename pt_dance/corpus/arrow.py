"""Columns of strings in Arrow files: written as a stream, read by row number without touching other rows."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pt_dance.storage.pages import Pages


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


def open_table(path: str | Path) -> tuple[Any, Pages]:
    """Open an Arrow file as a ``datasets.Dataset``, memory-mapped; its pages are for :class:`TextColumn`.

    Raises:
        ValueError: If the file is damaged.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
        pages = Pages([mapped])
        pages.release()  # opening visits every block
        return Dataset(MemoryMappedTable(table, str(path))), pages
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path} is no Arrow file of ours, or damaged ({type(err).__name__})") from err


class TextColumn:
    """Random access to one string column, without nulls, of a table that :func:`open_table` opened.

    Takes 1-2 microseconds a row: ``Table.take`` over many chunks copies or concatenates them, here the offsets of the
    chunk are read directly.
    """

    def __init__(self, dataset: Any, pages: Pages, name: str) -> None:
        self._chunks, self._pages = dataset.data.column(name).chunks, pages
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
        texts, counted = [""] * len(wanted), self._pages.are_given_back
        # Of a large file each page is mapped once: it may be given back when a row behind it is read.
        order = np.argsort(wanted, kind="stable") if counted else np.arange(len(wanted))
        for place, number, at in zip(order.tolist(), chunks[order].tolist(), local[order].tolist(), strict=True):
            positions, data = self._view(number)
            start, end = positions[at], positions[at + 1]
            texts[place] = str(data[start:end], "utf-8")
            if counted:
                self._pages.read(int(end - start), places=1)
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

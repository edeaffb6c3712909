"""Sorting and telling duplicates apart in bounded memory: what does not fit a block goes through files."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

# Numbers, or docnos, that are sorted in memory at a time.
BLOCK = 1 << 22
# A bin of the first pass holds a fraction of a block, as long as the numbers are spread evenly.
_BINS_PER_BLOCK = 4
_MOST_BINS = 1 << 16
_SAMPLES_PER_PART = 64


def sort_numbers(numbers: np.ndarray, ordered: np.ndarray, rows: np.ndarray, bits: int = 64) -> None:
    """Sort numbers and tell where each was, stably, in memory for two blocks.

    Numbers first go to the bin of their highest bits, then neighbouring bins are sorted together. Hashes fall evenly
    into bins; of other numbers a bin may be larger than a block.

    Args:
        numbers: Unsigned (n,), each below ``2 ** bits``; may be memory-mapped, as the others.
        ordered: Of the same type and shape; receives the sorted numbers.
        rows: ``uint32`` (n,); receives the position that each had.
        bits: How many bits the numbers have.
    """
    count = len(numbers)
    bins = 1
    while count > BLOCK and bins * BLOCK < _BINS_PER_BLOCK * count and bins < min(_MOST_BINS, 1 << bits):
        bins *= 2
    if bins == 1:
        rows[:] = order = np.argsort(numbers, kind="stable")
        ordered[:] = numbers[order]
        return
    shift = numbers.dtype.type(bits - bins.bit_length() + 1)
    sizes = np.zeros(bins, dtype=np.int64)
    for start in range(0, count, BLOCK):
        sizes += np.bincount((numbers[start : start + BLOCK] >> shift).astype(np.uint16), minlength=bins)
    ends = np.cumsum(sizes)
    free = ends - sizes
    for start in range(0, count, BLOCK):
        block = np.asarray(numbers[start : start + BLOCK])
        bin_of = (block >> shift).astype(np.uint16)  # which NumPy sorts quickest
        order = np.argsort(bin_of, kind="stable")
        taken = np.bincount(bin_of, minlength=bins)
        place = np.arange(len(block)) + np.repeat(free - (np.cumsum(taken) - taken), taken)
        ordered[place], rows[place] = block[order], start + order
        free += taken
    first = 0
    while first < count:
        # As many bins as fit a block, but at least one.
        last = ends[np.searchsorted(ends, first, side="right")]
        fitting = ends[np.searchsorted(ends, first + BLOCK, side="right") - 1] if ends[0] <= first + BLOCK else 0
        part = slice(first, max(int(last), int(fitting)))
        order = np.argsort(ordered[part], kind="stable")
        ordered[part], rows[part] = ordered[part][order], rows[part][order]
        first = part.stop


def rank_strings(strings: Any, ranks: np.ndarray, folder: Path | None = None) -> None:
    """Tell the place of every string in their order (by code point), in memory for a few blocks.

    Blocks are sorted and cut at the same strings, drawn from all of them; then the pieces between two cuts are sorted
    together.

    Args:
        strings: Arrow array of n distinct strings, may be memory-mapped.
        ranks: ``uint32`` (n,), may be memory-mapped; receives the places.
        folder: Where a temporary file of 4 bytes a string lies.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    count = len(strings)
    if count <= BLOCK:
        ranks[pc.sort_indices(strings).to_numpy()] = np.arange(count, dtype=np.uint32)
        return
    parts = 2 * -(-count // BLOCK)
    drawn = np.linspace(0, count - 1, min(count, _SAMPLES_PER_PART * parts)).astype(np.int64)
    sample = sorted(strings.take(pa.array(drawn)).to_pylist())
    cuts = sample[_SAMPLES_PER_PART::_SAMPLES_PER_PART]
    pieces: list[list[slice]] = [[] for _ in range(len(cuts) + 1)]
    with tempfile.TemporaryFile(dir=folder) as file:
        for start in range(0, count, BLOCK):
            block = strings.slice(start, BLOCK)
            order = pc.sort_indices(block).to_numpy()
            at = [0, *(_cut(block, order, cut) for cut in cuts), len(order)]
            for piece, begin, end in zip(pieces, at, at[1:], strict=False):
                piece.append(slice(start + begin, start + end))
            file.write((order + start).astype(np.uint32).tobytes())
        file.flush()
        sorted_rows = np.memmap(file, dtype=np.uint32, mode="r", shape=(count,))
        done = 0
        for piece in pieces:
            rows = np.concatenate([sorted_rows[part] for part in piece])
            order = pc.sort_indices(strings.take(pa.array(rows, type=pa.uint32()))).to_numpy()
            ranks[rows[order]] = np.arange(done, done + len(rows), dtype=np.uint32)
            done += len(rows)


def _cut(block: Any, order: np.ndarray, cut: str) -> int:
    return bisect_left(range(len(order)), cut, key=lambda place: block[int(order[place])].as_py())


def mapped_file(file: Any, dtype: str, count: int) -> np.memmap:
    """Return new numbers in an empty open file, memory-mapped.

    Raises:
        OSError: If the disk has no room for them: writing to a mapped file could not say so.
    """
    size = np.dtype(dtype).itemsize * count
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
    return np.memmap(file, dtype=dtype, mode="r+", shape=(count,))


class SeenNumbers:
    """Numbers in the order they came, and whether one came before; 16 bytes each, of which few are in memory.

    Args:
        folder: Where temporary files lie, which have no name, so that a killed process leaves none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: Any = None
        self._count = 0
        self._runs: list[np.ndarray] = []  # sorted; those in memory shrink by half or more, so there are few

    def __len__(self) -> int:
        return self._count

    def add(self, block: np.ndarray) -> list[int]:
        """Add numbers, ``uint64`` (n,), and return the positions of those that came before, also in the same block."""
        if not len(block):
            return []
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (as long as this object)
        self._file.write(block.tobytes())
        self._count += len(block)
        order = np.argsort(block, kind="stable")
        run = block[order]
        seen = np.zeros(len(block), dtype=bool)
        seen[order[1:]] = run[1:] == run[:-1]
        for old in self._runs:
            at = np.searchsorted(old, run)
            seen[order] |= old[np.minimum(at, len(old) - 1)] == run
        while self._runs and len(self._runs[-1]) <= 2 * len(run) and len(self._runs[-1]) < BLOCK:
            run = np.sort(np.concatenate([self._runs.pop(), run]))
        self._runs.append(run if len(run) < BLOCK else self._on_disk(run))
        return np.flatnonzero(seen).tolist()

    def _on_disk(self, run: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(run.tobytes())
            file.flush()
            return np.memmap(file, dtype=run.dtype, mode="r", shape=run.shape)

    def all(self) -> np.ndarray:
        """Return all numbers in the order they came, memory-mapped."""
        if self._file is None:
            return np.empty(0, dtype=np.uint64)
        self._file.flush()
        return np.memmap(self._file, dtype=np.uint64, mode="r", shape=(self._count,))


def ends_of_lines(lines: np.ndarray, offsets: np.ndarray, error: Exception) -> None:
    """Write where each line begins, and at last where the last one ends.

    Args:
        lines: ``uint8``, text whose lines end with a line feed; may be memory-mapped.
        offsets: ``int64`` (lines + 1,); may be memory-mapped.
        error: Raised where there are more or fewer lines, or the last one has no end.
    """
    offsets[0] = found = 0
    for start in range(0, len(lines), BLOCK):
        ends = np.flatnonzero(lines[start : start + BLOCK] == 10) + (start + 1)
        if found + len(ends) >= len(offsets):
            raise error
        offsets[found + 1 : found + 1 + len(ends)] = ends
        found += len(ends)
    if found + 1 != len(offsets) or offsets[-1] != len(lines):
        raise error

"""Docnos: what is a valid one, which occur twice, and which row each one has.

Lookup goes through a table of 64-bit hashes on disk, memory-mapped, and compares every hit with the docno itself.
FLEX's own ``docnos.npids`` is written beside it, so that pyterrier_dr opens our indexes. Its inverse lookup is not
used: for docnos that are numbers it takes ``01`` for ``1``, and it misses numbers that do not start at 0 in a later
block (npids 0.1.3).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from more_itertools import chunked

from pt_dance.storage.digests import short_text_digest

MAX_DOCNO_LENGTH = 1024
_BAD_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NPIDS_BLOCK = 1 << 16


def check_docno(value: object, position: int) -> str:
    """Return what a document gives as its docno as a plain ``str``; ``position`` is its number in the source, from 0.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, too long or holds characters that break run files (control characters, line breaks).
    """
    if not isinstance(value, str):
        raise TypeError(
            f"document number {position} has the docno {value!r}, a {type(value).__name__}: docnos must be strings, "
            "e.g. str(docno)"
        )
    if not value:
        raise ValueError(f"document number {position} has an empty docno: every document needs its own")
    if len(value) > MAX_DOCNO_LENGTH:
        raise ValueError(
            f"document number {position} has a docno of {len(value):,} characters ({value[:40]!r}...): at most "
            f"{MAX_DOCNO_LENGTH:,} are allowed"
        )
    if _BAD_CHARACTERS.search(value):
        raise ValueError(
            f"document number {position} has the docno {value!r}, which holds control characters, line breaks or lone "
            "surrogates: run files could not hold it; replace them"
        )
    return value if type(value) is str else str(value)


def duplicate_error(docno: str) -> ValueError:
    """Return the error that says that a docno occurs twice."""
    return ValueError(f"docno {docno!r} occurs more than once: every document needs its own; remove the duplicates")


class DuplicateDocnos:
    """Find docnos that occur twice, in bounded memory: 16 bytes a docno, whatever its length.

    Attributes:
        hashes: ``array('Q')`` with the hash of every docno added, in order.
    """

    def __init__(self) -> None:
        self.hashes = array("Q")
        self._runs: list[np.ndarray] = []  # sorted hashes; sizes shrink by half or more, so there are few of them

    def add_block(self, docnos: Sequence[str]) -> list[int]:
        """Add a block of valid docnos and return the positions of those whose hash has been seen before.

        They occur already, in an earlier block or in this one, or once in about 2**64 pairs another docno has the same
        hash: the caller compares the strings.
        """
        block = np.fromiter((short_text_digest(d) for d in docnos), dtype=np.uint64, count=len(docnos))
        self.hashes.frombytes(block.tobytes())
        order = np.argsort(block, kind="stable")
        run = block[order]
        seen = np.zeros(len(block), dtype=bool)
        seen[order[1:]] = run[1:] == run[:-1]
        for old in self._runs:
            at = np.searchsorted(old, block)
            seen |= old[np.minimum(at, len(old) - 1)] == block
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]))
        if len(run):
            self._runs.append(run)
        return np.flatnonzero(seen).tolist()


class DocnoRows:
    """Row numbers of docnos: sorted hashes and their rows, usually memory-mapped from a file.

    Args:
        hashes: ``uint64``, sorted.
        rows: ``uint32``, the row of each hash.
        docnos_at: Gives the docnos of an array of rows, to compare with.
    """

    def __init__(self, hashes: np.ndarray, rows: np.ndarray, docnos_at: Callable[[np.ndarray], Sequence[str]]) -> None:
        self._hashes, self._rows, self._docnos_at = hashes, rows, docnos_at

    @staticmethod
    def write(path: str | Path, hashes: array | np.ndarray) -> None:
        """Write the table for hashes in row order: n sorted ``uint64``, then n ``uint32`` rows (12 bytes a docno)."""
        values = np.frombuffer(hashes, dtype=np.uint64)
        order = np.argsort(values, kind="stable")
        with open(path, "wb") as out:
            out.write(values[order].astype("<u8").tobytes())
            out.write(order.astype("<u4").tobytes())

    @classmethod
    def open(cls, path: str | Path, count: int, docnos_at: Callable[[np.ndarray], Sequence[str]]) -> DocnoRows:
        """Open a table of ``count`` docnos written by :meth:`write`, memory-mapped.

        Raises:
            ValueError: If the file has another size.
        """
        size = Path(path).stat().st_size
        if size != 12 * count:
            raise ValueError(f"{path} has {size:,} bytes where {12 * count:,} belong: the file is damaged")
        hashes = np.memmap(path, dtype="<u8", mode="r", shape=(count,))
        rows = np.memmap(path, dtype="<u4", mode="r", shape=(count,), offset=8 * count)
        return cls(hashes, rows, docnos_at)

    @classmethod
    def of(cls, docnos: Iterable[str], docnos_at: Callable[[np.ndarray], Sequence[str]]) -> DocnoRows:
        """Make the table in memory, for folders that have none."""
        hashes = np.fromiter((short_text_digest(d) for d in docnos), dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], order.astype("<u4"), docnos_at)

    def __call__(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row of each docno, ``int64``, the first one where it is there twice; -1 where it is not there."""
        docnos = list(docnos)
        found = np.full(len(docnos), -1, dtype=np.int64)
        if not docnos or not len(self._hashes):
            return found
        given = (short_text_digest(docno) if isinstance(docno, str) else 0 for docno in docnos)
        hashes = np.fromiter(given, np.uint64, len(docnos))
        at = np.searchsorted(self._hashes, hashes)
        open_ = np.arange(len(docnos))
        # One turn is enough unless two docnos share a 64-bit hash.
        while len(open_):
            open_ = open_[at[open_] < len(self._hashes)]
            open_ = open_[self._hashes[at[open_]] == hashes[open_]]
            if not len(open_):
                break
            rows = np.asarray(self._rows[at[open_]], dtype=np.int64)
            rows = np.minimum(rows, len(self._hashes) - 1)
            same = np.fromiter(
                (a == docnos[i] for a, i in zip(self._docnos_at(rows), open_, strict=True)), bool, len(open_)
            )
            found[open_[same]] = rows[same]
            open_ = open_[~same]
            at[open_] += 1
        return found


class DocnoColumn:
    """The docnos of an index by row, in Arrow memory, memory-mapped where ``docnos.txt`` is there."""

    def __init__(self, lines: Any, count: int, source: Path) -> None:
        import pyarrow as pa

        data = np.frombuffer(lines, dtype=np.uint8)
        ends = np.flatnonzero(data == 10) + 1
        if len(ends) != count or (count and ends[-1] != len(data)):
            raise ValueError(f"{source} does not hold {count:,} docnos: the index is damaged; index again")
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        # Every string keeps its line break: Arrow's strings lie end to end, so the file can be used as it is.
        self._lines = pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(lines))

    def take(self, rows: np.ndarray) -> Any:
        """Return the docnos of rows as an Arrow array of strings."""
        import pyarrow as pa
        import pyarrow.compute as pc

        lines = self._lines.take(pa.array(np.asarray(rows, dtype=np.int64)))
        return pc.utf8_rtrim(lines, characters="\n")

    def at(self, rows: np.ndarray) -> list[str]:
        """Return the docnos of rows as a list."""
        return self.take(rows).to_pylist()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._lines), 1 << 16):
            yield from (line[:-1] for line in self._lines[start : start + (1 << 16)].to_pylist())

    def ranks(self) -> np.ndarray:
        """Return the place of every row's docno in docno order (by code point), ``uint32``."""
        import pyarrow.compute as pc

        # A line break sorts before every character that a docno may hold.
        order = pc.sort_indices(self._lines).to_numpy()
        ranks = np.empty(len(order), dtype="<u4")
        ranks[order] = np.arange(len(order), dtype="<u4")
        return ranks


def write_npids(path: str | Path, docnos: Iterator[str]) -> None:
    """Write FLEX's ``docnos.npids`` in bounded memory, readable by every ``npids.Lookup``.

    Only npids' plain codecs are used, fixed-length byte strings and the hash lookup, in blocks of 65,536: its own
    builder fails for a block of one docno (``ZeroDivisionError``) and for docnos whose common bytes end inside a
    character (``UnicodeDecodeError``). The file must not exist, and there must be a docno.
    """
    import npids
    from npids import codecs
    from npids.utils import FileManager

    with FileManager(path, "a") as out:
        for block in chunked((docno.encode("utf-8") for docno in docnos), _NPIDS_BLOCK):
            width = max(map(len, block))
            out.write_header(0, len(block), {"format": "fixedbytes", "length": width, "prefix": ""})
            out.write(np.array(block, dtype=f"S{width}").tobytes())
    with npids.Lookup(path) as lookup, FileManager(path, "a") as out:
        codecs.inv["hash"].build(lookup.fwd, out)

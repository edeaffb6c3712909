"""Docnos: what is a valid one, which occur twice, and which row each one has.

Lookup goes through a table of 64-bit hashes on disk, memory-mapped, and compares every hit with the docno itself.
FLEX's own ``docnos.npids`` is written beside it, so that pyterrier_dr opens our indexes. Its inverse lookup is not
used: for docnos that are numbers it takes ``01`` for ``1``, and it misses numbers that do not start at 0 in a later
block (npids 0.1.3).
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from more_itertools import chunked

from pt_dance.corpus.sorting import BLOCK, ends_of_lines, mapped_file, rank_strings, sort_numbers
from pt_dance.storage.digests import short_text_digest

MAX_DOCNO_LENGTH = 1024
_BAD_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NPIDS_BLOCK = 1 << 16


def check_docno(value: object, position: int | None) -> str:
    """Return what a document gives as its docno as a plain ``str``.

    Args:
        value: What the document gives.
        position: Its number in the source, from 0; None where the caller says which document it is.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is empty, too long or holds characters that break run files (control characters, line breaks).
    """
    if not isinstance(value, str):
        raise TypeError(
            f"{_named(position)} has the docno {value!r}, a {type(value).__name__}: docnos must be strings, "
            "e.g. str(docno)"
        )
    if not value:
        raise ValueError(f"{_named(position)} has an empty docno: every document needs its own")
    if len(value) > MAX_DOCNO_LENGTH:
        raise ValueError(
            f"{_named(position)} has a docno of {len(value):,} characters ({value[:40]!r}...): at most "
            f"{MAX_DOCNO_LENGTH:,} are allowed"
        )
    if _BAD_CHARACTERS.search(value):
        raise ValueError(
            f"{_named(position)} has the docno {value!r}, which holds control characters, line breaks or lone "
            "surrogates: run files could not hold it; replace them"
        )
    return value if type(value) is str else str(value)


def _named(position: int | None) -> str:
    return "the document" if position is None else f"document number {position}"


def duplicate_error(docno: str, files: Sequence[Path] = ()) -> ValueError:
    """Return the error that says that a docno occurs twice, and in which files."""
    where = f" in {' and '.join(map(str, dict.fromkeys(files)))}" if files else ""
    return ValueError(
        f"docno {docno!r} occurs more than once{where}: every document needs its own; remove the duplicates"
    )


def docno_hashes(docnos: Sequence[str]) -> np.ndarray:
    """Return the hash of each docno, ``uint64``; about one pair in 2**64 has the same: who finds one compares them."""
    return np.fromiter((short_text_digest(d) for d in docnos), dtype=np.uint64, count=len(docnos))


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
    def write(path: str | Path, hashes: np.ndarray) -> None:
        """Write the table for hashes in row order: n sorted ``uint64``, then n ``uint32`` rows (12 bytes a docno)."""
        with open(path, "w+b") as file:
            table = mapped_file(file, "<u4", 3 * len(hashes))
            sort_numbers(hashes, table[: 2 * len(hashes)].view("<u8"), table[2 * len(hashes) :])
            table.flush()

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
    """The docnos of an index by row, in Arrow memory, memory-mapped where there are files of them.

    Args:
        lines: Bytes, a docno a line.
        count: How many there are.
        source: What messages call them.
        offsets: ``int64`` (count + 1,), where each line begins and the last one ends, as :meth:`write_offsets` writes
            them; found by reading all lines if None.

    Raises:
        ValueError: If ``lines`` are not so many docnos.
    """

    def __init__(self, lines: Any, count: int, source: Path, offsets: np.ndarray | None = None) -> None:
        import pyarrow as pa

        self._data, self._source, self._count = np.frombuffer(lines, dtype=np.uint8), source, count
        self._checked = offsets is None
        if offsets is None:
            offsets = np.empty(count + 1, dtype=np.int64)
            ends_of_lines(self._data, offsets, self._damaged())
        elif offsets[0] != 0 or offsets[-1] != len(self._data):
            raise self._damaged()
        self._offsets = offsets.view(np.ndarray)
        # Every string keeps its line break: Arrow's strings lie end to end, so the file can be used as it is.
        self._lines = pa.LargeStringArray.from_buffers(count, pa.py_buffer(self._offsets), pa.py_buffer(lines))

    @staticmethod
    def write_offsets(lines: Path, count: int, path: Path) -> np.ndarray:
        """Write where each docno of a file begins, 8 bytes each, so that opening it need not read them all.

        Returns what was written, memory-mapped.

        Raises:
            ValueError: If the file does not hold ``count`` docnos.
        """
        with open(path, "w+b") as file:
            offsets = mapped_file(file, "<i8", count + 1)
            data = np.memmap(lines, dtype=np.uint8, mode="r")
            ends_of_lines(data, offsets, _damaged(lines, count))
            offsets.flush()
        return offsets

    def _damaged(self) -> ValueError:
        return _damaged(self._source, self._count)

    def _check(self, rows: np.ndarray) -> None:
        """Refuse offsets of a damaged file, with which Arrow would read other memory."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._count:
            raise IndexError(f"rows are 0 to {self._count - 1}, not {rows.min()} to {rows.max()}")
        if not self._checked:
            starts, ends = self._offsets[rows], self._offsets[rows + 1]
            inside = (starts >= 0) & (starts < ends) & (ends <= len(self._data))
            if not inside.all() or not (self._data[ends - 1] == 10).all():
                raise self._damaged()

    def take(self, rows: np.ndarray) -> Any:
        """Return the docnos of rows as an Arrow array of strings."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.asarray(rows, dtype=np.int64)
        self._check(rows)
        return pc.utf8_rtrim(self._lines.take(pa.array(rows)), characters="\n")

    def at(self, rows: np.ndarray) -> list[str]:
        """Return the docnos of rows as a list."""
        return self.take(rows).to_pylist()

    def _blocks(self) -> Iterator[Any]:
        for start in range(0, self._count, 1 << 16):
            end = min(start + (1 << 16), self._count)
            self._check(np.arange(start, end))
            yield self._lines[start:end]

    def __iter__(self) -> Iterator[str]:
        for block in self._blocks():
            yield from (line[:-1] for line in block.to_pylist())

    def ranks(self, out: np.ndarray | None = None, folder: Path | None = None) -> np.ndarray:
        """Return the place of every row's docno in docno order (by code point), ``uint32``.

        Args:
            out: Where they are written, e.g. a memory-mapped file; new memory if None.
            folder: Where temporary files lie.
        """
        for _ in self._blocks():
            pass  # all offsets are checked
        ranks = np.empty(self._count, dtype="<u4") if out is None else out
        # A line break sorts before every character that a docno may hold.
        rank_strings(self._lines, ranks, folder)
        return ranks


def _damaged(source: Path, count: int) -> ValueError:
    return ValueError(f"{source} does not hold {count:,} docnos: the index is damaged; index again")


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
        if len(lookup) <= BLOCK:
            codecs.inv["hash"].build(lookup.fwd, out)
        else:
            _write_hash_lookup(lookup.fwd, out, Path(path).parent)


def _write_hash_lookup(docnos: Any, out: Any, folder: Path) -> None:
    """Write what npids' ``InvHash.build`` writes, which needs some 40 bytes of memory a docno, with little memory."""
    from npids.codecs.inv_hash import fnv1_32

    count = len(docnos)
    bits = (count - 1).bit_length()
    with contextlib.ExitStack() as files:
        arrays = []
        for _ in range(3):
            file = files.enter_context(tempfile.TemporaryFile(dir=folder))
            arrays.append(mapped_file(file, "<u4", count))
        buckets, ordered, rows = arrays
        for start in range(0, count, _NPIDS_BLOCK):
            part = np.arange(start, min(start + _NPIDS_BLOCK, count))
            buckets[part] = fnv1_32(docnos.lookup(part, as_bytes=True)) & ((1 << bits) - 1)
        sort_numbers(buckets, ordered, rows, bits)
        out.write_header(1, count, {"format": "hash", "hash_bits": bits, "hash_fn": "fnv1_32"})
        for start in range(0, 1 << bits, BLOCK):
            firsts = np.arange(start, min(start + BLOCK, 1 << bits), dtype=np.uint32)
            out.write(np.searchsorted(ordered, firsts).astype(np.uint32).tobytes())
        out.write(np.array([count], dtype=np.uint32).tobytes())
        for start in range(0, count, BLOCK):
            out.write(rows[start : start + BLOCK].tobytes())

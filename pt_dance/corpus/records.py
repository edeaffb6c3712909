"""From documents, whatever they hold, to the checked rows of a corpus, written or compared as a stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from more_itertools import constrained_batches

from pt_dance.corpus.arrow import TextColumn, open_table, table_writer
from pt_dance.corpus.docnos import DocnoRows, check_docno, docno_hashes, duplicate_error
from pt_dance.corpus.sorting import SeenNumbers
from pt_dance.storage.digests import add_columns, new_digest

TABLE, HASHES = "corpus.arrow", "docnos.hash"

_BLOCK_DOCUMENTS = 1000
_BLOCK_CHARACTERS = 16 << 20


def columns_of(fields: Sequence[str]) -> list[str]:
    """Return the columns of a corpus with these fields."""
    return ["docno", *(field for field in fields if field != "text"), "text"]


def checked_fields(fields: Sequence[str]) -> list[str]:
    """Return the fields as a list.

    Raises:
        ValueError: If there are none, or one occurs twice, is no name or is ``docno``.
    """
    fields = [fields] if isinstance(fields, str) else list(fields)
    if not fields or not all(isinstance(f, str) and f for f in fields) or len(set(fields)) < len(fields):
        raise ValueError(f"fields={fields!r} must name at least one field, each once")
    if "docno" in fields:
        raise ValueError("'docno' cannot be one of the fields: it is the document's name, not its text")
    return fields


def row_of(document: dict[str, Any], position: int | None, fields: Sequence[str], separator: str) -> tuple[str, ...]:
    """Return a document's values in the order of :func:`columns_of`.

    Raises:
        TypeError: If a docno or field is no string.
        ValueError: If a docno is invalid, or the document lacks its last field.
    """
    docno = check_docno(document.get("docno"), position)
    row = _values(document, docno, fields)
    text = separator.join(value for value in row.values() if value)
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"document {docno!r} holds a lone surrogate, which no text file can: clean it with "
            "text.encode('utf-8', 'replace').decode()"
        ) from None
    return tuple((row | {"docno": docno, "text": text})[name] for name in columns_of(fields))


def _values(document: dict[str, Any], docno: str, fields: Sequence[str]) -> dict[str, str]:
    values = {}
    for field in fields:
        value = document.get(field)
        if value is None or (isinstance(value, float) and value != value) or value is pd.NA:
            if field == fields[-1]:
                found = f"{value!r} as its" if field in document else f"only {sorted(map(str, document))} and no"
                raise ValueError(
                    f"document {docno!r} has {found} {field!r}: every document needs a string there; give an empty "
                    "one, leave the document out, or choose other fields"
                )
            value = ""
        elif not isinstance(value, str):
            raise TypeError(f"document {docno!r} has a {type(value).__name__} as its {field!r}: fields must be strings")
        values[field] = value
    return values


def blocks_of(rows: Iterable[tuple[str, ...]], names: Sequence[str]) -> Generator[Any, None, None]:
    """Yield the blocks that rows are written in, see :func:`block_of`."""

    def characters(row: tuple[str, ...]) -> int:
        return sum(map(len, row))

    for block in constrained_batches(rows, _BLOCK_CHARACTERS, _BLOCK_DOCUMENTS, characters, strict=False):
        yield block_of(block, names)


def block_of(rows: Sequence[tuple[str, ...]], names: Sequence[str]) -> Any:
    """Return rows as an Arrow batch: a column for each name, and the docnos' hashes in one whose name is empty."""
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    hashes = pa.array(docno_hashes(columns[0]))
    strings = [pa.array(column, pa.large_string()) for column in columns]
    return pa.RecordBatch.from_arrays([*strings, hashes], names=[*names, ""])


def rows_in(blocks: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    """Yield the rows that blocks hold."""
    for block in blocks:
        yield from zip(*(column.to_pylist() for column in block.columns[:-1]), strict=True)


def cut_anew(blocks: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the blocks that :func:`blocks_of` would make of the rows in other blocks."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rest: list[Any] = []
    for block in blocks:
        table = pa.Table.from_batches([*rest, block]).combine_chunks()
        lengths = [pc.utf8_length(column).to_numpy() for column in table.columns[:-1]]
        ends = np.cumsum(np.sum(lengths, axis=0))
        start, used = 0, 0
        # The next row tells whether a block is full.
        while (end := _end_of_block(ends, start, used)) < len(table):
            # A slice would be written with some bytes of the rows after it.
            yield from table.take(np.arange(start, end)).to_batches()
            start, used = end, int(ends[end - 1])
        rest = table.take(np.arange(start, len(table))).to_batches()
    yield from rest


def _end_of_block(ends: np.ndarray, start: int, used: int) -> int:
    fitting = int(np.searchsorted(ends, used + _BLOCK_CHARACTERS, side="right"))
    return min(max(fitting, start + 1), start + _BLOCK_DOCUMENTS)


def write_blocks(
    folder: Path,
    blocks: Iterable[Any],
    fields: list[str],
    separator: str,
    file_of: Callable[[int], Path] | None = None,
) -> dict[str, Any]:
    """Write the files of a corpus to an empty folder, as a stream, and return its metadata.

    Args:
        folder: The folder.
        blocks: What :func:`blocks_of` yields.
        fields: The fields of a document.
        separator: What stands between two of them.
        file_of: Tells the file that a row comes from.

    Raises:
        ValueError: If there are no rows, or a docno occurs twice.
    """
    names = columns_of(fields)
    digest = new_digest("\x1f".join(names).encode())
    seen, suspects = SeenNumbers(folder), dict[int, str]()
    with table_writer(folder / TABLE, names) as write:
        for block in blocks:
            first = len(seen)
            again = seen.add(block.column(len(names)).to_numpy())
            if len(suspects) < _BLOCK_DOCUMENTS:  # so many are no accident
                suspects |= {first + place: block.column(0)[place].as_py() for place in again}
            columns = block.select(names)
            add_columns(digest, columns.columns)
            write(columns)
    if not len(seen):
        raise ValueError("the source has no documents: a corpus needs at least one")
    DocnoRows.write(folder / HASHES, seen.all())
    column = TextColumn(*open_table(folder / TABLE), "docno")
    first_rows = DocnoRows.open(folder / HASHES, len(seen), column.take)(list(suspects.values()))
    for (suspect, docno), first_row in zip(suspects.items(), first_rows.tolist(), strict=True):
        if suspect != first_row:
            files = [] if file_of is None else [file_of(first_row), file_of(suspect)]
            raise duplicate_error(docno, files)
    return {
        "type": "corpus",
        "format": "arrow",
        "package_hint": "pt_dance",
        "doc_count": len(seen),
        "fields": fields,
        "separator": separator,
        "fingerprint": digest.hexdigest(),
        "files": {name: (folder / name).stat().st_size for name in (TABLE, HASHES)},
    }


def first_difference(rows: Iterable[tuple[str, ...]], stored: Iterable[tuple[str, ...]], count: int) -> str | None:
    """Say where documents' rows and those of a corpus, ``count`` of them, begin to differ; None if they do not."""
    for position, (mine, theirs) in enumerate(zip_longest(rows, stored)):
        if theirs is None:
            return f"it has {count:,} documents and more were given"
        if mine is None:
            return f"it has {count:,} documents and {position:,} were given"
        if mine != theirs:
            return f"its document number {position}, docno {theirs[0]!r}, is another one"
    return None

"""From documents, whatever they hold, to the checked rows of a corpus, written or compared as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from more_itertools import chunked, constrained_batches

from pt_dance.corpus.arrow import TextColumn, open_table, table_writer
from pt_dance.corpus.docnos import DocnoRows, DuplicateDocnos, check_docno, duplicate_error
from pt_dance.storage.digests import add_texts, new_digest

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


def rows_of(documents: Iterable[dict[str, Any]], fields: Sequence[str], separator: str) -> Iterator[tuple[str, ...]]:
    """Yield the row of each document: its values in the order of :func:`columns_of`.

    Raises:
        TypeError: If a docno or field is no string.
        ValueError: If a docno is invalid, or a document lacks its last field.
    """
    names = columns_of(fields)
    for position, document in enumerate(documents):
        docno = check_docno(document.get("docno"), position)
        row = _values(document, docno, fields)
        text = separator.join(value for value in row.values() if value)
        yield tuple((row | {"docno": docno, "text": text})[name] for name in names)


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


def write_rows(folder: Path, rows: Iterable[tuple[str, ...]], fields: list[str], separator: str) -> dict[str, Any]:
    """Write the files of a corpus to an empty folder, as a stream, and return its metadata.

    Raises:
        ValueError: If there are no rows, or a docno occurs twice.
    """
    names = columns_of(fields)
    digest = new_digest("\x1f".join(names).encode())
    seen, suspects = DuplicateDocnos(folder), dict[int, str]()
    with table_writer(folder / TABLE, names) as write:
        for block in constrained_batches(rows, _BLOCK_CHARACTERS, _BLOCK_DOCUMENTS, _characters, strict=False):
            first, docnos = len(seen), [row[0] for row in block]
            again = seen.add_block(docnos)
            if len(suspects) < _BLOCK_DOCUMENTS:  # so many are no accident
                suspects |= {first + place: docnos[place] for place in again}
            for row in block:
                add_texts(digest, row)
            write({name: list(values) for name, values in zip(names, zip(*block, strict=True), strict=True)})
    if not len(seen):
        raise ValueError("the source has no documents: a corpus needs at least one")
    DocnoRows.write(folder / HASHES, seen.hashes)
    column = TextColumn(open_table(folder / TABLE), "docno")
    first_rows = DocnoRows.open(folder / HASHES, len(seen), column.take)(list(suspects.values()))
    for (suspect, docno), first_row in zip(suspects.items(), first_rows, strict=True):
        if suspect != first_row:
            raise duplicate_error(docno)
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


def _characters(row: tuple[str, ...]) -> int:
    return sum(map(len, row))


def first_difference(
    rows: Iterable[tuple[str, ...]], stored: Callable[[range], Iterable[tuple[str, ...]]], count: int
) -> str | None:
    """Say where documents' rows and those of a corpus, which ``stored`` gives, begin to differ; None if they do not."""
    start = 0
    for block in chunked(rows, _BLOCK_DOCUMENTS):
        end = start + len(block)
        for position, (mine, theirs) in enumerate(
            zip(block, stored(range(start, min(end, count))), strict=False), start
        ):
            if mine != theirs:
                return f"its document number {position}, docno {theirs[0]!r}, is another one"
        if end > count:
            return f"it has {count:,} documents and more were given"
        start = end
    return None if start == count else f"it has {count:,} documents and {start:,} were given"

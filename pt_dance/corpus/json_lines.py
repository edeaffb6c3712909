"""JSON objects, one a line, in files that may be compressed; what is wrong is said with file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import IO, Any

# What reading compressed bytes raises where they are cut or damaged.
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)


def open_lines(path: Path) -> IO[bytes]:
    """Open a file of lines, decompressed where its name ends in ``.gz``."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def broken_file(path: Path, number: int, error: Exception) -> ValueError:
    """Return the error that says that a file cannot be read to its end."""
    return ValueError(f"{path}: broken after line {number} ({error}); fetch the file again")


def json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Return the object in one line.

    Raises:
        ValueError: If the line holds none; names the file and the line's number, which counts from 1.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise ValueError(f"{path}, line {number}: not valid JSON ({error}); correct this line") from error
    if not isinstance(record, dict):
        raise ValueError(
            f'{path}, line {number}: expected an object such as {{"_id": ..., "text": ...}}, found '
            f"{type(record).__name__}"
        )
    return record

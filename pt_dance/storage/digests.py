"""The one place for digests: what was given is compared with what is there by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash

_FILE_BLOCK = 1 << 22


def new_digest(start: bytes = b"") -> xxhash.xxh3_128:
    """Return a running digest (xxh3, 128 bits) for contents of any size."""
    return xxhash.xxh3_128(start)


def add_texts(digest: xxhash.xxh3_128, texts: Iterable[str]) -> None:
    """Feed texts to a running digest so that no two different lists of texts feed it the same."""
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)


def add_columns(digest: xxhash.xxh3_128, columns: Sequence[Any]) -> None:
    """Feed Arrow columns of strings to a running digest: for each row what :func:`add_texts` feeds of its values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = []
    for column in columns:
        raw = pc.cast(column, pa.large_binary())
        lengths = pc.binary_length(raw).to_numpy(zero_copy_only=False).astype("<i8")
        offsets = np.arange(0, 8 * len(raw) + 1, 8, dtype=np.int64)
        parts += [
            pa.Array.from_buffers(pa.large_binary(), len(raw), [None, pa.py_buffer(offsets), pa.py_buffer(lengths)]),
            raw,
        ]
    joined = pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary()))
    if len(joined):
        _, offsets, data = joined.buffers()
        first, *_, last = np.frombuffer(offsets, dtype=np.int64, count=joined.offset + len(joined) + 1)[joined.offset :]
        digest.update(memoryview(data)[first:last])


def texts_digest(*texts: str, start: bytes = b"") -> bytes:
    """Return 16 bytes that tell these texts, in this order, from all others."""
    digest = new_digest(start)
    add_texts(digest, texts)
    return digest.digest()


def short_text_digest(text: str) -> int:
    """Return a text's 64-bit hash (xxh3 of its UTF-8 bytes), for tables whose hits are compared with the text."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def file_digest(path: str | Path) -> str:
    """Return 32 hexadecimal digits over the bytes of a file, read in blocks."""
    return add_file(new_digest(), path).hexdigest()


def add_file(digest: xxhash.xxh3_128, path: str | Path) -> xxhash.xxh3_128:
    """Feed the bytes of a file to a running digest, in blocks, and return it."""
    with open(path, "rb") as source:
        while block := source.read(_FILE_BLOCK):
            digest.update(block)
    return digest


def text_id(text: str, digits: int = 16) -> str:
    """Return up to 64 hexadecimal digits (SHA-256) for names of folders and for settings that are compared later."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def frame_id(frame: pd.DataFrame) -> str:
    """Return 16 hexadecimal digits (SHA-256) over the values of a frame as strings, in its order."""
    # The hash of a category is that of its value, so that a frame of categories needs no strings for its rows.
    strings = {
        name: column if isinstance(column.dtype, pd.CategoricalDtype) else column.astype(str)
        for name, column in frame.items()
    }
    hashed: Any = pd.util.hash_pandas_object(pd.DataFrame(strings), index=False).to_numpy()
    return hashlib.sha256(hashed.tobytes()).hexdigest()[:16]

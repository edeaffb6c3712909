"""The files of a dense index: read without trusting them, opened all together or not at all.

``vecs.f4`` (or ``vecs.f2``) holds the vectors row by row, ``docnos.npids`` FLEX's docno lookup; with ``pt_meta.json``
they are what pyterrier_dr opens. ``docnos.txt`` (a docno a line), ``docno_offsets.i8`` (where each line begins),
``docnos.hash`` (rows by hash), ``docno_ranks.u4`` (the place of each row's docno in docno order, which decides ties)
and ``shards.jsonl`` (what was indexed, shard by shard) are ours; a folder without them is read all the same, and what
they hold is computed. Vectors may go on behind the last one that counts: where documents are being appended, the
longer index shares the file (:mod:`pt_dance.index.writer`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pt_dance.corpus.docnos import DocnoColumn, DocnoRows
from pt_dance.index import joined
from pt_dance.index.documents import PassageDocuments, RowDocuments
from pt_dance.index.joined import DOCNOS, HASHES, NPIDS, OFFSETS, RANKS
from pt_dance.retriever.search.vectors import Vectors
from pt_dance.storage import meta as meta_files
from pt_dance.storage.meta import META

SHARDS = "shards.jsonl"
VECTORS = {"float32": "vecs.f4", "float16": "vecs.f2"}
FORMATS = {"float32": "flex", "float16": "flex_f16"}
_ENTRIES = {
    "vec_size": meta_files.whole_entry(1, 1 << 20),
    "doc_count": meta_files.whole_entry(1, 2**32 - 1),
    **dict.fromkeys(("content", "text_field", "sim_fn", "corpus"), meta_files.TEXT_OR_NONE),
    "passages": meta_files.FLAG_OR_NONE,
    "files": meta_files.entry_of(dict, "a list of sizes by name", missing=True),
    "encoder": meta_files.Entry(
        lambda known: isinstance(known, dict) and all(isinstance(v, (str, type(None))) for v in known.values()),
        "a description of an encoder",
        missing=True,
    ),
}


def row_bytes(vec_dtype: str, vec_size: int) -> int:
    """Return how many bytes a vector takes on disk."""
    return np.dtype(vec_dtype).itemsize * vec_size


def can_grow(meta: dict[str, Any]) -> bool:
    """Return whether the file of vectors may be longer than its metadata says, which says so twice."""
    size = meta["doc_count"] * row_bytes(meta["vec_dtype"], meta["vec_size"])
    return (meta.get("files") or {}).get(VECTORS[meta["vec_dtype"]]) == size


def read_meta(path: Path) -> dict[str, Any]:
    """Read and check an index's ``pt_meta.json``; ``vec_dtype`` is filled in.

    Raises:
        FileNotFoundError: If there is no index.
        ValueError: If the folder is no dense index or its files are not what the metadata says; names the file.
    """
    read = meta_files.read_meta(
        path,
        "dense index",
        type="dense_index",
        formats=(*FORMATS.values(), joined.FORMAT),
        entries=_ENTRIES,
        advice="make one with .index()",
    )
    is_joined = read["format"] == joined.FORMAT
    if not is_joined:
        read["vec_dtype"] = next(dtype for dtype, name in FORMATS.items() if name == read["format"])
    elif read.get("vec_dtype") not in VECTORS or not isinstance(read.get("shards"), list):
        raise ValueError(f"{path / META} is damaged: it does not say what its shards hold")
    _check_encoder(path / META, read.get("encoder"))
    count = read["doc_count"]
    vectors = VECTORS[read["vec_dtype"]]
    sizes: dict[str, Any] = {} if is_joined else {vectors: count * row_bytes(read["vec_dtype"], read["vec_size"])}
    if can_grow(read) and (path / vectors).is_file() and (path / vectors).stat().st_size > sizes[vectors]:
        sizes[vectors] = None
    for name, size in ((HASHES, 12 * count), (RANKS, 4 * count), (OFFSETS, 8 * (count + 1))):
        if (path / name).exists():
            sizes[name] = size
    # Only names of ours are looked at: metadata can point nowhere else.
    for name in (NPIDS, DOCNOS, OFFSETS, HASHES, RANKS, SHARDS):
        if name in (read.get("files") or {}):
            sizes.setdefault(name, read["files"][name])
    meta_files.check_sizes(path, {**sizes, NPIDS: sizes.get(NPIDS)}, "index", "index again")
    return read


def _check_encoder(meta_path: Path, encoder: dict[str, Any] | None) -> None:
    path = None if encoder is None else encoder.get("path")
    if path is None:
        return
    folder = meta_path.parent.resolve()
    try:
        inside = (folder / path).resolve().is_relative_to(folder.parent)
    except (ValueError, OSError):
        inside = False
    if os.path.isabs(path) or not inside:
        raise ValueError(
            f"{meta_path} says that its encoder is at {path[:80]!r}, outside the folder that holds the index: that is "
            "not followed; give the encoder"
        )


class OpenIndex:
    """A built index, opened: its metadata, vectors and docnos belong together.

    Attributes:
        meta: The checked metadata.
        vectors: (n, d), memory-mapped; of shards a :class:`pt_dance.index.joined.JoinedVectors`.
        docnos: Docnos by row.
        rows: Rows by docno.
        identity: Tells this content from any other, also from what is later built at the same path.
    """

    def __init__(self, path: Path) -> None:
        # An index may be replaced while it is opened: what was opened counts only if the metadata is still the same.
        for _ in range(8):
            before = _stamp(path)
            try:
                self._load(path)
            except (FileNotFoundError, ValueError):
                if before == _stamp(path):
                    raise
                continue
            if before == _stamp(path):
                return
        raise OSError(f"{path} is being replaced again and again by another process: it could not be opened")

    def _load(self, path: Path) -> None:
        self.path = path
        self.meta = meta = read_meta(path)
        count = meta["doc_count"]
        file = path / VECTORS[meta["vec_dtype"]]
        dtype = np.dtype(meta["vec_dtype"]).newbyteorder("<")
        # Mapped so that writing would stay in memory: torch takes no arrays that cannot be written.
        if meta["format"] == joined.FORMAT:
            self.vectors: Any = joined.open_shards(path, meta, OpenIndex)
        else:
            self.vectors = np.memmap(file, mode="c", dtype=dtype, shape=(count, meta["vec_size"]))
        self._lookup: Any = None
        if (path / DOCNOS).exists():
            lines: Any = np.memmap(path / DOCNOS, dtype=np.uint8, mode="r")
            self.docnos = DocnoColumn(lines, count, path / DOCNOS, _offsets(path, count))
        else:
            lines = "".join(f"{docno}\n" for docno in self.lookup).encode("utf-8", "surrogatepass")
            self.docnos = DocnoColumn(lines, count, path / NPIDS)
        if (path / HASHES).exists():
            self.rows = DocnoRows.open(path / HASHES, count, self.docnos.at)
        else:
            self.rows = DocnoRows.of(self.docnos, self.docnos.at)
        self._ranks: np.ndarray | None = None
        if (path / RANKS).exists():
            self._ranks = np.memmap(path / RANKS, dtype="<u4", mode="r", shape=(count,))
        self.identity: str = meta.get("content") or ":".join(map(str, _stamp(path) or ()))

    @cached_property
    def reader(self) -> Vectors:
        """Reads the vectors where they are on disk; one for all callers, so that it knows what they have mapped."""
        return Vectors(self.vectors)

    @property
    def ranks(self) -> np.ndarray:
        """The place of every row's docno in docno order, ``uint32``."""
        if self._ranks is None:
            self._ranks = self.docnos.ranks()
        return self._ranks

    @cached_property
    def documents(self) -> RowDocuments:
        """What documents are: rows, or whole documents where the index has passages."""
        if self.meta.get("passages"):
            return PassageDocuments(self.docnos, self.meta["doc_count"], self.path)
        return RowDocuments(self.docnos, self.rows, self.ranks)

    @property
    def lookup(self) -> Any:
        """FLEX's own docno lookup, an ``npids.Lookup``."""
        if self._lookup is None:
            import npids

            file = self.path / NPIDS
            try:
                lookup = npids.Lookup(file)
                count = len(lookup)
            except Exception as err:  # npids lets through whatever its parsing runs into
                raise ValueError(f"{file} is no docno lookup or damaged ({type(err).__name__}): index again") from err
            if count != self.meta["doc_count"]:
                raise ValueError(f"{file} holds {count:,} docnos where {self.meta['doc_count']:,} belong: index again")
            self._lookup = lookup
        return self._lookup


def _offsets(path: Path, count: int) -> np.ndarray | None:
    """Return where each docno begins, memory-mapped; None where the folder cannot hold it.

    An index of an earlier version gets the file when it is first opened.
    """
    if not (path / OFFSETS).exists():
        beside = path / f".{OFFSETS}.{os.getpid()}.{threading.get_ident()}"
        try:
            DocnoColumn.write_offsets(path / DOCNOS, count, beside)
            # A link does not replace what another process, or the index that took this one's place, has there.
            with contextlib.suppress(FileExistsError):
                os.link(beside, path / OFFSETS)
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()
    return np.memmap(path / OFFSETS, dtype="<i8", mode="r", shape=(count + 1,))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when another index takes the place of this one."""
    try:
        stat = (path / META).stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

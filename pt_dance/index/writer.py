"""Writes a dense index shard by shard, so that a killed process loses at most the shard it was at.

Everything happens in the folder beside the final one. A shard's vectors and docnos are appended and synced; then one
line in ``shards.jsonl`` says how many documents it has and a digest of what was read. Whatever lies behind the last
whole line does not count. A later call reads its documents again, compares shard by shard and goes on where the first
difference (or the end) is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from more_itertools import chunked

from pt_dance.corpus.docnos import docno_hashes, duplicate_error
from pt_dance.corpus.sorting import SeenNumbers
from pt_dance.index.files import FORMATS, SHARDS, VECTORS, OpenIndex, can_grow, row_bytes
from pt_dance.index.joined import DOCNOS, HASHES, NPIDS, OFFSETS, RANKS, write_lookups
from pt_dance.retriever.search.vectors import MAX_NORM
from pt_dance.storage.digests import add_file, new_digest
from pt_dance.storage.folders import remove_folder, write_json
from pt_dance.storage.meta import META
from pt_dance.storage.options import is_whole


@dataclass(frozen=True)
class Shard:
    """One line of ``shards.jsonl``: how many documents, the bytes of their docnos, a digest of what was read."""

    docs: int
    docno_bytes: int
    digest: str | None


def digest_of(docnos: Sequence[str], contents: Iterable[bytes]) -> str:
    """Return a digest of documents: their docnos and what was indexed of them."""
    digest = new_digest()
    for docno, content in zip(docnos, contents, strict=True):
        name = docno.encode("utf-8")
        digest.update(len(name).to_bytes(4, "little") + name + len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def read_journal(folder: Path) -> tuple[dict[str, Any], list[Shard]]:
    """Return the settings an index was begun with, empty if none can be read, and its shards up to a torn line."""
    try:
        first, *lines = (folder / SHARDS).read_bytes().split(b"\n")[:-1]
        settings = dict(json.loads(first)["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}, []
    shards = []
    for line in lines:
        try:
            shard = Shard(**json.loads(line))
        except (ValueError, TypeError):
            break
        if not (is_whole(shard.docs) and is_whole(shard.docno_bytes)):
            break
        shards.append(shard)
    return settings, shards


def check_vectors(vectors: Any, docnos: Sequence[str], vec_size: int, vec_dtype: str) -> np.ndarray:
    """Return the vectors of a shard, (n, d), as they are stored; ``vec_size`` is the index's d.

    Raises:
        ValueError: If there are other than n vectors, or if one has another size, is not finite, too long, or does not
            fit ``vec_dtype``; names the docno.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) != len(docnos) or vectors.dtype.kind not in "fiu":
        raise ValueError(
            f"the encoder gave {vectors.dtype} vectors of shape {vectors.shape} for {len(docnos)} documents, from "
            f"{docnos[0]!r} on"
        )
    if vectors.shape[1] != vec_size:
        raise ValueError(
            f"document {docnos[0]!r} has a vector of {vectors.shape[1]} numbers where the index has {vec_size}"
        )
    vectors = vectors.astype(np.float32, copy=False)
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise ValueError(
            f"document {docnos[int(bad.argmax())]!r} has NaN or infinity in its vector: look at its text and at "
            "the encoder's weights"
        )
    bad = np.linalg.norm(vectors.astype(np.float64), axis=1) > MAX_NORM
    if vec_dtype == "float16" and not bad.any():
        with np.errstate(over="ignore"):
            vectors = vectors.astype(np.float16)
        bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise ValueError(
            f"document {docnos[int(bad.argmax())]!r} has numbers in its vector that are too large for {vec_dtype}"
        )
    return np.ascontiguousarray(vectors, dtype=np.dtype(vec_dtype).newbyteorder("<"))


class IndexWriter:
    """The files of an index under construction.

    Args:
        folder: Folder to write in; exists and is locked.
        settings: What decides which vectors a document gets; work done under other settings is thrown away.
        vec_size: Numbers in a vector.
        vec_dtype: "float32" or "float16".
        base: For appending: the index that the new documents are added to.

    Attributes:
        recorded: Shards found on disk that the caller has not confirmed with :meth:`keep` yet.
        shards: Those that are in the index so far.
        count: How many documents they have.
        settings: What the journal says that it was begun with.
        fresh: Whether work was thrown away: done under other settings, or with a journal that cannot be read.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], vec_size: int, vec_dtype: str, base: OpenIndex | None = None
    ):
        self.folder, self.vec_dtype, self.vec_size = folder, vec_dtype, vec_size
        self.settings = {
            **settings,
            "vec_size": vec_size,
            "vec_dtype": vec_dtype,
            "base": None if base is None else base.identity,
        }
        self._vectors_path = folder / VECTORS[vec_dtype]
        self._row_bytes = row_bytes(vec_dtype, vec_size)
        self._seen = SeenNumbers(folder)
        self.count = 0
        self._docno_bytes = 0
        self.shards: list[Shard] = []
        (folder / META).unlink(missing_ok=True)
        found = self._read_journal()
        if base is not None and sum(shard.docs for shard in found or []) < base.meta["doc_count"]:
            found = None  # killed while the journal was begun
        self.fresh = found is None and any(folder.iterdir())
        if found is None:
            self._start(base)
            found = self._read_journal()
        self.recorded: list[Shard] = list(found or [])
        if base is not None:
            while self.count < base.meta["doc_count"]:
                self._take(self.recorded.pop(0))
            for block in chunked(base.docnos, 1 << 16):
                self._seen.add(docno_hashes(block))
        # Vectors, docnos and journal, once they are open.
        self._files: tuple[BinaryIO, BinaryIO, BinaryIO] | None = None

    def _read_journal(self) -> list[Shard] | None:
        """Return the whole shards on disk that belong to these settings; None if there is nothing to go on with."""
        settings, shards = read_journal(self.folder)
        vectors, docnos = self._vectors_path, self.folder / DOCNOS
        if settings != self.settings or not (vectors.exists() and docnos.exists()):
            return None
        rows, docno_bytes = vectors.stat().st_size // self._row_bytes, docnos.stat().st_size
        whole: list[Shard] = []
        for shard in shards:
            rows, docno_bytes = rows - shard.docs, docno_bytes - shard.docno_bytes
            if min(rows, docno_bytes) < 0:
                break
            whole.append(shard)
        return whole

    def _start(self, base: OpenIndex | None) -> None:
        for name in os.listdir(self.folder):
            path = self.folder / name
            remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shards = []
        if base is None:
            self._vectors_path.touch()
            (self.folder / DOCNOS).touch()
        else:
            _share_vectors(base, self._vectors_path)
            with open(self.folder / DOCNOS, "wb") as out:
                for docno in base.docnos:
                    out.write(docno.encode("utf-8") + b"\n")
            shards = recorded_shards(base, (self.folder / DOCNOS).stat().st_size)
        # The journal comes last: without it, nothing of the above counts.
        with open(self.folder / SHARDS, "wb") as out:
            for entry in ({"settings": self.settings}, *map(asdict, shards)):
                out.write(json.dumps(entry).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    def _take(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.count += shard.docs
        self._docno_bytes += shard.docno_bytes

    def keep(self, docnos: Sequence[str]) -> None:
        """Confirm the next recorded shard: its documents are still the same."""
        self._take(self.recorded.pop(0))
        self._seen.add(docno_hashes(docnos))

    def check_docnos(self, docnos: Sequence[str]) -> None:
        """Raise a ``ValueError`` if one of the next shard's docnos occurs twice, there or in an earlier shard."""
        own: set[str] = set()
        for docno in (docnos[place] for place in self._seen.add(docno_hashes(docnos))):
            if docnos.count(docno) > 1 or docno in own or self._contains(docno):
                raise duplicate_error(docno)
            own.add(docno)

    def _contains(self, docno: str) -> bool:
        line = docno.encode("utf-8") + b"\n"
        with open(self.folder / DOCNOS, "rb") as lines:
            return any(line == other for other, _ in zip(lines, range(self.count), strict=False))

    def add(self, docnos: Sequence[str], vectors: np.ndarray, digest: str) -> None:
        """Append a shard that :meth:`check_docnos` and :func:`check_vectors` have seen; then it survives a crash."""
        lines = "".join(f"{docno}\n" for docno in docnos).encode("utf-8")
        shard = Shard(len(docnos), len(lines), digest)
        contents = (vectors.tobytes(), lines, json.dumps(asdict(shard)).encode() + b"\n")
        for file, content in zip(self._open(), contents, strict=True):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._take(shard)

    def _open(self) -> tuple[BinaryIO, BinaryIO, BinaryIO]:
        """Return the open files of vectors, docnos and journal, at first cut off behind the confirmed shards."""
        if self._files is not None:
            return self._files
        entries = ({"settings": self.settings}, *map(asdict, self.shards))
        journal = sum(len(json.dumps(entry).encode()) + 1 for entry in entries)
        sizes = {
            self._vectors_path: self.count * self._row_bytes,
            self.folder / DOCNOS: self._docno_bytes,
            self.folder / SHARDS: journal,
        }
        files: list[BinaryIO] = []
        # The journal is cut first: it must never promise more than the other files hold.
        for path, size in reversed(sizes.items()):
            file = open(path, "r+b")  # noqa: SIM115 (stays open until close())
            files.append(file)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
            file.seek(size)
        journal_file, docnos_file, vectors_file = files
        self._files = (vectors_file, docnos_file, journal_file)
        return self._files

    def close(self) -> None:
        """Close the files; what was added stays."""
        for file in self._files or ():
            file.close()
        self._files = None

    def finish(self, meta: dict[str, Any]) -> None:
        """Write what is made from all documents, the metadata last, with entries that the writer does not know."""
        self._open()
        self.close()
        write_lookups(self.folder, self._seen.all())
        digest = add_file(add_file(new_digest(), self._vectors_path), self.folder / DOCNOS)
        names = (self._vectors_path.name, NPIDS, DOCNOS, OFFSETS, HASHES, RANKS, SHARDS)
        write_json(
            self.folder / META,
            {
                "type": "dense_index",
                "format": FORMATS[self.vec_dtype],
                "package_hint": "pt_dance",
                "vec_size": self.vec_size,
                "doc_count": self.count,
                "content": digest.hexdigest(),
                **meta,
                "files": {name: (self.folder / name).stat().st_size for name in names},
            },
        )


def _share_vectors(base: OpenIndex, target: Path) -> None:
    """Give the file of an index's vectors a second name, or copy it where that cannot be.

    The file is only ever added to: what is behind an index's vectors does not count in it, and the next call that
    appends cuts it off.
    """
    source = base.path / VECTORS[base.meta["vec_dtype"]]
    if can_grow(base.meta):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def recorded_shards(base: OpenIndex, docno_bytes: int) -> list[Shard]:
    """Return the shards that an index was made of; one without digest if it was not made here.

    Args:
        base: The index.
        docno_bytes: The bytes of its docnos, a line each.
    """
    shards = read_journal(base.path)[1]
    if (sum(s.docs for s in shards), sum(s.docno_bytes for s in shards)) == (base.meta["doc_count"], docno_bytes):
        return shards
    return [Shard(base.meta["doc_count"], docno_bytes, None)]

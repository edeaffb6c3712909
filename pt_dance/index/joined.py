"""Indexes in ``shards/00000``, ``shards/00001``, … of a folder, joined to one without writing their vectors again.

What is found by docno, and the order that decides ties, is made anew for all of them and lies in the folder itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from more_itertools import chunked

from pt_dance.corpus.docnos import DocnoColumn, DocnoRows, docno_hashes, duplicate_error, write_npids
from pt_dance.corpus.sorting import SeenNumbers, mapped_file
from pt_dance.storage.digests import new_digest
from pt_dance.storage.folders import lock_folder, sync_folder, write_json
from pt_dance.storage.meta import META

NPIDS = "docnos.npids"
DOCNOS = "docnos.txt"
HASHES = "docnos.hash"
RANKS = "docno_ranks.u4"
OFFSETS = "docno_offsets.i8"
FOLDER = "shards"
NAME = "{:05}"
FORMAT = "flex_shards"
_SAME = ("vec_size", "vec_dtype", "sim_fn", "text_field", "passages")
_BLOCK = 1 << 16


class JoinedVectors:
    """Rows of several memory-mapped arrays, one after the other; reading some rows gives an array of them.

    Args:
        parts: ``float32`` or ``float16`` (n_i, d) each.
    """

    ndim = 2

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        sizes = [len(part) for part in parts]
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self.dtype = parts[0].dtype
        self.shape = (int(self._ends[-1]), parts[0].shape[1])
        self.nbytes = self.dtype.itemsize * self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def view(self, _: Any = None) -> JoinedVectors:
        """Return these vectors, as plain as they are."""
        return self

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            first, end, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(first, end, step)]
            pieces = self._pieces(first, max(first, end)) or [np.empty((0, self.shape[1]), dtype=self.dtype)]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        rows = np.asarray(rows)
        if rows.dtype.kind not in "iu":
            raise IndexError(f"rows are whole numbers, not {rows.dtype}")
        flat = np.where(rows < 0, rows + len(self), rows).reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"rows are 0 to {len(self) - 1}")
        found = np.empty((len(flat), self.shape[1]), dtype=self.dtype)
        number = np.searchsorted(self._ends, flat, side="right")
        for part in np.unique(number):
            here = number == part
            found[here] = self.parts[part][flat[here] - self._starts[part]]
        return found.reshape(*rows.shape, self.shape[1])

    def _pieces(self, first: int, end: int) -> list[np.ndarray]:
        low, high = np.searchsorted(self._ends, (first, end - 1), side="right")
        starts = self._starts[low : high + 1].tolist()
        return [self.parts[n].view(np.ndarray)[max(first - s, 0) : end - s] for n, s in enumerate(starts, low)]

    def part(self, first: int, end: int) -> JoinedVectors:
        """Return some rows without reading them; at least one."""
        return JoinedVectors(self._pieces(first, end))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def astype(self, dtype: Any) -> np.ndarray:
        """Return all vectors, in memory."""
        return self[:].astype(dtype)

    def __getstate__(self) -> list[tuple[str, str, tuple[int, ...]]]:
        # Other processes map the files, too.
        return [(str(part.filename), part.dtype.str, part.shape) for part in self.parts]  # type: ignore[attr-defined]

    def __setstate__(self, state: list[tuple[str, str, tuple[int, ...]]]) -> None:
        self.__init__([np.memmap(name, dtype, "c", shape=shape) for name, dtype, shape in state])  # type: ignore[misc]


def shard_folders(path: Path) -> list[Path]:
    """Return the folders of an index's shards in order.

    Raises:
        FileNotFoundError: If there are none, or one is missing in between.
    """
    there = sorted(folder.name for folder in (path / FOLDER).glob("[0-9]" * 5) if folder.is_dir())
    if not there or there != [NAME.format(number) for number in range(len(there))]:
        raise FileNotFoundError(
            f"{path / FOLDER} must hold indexes named {NAME.format(0)}, {NAME.format(1)} and so on, and holds "
            f"{', '.join(there) or 'none'}: make each with DenseIndex(folder, encoder).index(documents)"
        )
    return [path / FOLDER / name for name in there]


def open_shards(path: Path, meta: dict[str, Any], opened: Callable[[Path], Any]) -> JoinedVectors:
    """Open the vectors of a joined index.

    Args:
        path: Its folder.
        meta: Its metadata.
        opened: Opens an index.

    Raises:
        ValueError: If a shard is damaged, or another one than when they were joined.
    """
    parts = []
    for folder, known in zip(shard_folders(path), meta["shards"], strict=False):
        shard = opened(folder)
        if _content(shard) != known or shard.meta["vec_size"] != meta["vec_size"]:
            raise ValueError(f"{folder} is another index than the one that was joined: call join() again")
        parts.append(shard.vectors)
    if sum(map(len, parts)) != meta["doc_count"] or len(parts) != len(meta["shards"]):
        raise ValueError(f"{path / FOLDER} holds other shards than those that were joined: call join() again")
    return JoinedVectors(parts)


def _content(shard: Any) -> dict[str, Any]:
    return {"docs": shard.meta["doc_count"], "content": shard.meta.get("content")}


def join(path: Path, opened: Callable[[Path], Any]) -> None:
    """Join the indexes in the shards of a folder, opened by ``opened``; see :meth:`pt_dance.DenseIndex.join`."""
    folders = shard_folders(path)
    with lock_folder(path, f"another process is joining the shards of {path}: wait for it"):
        shards = [opened(folder) for folder in folders]
        first = shards[0].meta
        for folder, shard in zip(folders, shards, strict=True):
            _check_same(folder, shard.meta, folders[0], first)
        (path / META).unlink(missing_ok=True)
        seen, suspects = SeenNumbers(path), dict[int, str]()
        with open(path / DOCNOS, "wb") as out:
            for block in chunked(chain.from_iterable(shard.docnos for shard in shards), _BLOCK):
                start = len(seen)
                suspects |= {start + place: block[place] for place in seen.add(docno_hashes(block))[:_BLOCK]}
                out.write("".join(f"{docno}\n" for docno in block).encode("utf-8"))
        docnos = write_lookups(path, seen.all())
        first_rows = DocnoRows.open(path / HASHES, len(seen), docnos.at)(list(suspects.values()))
        for (row, docno), first_row in zip(suspects.items(), first_rows, strict=True):
            if row != first_row:
                raise duplicate_error(docno)
        known = [_content(shard) for shard in shards]
        sync_folder(path)
        encoder = {**first["encoder"], "path": None} if first.get("encoder") else None
        write_json(
            path / META,
            {
                "type": "dense_index",
                "format": FORMAT,
                "package_hint": "pt_dance",
                "doc_count": len(seen),
                "content": new_digest(repr(known).encode()).hexdigest(),
                **{name: first[name] for name in _SAME if name in first},
                "corpus": None,
                "encoder": encoder,
                "shards": known,
                "files": {name: (path / name).stat().st_size for name in (NPIDS, DOCNOS, OFFSETS, HASHES, RANKS)},
            },
        )


def write_lookups(folder: Path, hashes: np.ndarray) -> DocnoColumn:
    """Write all that finds or orders the docnos in :data:`DOCNOS`, of which these are the hashes; return the docnos."""
    lines, count = folder / DOCNOS, len(hashes)
    offsets = DocnoColumn.write_offsets(lines, count, folder / OFFSETS)
    docnos = DocnoColumn(np.memmap(lines, dtype=np.uint8, mode="r"), count, lines, offsets)
    DocnoRows.write(folder / HASHES, hashes)
    with open(folder / RANKS, "w+b") as file:
        ranks = mapped_file(file, "<u4", count)
        docnos.ranks(ranks, folder)
        ranks.flush()
    (folder / NPIDS).unlink(missing_ok=True)
    write_npids(folder / NPIDS, iter(docnos))
    return docnos


def _check_same(folder: Path, meta: dict[str, Any], first_folder: Path, first: dict[str, Any]) -> None:
    if meta["format"] == FORMAT:
        raise ValueError(f"{folder} is itself joined from shards: only whole indexes can be joined")
    for name in _SAME:
        if meta.get(name) != first.get(name):
            raise ValueError(
                f"{folder} has {name} {meta.get(name)!r} where {first_folder} has {first.get(name)!r}: only indexes of "
                "the same kind can be joined"
            )
    mine, theirs = ((one.get("encoder") or {}).get("fingerprint") for one in (meta, first))
    if mine != theirs:
        raise ValueError(f"{folder} was made with other weights than {first_folder}: index its documents again")

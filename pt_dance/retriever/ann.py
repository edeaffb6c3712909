"""Approximate retrieval with FAISS over an index's vectors, re-scored exactly, with its recall told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.corpus.quiet import quiet
from pt_dance.retriever.dense import DenseRetriever
from pt_dance.retriever.opened import SearchableIndex
from pt_dance.retriever.search.arrays import best_first
from pt_dance.retriever.search.vectors import Vectors
from pt_dance.storage import options
from pt_dance.storage.attributes import Fixed, Live
from pt_dance.storage.digests import file_digest, short_text_digest
from pt_dance.storage.folders import read_json, remove_folder, write_json
from pt_dance.storage.meta import META
from pt_dance.storage.progress import progress_bar
from pt_dance.storage.writing import in_turn, new_folder

# Options that decide what is built, with their defaults, and options of the search.
BUILD_OPTIONS: dict[str, dict[str, int | None]] = {
    "hnsw": {"neighbours": 32, "ef_construction": 80},
    "ivfpq": {"lists": None, "subvectors": None},
}
SEARCH_OPTIONS: dict[str, dict[str, int]] = {"hnsw": {"ef_search": 128}, "ivfpq": {"probes": 32}}
_FOLDER, _FILE, _LISTS = "ann", "index.faiss", "lists.ivfdata"
_QUERY_BLOCK = 512
_ADD_BLOCK = 1 << 14
# A codebook of product quantization has 256 entries; FAISS asks for 39 training vectors for each centre.
_LEAST_FOR_IVFPQ = 256
_PER_CENTRE = 39
# Rows of an ivfpq that are filled in memory at a time; with more, its lists are merged on disk and stay there.
_ROWS_IN_MEMORY = 1 << 22
# Beyond so many lists a graph over their centres finds a vector's list quicker than comparing with all of them.
_MOST_FLAT_LISTS = 8192


def _no_engine(_: str, value: Any) -> None:
    if value is not None:
        raise ValueError("FAISS searches in this process: AnnRetriever takes no engine, DenseRetriever does")


class AnnRetriever(DenseRetriever):
    """Retrieve approximately: FAISS finds candidates, which are re-scored exactly.

    The scores are those of :class:`pt_dance.DenseRetriever`; only documents may be missing. :meth:`recall`
    tells how many. Result frames are re-scored as there, without FAISS. The structure is built once for an index and
    its build options, and kept in the index's folder.

    Args:
        index: Where the vectors are.
        method: "hnsw" (a graph; quick, large) or "ivfpq" (lists and product quantization; small).
        candidates: How many documents FAISS finds for a query; ``num_results`` by default, and at least that. Of an
            index of passages, as many as so many documents have on average.
        threads: Threads that build; with more than one, two builds of "hnsw" differ.
        build_options: hnsw: ``neighbours`` (32), ``ef_construction`` (80). ivfpq: ``lists`` (about 4 times the root of
            the number of documents), ``subvectors`` (a code of one byte each; a quarter of the dimensions or so).
        search_options: hnsw: ``ef_search`` (128). ivfpq: ``probes`` (32).
        **other: As for :class:`pt_dance.DenseRetriever`.

    Raises:
        ValueError: If there is no such method or option, or it is out of range.
    """

    schematic = {"label": "AnnRetriever", "help_url": None}
    method, build_options, search_options = (Fixed() for _ in range(3))
    threads, engine = Live(options.whole), Live(_no_engine)

    def __init__(
        self,
        index: SearchableIndex,
        method: str = "hnsw",
        *,
        candidates: int | None = None,
        threads: int = 1,
        build_options: dict[str, int | None] | None = None,
        search_options: dict[str, int] | None = None,
        **other: Any,
    ) -> None:
        super().__init__(index, **other)
        self.method = options.choice("method", method, tuple(BUILD_OPTIONS))
        self.threads = threads
        self.build_options = _checked(method, BUILD_OPTIONS[method], build_options)
        self.search_options = _checked(method, SEARCH_OPTIONS[method], search_options)
        self.candidates = candidates
        self._loaded: tuple[str, Any] | None = None

    @property
    def candidates(self) -> int:
        """How many documents FAISS finds for a query, at least ``num_results``."""
        return max(self._candidates or 0, self.num_results)

    @candidates.setter
    def candidates(self, value: int | None) -> None:
        self._candidates = options.whole("candidates", value, or_none=True)

    def build(self) -> AnnRetriever:
        """Build what FAISS searches, if the index's folder does not hold it yet; threads wait for each other.

        Raises:
            ValueError: If there are too few documents for the method, or the options do not fit the vectors.
            OSError: If the disk is full or cannot be written to.
        """
        folder = self._folder()
        with in_turn(folder):
            if self._is_there(folder):
                return self
            with new_folder(folder, "the approximate index") as building:
                if not self._is_there(folder):  # else another process was quicker
                    self._write(building)
                    # Damaged, or of other vectors.
                    remove_folder(folder)
        return self

    def recall(self, queries: pd.DataFrame, k: int = 10) -> float:
        """Return which share of the exact best ``k`` documents of the queries is found, as a mean over queries.

        Args:
            queries: Queries (``qid``, and ``query`` or ``query_vec``).
            k: How many of the best, at most ``num_results``.

        Raises:
            ValueError: If ``k`` is out of range or there are no queries.
        """
        if not 1 <= k <= self.num_results or not len(queries):
            raise ValueError(f"recall needs queries and a k from 1 to num_results ({self.num_results}), not k={k!r}")
        pt.validate.query_frame(queries, context=self)
        vectors = self._query_vectors(queries)
        blocks = self.index.open().documents.iter_search(self.index, vectors, k)
        exact = np.concatenate([found for _, _, found in blocks])
        shares = []
        for start, _, rows in self._search(vectors):
            found = rows[:, :k]
            shares += [np.isin(exact[start + i], found[i]).mean() for i in range(len(found))]
        return float(np.mean(shares))

    def _search(self, vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        ann, ranks, documents = self._ann(), self.index.open().ranks, self.index.open().documents
        count = min(self.candidates * documents.rows_each, len(self.index))
        for start in range(0, len(vectors), _QUERY_BLOCK):
            block = np.ascontiguousarray(vectors[start : start + _QUERY_BLOCK])
            rows = ann.search(block, count, params=self._parameters(count))[1]
            if rows.max(initial=-1) >= len(self.index):
                raise ValueError(f"{self._folder() / _LISTS} is damaged: remove {self._folder()}, it is built again")
            scores = np.full(rows.shape, -np.inf, dtype=np.float32)
            query, slot = np.nonzero(rows >= 0)
            scores[query, slot] = self.index.score_pairs(block, query, rows[query, slot])
            order = best_first(scores, ranks[rows])
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
            yield start, *documents.best(scores, rows, self.num_results)

    def _parameters(self, count: int) -> Any:
        import faiss

        if self.method == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.search_options["ef_search"], count))
        return faiss.SearchParametersIVF(nprobe=self.search_options["probes"])

    def _folder(self) -> Path:
        key = short_text_digest(repr(sorted(self.build_options.items())))
        return Path(self.index.index_path) / _FOLDER / f"{self.method}-{key:016x}"

    def _is_there(self, folder: Path) -> bool:
        """Return whether the folder holds what was built from the index's vectors, whole."""
        try:
            meta = read_json(folder / META)
            size = (folder / _FILE).stat().st_size
            lists = (folder / _LISTS).stat().st_size if self._on_disk() else None
        except (OSError, ValueError):
            return False
        return (meta.get("of"), meta.get("size"), meta.get("lists")) == (self.index.open().identity, size, lists)

    def _ann(self) -> Any:
        import faiss

        identity = self.index.open().identity
        if self._loaded is None or self._loaded[0] != identity:
            self.build()
            file = self._folder() / _FILE
            # FAISS trusts what it reads: only the bytes that were written here reach it.
            if file_digest(file) != read_json(file.with_name(META)).get("digest"):
                raise ValueError(f"{file} is not what was written there: remove {file.parent}, it is built again")
            flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR if self._on_disk() else 0
            with quiet():  # FAISS says where the lists are
                ann = faiss.read_index(str(file), flags)
            if (ann.ntotal, ann.d) != self.index.open().vectors.shape:
                raise ValueError(f"{file} is of other vectors: remove {file.parent}, it is built again")
            self._loaded = identity, ann
        return self._loaded[1]

    def _write(self, folder: Path) -> None:
        import faiss

        vectors = self.index.open().reader
        count, dimension = vectors.shape
        with _threads(self.threads):
            ann = self._empty(count, dimension)
            if not ann.is_trained:
                wanted = _PER_CENTRE * max(_LEAST_FOR_IVFPQ, self._lists(count))
                # A row of each of as many equal stretches: no array is as long as the collection.
                at = np.arange(min(wanted, count)) + np.random.default_rng(0).random(min(wanted, count))
                chosen = np.minimum((at * (count / len(at))).astype(np.int64), count - 1)
                _train(ann, vectors.rows(chosen))
            with progress_bar(self.verbose, repr(self), count) as bar:
                if self._on_disk():
                    self._merge(folder, ann, vectors, bar)
                else:
                    ann = _filled(ann, vectors, 0, count, bar)
        faiss.write_index(ann, str(folder / _FILE))
        meta = {
            "type": "ann_index",
            "format": f"faiss_{self.method}",
            "package_hint": "pt_dance",
            "options": self.build_options,
            "of": self.index.open().identity,
            "size": (folder / _FILE).stat().st_size,
            "digest": file_digest(folder / _FILE),
        }
        if self._on_disk():
            meta["lists"] = (folder / _LISTS).stat().st_size
        write_json(folder / META, meta)

    def _on_disk(self) -> bool:
        """Return whether the lists stay on disk, where FAISS maps them."""
        return self.method == "ivfpq" and len(self.index) > _ROWS_IN_MEMORY

    def _merge(self, folder: Path, ann: Any, vectors: Vectors, bar: Any) -> None:
        """Fill a trained, empty ``ann`` part by part and merge the parts' lists in a file, in memory for one part."""
        import faiss
        from faiss.contrib.ondisk import merge_ondisk

        parts: list[Path] = []
        for start in range(0, len(vectors), _ROWS_IN_MEMORY):
            part = _filled(faiss.clone_index(ann), vectors, start, min(start + _ROWS_IN_MEMORY, len(vectors)), bar)
            parts.append(folder / f"part-{len(parts):05}.faiss")
            faiss.write_index(part, str(parts[-1]))
            del part
        with quiet():
            merge_ondisk(ann, [str(part) for part in parts], str(folder / _LISTS))
        for part in parts:
            part.unlink()

    def _lists(self, count: int) -> int:
        return self.build_options.get("lists") or max(1, min(int(4 * count**0.5), count // _PER_CENTRE))

    def _empty(self, count: int, dimension: int) -> Any:
        import faiss

        if self.method == "hnsw":
            # Half precision is enough to find candidates.
            kind = faiss.ScalarQuantizer.QT_fp16
            ann = faiss.IndexHNSWSQ(dimension, kind, self.build_options["neighbours"], faiss.METRIC_INNER_PRODUCT)
            ann.hnsw.efConstruction = self.build_options["ef_construction"]
            return ann
        lists = self._lists(count)
        if count < max(_LEAST_FOR_IVFPQ, lists):
            raise ValueError(
                f"ivfpq needs at least {max(_LEAST_FOR_IVFPQ, lists)} documents and the index {self.index.index_path} "
                f"has {count}: use the exact retriever, or hnsw"
            )
        parts = self.build_options["subvectors"] or max(m for m in range(1, dimension // 4 + 2) if dimension % m == 0)
        if dimension % parts:
            raise ValueError(f"subvectors must divide the vectors' {dimension} numbers, and {parts} does not")
        centres = "_HNSW32" if lists > _MOST_FLAT_LISTS else ""
        ann = faiss.index_factory(dimension, f"IVF{lists}{centres},PQ{parts}", faiss.METRIC_INNER_PRODUCT)
        ann.cp.seed = 0
        # Arranging the codes for comparisons by Hamming distance, which no search here makes, takes most of the time.
        ann.do_polysemous_training = False
        return ann

    def fuse_rank_cutoff(self, k: int) -> AnnRetriever | None:
        """Return a retriever that stops at ``k`` itself; it looks at as many candidates, so it finds the same."""
        fused = super().fuse_rank_cutoff(k)
        if fused is not None:
            fused.candidates = self.candidates
        return fused

    def _key(self) -> tuple[Any, ...]:
        chosen = tuple(sorted({**self.build_options, **self.search_options}.items()))
        return (*super()._key(), self.method, self.candidates, chosen)

    __hash__ = DenseRetriever.__hash__

    def __repr__(self) -> str:
        return f"AnnRetriever({str(self.index.index_path)!r}, {self.num_results}, {self.method!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}


def _train(ann: Any, vectors: np.ndarray) -> None:
    """Train what FAISS searches; the search for centres, which takes most of the time, is the GPUs' where there are."""
    import faiss

    if faiss.get_num_gpus():
        centres = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(ann.d, ann.quantizer.metric_type))
        ann.clustering_index = centres
    ann.train(vectors)
    ann.clustering_index = None


def _filled(ann: Any, vectors: Vectors, start: int, end: int, bar: Any) -> Any:
    """Return what FAISS searches with rows of an index added under their numbers, by a GPU where one can."""
    import faiss

    on_gpu = _on_gpu(ann)
    filling = ann if on_gpu is None else on_gpu
    for first in range(start, end, _ADD_BLOCK):
        last = min(first + _ADD_BLOCK, end)
        block = np.ascontiguousarray(vectors.block(first, last))
        if start:
            filling.add_with_ids(block, np.arange(first, last))
        else:
            filling.add(block)
        bar.update(len(block))
    return ann if on_gpu is None else faiss.index_gpu_to_cpu(on_gpu)


def _on_gpu(ann: Any) -> Any:
    """Return a copy of an empty "ivfpq" on the first GPU; None where there is none or FAISS has no such index on it."""
    import faiss

    if not faiss.get_num_gpus() or not isinstance(ann, faiss.IndexIVFPQ):
        return None
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True  # of the tables that a search looks distances up in: only so do those of long codes fit
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, ann, options)
    except RuntimeError:  # a graph over the centres, or codes of a length that no GPU's kernel was made for
        return None


def _checked(method: str, known: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """Return options with defaults filled in."""
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        raise ValueError(f"{method} has no option {unknown[0]!r}: it has {', '.join(known)}")
    return {
        name: options.whole(name, value, or_none=known[name] is None)
        for name, value in {**known, **(given or {})}.items()
    }


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)

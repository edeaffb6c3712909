"""DenseRetriever: retrieves for queries, re-scores results, from stored vectors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.retriever.opened import SearchableIndex, check_index
from pt_dance.retriever.search.ranges import EngineSearch
from pt_dance.retriever.search.vectors import MAX_NORM
from pt_dance.storage import options
from pt_dance.storage.attributes import Live
from pt_dance.storage.engine import check_engine
from pt_dance.storage.queries import users_queries
from pt_dance.storage.texts import checked_texts

# Queries that are encoded and searched together: more would grow the memory, not the speed.
_QUERY_CHUNK = 4096
_REPLACED = ("docno", "docid", "score", "rank")


Retriever = TypeVar("Retriever", bound="DenseRetriever")


class DenseRetriever(pt.Transformer):
    """Retrieve from a :class:`pt_dance.DenseIndex`, exactly, and re-score other systems' results.

    Given queries, it returns the best documents of the whole index. Given results (a frame with ``docno``), it keeps
    every row and gives it the score that the first way would give it: no text is needed. (An encoder rounds a query
    differently among others: the scores of a query alone and among others agree to 1e-6.) Equal scores are ordered by
    docno. Where a rewriter changed the query, the user's own words are encoded: the last of PyTerrier's
    columns ``query_0``, ``query_1``, ... Of an index of passages the documents are the whole ones, each with the score
    of its best passage (MaxP).

    Args:
        index: Where the vectors are.
        encoder: Encodes queries; the index's own by default.
        num_results: Documents a query gets.
        batch_size: Documents that are multiplied with a block of queries at a time; the results are the same for any.
        drop_query_vec: True leaves the column ``query_vec`` out of the output, False puts it there, also where the
            retriever encodes the queries itself. By default a ``query_vec`` that came in stays, and no other is added.
        rescore_cutoff: Results kept for a query when re-scoring; all by default. ``% k`` sets it when a pipeline is
            compiled.
        engine: A :class:`pt_dance.engines.Ray`, each of whose workers searches a range of the rows; None searches in
            this process. The results are the same. Re-scoring is done in this process.
        verbose: Whether to show a progress bar.

    Raises:
        TypeError: If ``index`` is no dense index, or ``engine`` no engine.
        ValueError: If ``num_results`` or ``rescore_cutoff`` is no whole number of at least 1.
    """

    schematic = {"label": "DenseRetriever", "help_url": None}
    index, engine = Live(lambda _, value: check_index(value)), Live(lambda _, value: check_engine(value))
    num_results = Live(options.whole)
    batch_size, rescore_cutoff = (Live(partial(options.whole, or_none=True)) for _ in range(2))

    def __init__(
        self,
        index: SearchableIndex,
        *,
        encoder: Any = None,
        num_results: int = 1000,
        batch_size: int | None = None,
        drop_query_vec: bool | None = None,
        rescore_cutoff: int | None = None,
        engine: Any = None,
        verbose: bool = False,
    ) -> None:
        self.index = index
        self.encoder = encoder
        self.num_results = num_results
        self.batch_size = batch_size
        self.drop_query_vec = drop_query_vec
        self.rescore_cutoff = rescore_cutoff
        self.engine = engine
        self._by_engine: EngineSearch | None = None
        self.verbose = verbose

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve or re-score.

        Args:
            inp: Queries (``qid``, and ``query`` or ``query_vec``), or results (``docno`` too). A ``docid`` column is
                not looked at: it may be another index's.

        Returns:
            For queries: all their columns with ``docno``, ``score`` and ``rank`` (from 0), a query's rows together,
            best first. For results: the same rows in the same order with all their columns, ``score`` and ``rank`` new,
            ``docid`` gone.

        Raises:
            KeyError: Naming a docno that is not in the index, or missing columns.
            TypeError: If a query is no string; names the qid.
            ValueError: If the encoder's weights are not those the index was made with, there is no encoder, or a query
                vector has the wrong size or is not finite; names the qid.
        """
        with pt.validate.any(inp, context=self) as v:
            v.result_frame(extra_columns=["query_vec"], mode="rescore")
            v.result_frame(extra_columns=["query"], mode="rescore")
            v.query_frame(extra_columns=["query_vec"], mode="retrieve")
            v.query_frame(extra_columns=["query"], mode="retrieve")
        if v.mode == "rescore":
            return self._rescore(inp)
        # In one piece rather than from blocks, which would be in memory twice when they are put together.
        return next(self._retrieve(inp, len(inp)))

    def iter_blocks(self, inp: pd.DataFrame) -> Iterator[pd.DataFrame]:
        """Retrieve for queries block by block, in bounded memory: the rows of :meth:`transform`, cut into pieces.

        Args:
            inp: Queries (``qid``, and ``query`` or ``query_vec``).

        Yields:
            Result frames of some hundred queries each; at least one, even for no queries.
        """
        with pt.validate.any(inp, context=self) as v:
            v.query_frame(extra_columns=["query_vec"])
            v.query_frame(extra_columns=["query"])
        yield from self._retrieve(inp, 1)

    def _retrieve(self, inp: pd.DataFrame, least: int) -> Iterator[pd.DataFrame]:
        """Yield result frames of at least so many queries each, except for the last one."""
        kept = inp.drop(columns=[name for name in self._dropped() if name in inp.columns])
        if not len(inp):
            frame = _with_vectors(kept.reset_index(drop=True), [] if self._adds_vectors(inp) else None, [])
            yield _with_results(frame, pd.Series([], dtype=str), np.empty(0), np.empty(0, np.int64))
            return
        chunks = [inp.iloc[first : first + _QUERY_CHUNK] for first in range(0, len(inp), _QUERY_CHUNK)]
        if len(chunks) > 1:
            # What is wrong with a late query is said before the first one is searched.
            for chunk in chunks:
                self._check_queries(chunk)
        docnos = self.index.open().documents.docnos
        added: list[np.ndarray] | None = [] if self._adds_vectors(inp) else None
        blocks: list[tuple[np.ndarray, ...]] = []
        written = done = 0
        with pt.tqdm(desc=repr(self), total=len(inp), unit="q", disable=not self.verbose, delay=1) as bar:
            for number, chunk in enumerate(chunks):
                vectors = self._query_vectors(chunk)
                if added is not None:
                    added.extend(vectors)
                for first, scores, rows in self._search(vectors):
                    query, rank = np.nonzero(rows >= 0)
                    blocks.append((query + number * _QUERY_CHUNK + first, rank, scores[query, rank], rows[query, rank]))
                    done += len(rows)
                    bar.update(len(rows))
                    if done - written >= least or done == len(inp):
                        query, rank, scores, rows = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
                        blocks, written = [], done
                        found = docnos.take(rows).to_pandas()
                        frame = kept.iloc[query].reset_index(drop=True)
                        yield _with_results(_with_vectors(frame, added, query), found, scores, rank)

    def _search(self, vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield number of the first query, scores and document numbers of a block, best first; -1 for no more."""
        opened, searched = self.index.open(), self.index
        if self.engine is not None:
            known = self._by_engine
            if known is None or (known.identity, known.engine) != (opened.identity, self.engine):
                self._by_engine = EngineSearch(self.engine, opened, getattr(self.index, "device", None))
            searched = self._by_engine
        return opened.documents.iter_search(searched, vectors, self.num_results, self.batch_size)

    def _rescore(self, inp: pd.DataFrame) -> pd.DataFrame:
        kept = inp.drop(columns=[name for name in self._dropped() if name in inp.columns and name != "docno"])
        adds = self._adds_vectors(inp)
        if not len(inp):
            kept = _with_vectors(kept, [] if adds else None, [])
            return _with_results(kept, inp["docno"], np.empty(0), np.empty(0, np.int64))
        documents = self.index.known_documents(inp["docno"].tolist())
        if "query_vec" in inp.columns:
            vectors, query_of = self._query_vectors(inp), np.arange(len(inp))
        else:
            # Each distinct query is encoded once; the qid that names it in an error is the first one.
            query_of, queries = pd.factorize(users_queries(inp), use_na_sentinel=False)
            first = np.full(len(queries), len(inp), dtype=np.int64)
            np.minimum.at(first, query_of, np.arange(len(inp)))
            vectors = self._query_vectors(inp.iloc[first])
        kept = _with_vectors(kept, list(vectors) if adds else None, query_of)
        scores = self.index.open().documents.score_pairs(self.index, vectors, query_of, documents)
        qids = pd.factorize(inp["qid"], use_na_sentinel=False)[0]
        order = np.lexsort((self.index.open().documents.ranks[documents], -scores, qids))
        ranks = np.empty(len(inp), dtype=np.int64)
        starts = np.flatnonzero(np.diff(qids[order], prepend=-1))
        ranks[order] = np.arange(len(inp)) - np.repeat(starts, np.diff(starts, append=len(inp)))
        result = _with_results(kept, inp["docno"], scores, ranks)
        if self.rescore_cutoff is not None:
            result = result[result["rank"] < self.rescore_cutoff].reset_index(drop=True)
        return result

    def _adds_vectors(self, inp: pd.DataFrame) -> bool:
        return self.drop_query_vec is False and "query_vec" not in inp.columns

    def _dropped(self) -> tuple[str, ...]:
        return (*_REPLACED, "query_vec") if self.drop_query_vec else _REPLACED

    def _check_queries(self, inp: pd.DataFrame) -> np.ndarray | list[str]:
        """Return vectors, ``float32`` (rows, d), or queries as they are given, if nothing is wrong with them."""
        qids = inp["qid"]
        if "query_vec" not in inp.columns:
            return checked_texts(users_queries(inp), lambda position: f"query {qids.iloc[position]!r}")
        dim = self.index.open().meta["vec_size"]
        vectors = np.empty((len(inp), dim), dtype=np.float32)
        for position, value in enumerate(inp["query_vec"]):
            vector = np.asarray(value)
            if vector.shape != (dim,) or vector.dtype.kind not in "fiu":
                found = "no numbers" if vector.dtype.kind not in "fiu" else f"shape {vector.shape}"
                raise ValueError(
                    f"query {qids.iloc[position]!r} has a query_vec with {found} where the index has vectors of {dim} "
                    "numbers: encode it with the encoder of this index"
                )
            vectors[position] = vector
        return _checked_lengths(vectors, qids)

    def _query_vectors(self, inp: pd.DataFrame) -> np.ndarray:
        """Return a checked vector for every row, ``float32`` (rows, d)."""
        given = self._check_queries(inp)
        if isinstance(given, np.ndarray):
            return given
        encoder = self._checked_encoder()
        vectors = np.asarray(encoder.encode_queries(given, precision=self.index.precision), dtype=np.float32)
        dim = self.index.open().meta["vec_size"]
        if vectors.shape != (len(inp), dim):
            raise ValueError(
                f"the encoder gives vectors of {vectors.shape[-1]} numbers and the index {self.index.index_path} has "
                f"{dim}: use the encoder it was made with"
            )
        return _checked_lengths(vectors, inp["qid"])

    def _checked_encoder(self) -> Any:
        encoder = self.encoder or self.index.encoder
        path, expected = self.index.index_path, self.index.fingerprint
        if encoder is None:
            raise ValueError(
                f"the index {path} has no encoder at hand for queries: open it with "
                f"DenseIndex({str(path)!r}, encoder), or put encoder.query_encoder() before the retriever"
            )
        if expected is not None and encoder.fingerprint != expected:
            raise ValueError(
                f"the encoder's weights are not those the index {path} was made with (they were trained since, or it "
                "is another model): index the documents again, or use the encoder of that time"
            )
        return encoder

    def fuse_rank_cutoff(self: Retriever, k: int) -> Retriever | None:
        """Return a retriever that stops at ``k`` itself, for ``% k`` in compiled pipelines."""
        if k < 1:
            return None
        fused = object.__new__(type(self))
        fused.__dict__.update(self.__dict__)
        fused.num_results, fused.rescore_cutoff = min(k, self.num_results), min(k, self.rescore_cutoff or k)
        return fused

    def __mod__(self, right: int) -> pt.Transformer:
        if isinstance(right, bool) or not isinstance(right, (int, np.integer)) or right < 1:
            raise ValueError(f"% {right!r} makes no sense: the number of results to keep must be at least 1")
        return super().__mod__(int(right))

    def _key(self) -> tuple[Any, ...]:
        path = Path(self.index.index_path).resolve()
        built = self.index.built()
        identity = (self.index.open().identity, self.index.fingerprint) if built else None
        encoder = None if self.encoder is None else self.encoder.fingerprint
        return path, identity, encoder, self.num_results, self.drop_query_vec, self.rescore_cutoff

    def __eq__(self, other: object) -> bool:
        return self is other or self._key() == other._key() if isinstance(other, DenseRetriever) else NotImplemented

    def __hash__(self) -> int:
        return hash((DenseRetriever, Path(self.index.index_path).resolve(), self.num_results))

    def __repr__(self) -> str:
        return f"DenseRetriever({str(self.index.index_path)!r}, {self.num_results})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_by_engine": None}

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return no transformers: index and encoder are parts of this one."""
        return {}


def _checked_lengths(vectors: np.ndarray, qids: pd.Series) -> np.ndarray:
    bad = ~(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64) <= MAX_NORM**2)
    if bad.any():
        raise ValueError(
            f"query {qids.iloc[int(bad.argmax())]!r} has NaN, infinity or numbers beyond float32's dot products in its "
            "vector: look at its text and the encoder's weights"
        )
    return vectors


def _with_vectors(frame: pd.DataFrame, vectors: list[np.ndarray] | None, numbers: Any) -> pd.DataFrame:
    if vectors is None:
        return frame
    return frame.assign(query_vec=pd.Series([vectors[n] for n in numbers], dtype=object, index=frame.index))


def _with_results(frame: pd.DataFrame, docnos: Any, scores: np.ndarray, ranks: np.ndarray) -> pd.DataFrame:
    # Every float32 is a float64: the scores stay what they are.
    return frame.assign(docno=docnos, score=scores.astype(np.float64), rank=ranks)

"""DenseIndex: documents in, vectors on disk in FLEX format, retrievers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
from pyterrier_dr import FlexIndex, SimFn

from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.index import joined
from pt_dance.index.files import VECTORS, OpenIndex, read_meta
from pt_dance.index.flex_retrievers import FlatNumpyRetriever, FlatTorchRetriever
from pt_dance.index.indexer import DenseIndexer
from pt_dance.retriever.ann import AnnRetriever
from pt_dance.retriever.dense import DenseRetriever
from pt_dance.retriever.scorer import DenseScorer
from pt_dance.retriever.search.exact import exact_search, iter_exact_search, open_vectors, score_pairs
from pt_dance.retriever.search.vectors import Vectors
from pt_dance.storage import options
from pt_dance.storage.attributes import Fixed, Live
from pt_dance.storage.folders import recover_folder


class DenseIndex(FlexIndex):
    """Vectors of a collection on disk, made from its texts, in the format of :class:`pyterrier_dr.FlexIndex`.

    The index encodes texts itself, in large windows; documents that carry a ``doc_vec`` already, as in ``encoder >>
    index``, are taken as they are. Indexing is crash-safe: work goes to a folder beside, shard by shard, and a call
    that was killed is continued by the next one with the same settings and documents, to the same bytes. What is at
    ``path`` is always a whole index.

    Args:
        path: Folder of the index; it need not exist yet.
        encoder: Encodes documents when indexing and queries when retrieving. For an index that exists it is loaded from
            where its metadata says that it was saved, if it is there.
        text_field: Field with the documents' text.
        vec_dtype: "float32", or "float16" for half the space and about 3 digits (pyterrier_dr cannot open these).
        shard_size: Documents encoded and written at a time: what a crash costs at most, and the window in which the
            encoder sorts by length.
        device: Where to search: "cpu", "cuda", ...; a GPU if there is one by default. Scores may differ between two
            devices in float32's last bit.
        verbose: Whether to show progress bars and say what will be written.

    Raises:
        TypeError: If ``encoder`` is no :class:`pt_dance.DualEncoder`.
        ValueError: If an option is out of its range.

    Example::

        index = DenseIndex("runs/vaswani", encoder).index(corpus)
        dense = index.retriever(num_results=100)
        bm25 >> dense
    """

    ARTIFACT_TYPE = "dense_index"
    ARTIFACT_FORMAT = "flex"
    ARTIFACT_PACKAGE_HINT = "pt_dance"
    schematic = {"label": "DenseIndex", "help_url": None}
    path, index_path, shard_size = Fixed(), Fixed(), Live(options.whole)
    text_field = Live(partial(options.column, taken=("docno", "doc_vec")))
    vec_dtype = Live(partial(options.choice, choices=tuple(VECTORS)))

    def __init__(
        self,
        path: str | Path,
        encoder: DualEncoder | None = None,
        *,
        text_field: str = "text",
        vec_dtype: str = "float32",
        shard_size: int = 4096,
        device: str | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(str(options.path_of(path)), sim_fn=SimFn.dot, verbose=verbose)
        needed = ("encode_docs", "encode_queries", "fingerprint", "similarity", "dim")
        if encoder is not None and not all(hasattr(encoder, name) for name in needed):
            raise TypeError(
                f"encoder must be a pt_dance.DualEncoder, not a {type(encoder).__name__}: wrap the model, "
                "DualEncoder(name_or_model), or use the pipeline encoder >> index"
            )
        self.given_encoder, self.device = encoder, device
        self.text_field, self.vec_dtype, self.shard_size = text_field, vec_dtype, shard_size
        self._opened: OpenIndex | None = None
        self._loaded_encoder: DualEncoder | None = None
        self._vectors: tuple[str | None, Vectors] | None = None
        recover_folder(self.index_path)

    # --- indexing -----------------------------------------------------------------------------------------------------

    def index(self, inp: Any, *, overwrite: bool = False, **_: Any) -> DenseIndex:
        """Index documents into a new folder.

        An index that is at the path already is compared with the documents, and used where it was made of the same ones
        by the same encoder. Threads that ask for an index that another one is making wait for it.

        Args:
            inp: A :class:`pt_dance.Corpus`, an iterable of dicts, or a DataFrame, with ``docno`` and the text field, or
                with ``docno`` and ``doc_vec``. A :class:`pt_dance.PassageCorpus` gives a vector for each passage, and
                retrievers that score a document by its best one.
            overwrite: Whether an index at the path is replaced, once the new one is whole.

        Returns:
            This index.

        Raises:
            FileExistsError: If at the path there is an index of other documents or another encoder, unless
                ``overwrite`` says to replace it, or something else.
            TypeError: If a document, docno or text has the wrong type; names it.
            ValueError: If a docno occurs twice, a text is missing, or a vector is not finite or of another size; names
                the docno.
            OSError: If the disk has not enough room.
            StreamError: If the documents' own iterator raises. As with every error, the whole shards before it are kept
                for the next call.
        """
        return self.indexer(mode="overwrite" if overwrite else "create").index(inp)

    def append(self, inp: Any) -> DenseIndex:
        """Add documents to an index that exists; it stays as it is until the longer one takes its place.

        Args:
            inp: As for :meth:`index`; the docnos must be new.

        Raises:
            FileNotFoundError: If there is no index yet.
            ValueError: As for :meth:`index`, or if the encoder has other weights than those the index was made with.
        """
        return self.indexer(mode="append").index(inp)

    def join(self) -> DenseIndex:
        """Make one index of those in its folder's ``shards/00000``, ``shards/00001``, …, without copying vectors.

        Other processes and machines make them, ``DenseIndex(path / "shards" / "00000", encoder).index(part)``.

        Raises:
            FileNotFoundError: If there are none, or one is missing in between.
            ValueError: If they differ in weights, vectors or field, or a docno occurs twice.
        """
        joined.join(Path(self.index_path), OpenIndex)
        self.forget()
        return self

    def indexer(self, *, mode: str = "create", engine: Any = None) -> DenseIndexer:
        """Return an indexer.

        Args:
            mode: "create" a new index or use the same one that is there, "overwrite" an existing one, which stays until
                the new one is complete, or "append" to it.
            engine: A :class:`pt_dance.engines.Ray` encodes a ``Corpus`` in its workers, to the same bytes.

        Raises:
            ValueError: If there is no such mode.
        """
        return DenseIndexer(self, mode=mode, engine=engine)

    def index_inputs(self) -> list[list[str]]:
        """Return the columns that documents need, for PyTerrier's inspection."""
        return [["docno", self.text_field], ["docno", "doc_vec"]]

    def forget(self) -> None:
        """Close what is open, so that the next use reads the folder as it is then; frees a GPU's memory."""
        self._opened = self._vectors = self._loaded_encoder = None
        self._meta = self._docnos = None
        self._dvecs: np.ndarray | None = None
        self._cache: dict[str, Any] = {}

    # --- what is in it ------------------------------------------------------------------------------------------------

    def built(self) -> bool:
        """Return whether there is a whole index: its metadata is there and the sizes of its files agree."""
        try:
            read_meta(Path(self.index_path))
        except (OSError, ValueError):
            return False
        return True

    def open(self) -> OpenIndex:
        """Return the index's files, opened and checked.

        Raises:
            FileNotFoundError: If there is no index.
            ValueError: If it is damaged; names the file.
        """
        if self._opened is None:
            self._opened = OpenIndex(Path(self.index_path))
        return self._opened

    def payload(self, return_dvecs: bool = True, return_docnos: bool = True) -> list[Any]:
        """Return docno lookup, vectors and metadata, as pyterrier_dr's retrievers ask for them."""
        opened = self.open()
        result: list[Any] = [opened.meta]
        if return_dvecs:
            if self._dvecs is None:
                # pyterrier_dr reads every memory as float32, so half-precision vectors are given to it in full.
                half = opened.vectors.dtype.itemsize == 2
                self._dvecs = opened.vectors.astype(np.float32) if half else opened.vectors
            result.insert(0, self._dvecs)
        if return_docnos:
            result.insert(0, opened.lookup)
        return result

    def __len__(self) -> int:
        return self.open().meta["doc_count"]

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the weights that the documents were encoded with; None if the index does not know them."""
        return (self.open().meta.get("encoder") or {}).get("fingerprint")

    @property
    def precision(self) -> str | None:
        """How its texts were encoded, see :attr:`DualEncoder.precision`: queries are, too; None if it is not known."""
        return (self.open().meta.get("encoder") or {}).get("precision")

    @property
    def encoder(self) -> DualEncoder | None:
        """The given encoder, or the one the index was made with if it lies where it was saved; None otherwise.

        Raises:
            ValueError: If the encoder that was saved there has other weights by now.
        """
        if self.given_encoder is not None:
            return self.given_encoder
        if self._loaded_encoder is None and self.built():
            known = self.open().meta.get("encoder") or {}
            folder = None if known.get("path") is None else Path(self.index_path) / known["path"]
            if folder is not None and folder.is_dir():
                encoder = DualEncoder.load(str(folder.resolve()))
                if encoder.fingerprint != known.get("fingerprint"):
                    raise ValueError(
                        f"the encoder in {folder.resolve()} has other weights than those the index {self.index_path} "
                        "was made with: give the right one, or index again"
                    )
                self._loaded_encoder = encoder
        return self._loaded_encoder

    def rows(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row of each docno, ``int64``, -1 where there is no such document.

        Raises:
            TypeError: If one string is given instead of a list.
        """
        return self.open().rows(options.list_of("docnos", docnos, "DenseIndex.rows"))

    def known_rows(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row of each docno, ``int64``.

        Raises:
            KeyError: Naming a docno that is not in the index.
            TypeError: If one string is given instead of a list.
        """
        return self._known(options.list_of("docnos", docnos, "DenseIndex.known_rows"), self.rows)

    def known_documents(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the number of each document, ``int64``: its row, or its place among the documents of passages.

        Raises:
            KeyError: Naming a docno that is not in the index.
            TypeError: If one string is given instead of a list.
        """
        docnos = options.list_of("docnos", docnos, "DenseIndex.known_documents")
        return self._known(docnos, self.open().documents.rows)

    def _known(self, docnos: list[str], lookup: Callable[[list[str]], np.ndarray]) -> np.ndarray:
        numbers = lookup(docnos)
        if (numbers < 0).any():
            missing = docnos[int((numbers < 0).argmax())]
            raise KeyError(f"docno {missing!r} is not in the index {self.index_path} ({len(self):,} documents)")
        return numbers

    def docno(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the docnos of rows, an array of ``str`` objects of the same length.

        Raises:
            TypeError: If the rows are no whole numbers.
            IndexError: If there is no such row.
        """
        rows = np.asarray(options.list_of("rows", rows, "DenseIndex.docno"))
        if len(rows) and rows.dtype.kind not in "iu":
            raise TypeError(f"rows must be whole numbers, not {rows[0].item()!r}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must be 0 to {len(self) - 1}, not {rows.min()} to {rows.max()}")
        return np.array(self.open().docnos.at(rows), dtype=object)

    def stored_vectors(self, docnos: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the stored vectors of documents, ``float32``.

        In an index of passages they are those of all passages of these documents, and the second value is the position
        in ``docnos`` that each belongs to; it is None elsewhere.

        Raises:
            KeyError: Naming a docno that is not in the index.
        """
        rows, owner = self.open().documents.rows_of(self.known_documents(docnos))
        return self.open().reader.rows(rows), owner

    def _load_docids(self, inp: pd.DataFrame) -> np.ndarray:
        # pyterrier_dr's scorers and vector loaders ask here: a docid may come from another index, and an unknown docno
        # must not pass.
        if "docno" in inp.columns:
            return self.known_rows(inp["docno"].tolist())
        pt.validate.columns(inp, includes=["docid"], context=self)
        rows = inp["docid"].to_numpy().astype(np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise KeyError(f"docid {rows[(rows < 0) | (rows >= len(self))][0]} is not in the index {self.index_path}")
        return rows

    # --- searching ----------------------------------------------------------------------------------------------------

    def search(self, query_vecs: np.ndarray, k: int, *, progress: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Find the best k documents of query vectors, exactly.

        Args:
            query_vecs: ``float32`` (q, d).
            k: How many documents a query gets.
            progress: Called with the number of queries finished since the last call.

        Returns:
            Scores, ``float32`` (q, min(k, n)), and rows, ``int64`` of the same shape, best first; equal scores in the
            order of docnos.
        """
        return exact_search(query_vecs, self._device_vectors(), k, tie_order=self.open().ranks, progress=progress)

    def iter_search(
        self, query_vecs: np.ndarray, k: int, *, batch_size: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Search block by block, in bounded memory: yields first query number, scores and rows as :meth:`search`."""
        vectors, ranks = self._device_vectors(), self.open().ranks
        block: dict[str, Any] = {} if batch_size is None else {"doc_block": batch_size}
        return iter_exact_search(query_vecs, vectors, k, tie_order=ranks, **block)

    def score_pairs(self, query_vecs: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        """Score pairs of a query vector and a row as :meth:`search` does, ``float32`` (m,)."""
        return score_pairs(query_vecs, self._device_vectors(), query_of, row_of)

    def _device_vectors(self) -> Vectors:
        if self._vectors is None or self._vectors[0] != self.device:
            self._vectors = self.device, open_vectors(self.open().vectors, self.device)
        return self._vectors[1]

    # --- retrievers ---------------------------------------------------------------------------------------------------

    def retriever(
        self,
        num_results: int = 1000,
        *,
        batch_size: int | None = None,
        drop_query_vec: bool | None = None,
        engine: Any = None,
        verbose: bool | None = None,
    ) -> DenseRetriever:
        """Return the exact retriever and re-scorer of this index; see :class:`pt_dance.DenseRetriever`."""
        given = {"batch_size": batch_size, "drop_query_vec": drop_query_vec, "engine": engine}
        verbose = self.verbose if verbose is None else verbose
        return DenseRetriever(self, num_results=num_results, verbose=verbose, **given)

    def ann_retriever(
        self, num_results: int = 1000, method: str = "hnsw", *, verbose: bool | None = None, **other: Any
    ) -> AnnRetriever:
        """Return an approximate retriever, built if it is not there yet; see :class:`pt_dance.AnnRetriever`.

        Args:
            num_results: Documents a query gets.
            method: "hnsw" or "ivfpq".
            verbose: Whether to show progress bars; as the index does by default.
            **other: ``candidates``, ``threads``, ``build_options``, ``search_options``, ``drop_query_vec``.
        """
        verbose = self.verbose if verbose is None else verbose
        return AnnRetriever(self, method, num_results=num_results, verbose=verbose, **other).build()

    def scorer(self, *, num_results: int | None = None) -> DenseScorer:
        """Return what re-scores result frames.

        Args:
            num_results: Results kept for a query; all by default.
        """
        return DenseScorer(self, rescore_cutoff=num_results, verbose=self.verbose)

    def np_scorer(self, *, num_results: int | None = None) -> DenseScorer:
        """Return :meth:`scorer`: pyterrier_dr's fails for frames without rows, and with ``num_results``."""
        return self.scorer(num_results=num_results)

    def torch_scorer(
        self, *, num_results: int | None = None, device: str | None = None, fp16: bool = False
    ) -> DenseScorer:
        """Return :meth:`scorer` on another device, by default the index's own; ``fp16`` is refused."""
        if fp16:
            raise ValueError('scores are exact, so there is no fp16=True; vec_dtype="float16" halves an index')
        if device is None or device == self.device:
            return self.scorer(num_results=num_results)
        there = type(self)(self.index_path, self.given_encoder, device=device, verbose=self.verbose)
        return there.scorer(num_results=num_results)

    def np_retriever(self, *, mask: np.ndarray | None = None, **other: Any) -> FlatNumpyRetriever:
        """Return pyterrier_dr's ``np_retriever``; :meth:`retriever` is faster, and bounded in memory.

        Takes ``num_results``, ``batch_size`` and ``drop_query_vec``; a mask is refused, see :meth:`torch_retriever`.
        """
        if mask is not None:
            raise ValueError(
                "np_retriever multiplies scores by the mask, which puts masked documents before those with negative "
                "scores: use torch_retriever(mask=...), which leaves them out"
            )
        return FlatNumpyRetriever(self, **other)

    def torch_retriever(
        self, *, mask: np.ndarray | None = None, device: str | None = None, fp16: bool = False, **other: Any
    ) -> FlatTorchRetriever:
        """Return pyterrier_dr's ``torch_retriever``, which holds all vectors on its device.

        Args:
            mask: 1 for documents (in the order of rows) that may be retrieved, 0 for others.
            device: Where the vectors are held; a GPU if there is one by default.
            fp16: Whether to hold and multiply them in half precision.
            **other: ``num_results``, ``qbatch``, ``drop_query_vec``.

        Raises:
            ValueError: If the mask has not one number for each document, or others than 0 and 1.
        """
        if mask is not None and np.shape(mask) != (len(self),):
            raise ValueError(f"mask must hold 0 or 1 for each of {len(self):,} documents; it is {np.shape(mask)}")
        return FlatTorchRetriever(self, self.torch_vecs(device=device, fp16=fp16), mask=mask, **other)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve or re-score, as the default retriever does."""
        return self.retriever()(inp)

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return no transformers: the encoder is part of the index."""
        return {}

    def __repr__(self) -> str:
        return f"DenseIndex({str(self.index_path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        dropped = dict.fromkeys(("_opened", "_vectors", "_loaded_encoder", "_meta", "_docnos", "_dvecs"))
        return {**self.__dict__, **dropped, "_cache": {}}

"""Methods of pyterrier_dr's index with faults that a user of :class:`pt_dance.DenseIndex` must not meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
from pyterrier_dr import FlexIndex
from pyterrier_dr.flex.np_retr import NumpyRetriever
from pyterrier_dr.flex.torch_retr import TorchRetriever

from pt_dance.retriever.dense import DenseRetriever


class FlexMethods(FlexIndex):
    """pyterrier_dr's index with its scorers and retrievers put right."""

    def scorer(self, *, num_results: int | None = None) -> DenseScorer:
        """Return what re-scores result frames.

        Args:
            num_results: Results kept for a query; all by default.
        """
        return DenseScorer(self, rescore_cutoff=num_results, drop_query_vec=False, verbose=self.verbose)

    def np_scorer(self, *, num_results: int | None = None) -> DenseScorer:
        """Return :meth:`scorer`: pyterrier_dr's fails for frames without rows, and with ``num_results``."""
        return self.scorer(num_results=num_results)

    def torch_scorer(
        self, *, num_results: int | None = None, device: str | None = None, fp16: bool = False
    ) -> DenseScorer:
        """Return :meth:`scorer` on another device; the scores are the same to the bit.

        Args:
            num_results: Results kept for a query; all by default.
            device: Where to compute; as the index does by default.
            fp16: Not offered, since scores are exact.

        Raises:
            ValueError: If ``fp16`` is asked for.
        """
        if fp16:
            raise ValueError('scores are exact, so there is no fp16=True; vec_dtype="float16" halves an index.')
        if device is None or device == self.device:
            return self.scorer(num_results=num_results)
        there = type(self)(self.index_path, self.given_encoder, device=device, verbose=self.verbose)
        return there.scorer(num_results=num_results)

    def np_retriever(self, *, mask: np.ndarray | None = None, **options: Any) -> pt.Transformer:
        """Return pyterrier_dr's ``np_retriever``; :meth:`retriever` is faster, and bounded in memory.

        Args:
            mask: Not offered here, see :meth:`torch_retriever`.
            **options: ``num_results``, ``batch_size``, ``drop_query_vec``.

        Raises:
            ValueError: If a mask is given.
        """
        if mask is not None:
            raise ValueError(
                "np_retriever multiplies scores by the mask, which puts masked documents before those with negative "
                "scores: use torch_retriever(mask=...), which leaves them out."
            )
        return FlatNumpyRetriever(self, **options)

    def torch_retriever(
        self, *, mask: np.ndarray | None = None, device: str | None = None, fp16: bool = False, **options: Any
    ) -> pt.Transformer:
        """Return pyterrier_dr's ``torch_retriever``, which holds all vectors on its device.

        Args:
            mask: 1 for documents (in the order of rows) that may be retrieved, 0 for others.
            device: Where the vectors are held; a GPU if there is one by default.
            fp16: Whether to hold and multiply them in half precision.
            **options: ``num_results``, ``qbatch``, ``drop_query_vec``.

        Raises:
            ValueError: If the mask has not one number for each document, or others than 0 and 1.
        """
        if mask is not None and np.shape(mask) != (len(self),):
            raise ValueError(f"mask must hold 0 or 1 for each of {len(self):,} documents; it is {np.shape(mask)}.")
        return FlatTorchRetriever(self, self.torch_vecs(device=device, fp16=fp16), mask=mask, **options)


class DenseScorer(DenseRetriever):
    """Re-scores result frames (``qid``, ``docno`` or this index's ``docid``, and ``query`` or ``query_vec``)."""

    schematic = {"label": "DenseScorer", "help_url": None}

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score a result frame's documents anew; see :meth:`pt_dance.DenseRetriever.transform`.

        Raises:
            KeyError: If columns are missing, or a document is not in the index.
        """
        if "docno" not in inp.columns and "docid" in inp.columns:
            inp = inp.assign(docno=self.index.docno(self.index._load_docids(inp)))
        with pt.validate.any(inp, context=self) as v:
            v.result_frame(extra_columns=["query_vec"])
            v.result_frame(extra_columns=["query"])
        return super().transform(inp)

    def fuse_rank_cutoff(self, k: int) -> DenseScorer | None:
        """Return a scorer that keeps ``k`` results itself."""
        if k < 1:
            return None
        cutoff = min(k, self.rescore_cutoff or k)
        options = {"drop_query_vec": self.drop_query_vec, "verbose": self.verbose}
        return DenseScorer(self.index, encoder=self.encoder, rescore_cutoff=cutoff, **options)

    def _key(self) -> tuple[Any, ...]:
        return "scorer", *super()._key()

    def __repr__(self) -> str:
        return f"DenseScorer({str(self.index.index_path)!r})"


class FlatNumpyRetriever(NumpyRetriever):
    """pyterrier_dr's retriever, with one document a row also where every query gets one document or none."""

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve for ``qid`` and ``query_vec``."""
        return _flat(super().transform(inp))

    def fuse_rank_cutoff(self, k: int) -> FlatNumpyRetriever | None:
        """Return a retriever that stops at ``k`` itself."""
        if not 1 <= k < self.num_results:
            return None
        return FlatNumpyRetriever(
            self.flex_index, num_results=k, batch_size=self.batch_size, drop_query_vec=self.drop_query_vec
        )


class FlatTorchRetriever(TorchRetriever):
    """The same with torch; equal to another one only if the masks are, too: an experiment shares equal stages."""

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve for ``qid`` and ``query_vec``."""
        return _flat(super().transform(inp))

    def fuse_rank_cutoff(self, k: int) -> FlatTorchRetriever | None:
        """Return a retriever that stops at ``k`` itself."""
        if not 1 <= k < self.num_results:
            return None
        options = {"qbatch": self.qbatch, "mask": self.mask, "drop_query_vec": self.drop_query_vec}
        return FlatTorchRetriever(self.flex_index, self.torch_vecs, num_results=k, **options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlatTorchRetriever) or (self.mask is None) != (other.mask is None):
            return False
        return super().__eq__(other) and (self.mask is None or np.array_equal(self.mask, other.mask))

    def __hash__(self) -> int:
        mask = b"" if self.mask is None else np.asarray(self.mask, dtype=bool).tobytes()
        return hash((super().__hash__(), mask))


def _flat(results: pd.DataFrame) -> pd.DataFrame:
    """Undo what becomes of queries that all have one document or none: arrays in the cells."""
    if not len(results) or not isinstance(results["docno"].iloc[0], np.ndarray):
        return results
    columns = ["docno", "docid", "score", "rank"]
    flat = results.explode(columns, ignore_index=True)
    flat = flat[flat["docno"].notna()].reset_index(drop=True)
    return flat.astype({"docno": str, "docid": np.int64, "score": np.float32, "rank": np.int64})

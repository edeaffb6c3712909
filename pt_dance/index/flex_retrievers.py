"""pyterrier_dr's retrievers, with faults that a user of :class:`pt_dance.DenseIndex` must not meet put right."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pyterrier as pt
from pyterrier_dr.flex.np_retr import NumpyRetriever
from pyterrier_dr.flex.torch_retr import TorchRetriever


class _Flat(pt.Transformer):
    """One document a row also where every query gets one document or none, and cut-offs that keep the class."""

    num_results: int

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve for ``qid`` and ``query_vec``."""
        return _flat(super().transform(inp))

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer | None:
        """Return a retriever that stops at ``k`` itself."""
        if not 1 <= k < self.num_results:
            return None
        fused = copy.copy(self)
        fused.num_results = k
        return fused


class FlatNumpyRetriever(_Flat, NumpyRetriever):
    """pyterrier_dr's retriever, put right."""


class FlatTorchRetriever(_Flat, TorchRetriever):
    """The same with torch; equal to another one only if the masks are, too: an experiment shares equal stages."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlatTorchRetriever) or (self.mask is None) != (other.mask is None):
            return False
        return super().__eq__(other) and (self.mask is None or np.array_equal(self.mask, other.mask))

    def __hash__(self) -> int:
        mask = b"" if self.mask is None else np.asarray(self.mask, dtype=bool).tobytes()
        return hash((super().__hash__(), mask))


def _flat(results: pd.DataFrame) -> pd.DataFrame:
    """Put one document in a row where queries that all have one document or none have arrays in the cells."""
    if not len(results) or not isinstance(results["docno"].iloc[0], np.ndarray):
        return results
    columns = ["docno", "docid", "score", "rank"]
    flat = results.explode(columns, ignore_index=True)
    flat = flat[flat["docno"].notna()].reset_index(drop=True)
    return flat.astype({"docno": str, "docid": np.int64, "score": np.float32, "rank": np.int64})

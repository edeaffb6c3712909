"""Methods of pyterrier_dr's index with faults that a user of :class:`pt_dance.DenseIndex` must not meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyterrier as pt
from pyterrier_dr import FlexIndex
from pyterrier_dr.flex.torch_retr import TorchRetriever

if TYPE_CHECKING:
    from .retriever import DenseRetriever


class FlexMethods(FlexIndex):
    """pyterrier_dr's index with its scorers and retrievers put right."""

    def scorer(self, *, num_results: int | None = None) -> DenseRetriever:
        """Return what re-scores result frames by docno.

        Args:
            num_results: Results kept for a query; all by default.
        """
        from .retriever import DenseRetriever

        return DenseRetriever(self, rescore_cutoff=num_results, drop_query_vec=False, verbose=self.verbose)

    def np_scorer(self, *, num_results: int | None = None) -> DenseRetriever:
        """Return :meth:`scorer`: pyterrier_dr's fails for frames without rows, and with ``num_results``."""
        return self.scorer(num_results=num_results)

    def torch_scorer(
        self, *, num_results: int | None = None, device: str | None = None, fp16: bool = False
    ) -> DenseRetriever:
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
        return super().np_retriever(**options)

    def torch_retriever(self, *, mask: np.ndarray | None = None, **options: Any) -> pt.Transformer:
        """Return pyterrier_dr's ``torch_retriever``, which holds all vectors on its device.

        Args:
            mask: 1 for documents (in the order of rows) that may be retrieved, 0 for others.
            **options: ``num_results``, ``device``, ``fp16``, ``qbatch``, ``drop_query_vec``.
        """
        retriever = super().torch_retriever(mask=mask, **options)
        if mask is not None:
            retriever.__class__ = MaskedRetriever
        return retriever


class MaskedRetriever(TorchRetriever):
    """The retriever with a mask, equal to another one only if the masks are: an experiment shares equal stages."""

    def fuse_rank_cutoff(self, k: int) -> MaskedRetriever | None:
        """Return a retriever that stops at ``k`` itself."""
        fused = super().fuse_rank_cutoff(k)
        if fused is not None:
            fused.__class__ = MaskedRetriever
        return fused

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskedRetriever):
            return False
        return super().__eq__(other) and np.array_equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((super().__hash__(), np.asarray(self.mask, dtype=bool).tobytes()))

"""DenseScorer: a retriever that only re-scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.retriever.dense import DenseRetriever


class DenseScorer(DenseRetriever):
    """Re-score result frames (``qid``, ``docno`` or this index's ``docid``, and ``query`` or ``query_vec``)."""

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

    def score(self, query_vecs: np.ndarray, docids: np.ndarray) -> np.ndarray:
        """Score every row with every query vector, as pyterrier_dr's adaptive retrievers (LADR) ask for it.

        Args:
            query_vecs: (q, d).
            docids: Rows, int (n,).

        Returns:
            ``float32`` (q, n).
        """
        vectors, rows = np.asarray(query_vecs, dtype=np.float32), np.asarray(docids)
        query_of, row_of = np.repeat(np.arange(len(vectors)), len(rows)), np.tile(rows, len(vectors))
        return self.index.score_pairs(vectors, query_of, row_of).reshape(len(vectors), len(rows))

    def _key(self) -> tuple[Any, ...]:
        return "scorer", *super()._key()

    def __repr__(self) -> str:
        return f"DenseScorer({str(self.index.index_path)!r})"

"""PISA's retriever without its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from pyterrier_pisa import PisaIndex, PisaRetrieve, PisaScorer

from pt_dance.corpus.quiet import quiet


class QuietPisaRetrieve(PisaRetrieve):
    """PISA's retriever, which otherwise writes to the terminal whenever it opens an index, and cannot be pickled."""

    def reset_retrieval_context(self, force: bool = False) -> None:
        """Open the index if that is needed."""
        with quiet():
            super().reset_retrieval_context(force)

    def transform(self, queries: pd.DataFrame) -> pd.DataFrame:
        """Retrieve for queries."""
        with quiet():
            return super().transform(queries)

    def fuse_rank_cutoff(self, k: int) -> QuietPisaRetrieve | None:
        """Return a retriever that stops at ``k`` itself."""
        if k >= self.num_results:
            return None
        return QuietPisaRetrieve(self.index, self.scorer, num_results=k, threads=self.threads, **self.retr_args)

    def __repr__(self) -> str:
        options = ", ".join(f"{name.removeprefix('bm25_')}={value:g}" for name, value in self.retr_args.items())
        return f"bm25({str(self.index.path.parent)!r}, {self.num_results}, {options})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ctxt": None, "_ctxt_key": None}


def pisa_bm25(path: Path, *, k1: float, b: float, num_results: int, threads: int) -> QuietPisaRetrieve:
    """Return a BM25 retriever over the PISA index in a folder."""
    index = PisaIndex(str(path), text_field="text", threads=threads)
    return QuietPisaRetrieve(index, PisaScorer.bm25, num_results=num_results, threads=threads, bm25_k1=k1, bm25_b=b)

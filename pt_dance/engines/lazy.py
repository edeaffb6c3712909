"""A pipeline that is made where it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pyterrier as pt


class LazyPipeline(pt.Transformer):
    """A pipeline that a function makes when it is first needed, in every process anew.

    A stage that holds something of its process (a Java object, a lock, an open connection) cannot be sent to another
    one. Instead, what makes it is sent::

        bm25 = engines.LazyPipeline(lambda: pt.terrier.Retriever("runs/terrier", wmodel="BM25"))
        mine_documents(bm25, topics, qrels, corpus, engine=engines.Ray(workers=2))

    Args:
        make: Returns the pipeline, from what can be sent itself, as paths and a :class:`pt_dance.Corpus` can.
        cutoff: How many results of a query are kept; all by default. ``% k`` sets it when a pipeline is compiled.

    Raises:
        TypeError: If ``make`` is no function, or, when it is called, returns no pipeline.
    """

    schematic = {"label": "LazyPipeline", "help_url": None}

    def __init__(self, make: Callable[[], pt.Transformer], *, cutoff: int | None = None) -> None:
        if not callable(make) or isinstance(make, pt.Transformer):
            raise TypeError(f"make={make!r} must be a function that returns a pipeline")
        self.make, self.cutoff = make, cutoff
        self._made: pt.Transformer | None = None

    @property
    def pipeline(self) -> pt.Transformer:
        """The pipeline, made now if it was not yet in this process."""
        if self._made is None:
            made = self.make()
            if not isinstance(made, pt.Transformer):
                raise TypeError(f"make() gave back a {type(made).__name__}; it must give a PyTerrier pipeline")
            self._made = made if self.cutoff is None else (made % self.cutoff).compile()
        return self._made

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return what the pipeline gives."""
        return self.pipeline(inp)

    def fuse_rank_cutoff(self, k: int) -> LazyPipeline:
        """Return a pipeline that stops at ``k`` itself, for ``% k`` in compiled pipelines."""
        return LazyPipeline(self.make, cutoff=min(k, self.cutoff or k))

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return none: the pipeline may not be made yet."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

"""The indexer of a dense index, for ``pipeline >> index.indexer(mode=...)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyterrier as pt

from pt_dance.index import indexing
from pt_dance.storage.engine import check_engine

if TYPE_CHECKING:
    from pt_dance.index.dense_index import DenseIndex


class DenseIndexer(pt.Indexer):
    """Write a :class:`DenseIndex`; made by :meth:`DenseIndex.indexer`.

    Args:
        index: The index to write.
        mode: "create", "overwrite" or "append".
        engine: Has workers that encode; this process does where it is None.

    Raises:
        TypeError: If ``engine`` is none.
        ValueError: If there is no such mode.
    """

    schematic = {"label": "DenseIndexer", "help_url": None}

    def __init__(self, index: DenseIndex, *, mode: str = "create", engine: Any = None) -> None:
        mode = getattr(mode, "value", mode)
        if mode not in indexing.MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, indexing.MODES))}, not {mode!r}")
        self._index, self.mode, self.engine = index, mode, check_engine(engine)

    def index(self, iter: Any, **_: Any) -> DenseIndex:
        """Index documents; see :meth:`DenseIndex.index`."""
        indexing.run(self._index, iter, self.mode, self.engine)
        self._index.forget()
        return self._index

    def index_inputs(self) -> list[list[str]]:
        """Return the columns that documents need, for PyTerrier's inspection."""
        return self._index.index_inputs()

    def subtransformers(self) -> dict[str, pt.Transformer]:
        """Return no transformers: the index is what is written."""
        return {}

    def __repr__(self) -> str:
        return f"{self._index!r}.indexer(mode={self.mode!r})"

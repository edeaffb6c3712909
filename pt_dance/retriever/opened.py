"""What retrievers need of an index; :class:`pt_dance.DenseIndex` is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class SearchableIndex(Protocol):
    """Vectors on disk whose rows are searched and scored."""

    index_path: Path

    @property
    def encoder(self) -> Any:
        """Encodes queries; None if the index does not know one."""

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the weights that the documents were encoded with."""

    def built(self) -> bool:
        """Return whether there is a whole index."""

    def open(self) -> Any:
        """Return what is on disk: ``identity``, ``meta``, ``vectors``, ``reader``, ``ranks`` and ``documents``."""

    def known_documents(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the number of each document, or raise a ``KeyError``."""

    def search(self, query_vecs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best rows."""

    def iter_search(
        self, query_vecs: np.ndarray, k: int, *, batch_size: int | None = None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Search block by block."""

    def score_pairs(self, query_vecs: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        """Score pairs of a query vector and a row."""

    def __len__(self) -> int: ...


def check_index(index: Any) -> Any:
    """Return an index that can be searched.

    Raises:
        TypeError: If it is something else.
    """
    if not all(hasattr(type(index), name) for name in ("open", "known_documents", "iter_search", "score_pairs")):
        raise TypeError(
            f"index must be a pt_dance.DenseIndex, not a {type(index).__name__}: open the folder with DenseIndex(path)"
        )
    return index

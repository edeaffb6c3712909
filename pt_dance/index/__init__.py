"""Vectors of a corpus on disk, in FLEX format."""

from pt_dance.index.artifact import prefer_open_index
from pt_dance.index.dense_index import DenseIndex

__all__ = ["DenseIndex"]

prefer_open_index()

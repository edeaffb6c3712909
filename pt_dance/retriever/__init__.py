"""Retrieval and re-scoring from stored vectors."""

from pt_dance.retriever.ann import AnnRetriever
from pt_dance.retriever.dense import DenseRetriever

__all__ = ["AnnRetriever", "DenseRetriever"]

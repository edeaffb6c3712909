"""Negatives for training: documents from any PyTerrier pipeline, queries from an index over the training queries.

Everything here works on data frames and NumPy arrays; a negative source is a PyTerrier pipeline.
"""

from pt_dance.mining.candidates import reduce_results, share_of
from pt_dance.mining.documents import mine_documents
from pt_dance.mining.filters import MiningContext, NearDuplicate, PositiveMargin, RankRange, TeacherScore
from pt_dance.mining.judgements import positive_pairs
from pt_dance.mining.queries import mine_queries
from pt_dance.mining.readings import Readings
from pt_dance.mining.sources import describe_source, needs_dense, resolve_source

__all__ = [
    "MiningContext",
    "NearDuplicate",
    "PositiveMargin",
    "RankRange",
    "Readings",
    "TeacherScore",
    "describe_source",
    "mine_documents",
    "mine_queries",
    "needs_dense",
    "positive_pairs",
    "reduce_results",
    "resolve_source",
    "share_of",
]

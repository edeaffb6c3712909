"""Losses for training dense retrievers, in sentence-transformers' loss interface.

Every loss takes the columns query, positive, negative_1 … negative_n and negative_query_1 … negative_query_m. Given
:class:`TrainingRows` it never uses a known-relevant pair as a negative: not mined, not in-batch, not of the same
tower, not in the dual direction. Nothing here knows of PyTerrier: the losses also work in a plain
``SentenceTransformerTrainer``.
"""

from pt_dance.losses._batch import Batch
from pt_dance.losses._make import check, make, options
from pt_dance.losses.base import RetrievalLoss
from pt_dance.losses.combined import SumLoss
from pt_dance.losses.contrastive import ContrastiveLoss
from pt_dance.losses.distill_kl import DistillKLLoss
from pt_dance.losses.dual import DualLoss
from pt_dance.losses.margin_mse import MarginMSELoss
from pt_dance.losses.pairwise import PairwiseLoss
from pt_dance.losses.regularized import RegularizedLoss
from pt_dance.losses.rows import TrainingRows
from pt_dance.losses.samtone import SamToneLoss

__all__ = [
    "Batch",
    "ContrastiveLoss",
    "DistillKLLoss",
    "DualLoss",
    "MarginMSELoss",
    "PairwiseLoss",
    "RegularizedLoss",
    "RetrievalLoss",
    "SamToneLoss",
    "SumLoss",
    "TrainingRows",
    "check",
    "make",
    "options",
]

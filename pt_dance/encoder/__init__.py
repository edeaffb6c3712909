"""Encoders: text in, vectors or scores out."""

from pt_dance.encoder.cross_encoder import CrossEncoderScorer
from pt_dance.encoder.dual_encoder import DualEncoder

__all__ = ["CrossEncoderScorer", "DualEncoder"]

"""Which batches, and which precision, encode fastest here."""

from __future__ import annotations

from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer


class Plan(NamedTuple):
    """How to encode: tokens in a batch, precision, and what was measured to decide that."""

    budget: int
    bfloat16: bool
    measured: dict[str, Any] | None = None


def plan(model: SentenceTransformer, texts: list[str], task: str, dtype: str) -> Plan:
    """Decide how to encode these texts."""
    return Plan(2048 if model.device.type == "cpu" else 65536, dtype == "bfloat16")

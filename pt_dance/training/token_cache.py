"""What a static tower's batches are made of, from token ids that are kept in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding

from pt_dance.encoder.reading import BagOfTexts
from pt_dance.encoder.token_memory import MEMORY, TokenMemory, mark_of


class TokenCache:
    """``model.preprocess`` of a static tower, with the token ids of texts that come again from memory.

    Args:
        model: A model of static towers (one, or a router over several); weights are not touched.
        memory: Where ids are kept.
    """

    def __init__(self, model: SentenceTransformer, memory: TokenMemory = MEMORY):
        self.model = model
        self.memory = memory
        self._marks: dict[int, int] = {}

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, task: str | None = None, **_: object
    ) -> dict[str, object]:
        """Return what the model's ``preprocess`` gives: ``input_ids`` int64 (tokens,), ``offsets`` int64 (texts,)."""
        tokenizer = self._tower(task).tokenizer
        if id(tokenizer) not in self._marks:
            self._marks[id(tokenizer)] = mark_of(tokenizer)
        texts = [prompt + text for text in inputs] if prompt else list(inputs)
        found = self.memory.tokens(tokenizer, self._marks[id(tokenizer)], texts)
        features: dict[str, object] = {**BagOfTexts(found).features(np.arange(len(found)))}
        if task is not None and isinstance(self.model[0], Router):
            features["task"] = task
        return features

    def _tower(self, task: str | None) -> StaticEmbedding:
        first = self.model[0]
        return first.sub_modules[task][0] if isinstance(first, Router) else first

"""Tokens of texts that come again, for static towers, whose training would otherwise be mostly tokenising."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding

_MOST_TOKENS = 50_000_000


class TokenCache:
    """``model.preprocess`` of a static tower, with the token ids of the texts seen last kept in memory.

    Args:
        model: a model of static towers (one, or a router over several); weights are not touched.
        most_tokens: ids kept at most, 4 bytes each; the texts that were not used for longest go first.
    """

    def __init__(self, model: SentenceTransformer, most_tokens: int = _MOST_TOKENS):
        self.model = model
        self.most_tokens = most_tokens
        self._ids: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._kept = 0

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, task: str | None = None, **_: object
    ) -> dict[str, object]:
        """Return what the model's ``preprocess`` gives: ``input_ids`` int64 (tokens,), ``offsets`` int64 (texts,)."""
        tower = self._tower(task)
        texts = [prompt + text for text in inputs] if prompt else list(inputs)
        found = self._lookup(tower, texts)
        offsets = np.cumsum([0, *(len(ids) for ids in found[:-1])])
        features: dict[str, object] = {
            "input_ids": torch.from_numpy(np.concatenate(found).astype(np.int64)),
            "offsets": torch.from_numpy(offsets.astype(np.int64)),
        }
        if task is not None and isinstance(self.model[0], Router):
            features["task"] = task
        return features

    def _tower(self, task: str | None) -> StaticEmbedding:
        first = self.model[0]
        return first.sub_modules[task][0] if isinstance(first, Router) else first

    def _lookup(self, tower: StaticEmbedding, texts: list[str]) -> list[np.ndarray]:
        number = id(tower)
        missing = list(dict.fromkeys(text for text in texts if (number, text) not in self._ids))
        new = {}
        if missing:
            encoded = tower.tokenizer.encode_batch(missing, add_special_tokens=False)
            new = {text: np.array(one.ids, dtype=np.int32) for text, one in zip(missing, encoded, strict=True)}
        found = []
        for text in texts:
            if (number, text) in self._ids:
                self._ids.move_to_end((number, text))
                found.append(self._ids[number, text])
            else:
                found.append(new[text])
        for text, ids in new.items():
            self._ids[number, text] = ids
            self._kept += len(ids) + 1
        while self._kept > self.most_tokens and self._ids:
            self._kept -= len(self._ids.popitem(last=False)[1]) + 1
        return found

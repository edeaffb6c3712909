"""How an encoder's texts are tokenised: as ``SentenceTransformer`` would, but once and without padding."""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any

import numpy as np
import torch
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from torch import nn
from transformers import PreTrainedTokenizerBase

from pt_dance.encoder.token_memory import MEMORY, mark_of
from pt_dance.storage.digests import short_text_digest

# A tokenizer cannot be used by two threads at once (it is reconfigured at every call), and encoders may share one.
_TOKENIZING = threading.Lock()
# Fewer texts are a search's queries: to tell the tokenizer from others would take longer than to read them.
_REMEMBERED = 256

_DIGEST_BLOCK = 4096


def prompt_for(model: SentenceTransformer, task: str) -> str | None:
    """Return what ``encode_query`` (task "query") or ``encode_document`` ("document") puts before each text."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in model.prompts), model.default_prompt_name)
    return model.prompts.get(name) if name is not None else None


def tower_of(model: SentenceTransformer, task: str) -> nn.Module | None:
    """Return the module that reads the texts of a task, or ``None`` where only the model itself can tell."""
    first = model[0]
    if isinstance(first, Router):
        return None if first.route_mappings or task not in first.sub_modules else first.sub_modules[task][0]
    return first


class PaddedTexts:
    """Tokenised texts from which padded batches are cut."""

    def __init__(self, columns: dict[str, list[list[int]]], reader: TransformerReader):
        self.lengths = np.fromiter(map(len, columns["input_ids"]), np.int64, len(columns["input_ids"]))
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        total = int(self.lengths.sum())
        self._flat = {name: np.fromiter(chain.from_iterable(lists), np.int64, total) for name, lists in columns.items()}
        self._reader = reader

    def features(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the model's input for these rows: each column (len(rows), longest), int64."""
        lengths, longest = self.lengths[rows], int(self.lengths[rows].max())
        positions = np.arange(longest)[None, :]
        before = longest - lengths[:, None] if self._reader.pads_left else np.zeros((len(rows), 1), np.int64)
        held = (positions >= before) & (positions < before + lengths[:, None])
        source = (self._starts[rows][:, None] + positions - before)[held]
        features = {}
        for name, flat in self._flat.items():
            padded = np.full((len(rows), longest), self._reader.padding[name], np.int64)
            padded[held] = flat[source]
            features[name] = torch.from_numpy(padded)
        features["attention_mask"] = torch.from_numpy(held.astype(np.int64))
        return features

    def digests(self) -> np.ndarray:
        """Return a hash of each text's token ids, uint64 (texts,)."""
        ids = self._flat["input_ids"]
        cuts = zip(self._starts, self._starts + self.lengths, strict=True)
        return np.fromiter((_hash(ids[a:b]) for a, b in cuts), np.uint64, len(self.lengths))


class TransformerReader:
    """Tokenise as :class:`sentence_transformers.base.modules.Transformer` does, without padding."""

    bags = False

    def __init__(self, module: Transformer, task: str, prompt: str | None):
        self.tokenizer = module.tokenizer
        self.prompt = prompt or ""
        self.max_length = module.query_length if task == "query" else module.document_length
        self.pads_left = self.tokenizer.padding_side == "left"
        self.padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}

    @staticmethod
    def reads(module: Any, model: SentenceTransformer, prompt: str | None) -> bool:
        """Return whether this module's tokenisation is the plain one that is reproduced here."""
        if type(module) is not Transformer or module.transformer_task != "feature-extraction":
            return False
        tokenizer = module.processor
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
            return False
        excludes_prompt = any(isinstance(part, Pooling) and not part.include_prompt for part in model.modules())
        return (
            set(module.modality_config) == {"text"}
            and not module.processing_kwargs
            and module.query_expansion is None
            and not module.can_flatten_inputs
            and tokenizer.pad_token_id is not None
            and {"input_ids", "attention_mask"} <= set(tokenizer.model_input_names)
            and set(tokenizer.model_input_names) <= {"input_ids", "token_type_ids", "attention_mask"}
            and not (prompt and excludes_prompt)
        )

    def read(self, texts: list[str]) -> PaddedTexts:
        """Tokenise texts, prompt included."""
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        with _TOKENIZING:
            columns = self.tokenizer(
                texts,
                padding=False,
                truncation="longest_first",
                max_length=self.max_length,
                return_attention_mask=False,
                verbose=False,
            )
        return PaddedTexts(dict(columns), self)


class BagOfTexts:
    """Tokenised texts for a static tower: one row of token ids after the other, no padding."""

    def __init__(self, encodings: list[np.ndarray]):
        self._ids = encodings
        self.lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))

    def features(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` (tokens of all rows) and ``offsets`` (len(rows)), int64."""
        ids = np.concatenate([np.empty(0, np.int32), *(self._ids[row] for row in rows)]).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])[:-1]]).astype(np.int64)
        return {"input_ids": torch.from_numpy(ids), "offsets": torch.from_numpy(offsets)}

    def digests(self) -> np.ndarray:
        """Return a hash of each text's token ids and how often each occurs, uint64 (texts,): a mean knows no order."""

        def shares(ids: np.ndarray) -> np.ndarray:
            tokens, counts = np.unique(ids.astype(np.int64), return_counts=True)
            return np.stack([tokens, counts // (np.gcd.reduce(counts) or 1)])

        return np.fromiter((_hash(shares(ids)) for ids in self._ids), np.uint64, len(self._ids))


class StaticReader:
    """Tokenise as :class:`sentence_transformers.sentence_transformer.modules.StaticEmbedding` does."""

    bags = True

    def __init__(self, module: StaticEmbedding, prompt: str | None):
        self.tokenizer = module.tokenizer
        self.prompt = prompt or ""
        self._mark: int | None = None

    def read(self, texts: list[str]) -> BagOfTexts:
        """Tokenise texts, prompt included."""
        if self.prompt:
            texts = [self.prompt + text for text in texts]
        if len(texts) < _REMEMBERED:
            with _TOKENIZING:
                encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return BagOfTexts([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])
        if self._mark is None:
            self._mark = mark_of(self.tokenizer)
        with _TOKENIZING:
            return BagOfTexts(MEMORY.tokens(self.tokenizer, self._mark, texts))


class AnyTexts:
    """Texts that only the model itself knows how to read; their length in characters stands for that in tokens."""

    def __init__(self, texts: list[str], reader: AnyReader):
        self._texts, self._reader = texts, reader
        self.lengths = np.fromiter((len(text) // 4 + 2 for text in texts), np.int64, len(texts))

    def features(self, rows: np.ndarray) -> dict[str, Any]:
        """Return what ``model.preprocess`` makes of these rows."""
        reader = self._reader
        with _TOKENIZING:
            return reader.model.preprocess([self._texts[row] for row in rows], prompt=reader.prompt, task=reader.task)

    def digests(self) -> np.ndarray:
        """Return a hash of each text, uint64 (texts,): only texts equal letter by letter are known to be read alike."""
        return np.fromiter(map(short_text_digest, self._texts), np.uint64, len(self._texts))


class AnyReader:
    """For input modules with a tokenisation of their own."""

    bags = False

    def __init__(self, model: SentenceTransformer, task: str, prompt: str | None):
        self.model, self.task, self.prompt = model, task, prompt

    def read(self, texts: list[str]) -> AnyTexts:
        """Keep the texts until their batch is cut."""
        return AnyTexts(texts, self)


Reader = TransformerReader | StaticReader | AnyReader


def reader_for(model: SentenceTransformer, task: str) -> Reader:
    """Return how texts of a task ("query" or "document") are tokenised for this model."""
    prompt, tower = prompt_for(model, task), tower_of(model, task)
    if TransformerReader.reads(tower, model, prompt):
        return TransformerReader(tower, task, prompt)
    if type(tower) is StaticEmbedding:
        return StaticReader(tower, prompt)
    return AnyReader(model, task, prompt)


def reading_digests(model: SentenceTransformer, texts: list[str], task: str) -> np.ndarray:
    """Return a hash of what a model reads of each text, uint64 (texts,): texts with equal ones get equal vectors."""
    reader = reader_for(model, task)
    blocks = (reader.read(texts[i : i + _DIGEST_BLOCK]).digests() for i in range(0, len(texts), _DIGEST_BLOCK))
    return np.concatenate([np.empty(0, np.uint64), *blocks])


def _hash(numbers: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(numbers).data)

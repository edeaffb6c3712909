"""Which texts are the same: those that an encoder cannot tell apart, whatever their ids are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pt_dance.storage.digests import new_digest, short_text_digest

_BLOCK_DOCUMENTS = 4096


class Readings:
    """Hashes of what is read of queries and documents, in bounded memory: each document is read once, when asked for.

    A copy of a relevant document under another docno is relevant, and queries that read the same share what is relevant
    to them. A document cut into passages (:class:`pt_dance.PassageCorpus`) is the same as another one if its passages
    are.

    Args:
        corpus: ``Corpus`` with the documents' texts, 9 bytes of memory each; without one, documents are the same only
            if their docnos are.
        encoder: ``DualEncoder``, or anything else with ``reading_digests(texts, task)``, that reads the texts; where
            None, texts are the same if they are equal letter by letter.
    """

    def __init__(self, corpus: Any = None, encoder: Any = None) -> None:
        if encoder is not None and not hasattr(encoder, "reading_digests"):
            raise TypeError(
                f"reads={encoder!r} must be a pt_dance.DualEncoder or mining.Readings, whose reading tells texts apart"
            )
        self.corpus, self.encoder = corpus, encoder
        count = 0 if corpus is None else len(corpus)
        self._documents = np.zeros(count, dtype=np.uint64)
        self._known = np.zeros(count, dtype=bool)

    @classmethod
    def of(cls, reads: Any, corpus: Any = None) -> Readings:
        """Return readings as they are, or those of an encoder (or of nobody: None) over a corpus."""
        return reads if isinstance(reads, Readings) else cls(corpus, reads)

    def queries(self, texts: Sequence[str] | pd.Series) -> np.ndarray:
        """Return a hash of what is read of each query, uint64 (len(texts),)."""
        number, distinct = pd.factorize(pd.Series(texts, dtype=object))
        return self._digests(list(distinct), "query")[number]

    def documents(self, docnos: Sequence[str] | pd.Series) -> np.ndarray:
        """Return a hash of what is read of each document, uint64 (len(docnos),); of the docno where it has no text."""
        number, distinct = pd.factorize(pd.Series(docnos, dtype=object))
        rows = np.full(len(distinct), -1) if self.corpus is None else self.corpus.rows(list(distinct))
        found = np.empty(len(distinct), dtype=np.uint64)
        found[rows >= 0] = self.rows(rows[rows >= 0])
        unknown = np.flatnonzero(rows < 0)
        found[unknown] = np.fromiter((short_text_digest(f"\0{distinct[i]}") for i in unknown), np.uint64, len(unknown))
        return found[number]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return a hash of what is read of the documents in rows of the corpus, uint64 (len(rows),)."""
        missing = np.unique(rows[~self._known[rows]])
        for start in range(0, len(missing), _BLOCK_DOCUMENTS):
            block = missing[start : start + _BLOCK_DOCUMENTS]
            self._documents[block] = self._read(block)
            self._known[block] = True
        return self._documents[rows]

    def _read(self, rows: np.ndarray) -> np.ndarray:
        if getattr(self.corpus, "passages", None) is None:
            return self._digests(self.corpus.texts_at(rows), "document")
        own = self.corpus.passage_rows(rows)
        there = own >= 0
        passages = np.zeros(own.shape, dtype=np.uint64)
        passages[there] = self._digests(self.corpus.passages.texts_at(own[there]), "document")
        joined = (new_digest(parts[held].tobytes()) for parts, held in zip(passages, there, strict=True))
        return np.fromiter((digest.intdigest() & (2**64 - 1) for digest in joined), np.uint64, len(rows))

    def _digests(self, texts: list[str], task: str) -> np.ndarray:
        if self.encoder is None:
            return np.fromiter(map(short_text_digest, texts), np.uint64, len(texts))
        return self.encoder.reading_digests(texts, task)

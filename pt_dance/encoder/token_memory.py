"""Tokens of texts that are read again and again: a static tower's training would otherwise be mostly tokenising.

Every round reads the same documents three times: for its index, to tell copies apart, to train.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import xxhash
from tokenizers import Tokenizer


class TokenMemory:
    """Token ids by text and tokenizer, in bounded memory; the texts that were not read for longest go first.

    Args:
        most_tokens: Ids kept at most, 4 bytes each; a text counts as 32 more.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._ids: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()

    def tokens(self, tokenizer: Tokenizer, mark: int, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text without special tokens, int32 (tokens,).

        Args:
            tokenizer: Reads texts that are not known.
            mark: What tells its settings from others', see :func:`mark_of`.
            texts: The texts.
        """
        keys = [xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"), seed=mark) for text in texts]
        with self._lock:
            missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._ids}
            encoded = tokenizer.encode_batch_fast(list(missing.values()), add_special_tokens=False)
            for key, one in zip(missing, encoded, strict=True):
                self._ids[key] = np.array(one.ids, dtype=np.int32)
                self._kept += len(self._ids[key]) + 32
            found = [self._ids[key] for key in keys]
            for key in keys:
                self._ids.move_to_end(key)
            while self._kept > self.most_tokens and self._ids:
                self._kept -= len(self._ids.popitem(last=False)[1]) + 32
            return found


def mark_of(tokenizer: Tokenizer) -> int:
    """Return what tells a tokenizer from others: a hash of all its settings, vocabulary included."""
    return xxhash.xxh3_64_intdigest(tokenizer.to_str().encode())


# Shared by all rounds of a process, whose encoders are loaded anew: 130 MB at most.
MEMORY = TokenMemory(32_000_000)

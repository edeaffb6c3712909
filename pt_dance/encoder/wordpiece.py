"""Train a WordPiece tokenizer on a stream of texts, the same one from the same texts every time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_WORDS = re.compile(r"[^\W_]+|[^\w\s]|_")
_ASCII_WORDS = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
_WORDS_IN_A_TEXT = 4096


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> tuple[Tokenizer, np.ndarray]:
    """Train a lower-casing WordPiece tokenizer, BERT's kind.

    Memory grows with the number of distinct words, not with the number of texts. The trainer of the tokenizers library
    numbers the letters inside words in the order of a randomly seeded hash map, and breaks ties between merges by
    these numbers, so two runs give different vocabularies. Here words are counted first and the letters get their
    numbers beforehand; the same texts then give the same tokenizer, in any process.

    Args:
        texts: Any iterable of texts; it is read once.
        vocab_size: Tokens at most, special tokens included. Of more characters than fit, the commonest are kept.

    Returns:
        The tokenizer, and each token's inverse document frequency ``log((N + 1) / (n + 1))``, at least .1: array
        (vocabulary,), float32. For a piece of a word, n is the sum over the words it is part of.

    Raises:
        TypeError: If ``texts`` is one string, or a text is no string; names its position.
        ValueError: If there is no text, no word in any of them, or the vocabulary is too small for a single word.
    """
    if vocab_size < len(SPECIAL) + 2:
        raise ValueError(
            f"vocab_size must be at least {len(SPECIAL) + 2} ({len(SPECIAL)} special tokens and a letter), "
            f"not {vocab_size}"
        )
    normalizer = normalizers.BertNormalizer(lowercase=True)
    words, documents, n_texts = _count_words(texts, normalizer)
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    # A letter may need two tokens: at the beginning of a word, and inside one.
    ranked = sorted(letters, key=lambda letter: (-letters[letter], letter))
    kept = set(ranked[: (vocab_size - len(SPECIAL)) // 2])
    words = Counter({word: words[word] for word in sorted(words) if kept.issuperset(word)})
    inside = sorted({f"##{letter}" for word in words for letter in word[1:]})

    counting = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    counting.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=SPECIAL + inside, show_progress=False
    )
    counting.train_from_iterator(_repeated(words), trainer)

    tokenizer = Tokenizer(models.WordPiece(counting.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer, _inverse_frequencies(tokenizer, documents, n_texts)


def _inverse_frequencies(tokenizer: Tokenizer, documents: Counter[str], n_texts: int) -> np.ndarray:
    count = np.zeros(tokenizer.get_vocab_size())
    words = sorted(documents)
    for start in range(0, len(words), 10_000):
        block = words[start : start + 10_000]
        for word, encoding in zip(block, tokenizer.encode_batch(block, add_special_tokens=False), strict=True):
            count[list(set(encoding.ids))] += documents[word]
    return np.maximum(np.log((n_texts + 1) / (np.minimum(count, n_texts) + 1)), 0.1).astype(np.float32)


def _count_words(texts: Iterable[str], normalizer: normalizers.Normalizer) -> tuple[Counter[str], Counter[str], int]:
    """Return how often each word occurs, in how many texts, and how many texts there are."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts are given as an iterable of strings, not as one {type(texts).__name__}")
    words: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    position = -1
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text number {position} is {text!r}, not a string; give it a text or drop it")
        if text.isascii():
            found = _ASCII_WORDS.findall(text.lower())
        else:
            # Half a character (a lone surrogate) cannot be tokenised; as a question mark it does no harm here.
            text = text.encode("utf-8", "replace").decode("utf-8")
            found = _WORDS.findall(normalizer.normalize_str(text))
        words.update(found)
        documents.update(set(found))
    if position < 0:
        raise ValueError("there are no texts to train a tokenizer on; give at least one")
    if not words:
        raise ValueError(f"there is not one word in the {position + 1} texts to train a tokenizer on")
    return words, documents, position + 1


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Return every word as often as it was counted, which is how a trainer learns of counts."""
    for word, count in words.items():
        block = " ".join([word] * min(count, _WORDS_IN_A_TEXT))
        for _ in range(count // _WORDS_IN_A_TEXT):
            yield block
        if count % _WORDS_IN_A_TEXT:
            yield " ".join([word] * (count % _WORDS_IN_A_TEXT))

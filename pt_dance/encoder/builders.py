"""Encoders that are built rather than opened: static towers and two towers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from pt_dance.encoder import models as _models
from pt_dance.encoder import towers as _towers

if TYPE_CHECKING:
    from pt_dance.encoder.dual_encoder import DualEncoder


class EncoderBuilders:
    """The constructors of :class:`pt_dance.DualEncoder` besides opening a model."""

    @classmethod
    def static(
        cls,
        texts: Iterable[str],
        dim: int = 256,
        vocab_size: int = 30000,
        *,
        seed: int = 42,
        normalize: bool = True,
        **kwargs: Any,
    ) -> DualEncoder:
        """A static tower from nothing: a WordPiece tokenizer trained on ``texts``, and random token embeddings.

        A text's vector is the mean of its tokens' embeddings. These begin as random directions, as long as the token's
        inverse document frequency: a random projection of tf-idf, which is about how the untrained encoder ranks. It
        needs no download and is fast on a CPU. The same texts and seed give the same encoder, in any process.

        Args:
            texts: Any iterable of texts; it is read once, in bounded memory.
            dim: Length of the vectors.
            vocab_size: Tokens in the vocabulary at most.
            seed: Fixes the embeddings; the global random state is neither read nor changed.
            normalize: Whether vectors are scaled to length one (cosine similarity) or not (dot product).
            **kwargs: Options of :class:`DualEncoder`.

        Raises:
            TypeError: If ``texts`` is one string, or a text is none; names its position.
            ValueError: If there are no texts, or no words in them, or an option is out of range.
        """
        encoder = cls(_towers.static(texts, dim, vocab_size, seed, normalize), **kwargs)
        encoder.name = "static"
        return encoder

    @classmethod
    def static_from(
        cls, model: str | os.PathLike | SentenceTransformer | DualEncoder, dim: int | None = None, **kwargs: Any
    ) -> DualEncoder:
        """A static tower from another model's token embeddings and tokenizer.

        Args:
            model: A model that begins with a transformer or a static tower; it is not changed.
            dim: Length of the vectors: the principal components of the embeddings; all of them when ``None``.
            **kwargs: Options of :class:`DualEncoder`.

        Raises:
            ValueError: If the model has no token embeddings or no fast tokenizer, or fewer dimensions than ``dim``.
        """
        encoder = cls(_towers.static_from(_model_of(model), dim), **kwargs)
        encoder.name = f"static from {_name_of(model)}"
        return encoder

    @classmethod
    def two_towers(
        cls,
        query_model: str | os.PathLike | SentenceTransformer | DualEncoder,
        doc_model: str | os.PathLike | SentenceTransformer | DualEncoder,
        shared_projection: int | Dense | None = None,
        *,
        similarity: str | None = None,
        seed: int = 42,
        **kwargs: Any,
    ) -> DualEncoder:
        """One tower for queries and one for documents: ADE, or ADE-SPL with a shared projection.

        Source: Moiseev et al., SamToNe (Findings of ACL 2023), section 3. The towers are copies, also when the same
        model is given twice, and keep their own maximum lengths.

        Args:
            query_model: Model of the query tower.
            doc_model: Model of the document tower; its vectors must be as long as the query tower's.
            shared_projection: Output dimension of a linear layer (no bias, no activation) that both towers go through,
                or that layer itself; none when ``None``.
            similarity: ``"cosine"`` or ``"dot"``; that of both models when ``None``.
            seed: Fixes the projection's first weights; the global random state is neither read nor changed.
            **kwargs: Options of :class:`DualEncoder`; ``max_length`` applies to both towers.

        Raises:
            ValueError: If the towers' vectors differ in length, or their similarities differ and none is given.
        """
        opened = [_model_of(model) for model in (query_model, doc_model)]
        encoder = cls(_towers.two_towers(*opened, shared_projection, similarity, seed), **kwargs)
        names = [_name_of(model) for model in (query_model, doc_model)]
        encoder.name = " + ".join(dict.fromkeys(names)) + (" (two towers)" if names[0] == names[1] else "")
        return encoder


def _model_of(model: Any) -> Any:
    return model.model if isinstance(model, EncoderBuilders) else model


def _name_of(model: Any) -> str:
    return model.name if isinstance(model, EncoderBuilders) else _models.name_of(model)

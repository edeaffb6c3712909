"""DualEncoder: any sentence-transformers model as query encoder, document encoder and text scorer."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from pyterrier_dr import BiEncoder, SimFn
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding

from pt_dance.encoder import batches as _encoding
from pt_dance.encoder import models
from pt_dance.encoder import precision as _precision
from pt_dance.encoder.builders import EncoderBuilders
from pt_dance.encoder.files import EncoderFiles
from pt_dance.encoder.fingerprint import fingerprint as _fingerprint
from pt_dance.encoder.reading import prompt_for, reading_digests
from pt_dance.encoder.stages import HANDED_OVER, DocEncoder, QueryEncoder, TextScorer
from pt_dance.storage.options import choice, whole

DTYPES = ("float32", "bfloat16", "auto")


class DualEncoder(EncoderBuilders, EncoderFiles, BiEncoder, pt.Artifact):
    """A sentence-transformers model that encodes queries and documents into one vector space.

    Used in a pipeline it encodes what it is given, as every :class:`pyterrier_dr.BiEncoder` does: queries get a
    ``query_vec``, documents a ``doc_vec``, and rows with both a score. :meth:`query_encoder`, :meth:`doc_encoder` and
    :meth:`scorer` are these three on their own.

    Prompts, and the tower of a two-tower model, are those that sentence-transformers' ``encode_query`` and
    ``encode_document`` would choose. Its folder is a plain sentence-transformers folder.

    Args:
        model: A folder, a name on the Hugging Face hub, or a ``SentenceTransformer``. One in memory is not changed,
            but its weights are shared: training this encoder trains them.
        batch_size: Texts in one forward pass of :meth:`encode_queries_torch` and :meth:`encode_docs_torch`. Encoding
            without gradients chooses its batches itself.
        text_field: Column with the documents' text.
        verbose: Whether to show progress.
        device: Where the model runs; sentence-transformers' choice when ``None``.
        dtype: How texts are encoded without gradients: ``"float32"``; ``"bfloat16"``, under autocast; or ``"auto"``,
            bfloat16 where a product of the model's own shape is faster by a fifth; see :attr:`precision`.
        max_length: Texts are cut after so many tokens; the model's own limit when ``None``.

    Raises:
        TypeError: If ``model`` is none of the above.
        FileNotFoundError: If there is no such model.
        ValueError: If the folder holds no readable model or pickled weights, or an option is out of range.
    """

    ARTIFACT_TYPE = "bi_encoder"
    ARTIFACT_FORMAT = "sentence_transformers"
    ARTIFACT_PACKAGE_HINT = "pt_dance"

    schematic = {"label": "DualEncoder", "help_url": None}

    def __init__(
        self,
        model: str | os.PathLike | SentenceTransformer,
        *,
        batch_size: int = 32,
        text_field: str = "text",
        verbose: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
    ):
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive number of texts, not {batch_size!r}.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
        if not isinstance(text_field, str) or not text_field:
            raise ValueError(f"text_field must be the name of a column, not {text_field!r}.")
        opened = models.open_model(model, None if device is None else str(device))
        pt.Artifact.__init__(self, self.NO_PATH if isinstance(model, SentenceTransformer) else Path(model).expanduser())
        self.model = models.with_ending(opened, models.similarity_of(opened), device)
        if max_length is not None:
            models.set_max_length(self.model, max_length)
        self.name = models.name_of(model)
        self.text_field = text_field
        self.verbose = verbose
        self.dtype = dtype
        self.max_length = max_length
        self._choice: _precision.Choice | None = None
        self._batch_size = batch_size

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """How many texts a pipeline had better hand over at once, which is what ``encoder >> index`` reads it for.

        The number given to ``__init__`` applies to encoding with gradients; here it is only a lower bound.
        """
        return max(HANDED_OVER, self._batch_size)

    @property
    def similarity(self) -> str:
        """``"cosine"`` or ``"dot"``; either way, the plain dot product of the vectors is the score."""
        return self.model.similarity_fn_name

    @property
    def sim_fn(self) -> SimFn:
        """pyterrier_dr's name for how these vectors are compared: always the dot product."""
        return SimFn.dot

    @property
    def fingerprint(self) -> str:
        """Identifies the weights and all else that changes the vectors; computed anew every time.

        32 hexadecimal digits (xxh3, 128 bits) over weights, modules, prompts, tokenizers and maximum lengths.
        """
        return _fingerprint(self.model)

    @property
    def model_name(self) -> str:
        """What pyterrier_dr compares encoders by: here, the :attr:`fingerprint`."""
        return f"DualEncoder:{self.fingerprint}"

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        dim = self.model.get_embedding_dimension()
        if dim is None:
            with _encoding.evaluating(self.model), torch.no_grad():
                dim = int(self.encode_docs_torch(["dimension"]).shape[1])
        return dim

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def has_two_towers(self) -> bool:
        """Whether queries and documents are read by different modules."""
        first = self.model[0]
        return isinstance(first, Router) and {"query", "document"} <= set(first.sub_modules)

    @property
    def is_static(self) -> bool:
        """Whether every tower is a table of token embeddings."""
        first = self.model[0]
        towers = [part[0] for part in first.sub_modules.values()] if isinstance(first, Router) else [first]
        return all(isinstance(tower, StaticEmbedding) for tower in towers)

    @property
    def precision(self) -> str:
        """How texts are encoded without gradients: ``"float32"``, ``"float32-onednn"`` or ``"bfloat16"``.

        Chosen when it is first asked for or needed, by a timed product of the model's own shape (some 50 ms), and kept
        by copies. ``"float32-onednn"`` multiplies with oneDNN where PyTorch's own choice is slower: the same up to
        float32 rounding. An index notes it, and uses it for what is appended, for queries and in later sessions.
        """
        if self._choice is None:
            self._choice = _precision.choose(self.model, self.dtype)
        return self._choice.precision

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_queries(
        self, texts: Sequence[str], batch_size: int | None = None, *, precision: str | None = None
    ) -> np.ndarray:
        """Encode queries, with the prompt and tower of ``SentenceTransformer.encode_query``.

        Args:
            texts: The queries.
            batch_size: Texts in a batch at most; by tokens alone when ``None``.
            precision: That of an index these vectors belong to; the encoder's :attr:`precision` when ``None``.

        Returns:
            Array (len(texts), dim), float32. It does not depend on the batch size.

        Raises:
            TypeError: If a text is no string; names its position.
        """
        return self._encode(texts, "query", batch_size, self.verbose, precision)

    def encode_docs(
        self, texts: Sequence[str], batch_size: int | None = None, *, precision: str | None = None
    ) -> np.ndarray:
        """Encode documents, with the prompt and tower of ``SentenceTransformer.encode_document``.

        Args:
            texts: The documents.
            batch_size: Texts in a batch at most; by tokens alone when ``None``.
            precision: That of an index these vectors belong to; the encoder's :attr:`precision` when ``None``.

        Returns:
            Array (len(texts), dim), float32. It does not depend on the batch size.

        Raises:
            TypeError: If a text is no string; names its position.
        """
        return self._encode(texts, "document", batch_size, self.verbose, precision)

    def _encode(
        self, texts: Sequence[str], task: str, batch_size: int | None, verbose: bool, precision: str | None = None
    ) -> np.ndarray:
        texts = _encoding.checked(texts, task)
        batch_size = whole("batch_size", batch_size, or_none=True)
        choice("precision", precision, _precision.PRECISIONS, or_none=True)
        dim = self.dim
        if not texts:
            return np.empty((0, dim), np.float32)
        if precision is None:
            precision = self.precision
            _precision.say_if_slow(self._choice, len(texts))
        unit = "query" if task == "query" else "doc"
        with pt.tqdm(total=len(texts), desc=f"Encoding {unit}s", unit=unit, disable=not verbose) as bar:
            return _encoding.encode(
                self.model, texts, task, dim=dim, most=batch_size, precision=precision, progress=bar.update
            )

    def encode_queries_torch(self, texts: Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Encode queries for training: gradients are kept, and the model stays in the mode it is in.

        Args:
            texts: The queries.
            batch_size: Texts in one forward pass; that of the encoder when ``None``.

        Returns:
            Tensor (len(texts), dim) on the model's device.
        """
        return self._encode_torch(texts, "query", batch_size)

    def encode_docs_torch(self, texts: Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Encode documents for training: gradients are kept, and the model stays in the mode it is in.

        Args:
            texts: The documents.
            batch_size: Texts in one forward pass; that of the encoder when ``None``.

        Returns:
            Tensor (len(texts), dim) on the model's device.
        """
        return self._encode_torch(texts, "document", batch_size)

    def _encode_torch(self, texts: Sequence[str], task: str, batch_size: int | None) -> torch.Tensor:
        texts, size = _encoding.checked(texts, task), batch_size or self._batch_size
        if not texts:
            return torch.empty((0, self.dim), device=self.device)
        prompt = prompt_for(self.model, task)
        return torch.cat(
            [
                _encoding.forward(
                    self.model, self.model.preprocess(texts[i : i + size], prompt=prompt, task=task), task
                )
                for i in range(0, len(texts), size)
            ]
        )

    def reading_digests(self, texts: Sequence[str], task: str = "document") -> np.ndarray:
        """Return what tells the texts that the encoder can tell apart from one another: a hash of what it reads.

        That is their tokens: after lower-casing, unknown words and cutting at the maximum length, as the tokenizer
        does these; of static towers, whose vectors are means, without their order. Texts with equal hashes get equal
        vectors.

        Args:
            texts: Queries or documents.
            task: "query" or "document".

        Returns:
            uint64 (len(texts),).
        """
        return reading_digests(self.model, _encoding.checked(texts, task), task)

    # -- in pipelines --------------------------------------------------------------------------------------------

    def query_encoder(self, verbose: bool | None = None, batch_size: int | None = None) -> QueryEncoder:
        """A transformer that adds a column ``query_vec``; every distinct query is encoded once."""
        return QueryEncoder(self, verbose=verbose, batch_size=batch_size)

    def doc_encoder(self, verbose: bool | None = None, batch_size: int | None = None) -> DocEncoder:
        """A transformer that adds a column ``doc_vec``; every distinct text is encoded once."""
        return DocEncoder(self, verbose=verbose, batch_size=batch_size)

    def text_scorer(
        self, verbose: bool | None = None, batch_size: int | None = None, sim_fn: SimFn | None = None
    ) -> TextScorer:
        """A transformer that scores each row's document for its query; every distinct text is encoded once."""
        return TextScorer(self, verbose=verbose, batch_size=batch_size, sim_fn=sim_fn)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Encode queries, encode documents or score rows, as the columns suggest.

        Args:
            inp: Queries (``query``), documents (the text column), or rows with both.

        Returns:
            The same rows with ``query_vec``, ``doc_vec``, or ``score`` and ``rank``.
        """
        text = self.text_field
        with pt.validate.any(inp, context=self) as v:
            v.query_frame(extra_columns=["query"], mode="query_encoder")
            v.document_frame(extra_columns=[text], mode="doc_encoder")
            for query in ("query", "query_vec"):
                for doc in (text, "doc_vec"):
                    v.columns(includes=["qid", query, doc], mode="scorer")
            v.columns(includes=["query"], mode="query_encoder")
            v.columns(includes=[text], mode="doc_encoder")
        # Outside inspection exactly one mode is set; inspection asks with frames that match none.
        return getattr(self, v.mode)()(inp) if v.mode else inp

    # -- identity ------------------------------------------------------------------------------------------------

    def copy(self) -> DualEncoder:
        """A deep copy, with weights of its own."""
        return copy.deepcopy(self)

    def with_similarity(self, similarity: str) -> DualEncoder:
        """A deep copy that compares vectors by ``"cosine"`` or ``"dot"``; only the normalisation differs."""
        made = self.copy()
        made.model = models.with_ending(made.model, similarity)
        made.path = self.NO_PATH
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not isinstance(self.path, Path):
            self.path = self.NO_PATH  # which PyTerrier compares by identity

    def _key(self) -> tuple:
        return (self.fingerprint, self.text_field, self.dtype, self.verbose)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DualEncoder) and (self is other or self._key() == other._key())

    def __hash__(self) -> int:
        return hash((DualEncoder, self._key()))

    def __repr__(self) -> str:
        return f"DualEncoder({self.name!r})"

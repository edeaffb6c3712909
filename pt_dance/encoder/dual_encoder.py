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
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding

from pt_dance.encoder import batches, card, models, opening, publishing, towers
from pt_dance.encoder.fingerprint import fingerprint
from pt_dance.encoder.origin import FROM_NOTHING, of_weights, origin_of
from pt_dance.encoder.precision import PRECISIONS, Choice, choose, say_if_slow
from pt_dance.encoder.reading import reading_digests
from pt_dance.encoder.stages import HANDED_OVER, DocEncoder, QueryEncoder, TextScorer, stage_for
from pt_dance.storage import options
from pt_dance.storage.attributes import Fixed, Live
from pt_dance.storage.display import facts
from pt_dance.storage.folders import write_json
from pt_dance.storage.writing import new_folder

DTYPES = ("float32", "bfloat16", "auto")


class DualEncoder(BiEncoder, pt.Artifact):
    """A sentence-transformers model that encodes queries and documents into one vector space.

    In a pipeline queries get a ``query_vec``, documents a ``doc_vec``, and rows with both a score. Prompts and towers
    are those that sentence-transformers' ``encode_query`` and ``encode_document`` would choose, and its folder is a
    plain sentence-transformers folder.

    Args:
        model: A folder, a name on the Hugging Face hub, or a ``SentenceTransformer``. One in memory is not changed, but
            its weights are shared: training this encoder trains them. Half precision is opened as float32 (in memory,
            as a copy). Published models are opened as they were meant, see :mod:`pt_dance.encoder.published`.
        batch_size: Texts in one forward pass of :meth:`encode_queries_torch` and :meth:`encode_docs_torch`. Encoding
            without gradients chooses its batches itself.
        text_field: Column with the documents' text.
        verbose: Whether to show progress.
        device: Where the model runs; sentence-transformers' choice when ``None``.
        dtype: How texts are encoded without gradients: ``"float32"``; ``"bfloat16"``, under autocast; or ``"auto"``,
            bfloat16 where products of the model's own shapes are faster by a fifth; see :attr:`precision`.
        max_length: Texts are cut after so many tokens; the model's own limit when ``None``.
        pooling: ``"cls"`` or ``"mean"``, for a plain transformers checkpoint; a warning says where it is assumed.
        similarity: ``"cosine"`` or ``"dot"``; what the model says when ``None``, see :meth:`with_similarity`.

    Raises:
        TypeError: If ``model`` is none of the above.
        FileNotFoundError: If there is no such model.
        ValueError: If the folder holds no readable model or pickled weights, or an option is out of range.
    """

    ARTIFACT_TYPE = "bi_encoder"
    ARTIFACT_FORMAT = "sentence_transformers"
    ARTIFACT_PACKAGE_HINT = "pt_dance"

    schematic = {"label": "DualEncoder", "help_url": None}
    dtype, max_length, text_field = Fixed(), Fixed(), Live(options.column)

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
        pooling: str | None = None,
        similarity: str | None = None,
    ):
        self._batch_size = options.whole("batch_size", batch_size)
        self.text_field = text_field
        self.dtype = options.choice("dtype", dtype, DTYPES)
        self.max_length = options.whole("max_length", max_length, or_none=True)
        device = None if device is None else str(device)
        opened = towers.open_published(model, device, pooling, similarity)
        pt.Artifact.__init__(self, opening.folder_given(model) or self.NO_PATH)
        self.model = models.with_ending(opened, similarity or models.similarity_of(opened), device)
        if self.max_length is not None:
            models.set_max_length(self.model, self.max_length)
        self.name, self.origin = opening.name_of(model), origin_of(model)
        self.verbose = verbose
        self._choice: Choice | None = None

    @classmethod
    def static(
        cls,
        texts: Any,
        dim: int = 256,
        vocab_size: int = 30000,
        *,
        seed: int = 42,
        normalize: bool = True,
        **kwargs: Any,
    ) -> DualEncoder:
        """Build a static tower from nothing: a WordPiece tokenizer trained on ``texts``, and random token embeddings.

        A text's vector is the mean of its tokens' embeddings, which begin as random directions, as long as the token's
        inverse document frequency, so that it begins to rank about as tf-idf does. Always the same from the same texts.

        Args:
            texts: Any iterable of texts, or documents whose field ``text_field`` is read: a :class:`pt_dance.Corpus`,
                whatever has ``get_corpus_iter()``, a DataFrame, or dicts. Read once, in bounded memory.
            dim: Length of the vectors.
            vocab_size: Tokens in the vocabulary at most.
            seed: Fixes the embeddings.
            normalize: Whether vectors are scaled to length one (cosine similarity) or not (dot product).
            **kwargs: Options of :class:`DualEncoder`.

        Raises:
            TypeError: If ``texts`` is one string, or a text is none; names its position.
            ValueError: If there are no texts, or no words in them.
        """
        texts = towers.texts_of(texts, kwargs.get("text_field", "text"))
        encoder = cls(towers.static(texts, dim, vocab_size, seed, normalize), **kwargs)
        encoder.name, encoder.origin = "static", FROM_NOTHING
        return encoder

    @classmethod
    def static_from(
        cls, model: str | os.PathLike | SentenceTransformer | DualEncoder, dim: int | None = None, **kwargs: Any
    ) -> DualEncoder:
        """Build a static tower from another model's token embeddings and tokenizer.

        Args:
            model: A model that begins with a transformer or a static tower; it is not changed.
            dim: Length of the vectors: the principal components of the embeddings; all of them when ``None``.
            **kwargs: Options of :class:`DualEncoder`.

        Raises:
            ValueError: If the model has no token embeddings or no fast tokenizer, or fewer dimensions than ``dim``.
        """
        encoder = cls(towers.static_from(opening.model_of(model), dim), **kwargs)
        encoder.name, encoder.origin = f"static from {opening.name_of(model)}", origin_of(model) | {"trainings": []}
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
        """Build one tower for queries and one for documents: ADE, or ADE-SPL with a shared projection.

        Source: Moiseev et al., SamToNe (Findings of ACL 2023), section 3. The towers are copies, also of one model
        given twice, and keep their own maximum lengths.

        Args:
            query_model: Model of the query tower.
            doc_model: Model of the document tower. With a shared projection its vectors may be longer or shorter than
                the query tower's: the shorter ones first go through a linear layer of their own.
            shared_projection: Output dimension of a linear layer (no bias) that both towers go through, or that layer.
            similarity: ``"cosine"`` or ``"dot"``; that of both models when ``None``.
            seed: Fixes the projection's first weights.
            **kwargs: Options of :class:`DualEncoder`; ``max_length`` applies to both towers.

        Raises:
            ValueError: If the towers' vectors differ in length without a shared projection, or their similarities
                differ and none is given.
        """
        queries, documents = opening.model_of(query_model), opening.model_of(doc_model)
        encoder = cls(towers.two_towers(queries, documents, shared_projection, similarity, seed), **kwargs)
        encoder.origin = origin_of(query_model, doc_model)
        names = [opening.name_of(model) for model in (query_model, doc_model)]
        encoder.name = " + ".join(dict.fromkeys(names)) + (" (two towers)" if names[0] == names[1] else "")
        return encoder

    @property
    def batch_size(self) -> int:
        """How many texts ``encoder >> index`` hands over at once: at least the number given to ``__init__``."""
        return max(HANDED_OVER, self._batch_size)

    @property
    def similarity(self) -> str:
        """``"cosine"`` or ``"dot"``; either way, the plain dot product of the vectors is the score."""
        return self.model.similarity_fn_name

    sim_fn = SimFn.dot  # how pyterrier_dr compares these vectors, whatever the similarity

    @property
    def fingerprint(self) -> str:
        """Identifies all that changes the vectors, in 32 hexadecimal digits (xxh3, 128 bits); computed every time."""
        return fingerprint(self.model)

    @property
    def model_name(self) -> str:
        """What pyterrier_dr compares encoders by."""
        return f"DualEncoder:{self.fingerprint}"

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return batches.dim_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def pooling(self) -> str | None:
        """How the tokens of the (first) tower become a vector, e.g. ``"cls"``; ``None`` for a static tower."""
        return models.pooling_of(self.model)

    @property
    def has_two_towers(self) -> bool:
        """Whether queries and documents are read by different modules."""
        return isinstance(self.model[0], Router) and {"query", "document"} <= set(self.model[0].sub_modules)

    @property
    def is_static(self) -> bool:
        """Whether every tower is a table of token embeddings."""
        return all(isinstance(tower, StaticEmbedding) for tower in models.input_modules(self.model))

    @property
    def precision(self) -> str:
        """How texts are encoded without gradients: ``"float32"``, ``"float32-onednn"`` or ``"bfloat16"``.

        Chosen when it is first needed, by timed products of the model's own shapes (some 50 ms), and kept by copies.
        ``"float32-onednn"`` multiplies with oneDNN where PyTorch's own choice is slower. An index keeps to it.
        """
        if self._choice is None:
            self._choice = choose(self.model, self.dtype)
        return self._choice.precision

    def encode_queries(
        self, texts: Sequence[str], batch_size: int | None = None, *, precision: str | None = None
    ) -> np.ndarray:
        """Encode queries, with the prompt and tower of ``SentenceTransformer.encode_query``.

        Args:
            texts: The queries.
            batch_size: Texts in a batch at most; by tokens alone when ``None``.
            precision: That of an index these vectors belong to; the encoder's :attr:`precision` when ``None``.

        Returns:
            Array (len(texts), dim), float32.

        Raises:
            TypeError: If a text is no string; names its position.
        """
        return self._encode(texts, "query", batch_size, self.verbose, precision)

    def encode_docs(
        self, texts: Sequence[str], batch_size: int | None = None, *, precision: str | None = None
    ) -> np.ndarray:
        """Encode documents, with the prompt and tower of ``SentenceTransformer.encode_document``.

        Arguments, result and errors are those of :meth:`encode_queries`.
        """
        return self._encode(texts, "document", batch_size, self.verbose, precision)

    def _encode(
        self, texts: Sequence[str], task: str, batch_size: int | None, verbose: bool, precision: str | None = None
    ) -> np.ndarray:
        texts = batches.checked(texts, task)
        batch_size = options.whole("batch_size", batch_size, or_none=True)
        options.choice("precision", precision, PRECISIONS, or_none=True)
        dim = self.dim
        if not texts:
            return np.empty((0, dim), np.float32)
        if precision is None:
            precision = self.precision
            say_if_slow(self._choice, len(texts))
        unit = "query" if task == "query" else "doc"
        with pt.tqdm(total=len(texts), desc=f"Encoding {unit}s", unit=unit, disable=not verbose) as bar:
            return batches.encode(
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
        """Encode documents for training; arguments and result are those of :meth:`encode_queries_torch`."""
        return self._encode_torch(texts, "document", batch_size)

    def _encode_torch(self, texts: Sequence[str], task: str, batch_size: int | None) -> torch.Tensor:
        size = batch_size or self._batch_size
        return batches.encode_with_gradients(self.model, batches.checked(texts, task), task, size)

    def reading_digests(self, texts: Sequence[str], task: str = "document") -> np.ndarray:
        """Return a hash of what the encoder reads of each text, uint64 (len(texts),): equal ones get equal vectors.

        That is its tokens, after lower-casing, unknown words and cutting; of static towers without their order.
        """
        return reading_digests(self.model, batches.checked(texts, task), task)

    def query_encoder(self, verbose: bool | None = None, batch_size: int | None = None) -> QueryEncoder:
        """Return a transformer that adds ``query_vec``; every distinct query is encoded once."""
        return QueryEncoder(self, verbose=verbose, batch_size=batch_size)

    def doc_encoder(self, verbose: bool | None = None, batch_size: int | None = None) -> DocEncoder:
        """Return a transformer that adds ``doc_vec``; every distinct text is encoded once."""
        return DocEncoder(self, verbose=verbose, batch_size=batch_size)

    def text_scorer(
        self, verbose: bool | None = None, batch_size: int | None = None, sim_fn: SimFn | None = None
    ) -> TextScorer:
        """Return a transformer that scores each row's document for its query; every distinct text is encoded once."""
        if sim_fn not in (None, SimFn.dot):
            raise ValueError(
                f"sim_fn must be {SimFn.dot}, not {sim_fn!r}: the encoder's vectors are made for the dot product; "
                "encoder.with_similarity(...) makes others"
            )
        return TextScorer(self, verbose=verbose, batch_size=batch_size)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Encode queries, encode documents or score rows, as the columns suggest.

        Args:
            inp: Rows with ``query``, the text column, or both; they get ``query_vec``, ``doc_vec``, or a score.
        """
        stage = stage_for(self, inp)
        return inp if stage is None else stage(inp)

    def copy(self) -> DualEncoder:
        """Return a deep copy, with weights of its own."""
        return copy.deepcopy(self)

    def with_similarity(self, similarity: str) -> DualEncoder:
        """Return a deep copy that compares vectors by ``"cosine"`` or ``"dot"``; only the normalisation differs.

        A model that was trained for cosine ranks much worse by dot products, which the lengths of its vectors decide
        that nobody trained. Where a loss asks for dot products, use :meth:`with_head`, which keeps lengths alike.
        """
        return self._with(models.with_ending(self.copy().model, similarity))

    def with_head(
        self, head: str = "layernorm", dim: int = 768, *, shared: bool = True, init: str = "orthogonal", seed: int = 42
    ) -> DualEncoder:
        """Return a deep copy that ends in ANCE's head: a linear layer and LayerNorm, compared by dot product.

        LayerNorm keeps lengths nearly alike, so that dot products rank as cosines do. Source: ANCE's and DANCE's
        releases (``RobertaDot_NLL_LN``).

        Args:
            head: ``"layernorm"``.
            dim: Length of the vectors.
            shared: Whether two towers go through the same head, or each through a copy of its own.
            init: First weights of the linear layer: ``"orthogonal"`` keeps the vectors' angles as well as ``dim``
                numbers can; ``"normal"`` draws from N(0, .02²), as the releases do. Its bias begins as 0.
            seed: Fixes these weights.
        """
        return self._with(towers.with_head(self.copy().model, head, dim, shared, init, seed))

    def _with(self, model: SentenceTransformer) -> DualEncoder:
        made = copy.copy(self)
        made.model, made.path = model, self.NO_PATH
        return made

    def save(self, path: str | os.PathLike) -> DualEncoder:
        """Write a sentence-transformers folder (safetensors); it is written beside and renamed when complete.

        Raises:
            FileExistsError: If there is something at ``path`` already.
            OSError: If the disk is full or cannot be written to.
        """
        path = options.path_of(path)
        if path.exists():
            raise FileExistsError(f"{path} exists already; give a new folder")
        with new_folder(path, "the encoder") as building:
            self.write(building)
        self.path = path
        return self

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` to an empty folder, as a part of something larger."""
        models.write(self.model, folder)
        settings = {"batch_size": self._batch_size, "text_field": self.text_field, "dtype": self.dtype}
        kind = {"type": self.ARTIFACT_TYPE, "format": self.ARTIFACT_FORMAT, "package_hint": self.ARTIFACT_PACKAGE_HINT}
        about = {"name": self.name, "fingerprint": self.fingerprint, "similarity": self.similarity}
        note = {**kind, **about, "origin": of_weights(self.origin, about["fingerprint"])}
        write_json(folder / "pt_meta.json", {**note, "settings": {**settings, "max_length": self.max_length}})

    @classmethod
    def load(cls, path: str | os.PathLike, **kwargs: Any) -> DualEncoder:
        """Open a folder; options that are not given are those it was saved with.

        Args:
            path: A folder written by :meth:`save`, or any sentence-transformers folder.
            **kwargs: Options of :class:`DualEncoder`.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds no model that can be read.
        """
        path = options.path_of(path)
        if not path.is_dir():
            raise FileNotFoundError(f"there is no encoder folder {path}")
        meta = opening.read_note(path, cls.ARTIFACT_TYPE)
        saved = meta.get("settings", {})
        settings = {name: saved[name] for name in ("batch_size", "text_field", "dtype") if name in saved}
        encoder = cls(path, **(settings | kwargs))
        if isinstance(meta.get("name"), str):
            encoder.name = meta["name"]
        if "max_length" not in kwargs:
            encoder.__dict__["max_length"] = saved.get("max_length")  # the saved tokenizer cuts there already
        return encoder

    build_package = publishing.build_package
    model_card = card.model_card
    push_to_hub = publishing.push
    _hf_readme = publishing.artifact_readme

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

    def _repr_html_(self) -> str:
        return facts(f"DualEncoder: {self.name}", card.about(self))

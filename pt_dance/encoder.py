"""DualEncoder: any sentence-transformers model as query encoder, document encoder and text scorer."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from pyterrier_dr import BiEncoder, SimFn
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding

from pt_dance import _encoding, _files, _models, _probe, _towers
from pt_dance._encoder_transformers import HANDED_OVER, DocEncoder, QueryEncoder, TextScorer
from pt_dance._fingerprint import fingerprint as _fingerprint
from pt_dance._reading import prompt_for

DTYPES = ("float32", "bfloat16", "auto")
_SETTINGS = ("batch_size", "text_field", "dtype", "max_length")


class DualEncoder(BiEncoder, pt.Artifact):
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
        dtype: ``"float32"``: the model's own precision; ``"bfloat16"``: autocast when encoding without gradients;
            ``"auto"``: bfloat16 where a short timed probe finds it faster and its vectors keep a cosine of .9999.
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
        opened = _models.open_model(model, None if device is None else str(device))
        pt.Artifact.__init__(self, self.NO_PATH if isinstance(model, SentenceTransformer) else Path(model).expanduser())
        self.model = _models.with_ending(opened, _models.similarity_of(opened), device)
        if max_length is not None:
            _models.set_max_length(self.model, max_length)
        self.name = _name(model)
        self.text_field = text_field
        self.verbose = verbose
        self.dtype = dtype
        self.max_length = max_length
        self.probe: dict[str, Any] | None = None
        self._batch_size = batch_size

    # -- making one ----------------------------------------------------------------------------------------------

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
        encoder = cls(_towers.static_from(model.model if isinstance(model, DualEncoder) else model, dim), **kwargs)
        encoder.name = f"static from {model.name if isinstance(model, DualEncoder) else _name(model)}"
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
        models = [model.model if isinstance(model, DualEncoder) else model for model in (query_model, doc_model)]
        encoder = cls(_towers.two_towers(*models, shared_projection, similarity, seed), **kwargs)
        names = [model.name if isinstance(model, DualEncoder) else _name(model) for model in (query_model, doc_model)]
        encoder.name = " + ".join(dict.fromkeys(names)) + (" (two towers)" if names[0] == names[1] else "")
        return encoder

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

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_queries(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Encode queries, with the prompt and tower of ``SentenceTransformer.encode_query``.

        Args:
            texts: The queries.
            batch_size: Texts in a batch at most; by tokens alone when ``None``.

        Returns:
            Array (len(texts), dim), float32. It does not depend on the batch size.

        Raises:
            TypeError: If a text is no string; names its position.
        """
        return self._encode(texts, "query", batch_size, self.verbose)

    def encode_docs(self, texts: Sequence[str], batch_size: int | None = None) -> np.ndarray:
        """Encode documents, with the prompt and tower of ``SentenceTransformer.encode_document``.

        Args:
            texts: The documents.
            batch_size: Texts in a batch at most; by tokens alone when ``None``.

        Returns:
            Array (len(texts), dim), float32. It does not depend on the batch size.

        Raises:
            TypeError: If a text is no string; names its position.
        """
        return self._encode(texts, "document", batch_size, self.verbose)

    def _encode(self, texts: Sequence[str], task: str, batch_size: int | None, verbose: bool) -> np.ndarray:
        texts = _encoding.checked(texts, task)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be a positive number of texts, not {batch_size!r}.")
        dim = self.dim
        if not texts:
            return np.empty((0, dim), np.float32)
        plan = _probe.plan(self.model, texts, task, self.dtype)
        if plan.measured is not None:
            self.probe = plan.measured
        unit = "query" if task == "query" else "doc"
        with pt.tqdm(total=len(texts), desc=f"Encoding {unit}s", unit=unit, disable=not verbose) as bar:
            return _encoding.encode(
                self.model,
                texts,
                task,
                dim=dim,
                budget=plan.budget,
                most=batch_size,
                bfloat16=plan.bfloat16,
                progress=bar.update,
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
            v.result_frame(extra_columns=["query", text], mode="scorer")
            v.columns(includes=["query", text], mode="scorer")
            v.columns(includes=["query_vec", text], mode="scorer")
            v.columns(includes=["query", "doc_vec"], mode="scorer")
            v.columns(includes=["query_vec", "doc_vec"], mode="scorer")
            v.columns(includes=["query"], mode="query_encoder")
            v.columns(includes=[text], mode="doc_encoder")
        # Outside inspection exactly one mode is set; inspection asks with frames that match none.
        return getattr(self, v.mode)()(inp) if v.mode else inp

    # -- copies, files -------------------------------------------------------------------------------------------

    def copy(self) -> DualEncoder:
        """A deep copy, with weights of its own."""
        return copy.deepcopy(self)

    def with_similarity(self, similarity: str) -> DualEncoder:
        """A deep copy that compares vectors by ``"cosine"`` or ``"dot"``; only the normalisation differs."""
        made = self.copy()
        made.model = _models.with_ending(made.model, similarity)
        return made

    def save(self, path: str | os.PathLike) -> DualEncoder:
        """Write a sentence-transformers folder (safetensors); it is written beside and renamed when complete.

        Args:
            path: The folder to make.

        Returns:
            The encoder itself, whose ``path`` is now that folder.

        Raises:
            FileExistsError: If there is something at ``path`` already.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise FileExistsError(f"{path} exists already; give a new folder.")
        building = _files.building_path(path)
        _files.remove_folder(building)
        building.mkdir(parents=True)
        self._write(building)
        _files.publish_folder(building, path)
        self.path = path
        return self

    def _write(self, folder: Path) -> None:
        with _models.no_bars():
            self.model.save(str(folder), create_model_card=self.model._model_card_text is not None)
        settings = {name: getattr(self, f"_{name}", getattr(self, name)) for name in _SETTINGS}
        _files.write_json(
            folder / "pt_meta.json",
            {
                "type": self.ARTIFACT_TYPE,
                "format": self.ARTIFACT_FORMAT,
                "package_hint": self.ARTIFACT_PACKAGE_HINT,
                "name": self.name,
                "fingerprint": self.fingerprint,
                "similarity": self.similarity,
                "settings": settings,
            },
        )

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
        path = Path(path).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"There is no encoder folder {path}.")
        meta = _models.read_meta(path, cls.ARTIFACT_TYPE)
        saved = meta.get("settings", {})
        settings = {name: saved[name] for name in ("batch_size", "text_field", "dtype") if name in saved}
        encoder = cls(path, **(settings | kwargs))
        encoder.name = meta.get("name", encoder.name)
        return encoder

    def build_package(self, package_path: str | None = None, **kwargs: Any) -> str:
        """Package the encoder as it is now, saved or not; see :meth:`pyterrier.Artifact.build_package`."""
        if package_path is None:
            if self.path is self.NO_PATH:
                raise ValueError("Say where to write the package: this encoder has not been saved to a folder.")
            package_path = f"{self.path}.tar.lz4"
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            return pt.Artifact(folder).build_package(package_path, **kwargs)

    # -- identity ------------------------------------------------------------------------------------------------

    def _key(self) -> tuple:
        return (self.fingerprint, self.text_field, self.dtype, self.verbose)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DualEncoder) and (self is other or self._key() == other._key())

    def __hash__(self) -> int:
        return hash((DualEncoder, self._key()))

    def __repr__(self) -> str:
        return f"DualEncoder({self.name!r})"


def _name(model: str | os.PathLike | SentenceTransformer) -> str:
    if not isinstance(model, SentenceTransformer):
        return Path(str(model)).name
    base = model.model_card_data.base_model
    return Path(base).name if base else type(model[0]).__name__

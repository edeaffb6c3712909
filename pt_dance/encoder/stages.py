"""The transformers that a DualEncoder makes: they encode queries, encode documents, and score rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyterrier as pt
from pyterrier_dr.biencoder import BiDocEncoder, BiQueryEncoder, BiScorer

if TYPE_CHECKING:
    from pt_dance.encoder.dual_encoder import DualEncoder

HANDED_OVER = 8192  # rows an indexing pipeline hands over at once: enough to find texts of like length among them
_ROWS_AT_ONCE = 65536


def texts_of(frame: pd.DataFrame, column: str, key: str) -> tuple[list[str], np.ndarray]:
    """Return the distinct texts of a column, and for each row which of them it holds.

    Messages name a row by its ``key``, where the frame has that column.

    Raises:
        ValueError: If a text is missing (None or NaN) or no string; names the row.
    """
    distinct: dict[str, int] = {}
    rows = np.empty(len(frame), np.int64)
    for row, text in enumerate(frame[column].tolist()):
        if not isinstance(text, str):
            named = f"{key} {frame[key].iloc[row]!r}" if key in frame.columns else f"row number {row}"
            raise ValueError(f"the {column} of {named} is {text!r}, not a string; give it a text or drop the row")
        rows[row] = distinct.setdefault(text, len(distinct))
    return list(distinct), rows


def _column(vectors: np.ndarray, rows: np.ndarray, index: pd.Index) -> pd.Series:
    return pd.Series([vectors[row] for row in rows], index=index, dtype=object)


class _Encoding:
    """What the three have in common: identity by the encoder's weights."""

    bi_encoder_model: DualEncoder

    def _key(self) -> tuple:
        options = (getattr(self, name, None) for name in ("verbose", "batch_size", "text_field", "sim_fn"))
        return (self.bi_encoder_model, *options)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))


class QueryEncoder(_Encoding, BiQueryEncoder):
    """Add ``query_vec`` (float32 vectors) to rows with a ``query``; made by :meth:`DualEncoder.query_encoder`."""

    schematic = {"label": "Query Encoder", "help_url": None}

    def encode(self, texts: list[str], batch_size: int | None = None) -> np.ndarray:
        """Encode queries; see :meth:`DualEncoder.encode_queries`."""
        return self.bi_encoder_model._encode(texts, "query", batch_size or self.batch_size, self.verbose)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Encode the queries of a frame, every distinct one once.

        Args:
            inp: Rows with a ``query``.

        Returns:
            The same rows and columns, and ``query_vec``.

        Raises:
            ValueError: If a query is missing; names its qid.
        """
        with pt.validate.any(inp, context=self) as v:
            v.query_frame(extra_columns=["query"])
            v.columns(includes=["query"])
        texts, rows = texts_of(inp, "query", "qid")
        return inp.assign(query_vec=_column(self.encode(texts), rows, inp.index))

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Make a cut-off behind this stage before it."""
        return pt.RankCutoff(k) >> self


class DocEncoder(_Encoding, BiDocEncoder):
    """Add ``doc_vec`` (float32 vectors) to rows with a text; made by :meth:`DualEncoder.doc_encoder`."""

    schematic = {"label": "Doc Encoder", "help_url": None}

    def encode(self, texts: list[str], batch_size: int | None = None) -> np.ndarray:
        """Encode documents; see :meth:`DualEncoder.encode_docs`."""
        return self.bi_encoder_model._encode(texts, "document", batch_size or self.batch_size, self.verbose)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Encode the documents of a frame, every distinct text once.

        Args:
            inp: Rows with the encoder's text column.

        Returns:
            The same rows and columns, and ``doc_vec``.

        Raises:
            ValueError: If a text is missing; names its docno.
        """
        with pt.validate.any(inp, context=self) as v:
            v.document_frame(extra_columns=[self.text_field])
            v.columns(includes=[self.text_field])
        texts, rows = texts_of(inp, self.text_field, "docno")
        return inp.assign(doc_vec=_column(self.encode(texts), rows, inp.index))


class TextScorer(_Encoding, BiScorer):
    """Score rows by the similarity of query and document; made by :meth:`DualEncoder.text_scorer`."""

    schematic = {"label": "Bi-Encoder Scorer", "help_url": None}

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score every row, encoding every distinct query and every distinct text once.

        Args:
            inp: Rows with qid, ``query`` (or ``query_vec``) and the encoder's text column (or ``doc_vec``). Vectors
                that are there are used and kept.

        Returns:
            The same rows in the same order, with ``score`` (float32) and ``rank``, and all other columns.

        Raises:
            ValueError: If a query or text is missing; names its qid or docno.
        """
        with pt.validate.any(inp, context=self) as v:
            v.columns(includes=["qid", "query_vec", "doc_vec"])
            v.columns(includes=["qid", "query", "doc_vec"])
            v.columns(includes=["qid", "query_vec", self.text_field])
            v.columns(includes=["qid", "query", self.text_field])
        queries, query_of = self._vectors(inp, "query_vec", "query", "qid")
        docs, doc_of = self._vectors(inp, "doc_vec", self.text_field, "docno")
        if len(inp) and queries.shape[1] != docs.shape[1]:
            raise ValueError(
                f"the queries' vectors have {queries.shape[1]} dimensions and the documents' {docs.shape[1]}; "
                "drop the column that another encoder made"
            )
        scores = np.empty(len(inp), np.float32)
        for start in range(0, len(inp), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            scores[rows] = np.einsum("ij,ij->i", queries[query_of[rows]], docs[doc_of[rows]])
        return pt.model.add_ranks(inp.assign(score=scores))

    def _vectors(self, inp: pd.DataFrame, held: str, text: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        if held in inp.columns:
            vectors = np.stack(inp[held].tolist()) if len(inp) else np.empty((0, 0), np.float32)
            return vectors.astype(np.float32, copy=False), np.arange(len(inp))
        texts, rows = texts_of(inp, text, key)
        task = "query" if held == "query_vec" else "document"
        return self.bi_encoder_model._encode(texts, task, self.batch_size, self.verbose), rows


def stage_for(encoder: DualEncoder, frame: pd.DataFrame) -> pt.Transformer | None:
    """Return the stage that the columns of a frame ask for; ``None`` for a frame that inspection asks with."""
    text = encoder.text_field
    with pt.validate.any(frame, context=encoder) as v:
        v.query_frame(extra_columns=["query"], mode="query_encoder")
        v.document_frame(extra_columns=[text], mode="doc_encoder")
        for query in ("query", "query_vec"):
            for doc in (text, "doc_vec"):
                v.columns(includes=["qid", query, doc], mode="scorer")
        v.columns(includes=["query"], mode="query_encoder")
        v.columns(includes=[text], mode="doc_encoder")
    # Outside inspection exactly one mode is set; inspection asks with frames that match none.
    return getattr(encoder, v.mode)() if v.mode else None

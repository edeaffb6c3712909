"""The documents to be indexed, read in shards and checked one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.corpus.docnos import check_docno
from pt_dance.corpus.sources import iter_documents, source_length
from pt_dance.index.writer import check_vectors, digest_of
from pt_dance.storage.texts import checked_texts

# Texts of a shard are in memory together; very long ones make it end earlier.
SHARD_CHARACTERS = 1 << 26


class StreamError(RuntimeError):
    """The documents' own iterator raised; its error is the cause, and the work so far is kept."""


class ShardReader:
    """Documents in shards, checked one by one."""

    def __init__(self, source: Any, encoder: Any, text_field: str, shard_size: int, *, context: Any) -> None:
        # None only where documents come with vectors.
        self.encoder: Any = encoder
        self.source = source
        self.text_field, self.shard_size = text_field, shard_size
        self.precision: str | None = None
        self.length = source_length(source)
        if isinstance(source, pd.DataFrame):
            content = "doc_vec" if "doc_vec" in source.columns else self.text_field
            pt.validate.columns(source, includes=["docno", content], context=context)
        self._documents: Iterator[dict[str, Any]] = iter_documents(source)
        self.position = 0  # documents read so far
        self.with_vectors: bool | None = None

    def read(self, count: int | None) -> list[tuple[str, Any]]:
        """Return the next documents, each a docno with its text or vector: ``count``, or a shard's worth if None."""
        shard: list[tuple[str, Any]] = []
        characters = 0
        while len(shard) < (count or self.shard_size) and (count or characters < SHARD_CHARACTERS):
            try:
                document = next(self._documents, None)
            except TypeError:
                raise
            except Exception as err:
                raise StreamError(
                    f"the documents' iterator raised a {type(err).__name__} after {self.position:,} documents "
                    f"({err}); whole shards before it are kept: call again and it goes on from there"
                ) from err
            if document is None:
                break
            docno, content = self._check(document)
            self.position += 1
            characters += len(content)
            shard.append((docno, content))
        return shard

    def push_back(self, shard: list[tuple[str, Any]]) -> None:
        """Give documents back, to be read again."""
        key = "doc_vec" if self.with_vectors else self.text_field
        self.position -= len(shard)
        self._documents = itertools.chain(({"docno": docno, key: content} for docno, content in shard), self._documents)

    def _check(self, document: dict[str, Any]) -> tuple[str, Any]:
        docno = check_docno(document.get("docno"), self.position)
        with_vectors = document.get("doc_vec") is not None
        if self.with_vectors is None:
            self.with_vectors = with_vectors
            if not with_vectors and self.encoder is None:
                raise ValueError(
                    f"document {docno!r} has no 'doc_vec' and the index has no encoder: give one, DenseIndex(path, "
                    "encoder), or put one before it, encoder >> index"
                )
        if with_vectors != self.with_vectors:
            raise ValueError(
                f"document {docno!r} has {'a' if with_vectors else 'no'} 'doc_vec', unlike those before it: either all "
                "have one or none"
            )
        if with_vectors:
            return docno, self._check_vector(docno, document["doc_vec"])
        text = document.get(self.text_field)
        if text is None or (isinstance(text, float) and text != text) or text is pd.NA:
            found = repr(text) if self.text_field in document else f"no such field; it has {sorted(map(str, document))}"
            raise ValueError(
                f"document {docno!r} has no text in {self.text_field!r} ({found}): give an empty string, leave the "
                "document out, or name another text_field"
            )
        return docno, checked_texts([text], lambda _: f"the text of document {docno!r} in {self.text_field!r}")[0]

    def _check_vector(self, docno: str, vector: Any) -> np.ndarray:
        vector = np.asarray(vector)
        if vector.ndim != 1 or not len(vector) or vector.dtype.kind not in "fiu":
            raise ValueError(
                f"document {docno!r} has as its 'doc_vec' no row of numbers but {vector.dtype} of shape {vector.shape}"
            )
        return vector.astype("<f4")

    def vectors(self, shard: list[tuple[str, Any]], vec_size: int, vec_dtype: str) -> np.ndarray:
        """Encode a shard, or take the vectors it came with, and check them."""
        docnos, contents = zip(*shard, strict=True)
        if not self.with_vectors:
            vectors = self.encoder.encode_docs(list(contents), precision=self.precision)
            return check_vectors(vectors, docnos, vec_size, vec_dtype)
        for docno, vector in shard:
            if len(vector) != vec_size:
                raise ValueError(
                    f"document {docno!r} has a vector of {len(vector)} numbers where the index has {vec_size}"
                )
        return check_vectors(np.stack(contents), docnos, vec_size, vec_dtype)


def digest_of_shard(shard: list[tuple[str, Any]]) -> str:
    """Return a digest of the documents of a shard."""
    contents = (c.tobytes() if isinstance(c, np.ndarray) else c.encode() for _, c in shard)
    return digest_of([docno for docno, _ in shard], contents)

"""From documents to a dense index: reading, encoding in large shards, and putting the result in its place."""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.docnos import check_docno
from pt_dance.corpus.passages import PassageCorpus
from pt_dance.corpus.sources import iter_documents, source_length
from pt_dance.index.files import META, OpenIndex, row_bytes
from pt_dance.index.writer import IndexWriter, Shard, check_vectors, digest_of, recorded_settings
from pt_dance.storage.folders import (
    DiskError,
    building_path,
    human_bytes,
    lock_folder,
    publish_folder,
    remove_folder,
    replace_folder,
    require_space,
)
from pt_dance.storage.progress import progress_bar
from pt_dance.storage.texts import lone_surrogate
from pt_dance.storage.writing import KEPT, writing

if TYPE_CHECKING:
    from pt_dance.index.dense_index import DenseIndex

MODES = ("create", "overwrite", "append")
# Texts of a shard are in memory together; very long ones make it end earlier.
SHARD_CHARACTERS = 1 << 26
_BYTES_PER_DOCNO = 50


class StreamError(RuntimeError):
    """The documents' own iterator raised; its error is the cause, and the work so far is kept."""


def run(index: DenseIndex, source: Any, mode: str) -> None:
    """Build, replace or extend the index at ``index.index_path``; see :meth:`pt_dance.DenseIndex.indexer`."""
    with writing(index.index_path, "the index", KEPT):
        _run(index, source, mode)


def _run(index: DenseIndex, source: Any, mode: str) -> None:
    path = Path(index.index_path)
    base = check_target(index, mode)
    with_passages = isinstance(source, PassageCorpus)
    if base is not None and base.meta.get("passages", False) != with_passages:
        raise ValueError(
            f"the index {path} has {'whole documents' if with_passages else 'passages'}: append the same kind, a "
            f"{'Corpus' if with_passages else 'PassageCorpus'}."
        )
    documents = _Documents(index, source.passages if with_passages else source)
    building = building_path(path)
    building.parent.mkdir(parents=True, exist_ok=True)
    building.mkdir(exist_ok=True)
    with lock_folder(building, f"another process is indexing into {path}: wait for it, or choose another path."):
        writer = None
        try:
            first = documents.read(None)
            if not first:
                raise ValueError("there are no documents to index.")
            writer = _writer(index, documents, building, base, first)
            _write_shards(index, writer, documents, first)
            writer.finish(_meta(index, source, base, documents.precision))
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT) or writer is None:
                raise
            raise DiskError(
                err.errno,
                f"the disk is full after {writer.count:,} documents: free some room and call again, it goes on "
                "from there",
                str(building),
            ) from None
        finally:
            if writer is not None:
                writer.close()
            elif not any(building.iterdir()):
                remove_folder(building)
        if path.exists():
            replace_folder(building, path)
        else:
            publish_folder(building, path)


def check_target(index: DenseIndex, mode: str) -> OpenIndex | None:
    """Check that ``mode`` fits what is at the index's path; return the index to append to, if that is what it is."""
    path = Path(index.index_path)
    if mode == "append":
        base = OpenIndex(path)
        known = (base.meta.get("encoder") or {}).get("fingerprint")
        mine = None if index.given_encoder is None else index.given_encoder.fingerprint
        if mine is not None and known != mine:
            raise ValueError(
                f"the index {path} was made with other weights than those of the encoder given: documents can only be "
                "appended with the same ones."
            )
        return base
    if not path.exists():
        return None
    if mode == "create":
        raise FileExistsError(
            f'{path} already exists: to replace an index use .indexer(mode="overwrite"), to add documents '
            ".append(), or choose another path."
        )
    if not _is_dense_index(path):
        raise FileExistsError(
            f"{path} is no dense index (its {META} does not say so): overwriting it would delete what it holds; "
            "choose another path."
        )
    return None


def _is_dense_index(path: Path) -> bool:
    """Whether a folder says that it is a dense index, in whatever state."""
    from pt_dance.storage.folders import read_json

    try:
        return read_json(path / META).get("type") == "dense_index"
    except (OSError, ValueError):
        return False


class _Documents:
    """Documents in shards, checked one by one."""

    def __init__(self, index: DenseIndex, source: Any) -> None:
        # None only where documents come with vectors.
        self.encoder: Any = index.encoder_for_indexing()
        self.text_field, self.shard_size = index.text_field, index.shard_size
        self.precision: str | None = None
        self.length = source_length(source)
        if isinstance(source, pd.DataFrame):
            content = "doc_vec" if "doc_vec" in source.columns else self.text_field
            pt.validate.columns(source, includes=["docno", content], context=index)
        self._documents: Iterator[dict[str, Any]] = iter_documents(source)
        self._position = 0
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
                    f"the documents' iterator raised a {type(err).__name__} after {self._position:,} documents "
                    f"({err}); "
                    "whole shards before it are kept: call again and it goes on from there."
                ) from err
            if document is None:
                break
            docno, content = self._check(document)
            self._position += 1
            characters += len(content)
            shard.append((docno, content))
        return shard

    def push_back(self, shard: list[tuple[str, Any]]) -> None:
        """Give documents back, to be read again."""
        key = "doc_vec" if self.with_vectors else self.text_field
        self._position -= len(shard)
        self._documents = itertools.chain(({"docno": docno, key: content} for docno, content in shard), self._documents)

    def _check(self, document: dict[str, Any]) -> tuple[str, Any]:
        docno = check_docno(document.get("docno"), self._position)
        with_vectors = document.get("doc_vec") is not None
        if self.with_vectors is None:
            self.with_vectors = with_vectors
            if not with_vectors and self.encoder is None:
                raise ValueError(
                    f"document {docno!r} has no 'doc_vec' and the index has no encoder: give one, DenseIndex(path, "
                    "encoder), or put one before it, encoder >> index."
                )
        if with_vectors != self.with_vectors:
            raise ValueError(
                f"document {docno!r} has {'a' if with_vectors else 'no'} 'doc_vec', unlike those before it: either all "
                "have one or none."
            )
        if with_vectors:
            return docno, self._check_vector(docno, document["doc_vec"])
        text = document.get(self.text_field)
        if text is None or (isinstance(text, float) and text != text) or text is pd.NA:
            found = repr(text) if self.text_field in document else f"no such field; it has {sorted(map(str, document))}"
            raise ValueError(
                f"document {docno!r} has no text in {self.text_field!r} ({found}): give an empty string, leave the "
                "document out, or name another text_field."
            )
        if not isinstance(text, str):
            raise TypeError(
                f"document {docno!r} has a {type(text).__name__} in {self.text_field!r}: texts must be strings."
            )
        if (place := lone_surrogate(text)) is not None:
            raise ValueError(
                f"document {docno!r} has a text in {self.text_field!r} that is no valid Unicode (a lone surrogate at "
                f"character {place}): clean it or leave the document out."
            )
        return docno, text

    def _check_vector(self, docno: str, vector: Any) -> np.ndarray:
        vector = np.asarray(vector)
        if vector.ndim != 1 or not len(vector) or vector.dtype.kind not in "fiu":
            raise ValueError(
                f"document {docno!r} has as its 'doc_vec' no row of numbers but {vector.dtype} of shape {vector.shape}."
            )
        return vector.astype("<f4")

    def vectors(self, shard: list[tuple[str, Any]], vec_size: int | None, vec_dtype: str) -> np.ndarray:
        """Encode a shard, or take the vectors it came with, and check them."""
        docnos, contents = zip(*shard, strict=True)
        if self.with_vectors:
            size = vec_size or len(contents[0])
            for docno, vector in shard:
                if len(vector) != size:
                    raise ValueError(
                        f"document {docno!r} has a vector of {len(vector)} numbers where the index has {size}."
                    )
            return check_vectors(np.stack(contents), docnos, size, vec_dtype)
        vectors = self.encoder.encode_docs(list(contents), precision=self.precision)
        return check_vectors(vectors, docnos, vec_size, vec_dtype)


def _digest(shard: list[tuple[str, Any]]) -> str:
    contents = (c.tobytes() if isinstance(c, np.ndarray) else c.encode() for _, c in shard)
    return digest_of([docno for docno, _ in shard], contents)


def _writer(
    index: DenseIndex, documents: _Documents, building: Path, base: OpenIndex | None, first: list[tuple[str, Any]]
) -> IndexWriter:
    encoder = documents.encoder
    vec_dtype = index.vec_dtype if base is None else base.meta["vec_dtype"]
    vec_size = len(first[0][1]) if documents.with_vectors else encoder.dim
    if base is not None and base.meta["vec_size"] != vec_size:
        raise ValueError(
            f"document {first[0][0]!r} would get a vector of {vec_size} numbers where the index has "
            f"{base.meta['vec_size']}."
        )
    if documents.length is not None:
        size = row_bytes(vec_dtype, vec_size) + _BYTES_PER_DOCNO
        total = (documents.length + (base.meta["doc_count"] if base else 0)) * size
        done = sum(f.stat().st_size for f in building.iterdir() if f.is_file())
        require_space(building, max(0, total - done), f"an index of {documents.length:,} documents")
        _say(index, f"{index.index_path}: {documents.length:,} documents, {human_bytes(total)} on disk")
    settings = {
        "encoder": None if encoder is None else encoder.fingerprint,
        "text_field": None if documents.with_vectors else documents.text_field,
        "content": "vectors" if documents.with_vectors else "texts",
    }
    if encoder is not None and not documents.with_vectors:
        # How texts are encoded is measured anew by every process: what was begun goes on as it was begun.
        settings["dtype"] = encoder.dtype
        begun = recorded_settings(building)
        documents.precision = ((base.meta.get("encoder") or {}) if base is not None else begun).get("precision")
        if documents.precision is None or (base is None and begun.get("dtype") != encoder.dtype):
            documents.precision = encoder.precision
        settings["precision"] = documents.precision
    writer = IndexWriter(building, settings, vec_size, vec_dtype, base)
    if writer.fresh:
        _say(index, f"{index.index_path}: what was left of an earlier call had other settings: starting afresh")
    elif writer.recorded:
        _say(
            index,
            f"{index.index_path}: {sum(s.docs for s in writer.recorded):,} documents are indexed already: going on",
        )
    return writer


def _write_shards(index: DenseIndex, writer: IndexWriter, documents: _Documents, shard: list[tuple[str, Any]]) -> None:
    documents.push_back(shard)
    with progress_bar(index.verbose, f"{Path(index.index_path).name} vectors", documents.length) as bar:
        while True:
            recorded: Shard | None = writer.recorded[0] if writer.recorded else None
            shard = documents.read(recorded.docs if recorded else None)
            if recorded:
                if len(shard) == recorded.docs and _digest(shard) == recorded.digest:
                    writer.keep([docno for docno, _ in shard])
                    bar.update(len(shard))
                    continue
                _say(
                    index,
                    f"{index.index_path}: the documents differ from those of the earlier call after the first "
                    f"{writer.count:,}: starting afresh from there",
                )
                writer.drop()
                documents.push_back(shard)
                continue
            if not shard:
                return
            docnos = [docno for docno, _ in shard]
            writer.check_docnos(docnos)
            writer.add(docnos, documents.vectors(shard, writer.vec_size, writer.vec_dtype), _digest(shard))
            bar.update(len(shard))


def _meta(index: DenseIndex, source: Any, base: OpenIndex | None, precision: str | None) -> dict[str, Any]:
    encoder = index.encoder_for_indexing()
    known: Any = None
    if encoder is not None:
        known = {
            "fingerprint": encoder.fingerprint,
            "name": _text_or_none(getattr(encoder, "name", None)),
            "path": _path_beside(encoder, Path(index.index_path)),
            "similarity": encoder.similarity,
            "precision": precision,
        }
    if base is not None:
        known = known or base.meta.get("encoder")
    return {
        "sim_fn": "dot" if known is None else known.get("similarity") or "dot",
        "text_field": index.text_field,
        "corpus": source.fingerprint if isinstance(source, Corpus) and base is None else None,
        "encoder": known,
        **({"passages": True} if isinstance(source, PassageCorpus) else {}),
    }


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _path_beside(encoder: Any, index_path: Path) -> str | None:
    """Where the encoder is saved, as seen from the index, if both lie in the same folder and can be moved together."""
    path = getattr(encoder, "path", None)
    if not isinstance(path, (str, Path)) or not Path(path).is_dir():
        return None
    path, folder = Path(path).resolve(), index_path.resolve().parent
    if path == folder or not path.is_relative_to(folder):
        return None
    return (Path("..") / path.relative_to(folder)).as_posix()


def _say(index: DenseIndex, message: str) -> None:
    if index.verbose:
        pt.tqdm.write(message, file=sys.stderr)

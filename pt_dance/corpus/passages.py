"""Long documents as passages: a corpus whose documents are scored by their best passage (MaxP)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyterrier as pt

from pt_dance.corpus.corpus import Corpus, holds
from pt_dance.storage import options
from pt_dance.storage.attributes import Fixed
from pt_dance.storage.digests import new_digest
from pt_dance.storage.folders import recover_folder, write_json
from pt_dance.storage.meta import META, TEXT, read_meta
from pt_dance.storage.writing import in_turn, new_folder

_BLOCK_DOCUMENTS = 500
_COUNTS = "counts.u4"


class PassageCorpus(Corpus):
    """A corpus of whole documents that also holds their passages; made by :meth:`pt_dance.Corpus.to_passages`.

    Docnos, texts and everything else are those of the whole documents: for BM25, for a teacher, for qrels. Encoders see
    the passages. An index of this corpus has a vector for each passage, its retrievers give documents with the score of
    their best passage, mining searches the same way, and training lets a document's best passage count, for each query
    anew (MaxP; ANCE, Xiong et al., ICLR 2021, section 5.1 after Dai & Callan, SIGIR 2019).

    Attributes:
        documents: The ``Corpus`` of whole documents.
        passages: A ``Corpus`` of the passages, with docnos ``<docno>%p<number>``, those of a document in a row.

    Args:
        path: Folder written by :meth:`pt_dance.Corpus.to_passages`.

    Raises:
        FileNotFoundError: If there is no such folder, or the whole documents are no longer where they were.
        ValueError: If the folder is no corpus of passages, or damaged, or the documents are not those it was made of.
    """

    ARTIFACT_FORMAT = "passages"
    documents, passages, passage_counts = (Fixed() for _ in range(3))

    def _open(self) -> None:
        meta = read_meta(
            self.path,
            "corpus of passages",
            type=self.ARTIFACT_TYPE,
            formats=(self.ARTIFACT_FORMAT,),
            entries={"documents": TEXT, "documents_fingerprint": TEXT, "fingerprint": TEXT},
            advice="make one with Corpus.to_passages()",
        )
        if os.path.isabs(meta["documents"]) or "\0" in meta["documents"]:
            raise ValueError(f"{self.path / META} is damaged: it gives no relative path of the whole documents")
        self.documents = Corpus((self.path / meta["documents"]).resolve())
        if self.documents.fingerprint != meta["documents_fingerprint"]:
            raise ValueError(
                f"the corpus {self.documents.path} is not the one that {self.path} was made of: make it again with "
                "overwrite=True"
            )
        self.passages = Corpus(self.path / "passages")
        content = (self.path / _COUNTS).read_bytes() if (self.path / _COUNTS).is_file() else b""
        if len(content) != 4 * len(self.documents) or meta["fingerprint"] != _fingerprint(
            self.documents, self.passages, content
        ):
            raise ValueError(
                f"{self.path / _COUNTS} and the passages beside it are damaged, not what {META} says: make them again "
                "with overwrite=True"
            )
        counts = np.frombuffer(content, dtype="<u4")
        self.passage_counts = counts.astype(np.int32)
        self.fingerprint = meta["fingerprint"]
        self._settings = {name: meta.get(name) for name in ("length", "stride", "most", "prepend")}
        self.dataset, self.fields = self.documents.dataset, self.documents.fields
        self.separator = self.documents.separator
        self._columns, self._rows = self.documents._columns, self.documents._rows

    @cached_property
    def _start(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.passage_counts, dtype=np.int64)])

    def passage_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return which rows of ``passages`` documents have.

        Args:
            rows: int (n,), row numbers of documents; -1 has no passages.

        Returns:
            int64 (n, p), p being the largest number of passages among them; -1 where a document has fewer.
        """
        rows = np.asarray(rows, dtype=np.int64)
        known = np.maximum(rows, 0)
        count = np.where(rows < 0, 0, self.passage_counts[known])
        place = np.arange(int(count.max(initial=1)))
        return np.where(place < count[:, None], self._start[known][:, None] + place, -1)


def split_corpus(
    documents: Corpus, path: Path, settings: dict[str, Any], *, overwrite: bool, verbose: bool
) -> PassageCorpus:
    """Write the passages of a corpus to a folder; see :meth:`pt_dance.Corpus.to_passages`."""
    length, stride = options.whole("length", settings["length"]), options.whole("stride", settings["stride"])
    most, prepend = options.whole("most", settings["most"], or_none=True), settings["prepend"]
    settings = {"length": length, "stride": stride, "most": most, "prepend": prepend}
    if stride > length:
        raise ValueError(f"stride={stride} is more than length={length}: the words between would be in no passage")
    if prepend is not None and prepend != documents.fields[0]:
        raise ValueError(f"prepend={prepend!r} must be the first of the fields, {documents.fields[0]!r}, or None")
    if isinstance(documents, PassageCorpus):
        raise TypeError(f"{documents.path} holds passages already: use its whole documents, .documents")
    with in_turn(path):
        recover_folder(path)
        if path.exists() and not holds(path, PassageCorpus):
            raise FileExistsError(f"{path} exists and is no corpus of passages: choose another path")
        if path.exists() and not overwrite:
            return _same(path, documents, settings)
        _write(documents, path, settings, verbose)
        return PassageCorpus(path)


def _same(path: Path, documents: Corpus, settings: dict[str, Any]) -> PassageCorpus:
    """Open passages that are to be those that would be made."""
    passages = PassageCorpus(path)
    if passages.documents.fingerprint != documents.fingerprint:
        difference = f"those of {passages.documents.path}"
    else:
        found = passages._settings
        difference = ", ".join(f"{name}={found[name]!r}" for name, value in settings.items() if value != found[name])
    if difference:
        raise FileExistsError(
            f"{path} holds other passages ({difference}): overwrite=True replaces them, or choose another path"
        )
    return passages


def _write(documents: Corpus, path: Path, settings: dict[str, Any], verbose: bool) -> None:
    with new_folder(path, "the corpus of passages", replace=True) as building:
        counts = np.zeros(len(documents), dtype="<u4")
        passages = Corpus.build(
            _passages(documents, counts, **settings, verbose=verbose),
            building / "passages",
            fields=["text"],
            verbose=False,
        )
        (building / _COUNTS).write_bytes(counts.data)
        meta = {
            "type": PassageCorpus.ARTIFACT_TYPE,
            "format": PassageCorpus.ARTIFACT_FORMAT,
            "package_hint": PassageCorpus.ARTIFACT_PACKAGE_HINT,
            "documents": os.path.relpath(documents.path.resolve(), path.resolve()),
            "documents_fingerprint": documents.fingerprint,
            "fingerprint": _fingerprint(documents, passages, counts.tobytes()),
            **settings,
        }
        write_json(building / META, meta)


def open_corpus(path: str | Path) -> Corpus:
    """Open a corpus, with or without passages, as its metadata says."""
    return PassageCorpus(path) if holds(options.path_of(path), PassageCorpus) else Corpus(path)


def _fingerprint(documents: Corpus, passages: Corpus, counts: bytes) -> str:
    return new_digest(f"{documents.fingerprint} {passages.fingerprint} ".encode() + counts).hexdigest()


def _windows(text: str, length: int, stride: int, most: int | None) -> list[str]:
    """Cut a text as :func:`pyterrier.text.sliding` does, but also keep what is left after the last full window."""
    words = re.split(r"\s+", text)
    starts = range(0, max(len(words) - length, 0) + stride, stride)[:most]
    return [" ".join(words[start : start + length]) for start in starts]


def _passages(
    documents: Corpus, counts: np.ndarray, length: int, stride: int, most: int | None, prepend: str | None,
    verbose: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Return the passages of all documents in order; their number is written to ``counts``."""
    blocks, unit = range(0, len(documents), _BLOCK_DOCUMENTS), f"{_BLOCK_DOCUMENTS} docs"
    for first in pt.tqdm(blocks, desc="passages", unit=unit, disable=not verbose, delay=1):
        rows = np.arange(first, min(first + _BLOCK_DOCUMENTS, len(documents)))
        texts, docnos, before = documents.texts_at(rows), documents.docno(rows), [""] * len(rows)
        if prepend is not None:
            before = documents.field_at(prepend, rows)
            # A document's text begins with its first field, if that is not empty.
            before = [field and field + documents.separator for field in before]
            texts = [text[len(field) :] for text, field in zip(texts, before, strict=True)]
        for row, docno, text, title in zip(rows, docnos, texts, before, strict=True):
            for window in _windows(text, length, stride, most):
                yield {"docno": f"{docno}%p{counts[row]}", "text": title + window}
                counts[row] += 1

"""Long documents as passages: a corpus whose documents are scored by their best passage (MaxP)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt
import xxhash

from pt_dance.corpus.corpus import Corpus
from pt_dance.storage.folders import read_json, write_json
from pt_dance.storage.writing import new_folder

_BLOCK_DOCUMENTS = 500
_COUNTS = "counts.u4"
_FILLER = "\ue000"  # a character for private use, which stands in no text


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

    def _open(self) -> None:
        meta_path = self.path / "pt_meta.json"
        if not meta_path.is_file():
            raise FileNotFoundError(
                f"there is no corpus of passages at {self.path}: make one with Corpus.to_passages()."
            )
        meta = read_json(meta_path)
        if (meta.get("type"), meta.get("format")) != (self.ARTIFACT_TYPE, self.ARTIFACT_FORMAT):
            raise ValueError(
                f"{self.path} is no corpus of passages: {meta_path.name} says type {meta.get('type')!r}, "
                f"format {meta.get('format')!r}."
            )
        if not all(isinstance(meta.get(key), str) for key in ("documents", "documents_fingerprint", "fingerprint")):
            raise ValueError(f"{meta_path} does not say documents and fingerprints as it should: it is damaged.")
        if os.path.isabs(meta["documents"]) or "\0" in meta["documents"]:
            raise ValueError(f"{meta_path} gives no relative path of the whole documents: it is damaged.")
        self.documents = Corpus((self.path / meta["documents"]).resolve())
        if self.documents.fingerprint != meta["documents_fingerprint"]:
            raise ValueError(
                f"the corpus {self.documents.path} is not the one that {self.path} was made of: make them again."
            )
        self.passages = Corpus(self.path / "passages")
        content = (self.path / _COUNTS).read_bytes() if (self.path / _COUNTS).is_file() else b""
        if len(content) != 4 * len(self.documents) or meta["fingerprint"] != _fingerprint(
            self.documents, self.passages, content
        ):
            raise ValueError(
                f"{self.path / _COUNTS} and the passages beside it are not what {meta_path.name} says: they are "
                "damaged; make them again."
            )
        counts = np.frombuffer(content, dtype="<u4")
        self.passage_counts: np.ndarray = counts.astype(np.int32)
        self.fingerprint = meta["fingerprint"]
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

    def __repr__(self) -> str:
        return f"PassageCorpus({str(self.path)!r})"


def split_corpus(
    documents: Corpus, path: Path, length: int, stride: int, *, most: int | None, prepend: str | None, verbose: bool
) -> PassageCorpus:
    """Write the passages of a corpus to a new folder; see :meth:`pt_dance.Corpus.to_passages`."""
    for name, value in (("length", length), ("stride", stride), ("most", most)):
        if not (name == "most" and value is None) and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if stride > length:
        raise ValueError(f"stride={stride} is more than length={length}: the words between would be in no passage.")
    if prepend is not None and prepend != documents.fields[0]:
        raise ValueError(f"prepend must be the first of the fields, {documents.fields[0]!r}, not {prepend!r}.")
    if isinstance(documents, PassageCorpus):
        raise TypeError(f"{documents.path} holds passages already: use its whole documents, .documents.")
    if path.exists():
        raise FileExistsError(
            f"{path} already exists: open it with PassageCorpus({str(path)!r}), or choose another path."
        )
    with new_folder(path, "the corpus of passages") as building:
        counts = np.zeros(len(documents), dtype="<u4")
        passages = Corpus.build(
            _passages(documents, counts, length, stride, most, prepend, verbose),
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
            "length": length,
            "stride": stride,
            "most": most,
            "prepend": prepend,
        }
        write_json(building / "pt_meta.json", meta)
    return PassageCorpus(path)


def open_corpus(path: str | Path) -> Corpus:
    """Open a corpus, with or without passages, as its metadata says."""
    meta = Path(path) / "pt_meta.json"
    passages = meta.is_file() and read_json(meta).get("format") == PassageCorpus.ARTIFACT_FORMAT
    return PassageCorpus(path) if passages else Corpus(path)


def _fingerprint(documents: Corpus, passages: Corpus, counts: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(f"{documents.fingerprint} {passages.fingerprint} ".encode() + counts)


def _filled(text: str, length: int, stride: int) -> str:
    words = len(re.split(r"\s+", text))
    missing = (length - words) % stride if words > length else 0
    return text + f" {_FILLER}" * missing


def _passages(
    documents: Corpus, counts: np.ndarray, length: int, stride: int, most: int | None, prepend: str | None,
    verbose: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The passages of all documents in order; their number is written to ``counts``."""
    sliding = pt.text.sliding(text_attr="text", length=length, stride=stride, prepend_attr=None)
    blocks = range(0, len(documents), _BLOCK_DOCUMENTS)
    if verbose:
        blocks = pt.tqdm(blocks, desc="passages", unit=f"{_BLOCK_DOCUMENTS} docs", delay=1)
    for first in blocks:
        rows = np.arange(first, min(first + _BLOCK_DOCUMENTS, len(documents)))
        texts, docnos, before = documents.texts_at(rows), documents.docno(rows), [""] * len(rows)
        if prepend is not None:
            before = documents.field_at(prepend, rows)
            # A document's text begins with its first field, if that is not empty.
            before = [field and field + documents.separator for field in before]
            texts = [text[len(field) :] for text, field in zip(texts, before, strict=True)]
        # PyTerrier leaves out what is left after the last full window: that is filled up, and emptied afterwards.
        texts = [_filled(text, length, stride) for text in texts]
        # Numbers instead of docnos, which may hold a %p of their own.
        split = sliding(pd.DataFrame({"docno": rows.astype(str), "text": texts}))
        for name, text in zip(split["docno"], split["text"], strict=True):
            row, _, number = name.partition("%p")
            row, number = int(row), int(number)
            if most is not None and number >= most:
                continue
            counts[row] += 1
            text = re.sub(f"(?: {_FILLER})+$", "", text)
            yield {"docno": f"{docnos[row - first]}%p{number}", "text": before[row - first] + text}

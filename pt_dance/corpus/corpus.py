"""Texts and titles of a collection on disk, with random access by docno."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyterrier as pt
import xxhash

from pt_dance.corpus.arrow import TextColumn, open_table, table_writer
from pt_dance.corpus.docnos import DocnoRows, DuplicateDocnos, check_docno
from pt_dance.corpus.sources import iter_documents
from pt_dance.storage.folders import read_json, write_json
from pt_dance.storage.progress import progress_bar
from pt_dance.storage.writing import new_folder

if TYPE_CHECKING:
    from pt_dance.corpus.passages import PassageCorpus

_BLOCK_DOCUMENTS = 1000
_BLOCK_CHARACTERS = 16 << 20


class Corpus(pt.Artifact):
    """A collection's documents on disk: Arrow files of ``datasets``, memory-mapped, so that any size fits.

    Every stage sees the same text of a document: ``text``, its non-empty fields joined by a separator (title and text
    by default). Two corpora are equal if their content is.

    Args:
        path: Folder written by :meth:`build`.

    Raises:
        FileNotFoundError: If there is no corpus at ``path``.
        ValueError: If the folder is no corpus, or damaged.

    Example::

        corpus = Corpus.build(pt.get_dataset("irds:vaswani"), "data/vaswani", fields=["text"])
        corpus.texts(["42", "7"])
        bm25 >> pt.text.get_text(corpus, "text") >> encoder.scorer()
    """

    ARTIFACT_TYPE = "corpus"
    ARTIFACT_FORMAT = "arrow"
    ARTIFACT_PACKAGE_HINT = "pt_dance"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._open()

    def _open(self) -> None:
        if not (self.path / "pt_meta.json").is_file():
            kind = "a folder without pt_meta.json" if self.path.exists() else "nothing"
            raise FileNotFoundError(
                f"there is no corpus at {self.path} ({kind} is there): make one with Corpus.build()."
            )
        meta_path = self.path / "pt_meta.json"
        meta = read_json(meta_path)
        if (meta.get("type"), meta.get("format")) != (self.ARTIFACT_TYPE, self.ARTIFACT_FORMAT):
            raise ValueError(
                f"{self.path} is no corpus: {meta_path.name} says type {meta.get('type')!r}, "
                f"format {meta.get('format')!r}."
            )
        count, fields, fingerprint = meta.get("doc_count"), meta.get("fields"), meta.get("fingerprint")
        if not (
            type(count) is int
            and count > 0
            and isinstance(fingerprint, str)
            and isinstance(fields, list)
            and fields
            and all(isinstance(f, str) for f in fields)
        ):
            raise ValueError(
                f"{meta_path} does not say doc_count, fields and fingerprint as a corpus does: it is damaged."
            )
        for name in ("corpus.arrow", "docnos.hash"):
            file, size = self.path / name, (meta.get("files") or {}).get(name)
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(
                    f"{file} is missing or has not the {size} bytes that pt_meta.json says: it is damaged."
                )
        self.dataset = open_table(self.path / "corpus.arrow")
        columns = list(self.dataset.column_names)
        if len(self.dataset) != count or columns != _columns(fields):
            raise ValueError(
                f"{self.path / 'corpus.arrow'} does not hold the {count} documents and the columns that "
                "pt_meta.json says: it is damaged."
            )
        self.fields: tuple[str, ...] = tuple(fields)
        self.separator: str = meta.get("separator", " ")
        self.fingerprint: str = fingerprint
        self._columns = {name: TextColumn(self.dataset, name) for name in columns}
        self._rows = DocnoRows.open(self.path / "docnos.hash", count, self._columns["docno"].take)

    @classmethod
    def build(
        cls,
        source: Any,
        path: str | Path,
        *,
        fields: Sequence[str] = ("title", "text"),
        separator: str = " ",
        verbose: bool = True,
    ) -> Corpus:
        """Write the documents of ``source`` to a new folder, as a stream: memory does not grow with them.

        Args:
            source: An iterable of dicts, a DataFrame, or an object with ``get_corpus_iter()`` such as a PyTerrier data
                set. Each document has a ``docno`` and the fields.
            path: Folder to make; written beside and renamed, so that it is whole or not there.
            fields: Fields that make up a document's text, in this order. The last one must be a string in every
                document; the others may be missing, None or NaN, which counts as empty.
            separator: What stands between two non-empty fields.
            verbose: Whether to show a progress bar.

        Returns:
            The corpus.

        Raises:
            FileExistsError: If something is at ``path`` already.
            TypeError: If a document, docno or field has the wrong type.
            ValueError: If a docno is invalid or occurs twice, if the last field of a document is missing or None, if
                there are no documents, or the fields make no sense. The message names the docno.
            OSError: If the disk is full or cannot be written to.
        """
        path, fields = Path(path), _check_fields(fields)
        if path.exists():
            raise FileExistsError(f"{path} already exists: open it with Corpus({str(path)!r}), or choose another path.")
        documents = iter_documents(source, verbose=verbose, desc=f"{path.name} corpus")
        with new_folder(path, "the corpus") as building:
            write_json(building / "pt_meta.json", _write(building, documents, fields, separator))
        return cls(path)

    def __len__(self) -> int:
        return len(self.dataset)

    def __contains__(self, docno: str) -> bool:
        return bool(self._rows([docno])[0] >= 0)

    def rows(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row number of each docno, ``int64``, -1 where there is no such document."""
        return self._rows(docnos)

    def docno(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the docnos of row numbers, an array of ``str`` objects of the same length.

        Raises:
            IndexError: If a row number is negative or too large.
        """
        return np.array(self._columns["docno"].take(rows), dtype=object)

    def texts(self, docnos: Sequence[str]) -> list[str]:
        """Return the texts of documents.

        Raises:
            KeyError: Naming a docno that is not in the corpus.
        """
        return self.texts_at(self.known_rows(docnos))

    def texts_at(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Return the texts of row numbers.

        Raises:
            IndexError: If a row number is negative or too large.
        """
        return self._columns["text"].take(rows)

    def field_at(self, name: str, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Return one column (``docno``, a field, or ``text``) of row numbers, like :meth:`texts_at`."""
        return self._columns[name].take(rows)

    def known_rows(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row number of each docno, ``int64``.

        Raises:
            KeyError: Naming a docno that is not in the corpus.
        """
        docnos = list(docnos)
        rows = self._rows(docnos)
        if (rows < 0).any():
            missing = docnos[int(np.flatnonzero(rows < 0)[0])]
            raise KeyError(f"docno {missing!r} is not in the corpus {self.path} ({len(self):,} documents).")
        return rows

    def get_corpus_iter(self, verbose: bool = True, start: int = 0) -> Iterator[dict[str, str]]:
        """Iterate over the documents in stored order.

        Args:
            verbose: Whether to show a progress bar.
            start: Row number to start at.

        Yields:
            Dicts with ``docno``, the fields and ``text``.
        """
        with progress_bar(verbose, f"{self.path.name} documents", len(self), start) as bar:
            for begin in range(start, len(self), _BLOCK_DOCUMENTS):
                rows = range(begin, min(begin + _BLOCK_DOCUMENTS, len(self)))
                columns = {name: column.take(rows) for name, column in self._columns.items()}
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
                bar.update(len(rows))

    def text_loader(self, fields: str | Sequence[str] = "*", *, verbose: bool = False) -> pt.Transformer:
        """Return a transformer that adds columns with the documents' texts, for ``pt.text.get_text(corpus, "text")``.

        Args:
            fields: ``text``, a field, a list of them, or ``*`` for all.
            verbose: Whether to show a progress bar.

        Raises:
            ValueError: If the corpus has no such field.
        """
        from pt_dance.corpus.text_loader import CorpusTextLoader

        return CorpusTextLoader(self, fields, verbose=verbose)

    def to_passages(
        self,
        path: str | Path,
        *,
        length: int = 150,
        stride: int = 75,
        most: int | None = 8,
        prepend: str | None = None,
        verbose: bool = True,
    ) -> PassageCorpus:
        """Cut the documents into passages with :func:`pyterrier.text.sliding`, to score them by the best one (MaxP).

        Args:
            path: Folder to make; the whole documents stay where they are.
            length: Words of a passage.
            stride: Words from one passage's beginning to the next one's.
            most: How many passages of a document count, the first ones; None for all. A batch of training holds so many
                texts for each document.
            prepend: The first field, such as the title, if every passage is to begin with it; None for none.
            verbose: Whether to show a progress bar.

        Returns:
            A corpus for :class:`pt_dance.DanceRetriever` and :class:`pt_dance.DenseIndex`.

        Raises:
            FileExistsError: If something is at ``path`` already.
            ValueError: If an option makes no sense.
            OSError: If the disk is full or cannot be written to.
        """
        from pt_dance.corpus.passages import split_corpus

        return split_corpus(self, Path(path), length, stride, most=most, prepend=prepend, verbose=verbose)

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Corpus) else NotImplemented

    def __hash__(self) -> int:
        return hash((Corpus, self.fingerprint))

    def __repr__(self) -> str:
        return f"Corpus({str(self.path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()


def _columns(fields: Sequence[str]) -> list[str]:
    return ["docno", *(f for f in fields if f != "text"), "text"]


def _check_fields(fields: Sequence[str]) -> list[str]:
    fields = [fields] if isinstance(fields, str) else list(fields)
    if not fields or not all(isinstance(f, str) and f for f in fields) or len(set(fields)) < len(fields):
        raise ValueError(f"fields must name at least one field, each once, not {fields!r}.")
    if "docno" in fields:
        raise ValueError("'docno' cannot be one of the fields: it is the document's name, not its text.")
    return fields


def _text_of(document: dict[str, Any], docno: str, fields: Sequence[str], separator: str) -> tuple[list[str], str]:
    values = []
    for field in fields:
        value = document.get(field)
        if value is None or (isinstance(value, float) and value != value) or value is pd.NA:
            if field == fields[-1]:
                found = f"{value!r}" if field in document else f"nothing: its fields are {sorted(map(str, document))}"
                raise ValueError(
                    f"document {docno!r} has {found} as its {field!r}: every document needs a string there; give "
                    "an empty one, leave the document out, or choose other fields."
                )
            value = ""
        elif not isinstance(value, str):
            raise TypeError(
                f"document {docno!r} has a {type(value).__name__} as its {field!r}: fields must be strings."
            )
        values.append(value)
    return values, separator.join(v for v in values if v)


def _write(folder: Path, documents: Iterator[dict[str, Any]], fields: list[str], separator: str) -> dict[str, Any]:
    """Write the files of a corpus and return its metadata."""
    names = _columns(fields)
    digest = xxhash.xxh3_128("\x1f".join(names).encode())
    seen = DuplicateDocnos()
    with table_writer(folder / "corpus.arrow", names) as write:
        block: dict[str, list[str]] = {name: [] for name in names}
        characters = 0
        for position, document in enumerate(documents):
            docno = check_docno(document.get("docno"), position)
            values, text = _text_of(document, docno, fields, separator)
            seen.add(docno)
            row = {"docno": docno, **dict(zip(fields, values, strict=True)), "text": text}
            for name in names:
                raw = row[name].encode("utf-8", "surrogatepass")
                digest.update(len(raw).to_bytes(8, "little") + raw)
                block[name].append(row[name])
                characters += len(raw)
            if len(block["docno"]) == _BLOCK_DOCUMENTS or characters >= _BLOCK_CHARACTERS:
                write(block)
                block, characters = {name: [] for name in names}, 0
        if block["docno"]:
            write(block)
    if not seen.hashes:
        raise ValueError("the source has no documents: a corpus needs at least one.")
    docnos = TextColumn(open_table(folder / "corpus.arrow"), "docno")
    seen.check(lambda row: docnos.take([row])[0])
    DocnoRows.write(folder / "docnos.hash", seen.hashes)
    files = {name: (folder / name).stat().st_size for name in ("corpus.arrow", "docnos.hash")}
    return {
        "type": "corpus",
        "format": "arrow",
        "package_hint": "pt_dance",
        "doc_count": len(seen.hashes),
        "fields": fields,
        "separator": separator,
        "fingerprint": digest.hexdigest(),
        "files": files,
    }

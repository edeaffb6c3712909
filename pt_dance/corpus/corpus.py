"""Texts and titles of a collection on disk, with random access by docno."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyterrier as pt

from pt_dance.corpus.arrow import TextColumn, open_table
from pt_dance.corpus.docnos import DocnoRows
from pt_dance.corpus.files import DocumentFiles
from pt_dance.corpus.records import (
    HASHES,
    TABLE,
    blocks_of,
    checked_fields,
    columns_of,
    cut_anew,
    first_difference,
    row_of,
    rows_in,
    write_blocks,
)
from pt_dance.corpus.sources import iter_documents
from pt_dance.corpus.text_loader import CorpusTextLoader
from pt_dance.storage import options
from pt_dance.storage.attributes import Fixed
from pt_dance.storage.display import cut, facts, grid
from pt_dance.storage.folders import read_json, recover_folder, write_json
from pt_dance.storage.meta import META, TEXT, TEXT_OR_NONE, check_sizes, entry_of, list_entry, read_meta, whole_entry
from pt_dance.storage.progress import progress_bar
from pt_dance.storage.writing import in_turn, new_folder

if TYPE_CHECKING:
    from pt_dance.corpus.passages import PassageCorpus

_BLOCK_DOCUMENTS = 1000
_ENTRIES = {
    "doc_count": whole_entry(1, 2**32 - 1),
    "fields": list_entry(str, "a list of names", least=1),
    "separator": TEXT_OR_NONE,
    "fingerprint": TEXT,
    "files": entry_of(dict, "the size of each file"),
}


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

    path, dataset, fields, separator, fingerprint = (Fixed() for _ in range(5))

    def __init__(self, path: str | Path) -> None:
        super().__init__(options.path_of(path))
        self._open()

    def _open(self) -> None:
        meta = read_meta(
            self.path,
            "corpus",
            type=self.ARTIFACT_TYPE,
            formats=(self.ARTIFACT_FORMAT,),
            entries=_ENTRIES,
            advice="make one with Corpus.build()",
        )
        count, fields = meta["doc_count"], meta["fields"]
        sizes = {name: meta["files"].get(name, 0) for name in (TABLE, HASHES)}
        check_sizes(self.path, sizes, "corpus", "build it again with overwrite=True")
        self.dataset, pages = open_table(self.path / TABLE)
        columns = list(self.dataset.column_names)
        if len(self.dataset) != count or columns != columns_of(fields):
            raise ValueError(
                f"{self.path / TABLE} is damaged: it does not hold the {count} documents and columns that {META} says"
            )
        self.fields = tuple(fields)
        self.separator = " " if meta.get("separator") is None else meta["separator"]
        self.fingerprint = meta["fingerprint"]
        self._columns = {name: TextColumn(self.dataset, pages, name) for name in columns}
        self._rows = DocnoRows.open(self.path / HASHES, count, self._columns["docno"].take)

    @classmethod
    def build(
        cls,
        source: Any,
        path: str | Path,
        *,
        fields: Sequence[str] = ("title", "text"),
        separator: str = " ",
        workers: int = 1,
        overwrite: bool = False,
        verbose: bool = True,
    ) -> Corpus:
        """Write the documents of ``source`` to a folder, as a stream: memory does not grow with them.

        A corpus that is at ``path`` already is compared with ``source`` document by document, and used where it is the
        same. Threads, and processes of the same job, that ask for a corpus that another one is making wait for it.

        Args:
            source: An iterable of dicts, a DataFrame, an object with ``get_corpus_iter()`` such as a PyTerrier data
                set, or a Terrier index (an object, or its folder) that stores its documents' text, as
                ``pt.IterDictIndexer(path, meta={"docno": 20, "text": 131072})`` does up to so many bytes. Each document
                has a ``docno`` and the fields. Another corpus of the same fields is copied as it is. Or a list of
                paths of Parquet or JSONL files (``.parquet``, ``.jsonl``, ``.jsonl.gz``), such as
                ``sorted(pathlib.Path(folder).glob("*.parquet"))``, read in this order; there, ``_id`` may stand for
                ``docno``, and whole numbers are taken as strings.
            path: Folder to make; written beside and renamed, so that it is whole or not there.
            fields: Fields that make up a document's text, in this order. The last one must be a string in every
                document; the others may be missing, None or NaN, which counts as empty.
            separator: What stands between two non-empty fields.
            workers: Processes that parse and check the documents of files, with the same result. They are started anew
                (a script needs ``if __name__ == "__main__":``), which takes seconds, so one is quicker for small
                collections.
            overwrite: Whether a corpus at ``path`` is replaced, once the new one is whole.
            verbose: Whether to show a progress bar.

        Returns:
            The corpus.

        Raises:
            FileExistsError: If at ``path`` there is a corpus of other documents, unless ``overwrite`` says to replace
                it, or something else.
            TypeError: If a document, docno or field has the wrong type.
            ValueError: If a docno is invalid or occurs twice, if the last field of a document is missing or None, if
                there are no documents, a file is broken, or an option makes no sense. The message names the docno; of
                files also which, and the line or row.
            RuntimeError: If a worker was killed or could not start.
            OSError: If the disk is full or cannot be written to.
        """
        path, fields = options.path_of(path), checked_fields(fields)
        files, workers = DocumentFiles.of(source), options.whole("workers", workers)
        if workers > 1 and files is None:
            raise ValueError(f"workers={workers} are for a list of Parquet or JSONL files; leave it out for others")
        names, desc = columns_of(fields), f"{path.name} corpus"
        if files is not None:
            blocks = cut_anew(files.blocks(fields, separator, workers=workers, verbose=verbose, desc=desc))
        elif isinstance(source, Corpus) and (list(source.fields), source.separator) == (fields, separator):
            blocks = blocks_of(source._iter_rows(range(len(source))), names)
        else:
            documents = iter_documents(source, verbose=verbose, desc=desc)
            blocks = blocks_of((row_of(d, number, fields, separator) for number, d in enumerate(documents)), names)
        with in_turn(path), contextlib.closing(blocks):
            recover_folder(path)
            if path.exists() and not overwrite:
                return _same(path, blocks, fields, separator)
            if path.exists() and not holds(path, Corpus):
                raise FileExistsError(f"{path} exists and is no corpus, so it is not replaced: choose another path")
            with new_folder(path, "the corpus", replace=overwrite) as building:
                meta = write_blocks(building, blocks, fields, separator, files.file_of if files else None)
                write_json(building / META, meta)
            return Corpus(path)

    def _iter_rows(self, rows: range) -> Iterator[tuple[str, ...]]:
        for start in range(rows.start, rows.stop, _BLOCK_DOCUMENTS):
            block = range(start, min(start + _BLOCK_DOCUMENTS, rows.stop))
            yield from zip(*(column.take(block) for column in self._columns.values()), strict=True)

    def __len__(self) -> int:
        return len(self.dataset)

    def __contains__(self, docno: str) -> bool:
        return bool(self._rows([docno])[0] >= 0)

    def rows(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row number of each docno, ``int64``, -1 where there is no such document."""
        return self._rows(options.list_of("docnos", docnos, "Corpus.rows"))

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
            TypeError: If it is one string instead of several.
        """
        return self.texts_at(self.known_rows(options.list_of("docnos", docnos, "Corpus.texts")))

    def texts_at(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Return the texts of row numbers.

        Raises:
            IndexError: If a row number is negative or too large.
        """
        return self._columns["text"].take(rows)

    def field_at(self, name: str, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Return one column (``docno``, a field, or ``text``) of row numbers, like :meth:`texts_at`."""
        return self._columns[name].take(rows)

    def field_bytes(self, name: str, rows: range) -> int:
        """Return how many bytes one column takes in consecutive rows, without reading it."""
        return self._columns[name].bytes(rows)

    def known_rows(self, docnos: Sequence[str]) -> np.ndarray:
        """Return the row number of each docno, ``int64``.

        Raises:
            KeyError: Naming a docno that is not in the corpus.
            TypeError: If it is one string instead of several.
        """
        docnos = options.list_of("docnos", docnos, "Corpus.known_rows")
        rows = self._rows(docnos)
        if (rows < 0).any():
            missing = docnos[int(np.flatnonzero(rows < 0)[0])]
            raise KeyError(f"docno {missing!r} is not in the corpus {self.path} ({len(self):,} documents)")
        return rows

    def get_corpus_iter(
        self, verbose: bool = True, start: int = 0, count: int | None = None
    ) -> Iterator[dict[str, str]]:
        """Iterate over the documents in stored order.

        Args:
            verbose: Whether to show a progress bar.
            start: Row number to start at.
            count: How many documents; None for all that follow.

        Yields:
            Dicts with ``docno``, the fields and ``text``.
        """
        start = options.whole("start", start, 0)
        end = len(self) if count is None else min(len(self), start + options.whole("count", count, 0))
        with progress_bar(verbose, f"{self.path.name} documents", end, start) as bar:
            for values in self._iter_rows(range(start, end)):
                yield dict(zip(self._columns, values, strict=True))
                bar.update()

    def text_loader(self, fields: str | Sequence[str] = "*", *, verbose: bool = False) -> pt.Transformer:
        """Return a transformer that adds columns with the documents' texts, for ``pt.text.get_text(corpus, "text")``.

        Args:
            fields: ``text``, a field, a list of them, or ``*`` for all.
            verbose: Whether to show a progress bar.

        Raises:
            ValueError: If the corpus has no such field.
        """
        return CorpusTextLoader(self, fields, verbose=verbose)

    def to_passages(
        self,
        path: str | Path,
        *,
        length: int = 150,
        stride: int = 75,
        most: int | None = 8,
        prepend: str | None = None,
        overwrite: bool = False,
        verbose: bool = True,
    ) -> PassageCorpus:
        """Cut the documents into passages with :func:`pyterrier.text.sliding`, to score them by the best one (MaxP).

        The passages of the same documents and options that are at ``path`` already are used.

        Args:
            path: Folder to make; the whole documents stay where they are.
            length: Words of a passage.
            stride: Words from one passage's beginning to the next one's.
            most: How many passages of a document count, the first ones; None for all. A batch of training holds so many
                texts for each document.
            prepend: The first field, such as the title, if every passage is to begin with it; None for none.
            overwrite: Whether other passages at ``path`` are replaced, once the new ones are whole.
            verbose: Whether to show a progress bar.

        Returns:
            A corpus for :class:`pt_dance.DanceRetriever` and :class:`pt_dance.DenseIndex`.

        Raises:
            FileExistsError: If at ``path`` there are other passages, unless ``overwrite`` says to replace them, or
                something else.
            ValueError: If an option makes no sense.
            OSError: If the disk is full or cannot be written to.
        """
        from pt_dance.corpus.passages import split_corpus

        settings = {"length": length, "stride": stride, "most": most, "prepend": prepend}
        return split_corpus(self, options.path_of(path), settings, overwrite=overwrite, verbose=verbose)

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Corpus) else NotImplemented

    def __hash__(self) -> int:
        return hash((Corpus, self.fingerprint))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _repr_html_(self) -> str:
        first = range(min(len(self), 3))
        texts = [cut(text, 160) for text in self.texts_at(first)]
        about = {"documents": len(self), "fields": ", ".join(self.fields), "content": self.fingerprint}
        rows = zip(self.docno(first), texts, strict=True)
        return facts(type(self).__name__, {"path": str(self.path), **about}, grid(["docno", "text"], rows))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()


def check_corpus(name: str, value: Any) -> Corpus | None:
    """Return an attribute that is a corpus or None.

    Raises:
        TypeError: If it is something else.
    """
    if value is not None and not isinstance(value, Corpus):
        raise TypeError(f"{name} must be a pt_dance.Corpus, such as Corpus.build() gives, not {type(value).__name__}")
    return value


def holds(path: Path, kind: type[Corpus]) -> bool:
    """Return whether the folder at ``path`` is one of ours of this kind, whole or damaged."""
    try:
        meta = read_json(path / META)
    except (OSError, ValueError):
        return False
    return (meta.get("type"), meta.get("format")) == (kind.ARTIFACT_TYPE, kind.ARTIFACT_FORMAT)


def _same(path: Path, blocks: Iterator[Any], fields: list[str], separator: str) -> Corpus:
    """Open the corpus at a path, which is to be the one that would be built of some blocks of rows."""
    if not holds(path, Corpus):
        raise FileExistsError(f"{path} exists and is no corpus: choose another path")
    corpus = Corpus(path)
    if (list(corpus.fields), corpus.separator) != (fields, separator):
        difference: str | None = f"its fields are {corpus.fields}, joined by {corpus.separator!r}"
    else:
        difference = first_difference(rows_in(blocks), corpus._iter_rows(range(len(corpus))), len(corpus))
    if difference is not None:
        raise FileExistsError(
            f"{path} holds another corpus ({difference}): overwrite=True replaces it, or choose another path"
        )
    return corpus

"""A test collection in a folder in the layout of the BEIR benchmark (Thakur et al., NeurIPS 2021, arXiv 2104.08663)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.json_lines import BROKEN, broken_file, json_object, open_lines
from pt_dance.corpus.text_loader import CorpusTextLoader
from pt_dance.storage import options
from pt_dance.storage.digests import file_digest

_QRELS_HEADER = ["query-id", "corpus-id", "score"]
_USUAL_ORDER = {"train": 0, "dev": 1, "test": 2}


class BeirFolder(pt.datasets.Dataset):
    """A folder that holds ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``.

    The corpus has a JSON object a line with ``_id``, ``text`` and, optionally, ``title``; the queries have ``_id`` and
    ``text``; the judgements are tab-separated with the header ``query-id corpus-id score``. Corpus and queries may be
    compressed (``.jsonl.gz``). Nothing is read before it is asked for, and the corpus is only ever streamed.

    The texts of queries are given as they are written in the file. Terrier's query language gives a meaning to
    punctuation, so a pipeline for Terrier needs its own tokenisation (``pt.rewrite.tokenise()``).

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If the folder holds no corpus.
    """

    def __init__(self, folder: str | Path):
        self._folder = options.path_of(folder, "folder")
        self._file("corpus.jsonl")

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    @property
    def _name(self) -> str:
        return self.folder.resolve().name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._folder)!r})"

    @property
    def splits(self) -> list[str]:
        """The names of the splits that have judgements: train, dev and test first, the others by name."""
        names = [path.stem for path in (self.folder / "qrels").glob("*.tsv")]
        return sorted(names, key=lambda name: (_USUAL_ORDER.get(name, len(_USUAL_ORDER)), name))

    def get_corpus_iter(
        self, *, verbose: bool = True, start: int = 0, count: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Stream the documents in the order of the file.

        Args:
            verbose: Whether to show a progress bar.
            start: Number of the first document, from 0; the lines before it are read but not looked at.
            count: How many documents; None for all that follow.

        Returns:
            An iterator of dicts with ``docno``, ``title`` ("" where a document has none), ``text`` and whatever other
            fields the file has.

        Raises:
            ValueError: If ``start`` or ``count`` makes no sense; while iterating, if a line is no JSON object, or its
                ``_id`` or ``text`` is missing or of another type; the message names file and line.
        """
        start, count = options.whole("start", start, 0), options.whole("count", count, 0, or_none=True)
        documents = _documents(self._file("corpus.jsonl"), start, None if count is None else start + count)
        bar = pt.tqdm(documents, desc=f"{self._name} documents", total=count, unit="d", disable=not verbose)
        return iter(bar)

    def text_loader(self, fields: str | Sequence[str] = "*", *, verbose: bool = False) -> pt.Transformer:
        """Return a transformer that adds the documents' texts by docno, for ``pt.text.get_text(dataset, "text")``.

        The first call writes the documents to a :class:`pt_dance.Corpus` below PyTerrier's home; later ones use it as
        long as the file's content is the same.

        Args:
            fields: ``text``, ``title``, a list of them, or ``*`` for both.
            verbose: Whether to show progress bars.

        Raises:
            ValueError: If there is no such field.
            OSError: If the disk is full or cannot be written to.
        """
        file = self._file("corpus.jsonl")
        path = Path(pt.io.pyterrier_home()) / "pt_dance" / f"{self._name}-{file_digest(file)[:16]}"
        try:
            corpus = Corpus(path)
        except (FileNotFoundError, ValueError):
            # Under another name, since a corpus's own text has the title in it.
            parts = ({"docno": d["docno"], "title": d["title"], "body": d["text"]} for d in _documents(file))
            corpus = Corpus.build(parts, path, fields=["title", "body"], overwrite=True, verbose=verbose)
        return CorpusTextLoader(corpus, fields, columns={"title": "title", "text": "body"}, verbose=verbose)

    def get_topics(self, variant: str | None = None) -> pd.DataFrame:
        """Return the queries.

        Args:
            variant: A split, for the queries judged in it; None for all queries.

        Returns:
            A frame with the string columns ``qid`` and ``query``, in the order of the file.

        Raises:
            FileNotFoundError: If the folder holds no queries.
            ValueError: If there is no such split, if the split judges a query that the file of queries does not have,
                or a line cannot be read.
        """
        qrels = None if variant is None else self.get_qrels(variant)
        path = self._file("queries.jsonl")
        queries: dict[str, str] = {}
        for number, record in _json_lines(path):
            qid = _identifier(record, path, number)
            if qid in queries:
                raise ValueError(f"{path}, line {number}: the query {qid!r} occurs a second time; remove one")
            queries[qid] = _text(record, "text", path, number)
        topics = pd.DataFrame({"qid": list(queries), "query": list(queries.values())}, dtype="str")
        if qrels is None:
            return topics
        judged = set(qrels["qid"])
        missing = sorted(judged - queries.keys())
        if missing:
            raise ValueError(
                f"{self._qrels_file(variant)} judges the query {missing[0]!r}"
                + (f" and {len(missing) - 1:,} more" if len(missing) > 1 else "")
                + f" not to be found in {path}; add the query or remove its judgements"
            )
        return topics[topics["qid"].isin(judged)].reset_index(drop=True)

    def get_qrels(self, variant: str | None = None) -> pd.DataFrame:
        """Return the judgements of a split.

        Args:
            variant: The split; may be left out where there is only one.

        Returns:
            A frame with the string columns ``qid`` and ``docno`` and the int64 column ``label``.

        Raises:
            FileNotFoundError: If the folder holds no judgements at all.
            ValueError: If there is no such split, or a line of its file cannot be read.
        """
        return _read_qrels(self._qrels_file(variant))

    def _qrels_file(self, split: str | None) -> Path:
        splits = self.splits
        if not splits:
            raise FileNotFoundError(f"{self.folder} has no judgements: no file qrels/<split>.tsv")
        available = ", ".join(repr(name) for name in splits)
        if split is None:
            if len(splits) > 1:
                raise ValueError(f"{self!r} has several splits, so say which judgements you want: one of {available}")
            split = splits[0]
        if split not in splits:
            raise ValueError(f"{self!r} has no split {split!r}; available: {available}")
        return self.folder / "qrels" / f"{split}.tsv"

    def _file(self, name: str) -> Path:
        for path in (self.folder / name, self.folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.folder} is no folder in BEIR layout: it has neither {name} nor {name}.gz")

    def _describe_component(self, component: str) -> bool | list[str] | None:
        if component == "corpus":
            return True
        return self.splits if component in ("topics", "qrels") else None


def _documents(path: Path, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
    for number, record in islice(_json_lines(path, start), None if end is None else end - start):
        docno = _identifier(record, path, number)
        title = "" if record.get("title") is None else _text(record, "title", path, number)
        text = _text(record, "text", path, number)
        del record["_id"]
        yield {**record, "docno": docno, "title": title, "text": text}


def _json_lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of the lines that are not blank, without the first ``start`` of them."""
    with open_lines(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                if start > 0:
                    start -= 1
                    continue
                yield number, json_object(line, path, number)
        except BROKEN as error:
            raise broken_file(path, number, error) from error


def _identifier(record: dict[str, Any], path: Path, number: int) -> str:
    value = record.get("_id")
    # A bool is an int to Python.
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{path}, line {number}: '_id' must be a string or a whole number, found {value!r}")
    return str(value)


def _text(record: dict[str, Any], field: str, path: Path, number: int) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        found = "nothing" if field not in record else repr(value)
        raise ValueError(f"{path}, line {number}: {field!r} of {record['_id']!r} must be a string, found {found}")
    return value


def _read_qrels(path: Path) -> pd.DataFrame:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected at least the header {' '.join(_QRELS_HEADER)!r}")
    labels: dict[tuple[str, str], int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid UTF-8 ({error}); correct this line") from error
            if number == 1:
                if values != _QRELS_HEADER:
                    raise ValueError(
                        f"{path}, line 1: expected the header {' '.join(_QRELS_HEADER)!r} separated by tabs, found "
                        f"{' '.join(values)!r}"
                    )
                continue
            if values == [""]:
                continue
            if len(values) != len(_QRELS_HEADER) or not values[0] or not values[1]:
                raise ValueError(
                    f"{path}, line {number}: expected three values separated by tabs ({', '.join(_QRELS_HEADER)}), "
                    f"found {values!r}"
                )
            qid, docno, score = values
            try:
                label = int(score) if "." not in score else _whole(float(score))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: the score must be a whole number, not {score!r}") from error
            if labels.setdefault((qid, docno), label) != label:
                raise ValueError(
                    f"{path}, line {number}: query {qid!r} and document {docno!r} are judged twice, as "
                    f"{labels[qid, docno]} and as {label}; remove one of the two"
                )
    types = {"qid": "str", "docno": "str", "label": "int64"}
    return pd.DataFrame([(*pair, label) for pair, label in labels.items()], columns=list(types)).astype(types)


def _whole(score: float) -> int:
    if not score.is_integer():
        raise ValueError("no whole number")
    return int(score)

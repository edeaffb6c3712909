"""The outcome of a run as others get it: encoder, index, history and settings of one round, without the corpus."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import pyterrier as pt

from pt_dance.corpus.passages import PassageCorpus
from pt_dance.encoder.card import artifact_card
from pt_dance.storage.folders import read_json
from pt_dance.storage.meta import META
from pt_dance.storage.options import path_of

CORPUS, DOCUMENTS = "corpus", "documents"


class Outcome(pt.Artifact):
    """The current round of a ``DanceRetriever``, to be packaged and uploaded by PyTerrier.

    Args:
        dance: The ``DanceRetriever``; its index is made if it is not there yet.
        number: Its current round.
        meta: What ``save`` would write into ``pt_meta.json``.
        include_corpus: Whether the texts go along.

    Raises:
        ValueError: If the corpus is to go along and there is none.
    """

    def __init__(self, dance: Any, number: int, meta: dict[str, Any], *, include_corpus: bool):
        if include_corpus and dance.corpus is None:
            raise ValueError("include_corpus=True: this DanceRetriever has no corpus; give corpus=... when loading it")
        super().__init__(dance.path)
        self._dance, self._number, self._include_corpus = dance, number, include_corpus
        self._encoder = dance.encoder
        self._meta = _without_folders(meta) | {"corpus": CORPUS if include_corpus else None}

    def build_package(self, package_path: str | None = None, *, verbose: bool | None = None, **options: Any) -> str:
        """Write the package; silent where the retriever is."""
        verbose = self._dance.verbose if verbose is None else verbose
        if package_path is not None:
            package_path = str(path_of(package_path, "package_path"))
        return super().build_package(package_path, verbose=verbose, **options)

    def _package_files(self) -> Iterator[tuple[str, Any]]:
        """Yield where each file goes and what it is, large ones from where they are."""
        round_ = f"rounds/{self._number:02d}"
        yield META, _json(self._meta)
        with tempfile.TemporaryDirectory() as folder:
            self._encoder.write(Path(folder))
            yield from _files(Path(folder), f"{round_}/encoder")
        yield from _files(Path(self._dance.index.index_path), f"{round_}/index")
        if not self._include_corpus:
            return
        corpus = self._dance.corpus
        if isinstance(corpus, PassageCorpus):
            yield f"{CORPUS}/{META}", _json(read_json(corpus.path / META) | {"documents": f"../{DOCUMENTS}"})
            yield from ((name, file) for name, file in _files(corpus.path, CORPUS) if name != f"{CORPUS}/{META}")
            yield from _files(corpus.documents.path, DOCUMENTS)
        else:
            yield from _files(corpus.path, CORPUS)

    def _hf_readme(self, *, repo: str, branch: str | None = "main", metadata: Any = None, **_: Any) -> str:
        name = repo if branch in (None, "main") else f"{repo}@{branch}"
        return self._card(repo.rsplit("/", 1)[-1], f"dance = pt.Artifact.from_hf({name!r})", metadata)

    def _zenodo_metadata(self, *, zenodo_id: str, metadata: Any, pretty_name: str | None = None) -> dict[str, Any]:
        about = super()._zenodo_metadata(zenodo_id=zenodo_id, metadata=metadata, pretty_name=pretty_name)
        card = self._card(pretty_name or "", f"dance = pt.Artifact.from_zenodo({str(zenodo_id)!r})", metadata)
        return about | {"description": f"<pre>{escape(card.split('---', 2)[2].strip())}</pre>"}

    def _card(self, title: str, load: str, metadata: Any) -> str:
        kept = "It comes with the corpus." if self._include_corpus else "The corpus is not part of it."
        about = (
            f"With it come its index of {len(self._dance.index):,} documents and the history of its training. {kept}"
        )
        use = f"{load}\ndance.search('a query')"
        return artifact_card(self._encoder, title, use, metadata or {}, extra=about)


def without_folders(text: str) -> str:
    """Return a text in which absolute paths, which tell of the machine alone, are cut to their last part."""
    return re.sub(r"(?<![\w.:/])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\"(),]+[\\/])+(?=[^\\/\s'\"(),])", "", text)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return without_folders(value) if isinstance(value, str) else value


def _json(obj: dict[str, Any]) -> io.BytesIO:
    return io.BytesIO((json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode())


def _files(folder: Path, under: str) -> Iterator[tuple[str, str]]:
    """Yield all files below a folder in a fixed order: their names below ``under``, and where they are."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            file = Path(root) / name
            yield f"{under}/{file.relative_to(folder).as_posix()}", str(file)

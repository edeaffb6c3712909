"""Documents from whatever holds them: iterables of dicts, DataFrames, PyTerrier data sets."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt

from pt_dance.storage import options
from pt_dance.storage.progress import progress_bar


def iter_documents(source: Any, *, verbose: bool = False, desc: str = "documents") -> Iterator[dict[str, Any]]:
    """Iterate over the documents of an iterable of dicts, a DataFrame, a Terrier index or a PyTerrier data set.

    Args:
        source: Where the documents come from.
        verbose: Whether to show a progress bar.
        desc: What the bar says.

    Raises:
        TypeError: If ``source`` is none of these, or (while iterating) if a document is no dict.
        ValueError: If a Terrier index stores no texts.
    """
    source = _terrier_index(source)
    total = source_length(source)
    if isinstance(source, pd.DataFrame):
        names = list(source.columns)
        documents: Iterable[Any] = (
            dict(zip(names, values, strict=True)) for values in zip(*(source[n] for n in names), strict=True)
        )
    elif isinstance(source, pt.terrier.TerrierIndex):
        documents = _stored_texts(source)
    elif hasattr(source, "get_corpus_iter"):
        try:
            silent = "verbose" in inspect.signature(source.get_corpus_iter).parameters
        except (TypeError, ValueError):
            silent = False
        documents = source.get_corpus_iter(verbose=False) if silent else source.get_corpus_iter()
    elif isinstance(source, (str, bytes, dict, Path)) or not isinstance(source, Iterable):
        raise TypeError(
            "documents must come as an iterable of dicts, a DataFrame, an object with get_corpus_iter(), or a Terrier "
            f"index with stored text, not as a {type(source).__name__}"
        )
    else:
        documents = source

    def stream() -> Iterator[dict[str, Any]]:
        with progress_bar(verbose, desc, total) as bar:
            for position, document in enumerate(documents):
                if not isinstance(document, dict):
                    files = isinstance(document, (str, os.PathLike))
                    raise TypeError(
                        f"document number {position} is a {type(document).__name__}: each document must be a dict "
                        "with a docno and its fields" + "; Corpus.build() takes a list of paths, too" * files
                    )
                yield document
                bar.update()

    return stream()


def source_length(source: Any) -> int | None:
    """Return how many documents a source has, None if it does not say."""
    with contextlib.suppress(TypeError, NotImplementedError):
        return len(source)
    return None


def _terrier_index(source: Any) -> Any:
    """Return the Terrier index where the source is the folder or the Java object of one; else the source as it is."""
    if isinstance(source, (str, Path)) and (options.path_of(source, "documents") / "data.properties").is_file():
        return pt.terrier.TerrierIndex(options.path_of(source))
    # Only a running Java has objects.
    if pt.java.started() and isinstance(source, (pt.terrier.J.IndexRef, pt.terrier.J.Index)):
        return pt.terrier.TerrierIndex.coerce(source)
    return source


def _stored_texts(index: Any) -> Iterable[dict[str, str]]:
    fields = [str(key) for key in index.index_obj().getMetaIndex().getKeys()]
    if not set(fields) - {"docno"}:
        raise ValueError(
            f"the Terrier index {index!r} stores no texts: index again with "
            "pt.IterDictIndexer(path, meta={'docno': 20, 'text': 131072})"
        )
    return index.get_corpus_iter(return_toks=False)

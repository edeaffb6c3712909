"""Documents from whatever holds them: iterables of dicts, DataFrames, PyTerrier data sets."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from pt_dance.storage.progress import progress_bar


def iter_documents(source: Any, *, verbose: bool = False, desc: str = "documents") -> Iterator[dict[str, Any]]:
    """Iterate over the documents of an iterable of dicts, a DataFrame, or an object with ``get_corpus_iter()``.

    Args:
        source: Where the documents come from.
        verbose: Whether to show a progress bar.
        desc: What the bar says.

    Raises:
        TypeError: If ``source`` is none of these, or (while iterating) if a document is no dict.
    """
    total = source_length(source)
    if isinstance(source, pd.DataFrame):
        names = list(source.columns)
        documents: Iterable[Any] = (
            dict(zip(names, values, strict=True)) for values in zip(*(source[n] for n in names), strict=True)
        )
    elif hasattr(source, "get_corpus_iter"):
        try:
            silent = "verbose" in inspect.signature(source.get_corpus_iter).parameters
        except (TypeError, ValueError):
            silent = False
        documents = source.get_corpus_iter(verbose=False) if silent else source.get_corpus_iter()
    elif isinstance(source, (str, bytes, dict, Path)) or not isinstance(source, Iterable):
        raise TypeError(
            f"documents must come as an iterable of dicts, a DataFrame, or an object with get_corpus_iter(), not as "
            f"a {type(source).__name__}."
        )
    else:
        documents = source

    def stream() -> Iterator[dict[str, Any]]:
        with progress_bar(verbose, desc, total) as bar:
            for position, document in enumerate(documents):
                if not isinstance(document, dict):
                    raise TypeError(
                        f"document number {position} is a {type(document).__name__}: each document must be a dict "
                        "with a docno and its fields."
                    )
                yield document
                bar.update()

    return stream()


def source_length(source: Any) -> int | None:
    """Return how many documents a source has, None if it does not say."""
    with contextlib.suppress(TypeError, NotImplementedError):
        return len(source)
    return None

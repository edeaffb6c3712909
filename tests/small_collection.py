"""A small collection of real English text for tests that must run where no test collection is at hand."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pandas as pd

from pt_dance.datasets._docstrings import STANDARD_LIBRARY, module_files, read_docstrings
from pt_dance.datasets.pydocs import make_collection

MODULES = ("argparse", "collections", "csv", "datetime", "email", "json", "logging", "pathlib", "random", "statistics")


class SmallCollection(NamedTuple):
    """Documents (docno, title, text), topics (qid, query) and qrels (qid, docno, label) as PyTerrier expects them."""

    documents: pd.DataFrame
    topics: pd.DataFrame
    qrels: pd.DataFrame

    def get_corpus_iter(self, *, verbose: bool = True):
        return iter(self.documents.to_dict("records"))


@lru_cache
def standard_library(modules: tuple[str, ...] = MODULES) -> SmallCollection:
    """The docstrings of some modules of the standard library: some 200 documents with as many queries.

    Callers share the frames and must not change them.
    """
    collection = make_collection(
        docstring
        for module, path in module_files(STANDARD_LIBRARY)
        if module.split(".")[0] in modules
        for docstring in read_docstrings(module, path)
    )
    return SmallCollection(
        documents=pd.DataFrame(collection.documents, columns=["docno", "title", "text"]),
        topics=pd.DataFrame(collection.queries, columns=["qid", "query"]),
        qrels=pd.DataFrame(collection.qrels, columns=["qid", "docno"]).assign(label=1),
    )

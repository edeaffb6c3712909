"""Small collections of real English text for tests that must run where no test collection is at hand."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pt_dance.datasets._docstrings import Docstring
from pt_dance.datasets.pydocs import make_collection

DOCSTRINGS = Path(__file__).with_name("data") / "docstrings.jsonl.gz"
MODULES = ("argparse", "collections", "csv", "datetime", "email", "json", "logging", "pathlib", "random", "statistics")


class SmallCollection(NamedTuple):
    """Documents (docno, title, text), topics (qid, query) and qrels (qid, docno, label) as PyTerrier expects them."""

    documents: pd.DataFrame
    topics: pd.DataFrame
    qrels: pd.DataFrame

    def get_corpus_iter(self, *, verbose: bool = True):
        return iter(self.documents.to_dict("records"))


@lru_cache
def standard_library(modules: tuple[str, ...] | None = MODULES) -> SmallCollection:
    """The docstrings of some modules of the standard library, some 200 documents, or of all (None), some 1,200.

    There are about as many queries. The texts are those of a file in the repository, whatever Python this is. Callers
    share the frames and must not change them.
    """
    with gzip.open(DOCSTRINGS, "rt", encoding="utf-8") as lines:
        docstrings = [Docstring(*json.loads(line)) for line in lines]
    documents, queries, qrels = make_collection(
        d for d in docstrings if modules is None or d.name.split(".")[0] in modules
    )
    return SmallCollection(
        documents=pd.DataFrame(documents).rename(columns={"_id": "docno"}),
        topics=pd.DataFrame(queries).rename(columns={"_id": "qid", "text": "query"}),
        qrels=pd.DataFrame(qrels, columns=["qid", "docno"]).assign(label=1),
    )

"""Texts on disk, with random access by docno."""

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.passages import PassageCorpus

__all__ = ["Corpus", "PassageCorpus"]

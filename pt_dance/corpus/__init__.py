"""Texts on disk, with random access by docno, and a first stage over them."""

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.first_stage import bm25
from pt_dance.corpus.passages import PassageCorpus

__all__ = ["Corpus", "PassageCorpus", "bm25"]

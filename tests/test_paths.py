"""Paths pass one door: wherever one enters, ``~`` is the home folder, and a later ``chdir`` loses nothing."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pt_dance
from pt_dance import Corpus, CrossEncoderScorer, DanceRetriever, DenseIndex, DualEncoder, PassageCorpus, recipes
from pt_dance.datasets import BeirFolder, DanceDatasetProvider
from small_collection import standard_library
from test_attributes import cross_encoder

COLLECTION = standard_library()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder, below the working folder of the tests, with one of everything that is opened by its path."""
    home = tmp_path_factory.mktemp("home")
    corpus = Corpus.build(COLLECTION, home / "corpus", verbose=False)
    corpus.to_passages(home / "passages", length=40, stride=20, verbose=False)
    encoder = DualEncoder.static(corpus, dim=4, vocab_size=200).save(home / "encoder")
    DenseIndex(home / "index", encoder, verbose=False).index(corpus)
    cross_encoder(home)
    dance = DanceRetriever(encoder, corpus, home / "run", recipe=recipes.mnrl(negatives=None), verbose=False)
    dance.fit(COLLECTION.topics, COLLECTION.qrels, COLLECTION.topics.head(9), COLLECTION.qrels)
    (home / "beir" / "qrels").mkdir(parents=True)
    (home / "beir" / "corpus.jsonl").write_text('{"_id": "d", "title": "", "text": "a text"}\n')
    (home / "beir" / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (home / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (home / "elsewhere").mkdir()
    return home


# What is opened by a path -> the thing in the home folder, how it is opened, and what it is asked for afterwards.
OPENED = {
    "Corpus": ("corpus", Corpus, lambda corpus: corpus.texts_at([3])),
    "PassageCorpus": ("passages", PassageCorpus, lambda corpus: corpus.passages.texts_at([3])),
    "DualEncoder": ("encoder", DualEncoder, lambda encoder: encoder.fingerprint),
    "DualEncoder.load": ("encoder", DualEncoder.load, lambda encoder: (encoder.path, encoder.fingerprint)),
    "static_from": ("encoder", DualEncoder.static_from, lambda encoder: encoder.fingerprint),
    "two_towers": ("encoder", lambda p: DualEncoder.two_towers(p, p), lambda encoder: encoder.fingerprint),
    "CrossEncoderScorer": ("ce", CrossEncoderScorer, lambda scorer: scorer.fingerprint),
    "DenseIndex": ("index", DenseIndex, lambda index: (index.index_path, index.docno([2]), index.encoder)),
    "DanceRetriever.load": ("run", DanceRetriever.load, lambda dance: dance(COLLECTION.topics.head(2)).to_dict()),
    "get_dataset": (
        "beir",
        lambda p: DanceDatasetProvider().get_dataset(str(p)),
        BeirFolder.get_topics,
    ),
    "BeirFolder": ("beir", BeirFolder, lambda dataset: list(dataset.get_corpus_iter(verbose=False))),
}
# What writes to a path -> how, given things of the home folder.
WRITTEN = {
    "Corpus.build": lambda path, home: Corpus.build(COLLECTION, path, verbose=False),
    "to_passages": lambda path, home: Corpus(home / "corpus").to_passages(path, length=40, stride=20, verbose=False),
    "DualEncoder.save": lambda path, home: DualEncoder(home / "encoder").save(path),
    "DualEncoder.build_package": lambda path, home: DualEncoder(home / "encoder").build_package(path, verbose=False),
    "DenseIndex.index": lambda path, home: DenseIndex(path, DualEncoder(home / "encoder"), verbose=False).index(
        COLLECTION.documents
    ),
    "DanceRetriever": lambda path, home: DanceRetriever(
        DualEncoder(home / "encoder"), Corpus(home / "corpus"), path, recipe=recipes.mnrl(negatives=None), verbose=False
    ),
    "DanceRetriever.save": lambda path, home: DanceRetriever.load(home / "run").save(path),
    "DanceRetriever.build_package": lambda path, home: DanceRetriever.load(home / "run").build_package(path),
    "DanceRetriever.report": lambda path, home: DanceRetriever.load(home / "run").report(
        path, COLLECTION.topics.head(6), COLLECTION.qrels
    ),
    "bm25": lambda path, home: pt_dance.bm25(Corpus(home / "corpus"), path),
}
SPELLINGS = {
    "~": lambda name: f"~/{name}",
    "relative": lambda name: name,
    "./": lambda name: f"./{name}",
    "..": lambda name: f"elsewhere/../{name}",
    "pathlib": Path,
    "pathlib ~": lambda name: Path("~") / name,
}


def comparable(value):
    return value.to_dict() if isinstance(value, pd.DataFrame) else value


class At:
    """Works in a folder, which is the home folder, too, and leaves it again."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def __enter__(self):
        self.before = os.getcwd()
        self.monkeypatch.setenv("HOME", str(self.folder))
        os.chdir(self.folder)

    def __exit__(self, *_):
        os.chdir(self.before)
        self.monkeypatch.undo()


@settings(deadline=None, max_examples=60)
@given(what=st.sampled_from(sorted(OPENED)), spelling=st.sampled_from(sorted(SPELLINGS)))
def test_what_is_opened_by_a_path_stays_open_wherever_the_process_goes(home, what, spelling):
    name, opened, asked = OPENED[what]
    with pytest.MonkeyPatch.context() as patch, At(home, patch):
        thing = opened(SPELLINGS[spelling](name))
        os.chdir(home / "elsewhere")
        patch.setenv("HOME", str(home / "elsewhere"))
        assert comparable(asked(thing)) == comparable(asked(opened(home / name)))


@pytest.mark.parametrize("spelling", ["~", "relative", "pathlib ~"])
@pytest.mark.parametrize("what", WRITTEN)
def test_what_is_written_to_a_path_is_where_the_path_said(home, what, spelling):
    if what == "bm25":
        pytest.importorskip("pyterrier_pisa")
    name = f"new-{uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch, At(home, patch):
        made = WRITTEN[what](SPELLINGS[spelling](name), home)
        os.chdir(home / "elsewhere")
        if what == "DanceRetriever":  # a run is written by what is done with it
            made.fit(COLLECTION.topics.head(20), COLLECTION.qrels)
    assert [entry for entry in home.iterdir() if entry.name.startswith(name)], "nothing is where the path said"
    assert not list((home / "elsewhere").iterdir()) and not (home / "~").exists()
    if hasattr(made, "path") and what != "DualEncoder.build_package":
        assert Path(made.path).is_absolute()


@settings(deadline=None, max_examples=100)
@given(what=st.sampled_from(sorted([*OPENED, *WRITTEN])), wrong=st.sampled_from(["", "a\0b", "~nobody-of-that-name/x"]))
def test_what_is_no_path_is_refused_everywhere(home, what, wrong):
    opens = OPENED[what][1] if what in OPENED else lambda path: WRITTEN[what](path, home)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=r"path|folder|model"):
        opens(wrong)

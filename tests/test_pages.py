"""Pages of large files: they count as a process's memory until they are given back."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pt_dance import Corpus, DenseIndex
from pt_dance.retriever import ann
from pt_dance.storage import pages

pytestmark = [
    pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no such advice"),
    pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps to see it by"),
]


def mapped(folder: Path, name: str) -> int:
    """Return how much of the files in a folder is in this process's memory, in kB."""
    maps = [one.partition("\n") for one in Path("/proc/self/smaps").read_text().split(str(folder))[1:]]
    return sum(int(rest.split("Rss:")[1].split()[0]) for file, _, rest in maps if file.endswith(name))


def take_for_large(patch: pytest.MonkeyPatch) -> None:
    """Set what is large, and kept, as if memory were a fiftieth."""
    for name, size in (("_KEPT", 8 << 20), ("_LOOK", 1 << 20), ("_SMALL", 20 << 20)):
        patch.setattr(pages, name, size)


def test_reading_a_large_corpus_does_not_hold_it(tmp_path, monkeypatch):
    take_for_large(monkeypatch)
    documents = [{"docno": f"d{i}", "text": f"{i} " + "x" * 20_000} for i in range(4_000)]
    built = Corpus.build(documents, tmp_path / "corpus", fields=["text"], verbose=False)

    def read(corpus) -> int:
        for start in range(0, len(documents), 100):
            texts = corpus.texts_at(range(start, start + 100))
            assert texts[7] == documents[start + 7]["text"]
        return mapped(built.path, "corpus.arrow")

    assert read(Corpus(built.path)) < 20_000
    corpus = Corpus(built.path)
    scattered = np.random.default_rng(1).permutation(len(documents))  # in one call
    assert corpus.texts_at(scattered)[9] == documents[scattered[9]]["text"]
    assert mapped(built.path, "corpus.arrow") < 20_000
    del corpus
    gc.collect()
    monkeypatch.setattr(pages, "_SMALL", 1 << 30)
    assert read(Corpus(built.path)) > 60_000  # small files stay as they are


@pytest.fixture(scope="module", params=["one file", "shards"])
def index(request, tmp_path_factory):
    """60 MB of vectors."""
    path = tmp_path_factory.mktemp("pages") / "index"
    vectors = np.random.default_rng(0).standard_normal((40_000, 384), dtype=np.float32)
    records = [{"docno": f"d{row}", "doc_vec": vector} for row, vector in enumerate(vectors)]
    if request.param == "one file":
        return DenseIndex(path, verbose=False).index(records)
    for number in range(4):
        part = records[number * 10_000 : (number + 1) * 10_000]
        DenseIndex(path / "shards" / f"{number:05}", verbose=False).index(part)
    return DenseIndex(path, verbose=False).join()


def test_searching_a_large_index_does_not_hold_it(index, monkeypatch):
    """Neither do its approximate search and what that is made from, nor scores of documents all over it."""
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((5, 384), dtype=np.float32)
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(5)], "query_vec": list(queries)})
    pairs = rng.integers(0, 5, 3_000), rng.integers(0, 40_000, 3_000)
    docnos = np.array([f"d{row}" for row in pairs[1]], dtype=object)
    monkeypatch.setattr("pt_dance.retriever.search.vectors._PAIR_BLOCK", 4)  # what is read at once is all mapped
    trained = ann._train
    path, few = Path(index.index_path), {"lists": 16, "subvectors": 4}

    def read() -> list:
        opened = DenseIndex(path, verbose=False)
        read, held = [], []

        def train(*given) -> None:
            held.append(mapped(path, ".f4"))  # after the sample was read
            trained(*given)

        monkeypatch.setattr(ann, "_train", train)
        for step in (
            lambda: opened.search(queries, 10)[1],
            lambda: opened.score_pairs(queries, *pairs),
            lambda: np.concatenate([opened.stored_vectors(part)[0] for part in np.array_split(docnos, 1_500)]),
            lambda: opened.ann_retriever(10, "ivfpq", build_options=few).build(),
            lambda: opened.ann_retriever(10, "ivfpq", build_options=few, candidates=2_000)(topics)["docno"],
        ):
            read.append(step())
            held.append(mapped(path, ".f4"))
        return [read, held]

    with monkeypatch.context() as large:
        take_for_large(large)
        (rows, scores, vectors, _, found), held = read()
    assert max(held) < 20_000
    gc.collect()
    (same_rows, same_scores, same_vectors, _, same_found), held = read()
    assert min(held) > 50_000
    np.testing.assert_array_equal(rows, same_rows)
    np.testing.assert_array_equal(scores, same_scores)
    np.testing.assert_array_equal(vectors, same_vectors)
    assert found.tolist() == same_found.tolist()

"""Indexes of parts of a collection, joined, are the index of all of it."""

import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest

from pt_dance import DenseIndex, DualEncoder
from pt_dance.index.joined import JoinedVectors

RNG = np.random.default_rng(0)
WORDS = [f"word{number}" for number in range(30)]
DOCUMENTS = [
    {"docno": f"d{number * 7 % 90}-{number}", "text": " ".join(RNG.choice(WORDS, RNG.integers(1, 9)))}
    for number in range(900)
]
PARTS = (slice(0, 100), slice(100, 101), slice(101, 900))
TOPICS = pd.DataFrame({"qid": [str(n) for n in range(40)], "query": [d["text"] for d in DOCUMENTS[::23]]})


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.static([d["text"] for d in DOCUMENTS], dim=16, vocab_size=200)


def shards(path, encoder, parts=PARTS):
    for number, part in enumerate(parts):
        DenseIndex(path / "shards" / f"{number:05}", encoder, shard_size=64, verbose=False).index(DOCUMENTS[part])
    return DenseIndex(path, encoder, device="cpu", verbose=False)


def test_joined_shards_are_one_index(tmp_path, encoder):
    whole = DenseIndex(tmp_path / "whole", encoder, device="cpu", verbose=False).index(DOCUMENTS)
    index = shards(tmp_path / "index", encoder)
    assert not index.built()
    before = {file: file.stat().st_ino for file in (tmp_path / "index").rglob("vecs.f4")}
    assert index.join() is index and index.built() and len(index) == 900
    assert {file: file.stat().st_ino for file in (tmp_path / "index").rglob("vecs.f4")} == before and len(before) == 3
    for make in (lambda of: of.retriever(50), lambda of: of.ann_retriever(50, "ivfpq", build_options={"lists": 5})):
        pd.testing.assert_frame_equal(make(index)(TOPICS), make(whole)(TOPICS))
    found = whole.retriever(20)(TOPICS)[["qid", "query", "docno"]]
    pd.testing.assert_frame_equal(index.retriever()(found), whole.retriever()(found))
    assert index.docno([0, 100, 101, 899]).tolist() == [DOCUMENTS[row]["docno"] for row in (0, 100, 101, 899)]
    opened = pt.Artifact.load(str(tmp_path / "index"))
    assert type(opened) is DenseIndex and opened.fingerprint == encoder.fingerprint
    # pyterrier_dr's retrievers take its vectors, too.
    theirs = opened.np_retriever(num_results=5)(TOPICS.assign(query_vec=list(encoder.encode_queries(TOPICS["query"]))))
    assert len(theirs) == 200
    with pytest.raises(ValueError, match=r"index is joined from shards: index the documents as another shard and call"):
        index.append([{"docno": "new", "text": "a"}])


def test_what_cannot_be_joined_is_said(tmp_path, encoder):
    other = DualEncoder.static([d["text"] for d in DOCUMENTS], dim=16, vocab_size=200, seed=7)
    index = DenseIndex(tmp_path / "index", encoder, verbose=False)
    with pytest.raises(FileNotFoundError, match="must hold indexes named 00000, 00001 and so on, and holds none: make"):
        index.join()
    shards(tmp_path / "index", encoder)
    shutil.move(tmp_path / "index" / "shards" / "00001", tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match="and holds 00000, 00002: make each"):
        index.join()
    second = DenseIndex(tmp_path / "index" / "shards" / "00001", other, verbose=False).index(DOCUMENTS[PARTS[1]])
    with pytest.raises(ValueError, match=r"00001 was made with other weights than .*00000: index its documents again"):
        index.join()
    shutil.rmtree(second.index_path)
    DenseIndex(second.index_path, encoder, verbose=False).index(DOCUMENTS[99:101])
    with pytest.raises(ValueError, match=f"docno {DOCUMENTS[99]['docno']!r} occurs more than once"):
        index.join()
    assert not index.built()


def test_another_shard_than_the_one_joined_is_noticed(tmp_path, encoder):
    index = shards(tmp_path / "index", encoder).join()
    identity = index.open().identity
    shard = DenseIndex(tmp_path / "index" / "shards" / "00001", encoder, verbose=False)
    shard.index([{"docno": "other", "text": "word1"}], overwrite=True)
    with pytest.raises(ValueError, match=r"00001 is another index than the one that was joined: call join\(\) again"):
        DenseIndex(tmp_path / "index", encoder, verbose=False).open()
    index.join()
    assert index.docno([100]).tolist() == ["other"] and index.open().identity != identity
    meta = tmp_path / "index" / "pt_meta.json"
    for damage in ({"shards": 3}, {"vec_dtype": "int8"}, {"shards": [{"docs": 100}] * 3}, {"shards": []}):
        kept = meta.read_text()
        meta.write_text(json.dumps({**json.loads(kept), **damage}))
        with pytest.raises(ValueError, match=r"shards hold|another index|other shards"):
            DenseIndex(tmp_path / "index", encoder, verbose=False).open()
        meta.write_text(kept)


def test_joined_vectors_are_read_like_one_array(tmp_path):
    parts = []
    for number, count in enumerate((3, 1, 5)):
        parts.append(np.memmap(tmp_path / str(number), np.float32, "w+", shape=(count, 2)))
        parts[-1][:] = RNG.standard_normal((count, 2))
        parts[-1].flush()
    whole, vectors = np.concatenate(parts), JoinedVectors(parts)
    for joined in (vectors, pickle.loads(pickle.dumps(vectors))):
        assert joined.shape == whole.shape and len(joined) == 9 and (np.asarray(joined) == whole).all()
        for rows in (slice(0, 9), slice(2, 5), slice(3, 3), slice(7, 2), slice(1, 9, 3), slice(-3, None), [8, 0, 3, 3],
                     np.array([[1, 2], [8, -1]]), 4, np.empty(0, dtype=int)):  # fmt: skip
            assert (joined[rows] == whole[rows]).all() and joined[rows].shape == whole[rows].shape
        with pytest.raises(IndexError, match="rows are 0 to 8"):
            joined[[9]]

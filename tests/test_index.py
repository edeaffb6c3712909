"""DenseIndex: what is on disk is right, whole, and can be gone on with, whatever happened before."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from pyterrier_dr import FlexIndex

from pt_dance import Corpus, DenseIndex, DualEncoder, PassageCorpus
from pt_dance.index import indexing as _indexing
from pt_dance.index.indexing import StreamError
from pt_dance.storage import folders as _files

WORDS = [f"word{i}" for i in range(20)]


def make_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"docno": f"d{i * 7 % count}-{i}", "text": " ".join(rng.choice(WORDS, rng.integers(1, 12)))}
        for i in range(count)
    ]


DOCUMENTS = make_documents(300)


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.static([d["text"] for d in DOCUMENTS], dim=24, vocab_size=300)


@pytest.fixture(scope="module")
def other(encoder):
    return DualEncoder.static([d["text"] for d in DOCUMENTS], dim=24, vocab_size=300, seed=7)


@pytest.fixture
def make(tmp_path, encoder):
    def build(name="index", encoder=encoder, **options):
        return DenseIndex(tmp_path / name, encoder, **{"shard_size": 64, "verbose": False, **options})

    return build


@pytest.fixture(scope="module")
def built(tmp_path_factory, encoder):
    """The folder of an index that no test changes."""
    path = tmp_path_factory.mktemp("built") / "index"
    return DenseIndex(path, encoder, shard_size=64, verbose=False).index(DOCUMENTS).index_path


def content(path):
    return {f.name: f.read_bytes() for f in Path(path).iterdir()}


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def queries(count=20):
    return pd.DataFrame({"qid": [f"q{i}" for i in range(count)], "query": [d["text"][:20] for d in DOCUMENTS[:count]]})


# --- what is written --------------------------------------------------------------------------------------------------


def test_vectors_docnos_and_metadata(make, encoder, tmp_path):
    index = make()
    assert not index.built()
    assert index.index(iter(DOCUMENTS)) is index
    assert index.built() and len(index) == 300 and names(tmp_path) == ["index"]
    expected = encoder.encode_docs([d["text"] for d in DOCUMENTS])
    vectors = np.fromfile(index.index_path / "vecs.f4", dtype="<f4").reshape(300, 24)
    assert np.abs(vectors - expected).max() < 1e-6
    assert index.docno(range(300)).tolist() == [d["docno"] for d in DOCUMENTS]
    assert index.rows([DOCUMENTS[7]["docno"], "nothing"]).tolist() == [7, -1]
    ranks = np.fromfile(index.index_path / "docno_ranks.u4", dtype="<u4")
    assert (np.argsort(ranks) == np.argsort(np.array([d["docno"] for d in DOCUMENTS]))).all()
    meta = json.loads((index.index_path / "pt_meta.json").read_text())
    assert (meta["type"], meta["format"], meta["package_hint"]) == ("dense_index", "flex", "pt_dance")
    assert (meta["vec_size"], meta["doc_count"], meta["sim_fn"], meta["text_field"]) == (24, 300, "cosine", "text")
    assert meta["encoder"]["fingerprint"] == encoder.fingerprint == index.fingerprint
    assert meta["files"] == {n: len(c) for n, c in content(index.index_path).items() if n != "pt_meta.json"}


def test_every_kind_of_source_gives_the_same_bytes(make, encoder, tmp_path):
    expected = content(make("a").index(DOCUMENTS).index_path)
    assert content(make("b").index(pd.DataFrame(DOCUMENTS)).index_path) == expected
    assert content(make("c").index(d for d in DOCUMENTS).index_path) == expected
    corpus = Corpus.build(DOCUMENTS, tmp_path / "corpus", fields=["text"], verbose=False)
    of_corpus = content(make("d").index(corpus).index_path)
    meta = json.loads(of_corpus.pop("pt_meta.json"))
    assert meta["corpus"] == corpus.fingerprint
    assert of_corpus == {n: c for n, c in expected.items() if n != "pt_meta.json"}


def test_pyterrier_dr_opens_it_and_finds_the_same(make, encoder):
    index = make().index(DOCUMENTS)
    flex = FlexIndex(str(index.index_path), verbose=False)
    theirs = (encoder.query_encoder() >> flex.np_retriever(num_results=100))(queries())
    ours = index.retriever(100)(queries())
    both = ours.merge(theirs, on=["qid", "docno"])
    # Documents with the same words have the same vector: ties that NumpyRetriever cuts off as it likes.
    assert len(ours) == len(theirs) == 2000 and len(both) > 1900
    assert np.abs(both["score_x"] - both["score_y"]).max() < 1e-6
    assert np.abs(ours.groupby("qid")["score"].min() - theirs.groupby("qid")["score"].min()).max() < 1e-6
    assert flex.docnos().inv[np.array([DOCUMENTS[5]["docno"]])].tolist() == [5]


def test_a_pipeline_of_encoder_and_index(make, encoder):
    index = make(encoder=None)
    assert (encoder >> index).index(DOCUMENTS) is index
    both = make("both")
    (encoder >> both).index(DOCUMENTS)
    plain = make("plain").index(DOCUMENTS)
    assert np.abs(index.open().vectors - plain.open().vectors).max() < 1e-6
    assert index.fingerprint is None and both.fingerprint == encoder.fingerprint
    found = (encoder.query_encoder() >> index.retriever(10))(queries())
    assert found["score"].round(5).tolist() == plain.retriever(10)(queries())["score"].round(5).tolist()


def test_float16(make):
    whole, half = make("whole").index(DOCUMENTS), make("half", vec_dtype="float16").index(DOCUMENTS)
    assert (half.index_path / "vecs.f2").stat().st_size * 2 == (whole.index_path / "vecs.f4").stat().st_size
    a, b = whole.retriever(300)(queries()), half.retriever(300)(queries())
    both = a.merge(b, on=["qid", "docno"])
    assert len(both) == len(a) and np.abs(both["score_x"] - both["score_y"]).max() < 2e-3
    assert half.retriever(5)(a)["score"].isin(b["score"]).all()
    # pyterrier_dr must not take half-precision numbers for single ones: its retrievers get them in full from the index,
    # and on its own it refuses the folder.
    vectors = half.given_encoder.query_encoder()(queries())
    for theirs in (half.torch_retriever(num_results=300), half.np_retriever(num_results=300)):
        both = b.merge(theirs(vectors), on=["qid", "docno"])
        assert len(both) == len(b) and np.abs(both["score_x"] - both["score_y"]).max() < 1e-5
    with pytest.raises((AssertionError, FileNotFoundError)):
        len(FlexIndex(str(half.index_path)))
    assert DenseIndex(half.index_path, verbose=False).open().vectors.dtype == np.float16
    assert isinstance(pt.Artifact.load(half.index_path), DenseIndex)
    with pytest.raises(ValueError, match="document 'x' has numbers in its vector that are too large for float16"):
        make("large", encoder=None, vec_dtype="float16").index([{"docno": "x", "doc_vec": np.array([1e6, 0])}])


def test_docnos_that_break_npids_own_builder(make, encoder):
    for number, docnos in enumerate(
        (
            ["only one"],
            ["é1", "è2"],
            [f"a{i}" for i in range(300)] + ["b", "b5000", "b5001"],
            [str(i) for i in range(1, 400)],
        )
    ):
        index = make(f"i{number}").index([{"docno": d, "text": "word1"} for d in docnos])
        assert index.rows(docnos).tolist() == list(range(len(docnos)))
        assert index.rows(["01", "x", "abc" * 50]).tolist() == [-1, -1, -1]
        lookup = FlexIndex(str(index.index_path)).docnos()
        assert lookup.fwd[np.arange(len(docnos))].tolist() == docnos
        assert lookup.inv[np.array(docnos)].tolist() == list(range(len(docnos)))


def test_it_knows_its_encoder(tmp_path, encoder, other):
    encoder.copy().save(tmp_path / "run" / "encoder")
    saved = DualEncoder.load(str(tmp_path / "run" / "encoder"))
    index = DenseIndex(tmp_path / "run" / "index", saved, verbose=False).index(DOCUMENTS)
    expected = index.retriever(10)(queries())
    # Both folders move together.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = DenseIndex(tmp_path / "moved" / "index", verbose=False)
    assert moved.encoder == encoder
    pd.testing.assert_frame_equal(moved.retriever(10)(queries()), expected)
    shutil.rmtree(tmp_path / "moved" / "encoder")
    other.copy().save(tmp_path / "moved" / "encoder")
    with pytest.raises(ValueError, match="has other weights than those the index"):
        DenseIndex(tmp_path / "moved" / "index", verbose=False).retriever(10)(queries())
    shutil.rmtree(tmp_path / "moved" / "encoder")
    with pytest.raises(ValueError, match="has no encoder at hand for queries: open it with DenseIndex"):
        DenseIndex(tmp_path / "moved" / "index", verbose=False).retriever(10)(queries())
    with pytest.raises(ValueError, match="weights are not those the index"):
        DenseIndex(tmp_path / "moved" / "index", other, verbose=False).retriever(10)(queries())


# --- create, overwrite, append ----------------------------------------------------------------------------------------


def test_the_same_index_is_used_again(make, encoder, tmp_path, capfd):
    corpus = Corpus.build(DOCUMENTS, tmp_path / "corpus", fields=["text"], verbose=False)
    make().index(corpus)
    before = content(tmp_path / "index")
    counting = CountingEncoder(encoder)
    for source in (corpus, DOCUMENTS, iter(DOCUMENTS), pd.DataFrame(DOCUMENTS)):
        again = make(encoder=counting, shard_size=7)
        assert again.index(source) is again and len(again) == 300
    assert counting.texts == 0 and content(tmp_path / "index") == before and names(tmp_path) == ["corpus", "index"]
    # Vectors that came with their documents, and what was appended since, are compared in the same way.
    vectors = [{"docno": d["docno"], "doc_vec": np.full(24, i, np.float32)} for i, d in enumerate(DOCUMENTS)]
    make("vectors").index(vectors[:200]).append(vectors[200:])
    before = content(tmp_path / "vectors")
    assert len(make("vectors").index(iter(vectors))) == 300 and content(tmp_path / "vectors") == before
    assert capfd.readouterr() == ("", "")


def test_another_index_is_refused_unless_it_is_to_be_replaced(make, other, tmp_path):
    make().index(DOCUMENTS)
    before = content(tmp_path / "index")
    changed = [*DOCUMENTS[:100], {"docno": DOCUMENTS[100]["docno"], "text": "another"}, *DOCUMENTS[101:]]
    renamed = [*DOCUMENTS[:-1], {"docno": "renamed", "text": DOCUMENTS[-1]["text"]}]
    vectors = [{"docno": "a", "doc_vec": np.ones(24)}]
    corpus = Corpus.build(DOCUMENTS, tmp_path / "corpus", fields=["text"], verbose=False)
    passages = corpus.to_passages(tmp_path / "passages", verbose=False)
    for index, documents, says in (
        (make(), changed, "with other documents from number 64 to 127"),
        (make(), renamed, "with other documents from number 256 to 299"),
        (make(), DOCUMENTS[:290], "of 300 documents where 290 were given"),
        (make(), [*DOCUMENTS, GOOD], "of 300 documents where more were given"),
        (make(), [], "of 300 documents where 0 were given"),
        (make(encoder=other), DOCUMENTS, "of other weights"),
        (make(vec_dtype="float16"), DOCUMENTS, "of float32 vectors"),
        (make(text_field="body"), [{**d, "body": d["text"]} for d in DOCUMENTS], "of the field 'text'"),
        (make(), vectors, "made of texts"),
        (make(), passages, "of whole documents"),
    ):
        with pytest.raises(FileExistsError, match=r"index holds another index \(.*overwrite=True replaces it") as error:
            index.index(documents)
        assert f"({says})" in str(error.value)
    assert content(tmp_path / "index") == before
    assert len(make().index(changed, overwrite=True)) == 300
    assert content(tmp_path / "index") == content(make("fresh").index(changed).index_path)
    vectors = [{"docno": docno, "doc_vec": np.ones(24, "f4")} for docno in ("a", "b")]
    FlexIndex(str(tmp_path / "flex"), verbose=False).index(vectors)
    with pytest.raises(FileExistsError, match=r"its shards\.jsonl does not say what it was made of"):
        make("flex").index(vectors)


def test_what_is_no_index_is_never_replaced(make, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "important.txt").write_text("keep me")
    for mode in ("create", "overwrite"):
        with pytest.raises(FileExistsError, match="exists and is no dense index"):
            make("folder").indexer(mode=mode).index(DOCUMENTS)
    assert names(tmp_path / "folder") == ["important.txt"]
    with pytest.raises(ValueError, match="mode must be one of"):
        make().indexer(mode="replace")


def test_threads_that_ask_for_the_same_index_wait_for_it(make, encoder, tmp_path):
    counting, inside, go_on = CountingEncoder(encoder), threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert go_on.wait(60)
        yield from DOCUMENTS

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(make(encoder=counting).index, slow())
        assert inside.wait(60)
        others = [pool.submit(make(encoder=counting).index, DOCUMENTS) for _ in range(2)]
        assert not any(other.done() for other in others)
        go_on.set()
        assert [len(asked.result(60)) for asked in (first, *others)] == [300] * 3
    assert counting.texts == 300 and names(tmp_path) == ["index"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_keeps_the_old_index_until_the_end(make, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda first, second: False)
    index = make().index(DOCUMENTS)
    before = content(index.index_path)
    reader = DenseIndex(index.index_path, verbose=False)
    old_vectors = reader.open().vectors

    def failing():
        yield from DOCUMENTS[:150]
        assert content(index.index_path) == before
        raise OSError("disk on fire")

    with pytest.raises(StreamError, match="disk on fire"):
        index.indexer(mode="overwrite").index(failing())
    assert content(index.index_path) == before and index.built()
    new = make_documents(120, seed=9)
    index.indexer(mode="overwrite").index(new)
    assert content(index.index_path) == content(make("fresh").index(new).index_path)
    assert names(tmp_path) == ["fresh", "index"]
    # H3: nothing of the old index is left in the object; who had it open can go on reading it.
    assert len(index) == 120 and index.docno([0])[0] == new[0]["docno"] and len(reader) == 300
    assert np.isfinite(old_vectors).all()


def test_a_kill_between_the_two_renames_is_mended(make, tmp_path, monkeypatch):
    index = make().index(DOCUMENTS)
    before = content(index.index_path)
    # Killed after the old folder was set aside: it comes back.
    os.rename(index.index_path, _files.replaced_path(index.index_path))
    assert DenseIndex(index.index_path, verbose=False).built()
    assert content(index.index_path) == before and names(tmp_path) == ["index"]
    # Killed after the new one had its place: the old one goes.
    shutil.copytree(index.index_path, _files.replaced_path(index.index_path))
    assert DenseIndex(index.index_path, verbose=False).built() and names(tmp_path) == ["index"]


def test_append(make, tmp_path, encoder, other):
    index = make(vec_dtype="float16").index(DOCUMENTS[:100])
    added = DenseIndex(index.index_path, encoder, shard_size=64, verbose=False).append(DOCUMENTS[100:])
    assert len(added) == 300 and names(tmp_path) == ["index"]
    fresh = make("fresh", vec_dtype="float16").index(DOCUMENTS)
    for name in ("vecs.f2", "docnos.txt", "docnos.hash", "docno_ranks.u4"):
        assert (fresh.index_path / name).read_bytes() == (index.index_path / name).read_bytes()
    pd.testing.assert_frame_equal(added.retriever(50)(queries()), fresh.retriever(50)(queries()))
    before = content(index.index_path)
    with pytest.raises(ValueError, match=f"docno '{DOCUMENTS[3]['docno']}' occurs more than once"):
        added.append([{"docno": "new", "text": "a"}, DOCUMENTS[3]])
    with pytest.raises(ValueError, match="made with other weights"):
        DenseIndex(index.index_path, other, verbose=False).append(DOCUMENTS)
    with pytest.raises(ValueError, match="vector of 3 numbers where the index has 24"):
        DenseIndex(index.index_path, verbose=False).append([{"docno": "new", "doc_vec": np.ones(3)}])
    with pytest.raises(FileNotFoundError, match="there is no dense index at"):
        make("nowhere").append(DOCUMENTS)
    assert content(index.index_path) == before
    added.append([{"docno": "new", "text": "word1 word2"}])
    assert len(added) == 301 and names(tmp_path) == ["fresh", "index"]


def test_append_to_an_index_of_pyterrier_dr(make, tmp_path):
    rng = np.random.default_rng(0)
    records = [{"docno": f"d{i}", "doc_vec": rng.standard_normal(5).astype("f4")} for i in range(10)]
    FlexIndex(str(tmp_path / "flex"), verbose=False).index(records[:7])
    index = make("flex", encoder=None)
    assert index.rows(["d3", "d03"]).tolist() == [3, -1]
    index.append(records[7:])
    assert len(index) == 10 and (index.open().vectors == np.stack([r["doc_vec"] for r in records])).all()


# --- going on where a call was interrupted ----------------------------------------------------------------------------


class CountingEncoder:
    """The real encoder, counting what it encodes; everything else is passed through."""

    def __init__(self, encoder):
        self.encoder, self.texts = encoder, 0

    def encode_docs(self, texts, batch_size=None, **options):
        self.texts += len(texts)
        return self.encoder.encode_docs(texts, batch_size, **options)

    def __getattr__(self, name):
        return getattr(self.encoder, name)


def failing_after(documents, count):
    yield from documents[:count]
    raise ConnectionError("gone")


def test_an_iterator_that_raises_costs_no_whole_shard(make, built, encoder, tmp_path):
    counting = CountingEncoder(encoder)
    with pytest.raises(StreamError, match=r"raised a ConnectionError after 200 documents .gone.") as caught:
        make(encoder=counting).index(failing_after(DOCUMENTS, 200))
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert counting.texts == 192 and not make().built()
    make(encoder=counting).index(iter(DOCUMENTS))
    assert counting.texts == 300
    assert content(tmp_path / "index") == content(built)
    assert names(tmp_path) == ["index"]


def test_other_documents_are_noticed(make, encoder, tmp_path):
    with pytest.raises(StreamError):
        make().index(failing_after(DOCUMENTS, 200))
    changed = [*DOCUMENTS[:100], {"docno": DOCUMENTS[100]["docno"], "text": "something else"}, *DOCUMENTS[101:]]
    counting = CountingEncoder(encoder)
    make(encoder=counting).index(iter(changed))
    assert counting.texts == 300 - 64
    assert content(tmp_path / "index") == content(make("fresh").index(changed).index_path)
    # A source that has become shorter, cut inside what was recorded.
    with pytest.raises(StreamError):
        make("short").index(failing_after(DOCUMENTS, 200))
    make("short").index(iter(DOCUMENTS[:130]))
    assert content(tmp_path / "short") == content(make("fresh2").index(DOCUMENTS[:130]).index_path)


def test_other_settings_start_afresh(make, encoder, other, tmp_path):
    renamed = [{**d, "body": d["text"]} for d in DOCUMENTS]
    for name, options in (
        ("encoder", {"encoder": other}),
        ("dtype", {"vec_dtype": "float16"}),
        ("field", {"text_field": "body"}),
    ):
        with pytest.raises(StreamError):
            make(name).index(failing_after(renamed, 200))
        changed = make(name, **options).index(iter(renamed))
        assert content(changed.index_path) == content(make(f"{name} fresh", **options).index(renamed).index_path)
    with_vectors = make("vectors")
    with pytest.raises(StreamError):
        with_vectors.index(failing_after(DOCUMENTS, 200))
    with_vectors.index({"docno": d["docno"], "doc_vec": np.full(24, i, np.float32)} for i, d in enumerate(DOCUMENTS))
    assert (with_vectors.open().vectors[:, 0] == np.arange(300)).all()


@pytest.mark.parametrize(
    "damage",
    ["torn line", "no line break", "binary", "no settings", "too many bytes", "shorter vectors", "foreign file"],
)
def test_what_a_crash_leaves_does_not_count(make, built, tmp_path, damage):
    with pytest.raises(StreamError):
        make().index(failing_after(DOCUMENTS, 200))
    building = _files.building_path(tmp_path / "index")
    journal = building / "shards.jsonl"
    lines = journal.read_bytes()
    if damage == "torn line":
        journal.write_bytes(lines[:-20])
    elif damage == "no line break":
        journal.write_bytes(lines[:-1])
    elif damage == "binary":
        journal.write_bytes(lines + b"\xff\x00{[")
    elif damage == "no settings":
        journal.write_bytes(b"\0" * 5 + lines[5:])
    elif damage == "too many bytes":
        for name in ("vecs.f4", "docnos.txt"):
            with open(building / name, "ab") as file:
                file.write(b"x" * 1000)
    elif damage == "shorter vectors":
        os.truncate(building / "vecs.f4", 100 * 24 * 4)
    else:
        journal.unlink()
        (building / "notes.txt").write_text("?")
    make().index(iter(DOCUMENTS))
    assert content(tmp_path / "index") == content(built)


def test_a_finished_folder_that_was_not_renamed_is_not_encoded_again(make, encoder, tmp_path):
    index = make().index(DOCUMENTS)
    expected = content(index.index_path)
    os.rename(index.index_path, _files.building_path(index.index_path))
    counting = CountingEncoder(encoder)
    make(encoder=counting).index(DOCUMENTS)
    assert counting.texts == 0 and content(index.index_path) == expected and names(tmp_path) == ["index"]


@pytest.mark.parametrize("lines, kept", [(None, 128), (1, 0)], ids=["later", "while the journal was begun"])
def test_an_interrupted_append_goes_on(make, encoder, tmp_path, lines, kept):
    index = make().index(DOCUMENTS[:100])
    with pytest.raises(StreamError):
        index.append(failing_after(DOCUMENTS[100:], 140))
    journal = _files.building_path(index.index_path) / "shards.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:lines]))
    assert len(make()) == 100
    counting = CountingEncoder(encoder)
    make(encoder=counting).append(DOCUMENTS[100:])
    assert counting.texts == 200 - kept and len(make()) == 300
    assert (make().open().vectors == make("fresh").index(DOCUMENTS).open().vectors).all()


def test_appending_copies_no_vectors(make, tmp_path, encoder):
    index = make().index(DOCUMENTS[:100])
    vectors = Path(index.index_path) / "vecs.f4"
    expected, file = vectors.read_bytes(), vectors.stat().st_ino
    with pytest.raises(StreamError):
        index.append(failing_after(DOCUMENTS[100:], 140))
    # The index that is there shares the file with the longer one, and is what it was.
    assert vectors.stat().st_size > len(expected) and vectors.read_bytes()[: len(expected)] == expected
    assert make().built() and make().open().vectors.tobytes() == expected
    assert len(FlexIndex(str(index.index_path)).payload()[1]) == 100
    shutil.rmtree(_files.building_path(index.index_path))
    make().append(DOCUMENTS[200:])
    assert vectors.stat().st_ino == file and vectors.stat().st_size == 2 * len(expected)
    fresh = make("fresh").index([*DOCUMENTS[:100], *DOCUMENTS[200:]])
    assert (make().open().vectors == fresh.open().vectors).all() and list(make().open().docnos) == list(
        fresh.open().docnos
    )


def test_an_index_without_offsets_gets_them_when_it_is_opened(make, monkeypatch):
    index = make().index(DOCUMENTS)
    folder, offsets = Path(index.index_path), Path(index.index_path) / "docno_offsets.i8"
    expected, meta = offsets.read_bytes(), json.loads((folder / "pt_meta.json").read_text())
    del meta["files"][offsets.name]
    (folder / "pt_meta.json").write_text(json.dumps(meta))
    offsets.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
        assert list(make().open().docnos) == [d["docno"] for d in DOCUMENTS] and not offsets.exists()
    assert list(make().open().docnos) == [d["docno"] for d in DOCUMENTS] and offsets.read_bytes() == expected
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    offsets.write_bytes(expected[:-8])
    with pytest.raises(ValueError, match=r"docno_offsets.i8 has 2,400 bytes where 2,408 belong"):
        make().open()


def test_two_writers_do_not_meet(make):
    def documents():
        yield from DOCUMENTS[:100]
        with pytest.raises(BlockingIOError, match="another process is indexing into"):
            make().index(DOCUMENTS)
        yield from DOCUMENTS[100:]

    assert len(make().index(documents())) == 300


def test_no_room_on_the_disk(make, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(_files.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(OSError, match=r"an index of 300 documents needs .* and the disk has 10.0 kB left"):
        make().index(DOCUMENTS)
    assert names(tmp_path) == []


def test_the_disk_runs_full(make, built, monkeypatch, tmp_path):
    add = _indexing.IndexWriter.add

    def full(self, docnos, vectors, digest):
        if self.count == 128:
            raise OSError(28, "No space left on device")
        add(self, docnos, vectors, digest)

    with monkeypatch.context() as patch:
        patch.setattr(_indexing.IndexWriter, "add", full)
        with pytest.raises(OSError, match="the disk is full after 128 documents"):
            make().index(DOCUMENTS)
    make().index(DOCUMENTS)
    assert content(tmp_path / "index") == content(built)


def test_what_it_says(make, capfd, encoder):
    with pytest.raises(StreamError):
        make().index(failing_after(DOCUMENTS, 200))
    assert capfd.readouterr() == ("", "")
    make(verbose=True).index(DOCUMENTS)
    said = capfd.readouterr().err
    assert "300 documents, 43.8 kB on disk" in said and "192 documents are indexed already: going on" in said
    with pytest.raises(StreamError):
        make("again").index(failing_after(DOCUMENTS, 200))
    make("again", verbose=True, vec_dtype="float16").index(DOCUMENTS)
    assert "had other settings, or no whole journal: starting afresh" in capfd.readouterr().err


# --- bad documents and damaged folders --------------------------------------------------------------------------------

GOOD = {"docno": "good", "text": "word1"}


@pytest.mark.parametrize(
    ("documents", "error", "says"),
    [
        ([GOOD, {"docno": "bad", "text": None}], ValueError, "document 'bad' has no text in 'text' .None."),
        ([GOOD, {"docno": "bad", "text": float("nan")}], ValueError, "document 'bad' has no text in 'text' .nan."),
        ([GOOD, {"docno": "bad", "text": pd.NA}], ValueError, "document 'bad' has no text"),
        (
            [GOOD, {"docno": "bad", "body": "x"}],
            ValueError,
            "document 'bad' has .*no such field; it has ..body., .docno",
        ),
        ([GOOD, {"docno": "bad", "text": 3}], TypeError, "the text of document 'bad' in 'text' is 3, not a"),
        (
            [GOOD, {"docno": "bad", "text": "half \ud83d"}],
            ValueError,
            "the text of document 'bad' in 'text' is no valid",
        ),
        ([GOOD, {"docno": "bad\ud83d", "text": "a"}], ValueError, "document number 1 has the docno .*lone surrogates"),
        ([GOOD, {"docno": "x" * 2000, "text": "a"}], ValueError, "document number 1 has a docno of 2,000 characters"),
        ([GOOD, {"docno": 7, "text": "a"}], TypeError, "document number 1 has the docno 7"),
        ([GOOD, {"text": "a"}], TypeError, "document number 1 has the docno None"),
        ([GOOD, {"docno": "a\tb", "text": "a"}], ValueError, "control characters"),
        (
            [GOOD, {"docno": "bad", "text": "a"}, {"docno": "bad", "text": "b"}],
            ValueError,
            "docno 'bad' occurs more than once",
        ),
        ([*DOCUMENTS, DOCUMENTS[0]], ValueError, f"docno '{DOCUMENTS[0]['docno']}' occurs more than once"),
        (
            [GOOD, {"docno": "bad", "doc_vec": np.ones(24)}],
            ValueError,
            "document 'bad' has a 'doc_vec', unlike those before",
        ),
        ([{"docno": "a", "doc_vec": np.ones(3)}, {"docno": "bad", "text": "x"}], ValueError, "'bad' has no 'doc_vec'"),
        (
            [{"docno": "a", "doc_vec": np.ones(3)}, {"docno": "bad", "doc_vec": np.ones(4)}],
            ValueError,
            "'bad' has a vector of 4",
        ),
        ([{"docno": "bad", "doc_vec": np.array([1, np.nan])}], ValueError, "'bad' has NaN or infinity"),
        ([{"docno": "bad", "doc_vec": np.array([1, np.inf])}], ValueError, "'bad' has NaN or infinity"),
        (
            [{"docno": "bad", "doc_vec": np.array([1e30, 1])}],
            ValueError,
            "'bad' has numbers in its vector that are too large",
        ),
        ([{"docno": "bad", "doc_vec": "12"}], ValueError, "'bad' has as its 'doc_vec' no row of numbers"),
        ([{"docno": "bad", "doc_vec": np.ones((2, 2))}], ValueError, "'bad' has as its 'doc_vec' no row of numbers"),
        ([{"docno": "bad", "doc_vec": []}], ValueError, "'bad' has as its 'doc_vec' no row of numbers"),
        ([GOOD, "x"], TypeError, "document number 1 is a str"),
        ([], ValueError, "no documents to index"),
        ("path", TypeError, "not as a str"),
        (5, TypeError, "not as a int"),
    ],
)
def test_bad_documents(make, built, tmp_path, documents, error, says):
    with pytest.raises(error, match=says):
        make().index(documents)
    assert not (tmp_path / "index").exists() and not make().built()
    # Repaired, the same call goes through.
    make().index(DOCUMENTS)
    assert content(tmp_path / "index") == content(built)


def test_bad_options(make, tmp_path, encoder):
    with pytest.raises(TypeError, match=r"encoder must be a pt_dance.DualEncoder, not a str"):
        DenseIndex(tmp_path / "x", "all-MiniLM-L6-v2")
    for options, says in (
        ({"vec_dtype": "int8"}, "vec_dtype='int8' is unknown; choose one of 'float32', 'float16'"),
        ({"shard_size": 0}, "shard_size=0 must be"),
        ({"shard_size": True}, "shard_size=True must be"),
        ({"text_field": "docno"}, "text_field='docno' must be"),
    ):
        with pytest.raises(ValueError, match=says):
            make(**options)
    with pytest.raises(ValueError, match="has no 'doc_vec' and the index has no encoder"):
        make(encoder=None).index(DOCUMENTS)
    with pytest.raises(KeyError, match="text"):
        make().index(pd.DataFrame({"docno": ["1"], "body": ["x"]}))
    assert names(tmp_path) == []


def test_one_string_is_not_a_list(built):
    index = DenseIndex(built, verbose=False)
    docno = DOCUMENTS[5]["docno"]
    for lookup in (index.rows, index.known_rows, index.known_documents, index.stored_vectors):
        lookup([docno]), lookup(np.array([docno])), lookup(pd.Series([docno]))
        with pytest.raises(TypeError, match=r"takes a list of docnos, not one string: write \['d"):
            lookup(docno)
    assert index.docno([5, 7]).tolist() == [DOCUMENTS[5]["docno"], DOCUMENTS[7]["docno"]]
    for bad, error in (
        ("5", TypeError),
        (["5"], TypeError),
        ([0.5], TypeError),
        ([-1], IndexError),
        ([300], IndexError),
    ):
        with pytest.raises(error, match="rows"):
            index.docno(bad)
    numbers = {"shard_size": np.int64(64), "vec_dtype": np.str_("float32")}
    assert DenseIndex(built, verbose=False, **numbers).shard_size == 64


META = {"type": "dense_index", "format": "flex", "vec_size": 24, "doc_count": 300}


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("pt_meta.json", b"", "not valid JSON"),
        ("pt_meta.json", b"\x80\x05pickle", "not valid JSON"),
        ("pt_meta.json", b"[" * 200_000, "not valid JSON"),
        ("pt_meta.json", b'{"doc_count": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ("pt_meta.json", b" " * (5 << 20), "larger than 4 MiB"),
        ("pt_meta.json", b'"text"', "holds a str"),
        ("pt_meta.json", {"type": "corpus"}, "is no dense index: its pt_meta.json says type .corpus."),
        ("pt_meta.json", {"format": "jpq"}, "is no dense index: .* format .jpq."),
        ("pt_meta.json", {"format": ["flex"]}, "is no dense index: "),
        ("pt_meta.json", {"vec_size": "24"}, "its 'vec_size' is '24' where a whole number from 1 to 1,048,576 belongs"),
        ("pt_meta.json", {"vec_size": 2**40}, "its 'vec_size' is 1099511627776 where"),
        ("pt_meta.json", {"vec_size": -24}, "its 'vec_size' is -24 where"),
        ("pt_meta.json", {"doc_count": True}, "its 'doc_count' is True where"),
        ("pt_meta.json", {"doc_count": 0}, "its 'doc_count' is 0 where"),
        ("pt_meta.json", {"doc_count": 10**30}, "its 'doc_count' is 1000"),
        ("pt_meta.json", {"doc_count": 299}, "vecs.f4 has 28,800 bytes where 28,704 belong"),
        ("pt_meta.json", {"text_field": ["text"]}, "its 'text_field' is ..text.. where a text belongs"),
        ("pt_meta.json", {"encoder": "mine"}, "where a description of an encoder belongs"),
        ("pt_meta.json", {"encoder": {"fingerprint": 5}}, "where a description of an encoder belongs"),
        ("pt_meta.json", {"encoder": {"path": "/etc"}}, "outside the folder"),
        ("pt_meta.json", {"encoder": {"path": "../../../etc"}}, "outside the folder"),
        ("pt_meta.json", {"encoder": {"path": "a\0b"}}, "outside the folder"),
        ("pt_meta.json", {"files": ["vecs.f4"]}, "its 'files' is ..vecs.f4.. where"),
        ("pt_meta.json", {"files": {"docnos.npids": "many"}}, "the size of 'docnos.npids' is 'many'"),
        ("pt_meta.json", {"files": {"docnos.npids": 5}}, "docnos.npids has .* bytes where 5 belong"),
        ("vecs.f4", b"cut", "vecs.f4 has 3 bytes where 28,800 belong"),
        ("vecs.f4", None, "vecs.f4 is missing"),
        ("docnos.npids", None, "docnos.npids is missing"),
        ("docnos.txt", b"d1\n" * 900, "docnos.txt"),
        ("docnos.txt", "zeros", "docnos.txt does not hold 300 docnos"),
        ("docnos.hash", b"", "docnos.hash has 0 bytes where 3,600 belong"),
        ("docno_ranks.u4", b"xx", "docno_ranks.u4 has 2 bytes where 1,200 belong"),
    ],
)
def test_damaged_index(make, built, tmp_path, name, damage, says):
    index = make()
    shutil.copytree(built, index.index_path)
    file = index.index_path / name
    if damage is None:
        file.unlink()
    elif damage == "zeros":
        file.write_bytes(b"0" * file.stat().st_size)
    elif isinstance(damage, dict):
        file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    else:
        file.write_bytes(damage)
    opened = make()
    with pytest.raises(ValueError, match=says):
        opened.retriever(5)(queries())
    if name != "docnos.txt":
        assert not opened.built()
    # It can be overwritten as long as it says what it is.
    if damage in ("zeros", b"cut"):
        assert len(opened.indexer(mode="overwrite").index(DOCUMENTS)) == 300


@pytest.mark.filterwarnings("ignore:magic header not found")
@pytest.mark.parametrize("content", [b"", b"x" * 500, b"NPID" + b"\xff" * 200, b"\x80\x04\x95pickle" * 40])
def test_damaged_lookup_of_pyterrier_dr(make, tmp_path, content):
    FlexIndex(str(tmp_path / "flex"), verbose=False).index(
        [{"docno": "a", "doc_vec": np.ones(3, "f4")}, {"docno": "b", "doc_vec": np.ones(3, "f4")}]
    )
    (tmp_path / "flex" / "docnos.npids").write_bytes(content)
    with pytest.raises(ValueError, match=r"docnos.npids is no docno lookup or damaged"):
        make("flex").open()


def test_artifact_round_trip(make, tmp_path):
    index = make().index(DOCUMENTS)
    index.build_package(str(tmp_path / "package.tar.lz4"), verbose=False)
    loaded = DenseIndex.load(str(index.index_path))
    assert len(loaded) == 300
    assert isinstance(pt.Artifact.load(str(index.index_path)), FlexIndex)


def test_readers_while_a_new_index_takes_its_place(make):
    index = make().index(DOCUMENTS[:200])
    for count in (250, 300, 100):
        index.indexer(mode="overwrite").index(DOCUMENTS[:count])
        opened = DenseIndex(index.index_path, verbose=False)
        assert len(opened) == len(opened.open().vectors) == len(list(opened.open().docnos)) == count


@pytest.mark.parametrize(("name", "source"), [("index", "corpus"), ("passage_index", "passages")])
def test_indexes_of_version_0_1_still_open(tmp_path, name, source):
    fixtures = Path(__file__).parent / "fixtures" / "v0_1"
    shutil.copytree(fixtures, tmp_path / "v0_1")
    index = DenseIndex(tmp_path / "v0_1" / name, verbose=False)
    expected = json.loads((fixtures / f"{name}.json").read_text())
    found = index.retriever(5).search("apple river")
    assert index.built() and index.precision is None and found["docno"].tolist() == expected["docno"]
    assert np.abs(found["score"] - expected["score"]).max() < 1e-6
    assert isinstance(pt.Artifact.load(str(index.index_path)), DenseIndex)
    # It is known what it was made of, and it can be added to.
    before = content(index.index_path)
    corpus = (Corpus if source == "corpus" else PassageCorpus)(tmp_path / "v0_1" / source)
    assert len(DenseIndex(index.index_path, index.encoder, verbose=False).index(corpus)) == len(index)
    assert content(index.index_path) == before
    more = Corpus.build([{"docno": "new", "text": "apple river"}], tmp_path / "more", verbose=False)
    index.append(more if source == "corpus" else more.to_passages(tmp_path / "cut", length=4, stride=4, verbose=False))
    assert index.retriever(1).search("apple river")["docno"].tolist() == ["new"]
    assert (index.open().vectors[: len(index) - 1] == np.frombuffer(before["vecs.f4"], "<f4").reshape(-1, 4)).all()

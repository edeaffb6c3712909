"""Engines: Ray's workers give the bytes, results and errors of one process, and leave nothing behind.

All tests share one engine, whose workers take some ten seconds to import everything. What depends on which process does
the work is tested with these; what does not, with workers that are in this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import psutil
import pyterrier as pt
import pytest
import torch
from pandas.testing import assert_frame_equal

from forked import forked_refreshers
from pt_dance import Corpus, DanceRetriever, DenseIndex, DualEncoder, recipes
from pt_dance.engines import LazyPipeline, sending
from pt_dance.engines.reaper import processes_of, status_of
from pt_dance.index import parts, shards
from pt_dance.index.parts import Part, plan
from pt_dance.index.shards import ShardReader
from pt_dance.losses.rows import TrainingRows
from pt_dance.mining import mine_documents, mine_queries
from pt_dance.retriever.search.ranges import EngineSearch
from pt_dance.training import teacher as teacher_module
from pt_dance.training.teacher import TeacherScores
from small_collection import standard_library

pytestmark = pytest.mark.timeout(900)  # on a busy machine, workers start slowly


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'pt_dance[ray]')")
    from pt_dance import engines

    with engines.Ray(workers=2) as started:
        yield started


class Here:
    """Workers in this process: what an engine does, without its processes."""

    workers, device = 3, None

    def __init__(self, most: int | None = None) -> None:
        self.most, self.asked = most, []

    def map(self, make, tasks, what):
        work = make()
        for task in tasks:
            if self.most is not None and len(self.asked) >= self.most:
                raise RuntimeError("the engine is gone")
            self.asked.append(task)
            yield work(task)

    def broadcast(self, make, tasks, what):
        works = [make(number) for number in range(self.workers)]
        for task in tasks:
            yield [work(task) for work in works]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus.build(standard_library(None).documents, tmp_path_factory.mktemp("corpus") / "c", verbose=False)


@pytest.fixture(scope="module")
def encoder(corpus) -> DualEncoder:
    return DualEncoder.static(corpus.texts_at(range(200)), dim=16, vocab_size=500)


def make(path: Path, encoder, corpus, engine=None, shard_size: int = 100, mode: str = "create") -> DenseIndex:
    index = DenseIndex(path, encoder, shard_size=shard_size, verbose=False)
    return index.indexer(mode=mode, engine=engine).index(corpus)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- indexing


def test_an_index_by_two_workers_has_the_bytes_of_one_process(engine, encoder, corpus, tmp_path):
    make(tmp_path / "one", encoder, corpus)
    make(tmp_path / "two", encoder, corpus, engine)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_an_encoder_on_a_gpu_goes_to_workers_without_one(engine, encoder, corpus, tmp_path, monkeypatch):
    """Ray's own way would ask there for the GPU that it came from; a CPU's tensors stand in for a GPU's."""
    import ray

    encoder, sent = encoder.copy(), []
    on_gpu = {parameter.data_ptr() for parameter in encoder.model.parameters()}

    def is_on_gpu(tensor) -> bool:
        sent.append(tensor.data_ptr())
        return tensor.data_ptr() in on_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sending, "_is_on_gpu", is_on_gpu)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    make(tmp_path / "two", encoder, corpus, engine)
    assert on_gpu <= set(sent)
    monkeypatch.undo()
    make(tmp_path / "one", encoder, corpus)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert torch.Tensor not in ray.cloudpickle.CloudPickler.dispatch


def test_a_killed_worker_is_replaced(engine, encoder, corpus, tmp_path, monkeypatch):
    import ray

    make(tmp_path / "one", encoder, corpus)
    add, added = parts.IndexWriter.add, []

    def kill_then_add(writer, docnos, *rest):
        if not added:
            os.kill(ray.get(engine._started()[0].pid.remote()), signal.SIGKILL)
        added.append(len(docnos))
        return add(writer, docnos, *rest)

    monkeypatch.setattr(parts.IndexWriter, "add", kill_then_add)
    make(tmp_path / "two", encoder, corpus, engine)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert added == [100] * (len(corpus) // 100) + [len(corpus) % 100]


def test_a_document_that_cannot_be_encoded_is_named(engine, encoder, corpus, tmp_path):
    class Choosy(DualEncoder):  # sent as it is: workers cannot import this file
        def encode_docs(self, texts, batch_size=None, **options):
            if poison in texts:
                raise OverflowError("the tokenizer gave up")
            return super().encode_docs(texts, batch_size, **options)

    poison = corpus.texts_at([321])[0]
    choosy = encoder.copy()
    choosy.__class__ = Choosy
    expected = f"document '{corpus.docno([321])[0]}' of shard 3 (documents 300 to 399) cannot be encoded: the tokenizer"
    with pytest.raises(RuntimeError) as raised:
        make(tmp_path / "index", choosy, corpus, engine)
    assert str(raised.value).startswith(expected) and "\n" not in str(raised.value)
    assert "Choosy" in str(raised.value.__cause__) or "gave up" in str(raised.value.__cause__)
    assert not (tmp_path / "index").exists()


def test_what_is_no_corpus_is_refused(encoder, corpus, tmp_path):
    with pytest.raises(TypeError, match=r"not from a list_iterator: Corpus\.build"):
        make(tmp_path / "index", encoder, iter([{"docno": "a", "text": "b"}]), Here())
    with pytest.raises(TypeError, match=r"engine must be a pt_dance\.engines\.Ray, or None for this process, not 2"):
        make(tmp_path / "index", encoder, corpus, 2)


def test_passages_and_appended_documents(encoder, corpus, tmp_path):
    more = Corpus.build([{"docno": f"new{n}", "text": f"text {n}"} for n in range(30)], tmp_path / "m", fields=["text"])
    whole = corpus.to_passages(tmp_path / "passages", length=40, stride=20, verbose=False)
    for name, engine in (("one", None), ("two", Here())):
        make(tmp_path / name, encoder, corpus, engine)
        make(tmp_path / name, encoder, more, engine, shard_size=7, mode="append")
        make(tmp_path / f"{name} of passages", encoder, whole, engine)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert content(tmp_path / "two of passages") == content(tmp_path / "one of passages")


def test_parts_of_a_call_that_was_interrupted_are_used(encoder, corpus, tmp_path, monkeypatch):
    make(tmp_path / "one", encoder, corpus)
    add = parts.IndexWriter.add
    monkeypatch.setattr(parts.IndexWriter, "add", _raises)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "two", encoder, corpus, _Eager())
    folder = tmp_path / ".two.building" / "parts"
    whole = sorted(os.listdir(folder))
    assert len(whole) == -(-len(corpus) // 100)
    (folder / whole[0]).write_bytes(b"cut off")
    (folder / "unfinished.new").write_bytes(b"")
    monkeypatch.setattr(parts.IndexWriter, "add", add)
    again = Here()
    make(tmp_path / "two", encoder, corpus, again)
    assert [f"{part.first}-{part.count}" for part in again.asked] == ["-".join(whole[0].split("-")[:2])]
    assert content(tmp_path / "two") == content(tmp_path / "one")


def _raises(*_):
    raise KeyboardInterrupt


class _Eager(Here):
    """Answers all tasks before the first answer is used."""

    def map(self, make, tasks, what):
        done = list(super().map(make, tasks, what))
        yield from done


def test_parts_of_other_weights_are_not_used(encoder, corpus, tmp_path, monkeypatch):
    other = encoder.copy()
    with pytest.raises(RuntimeError, match="the engine is gone"):
        make(tmp_path / "index", encoder, corpus, Here(most=4))
    other.model[0].embedding.weight.data.mul_(-1)
    make(tmp_path / "one", other, corpus)
    make(tmp_path / "index", other, corpus, Here())
    assert content(tmp_path / "index") == content(tmp_path / "one")


def test_shards_end_where_those_of_one_process_do(corpus, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 20_000)
    monkeypatch.setattr(parts, "SHARD_CHARACTERS", 20_000)
    reader = ShardReader(corpus, object(), "text", 40, context=None)
    expected, first = [], 0
    while shard := reader.read(None):
        expected.append((first, len(shard)))
        first += len(shard)
    assert [(part.first, part.count) for part in plan(corpus, "text", 0, 40, 0)] == expected
    assert {40} < {count for _, count in expected}, "no shard ended early, or all did"
    late = list(plan(corpus, "text", expected[3][0], 40, 3))
    assert late[0] == Part(3, *expected[3])


# ---------------------------------------------------------------------------------------------- search, mining, teacher


@pytest.fixture(scope="module")
def index(tmp_path_factory, encoder, corpus) -> DenseIndex:
    """With every document twice, so that there are ties, in whichever range its copy is."""
    documents = [{"docno": d["docno"], "text": d["text"]} for d in corpus.get_corpus_iter(False)]
    copies = [{**d, "docno": f"{'a' if n % 2 else 'z'}{d['docno']}"} for n, d in enumerate(documents)]
    twice = Corpus.build(documents + copies, tmp_path_factory.mktemp("twice") / "c", fields=["text"], verbose=False)
    return make(tmp_path_factory.mktemp("index") / "i", encoder, twice)


def topics(count: int = 60) -> pd.DataFrame:
    return standard_library(None).topics.iloc[:count]


@pytest.mark.parametrize("num_results", [7, 10**6])
def test_each_worker_searches_a_range_of_rows(index, num_results):
    found = index.retriever(num_results, engine=Here(), verbose=False)(topics())
    assert_frame_equal(found, index.retriever(num_results, verbose=False)(topics()))
    assert (found["score"].duplicated() & found["qid"].duplicated()).any(), "there were no ties"


def test_passages_are_searched_by_ranges(encoder, corpus, tmp_path):
    passages = corpus.to_passages(tmp_path / "passages", length=20, stride=10, most=None, verbose=False)
    of_passages = make(tmp_path / "index", encoder, passages)
    expected = of_passages.retriever(9, verbose=False)(topics())
    assert_frame_equal(of_passages.retriever(9, engine=Here(), verbose=False)(topics()), expected)


def test_ranges_of_joined_shards(encoder, corpus, tmp_path):
    documents = list(corpus.get_corpus_iter(False))
    for number, first in enumerate((0, 100, 950)):
        part = documents[first : (100, 950, None)[number]]
        DenseIndex(tmp_path / "index" / "shards" / f"{number:05d}", encoder, verbose=False).index(iter(part))
    joined = DenseIndex(tmp_path / "index", encoder, verbose=False).join()
    engine = Here()
    assert_frame_equal(joined.retriever(9, engine=engine)(topics()), joined.retriever(9)(topics()))
    vectors = joined.open().vectors
    assert np.array_equal(vectors.part(90, 960)[:], vectors[90:960])


def test_fewer_rows_than_workers(encoder, tmp_path):
    two = make(tmp_path / "index", encoder, Corpus.build([{"docno": d, "text": d} for d in "ab"], tmp_path / "c"))
    found = two.retriever(5, engine=Here(), verbose=False)(topics(3))
    assert_frame_equal(found, two.retriever(5, verbose=False)(topics(3)))


def test_an_index_that_was_replaced_meanwhile(encoder, corpus, tmp_path):
    index = make(tmp_path / "index", encoder, corpus)
    ranges = EngineSearch(Here(), index.open(), None)
    # While documents are appended, the file of the vectors grows; the index that is there is what it was.
    expected = ranges.search(encoder.encode_queries(["a"]), 3)
    with open(tmp_path / "index" / "vecs.f4", "ab") as file:
        file.write(bytes(64))
    for found, known in zip(ranges.search(encoder.encode_queries(["a"]), 3), expected, strict=True):
        assert (found == known).all()
    make(tmp_path / "index", encoder, corpus, mode="overwrite")
    with pytest.raises(ValueError, match=r"vecs\.f4 was replaced while it was searched"):
        ranges.search(encoder.encode_queries(["a"]), 3)


def test_faiss_takes_no_engine(index):
    with pytest.raises(ValueError, match="AnnRetriever takes no engine"):
        index.ann_retriever(engine=Here())


class Overlap(pt.Transformer):
    """Scores rows by how many words query and text share, and counts what it was asked."""

    asked: ClassVar[list[int]] = []

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        self.asked.append(len(inp))
        pairs = zip(inp["query"], inp["text"], strict=True)
        return inp.assign(score=[float(len(set(q.split()) & set(t.split()))) for q, t in pairs])

    def __repr__(self) -> str:
        return "Overlap()"


def training_rows(corpus: Corpus, queries: list[str]) -> tuple[TrainingRows, list[str], Corpus]:
    """A thousand rows with two negatives each, at random; many pairs occur twice."""
    numbers = np.random.default_rng(0)
    query, positive = numbers.integers(len(queries), size=1000), numbers.integers(40, size=1000)
    negatives = numbers.integers(-1, 40, size=(1000, 2))
    relevance = np.ones((len(queries), len(corpus)), dtype=bool)
    return TrainingRows(query, positive, relevance, negatives), queries, corpus


def test_searches_mining_and_teacher_by_two_workers(engine, index, encoder, corpus, tmp_path):
    """All in one test, for which the workers start once."""
    qrels, some = standard_library(None).qrels, topics()
    assert_frame_equal(index.retriever(7, engine=engine, verbose=False)(some), index.retriever(7, verbose=False)(some))
    dense = make(tmp_path / "index", encoder, corpus).retriever(50, verbose=False)
    lazy = LazyPipeline(partial(_unsendable, dense))
    for source in ([(dense, 2), dense(some)], [lazy]):
        options = dict(corpus=corpus, depth=30, negatives=4, query_block=17)
        expected = mine_documents(source, some, qrels, **options)
        found = mine_documents(source, some, qrels, engine=engine, **options)
        assert_frame_equal(found, expected)
        assert found.attrs == expected.attrs
    for given in ({"index": dense.index}, {}):
        options = dict(corpus=corpus, depth=30, negatives=4, document_block=17, **given)
        expected = mine_queries(encoder, some, qrels, **options)
        assert_frame_equal(mine_queries(encoder, some, qrels, engine=engine, **options), expected)
    with pytest.raises(TypeError) as raised:
        mine_documents(_unsendable(dense), some, qrels, engine=engine)
    assert "cannot be sent to another process" in str(raised.value)
    assert "LazyPipeline(lambda: ...)" in str(raised.value) and "\n" not in str(raised.value)
    teacher = _overlap()
    rows = training_rows(corpus, some["query"].tolist())
    expected = TeacherScores(teacher, tmp_path / "one.sqlite").of(*rows)
    found = TeacherScores(teacher, tmp_path / "two.sqlite", engine=engine).of(*rows)
    assert_rows_equal(found, expected)


def _unsendable(dense: pt.Transformer) -> pt.Transformer:
    """A pipeline that holds a lock, as others hold what is in Java."""
    lock = threading.Lock()

    def search(frame: pd.DataFrame) -> pd.DataFrame:
        with lock:
            return dense(frame)

    return pt.apply.generic(search)


def assert_rows_equal(found: TrainingRows, expected: TrainingRows) -> None:
    for name in ("teacher_positive", "teacher_negatives", "teacher_query_negatives"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_teacher_is_asked_once_for_a_pair_however_many_answers_are_outstanding(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "_BLOCK", 64)
    same = Corpus.build([{"docno": str(n), "text": f"text {n % 10}"} for n in range(40)], tmp_path / "c")
    rows, queries, _ = training_rows(corpus, topics()["query"].tolist())
    expected = TeacherScores(Overlap(), tmp_path / "one.sqlite").of(rows, queries, same)
    asked, Overlap.asked[:] = sum(Overlap.asked), []
    found = TeacherScores(Overlap(), tmp_path / "two.sqlite", engine=_Eager()).of(rows, queries, same)
    assert_rows_equal(found, expected)
    assert sum(Overlap.asked) == asked
    Overlap.asked[:] = []
    assert_rows_equal(TeacherScores(Overlap(), tmp_path / "two.sqlite", engine=Here()).of(rows, queries, same), found)
    assert not Overlap.asked


def test_a_lazy_pipeline_is_made_once_and_what_it_is_not_is_said():
    made = []
    results = pd.DataFrame({"qid": ["1"] * 3, "docno": [*"abc"]})
    lazy = LazyPipeline(lambda: made.append(1) or pt.Transformer.from_df(results))
    assert not made
    frame = pd.DataFrame({"qid": ["1"], "query": ["q"]})
    assert lazy(frame)["docno"].tolist() == [*"abc"] and lazy(frame)["docno"].tolist() == [*"abc"] and made == [1]
    with pytest.raises(TypeError, match=r"make\(\) gave back a int; it must give a PyTerrier pipeline"):
        LazyPipeline(lambda: 3)(frame)
    with pytest.raises(TypeError, match="must be a function that returns a pipeline"):
        LazyPipeline(lazy)


def test_a_fit_by_workers_gives_the_weights_of_one_process(engine, encoder, corpus, tmp_path):
    some, qrels = topics(40), standard_library(None).qrels
    qrels = qrels[qrels["qid"].isin(some["qid"])]
    overlap = LazyPipeline(_overlap)  # as a cross-encoder would be
    rounds = [*recipes.dance(1, warm_up=0, depth=20), *recipes.margin_mse(overlap, 1, negatives=lambda dense: dense)]
    fitted = {}
    for name, given in (("one", None), ("two", engine)):
        dance = DanceRetriever(
            encoder, corpus, tmp_path / name, recipe=rounds, num_results=9, engine=given, verbose=False
        )
        fitted[name] = dance.fit(some, qrels, some, qrels)
    one, two = fitted.values()
    assert [two.retriever(round=n).index.fingerprint for n in range(3)] == [
        one.retriever(round=n).index.fingerprint for n in range(3)
    ]
    timed = [column for column in one.history.columns if column.endswith("_seconds")]
    assert_frame_equal(two.history.drop(columns=timed), one.history.drop(columns=timed))
    assert_frame_equal(two(some), one(some))


def test_a_refresher_beside_the_training_is_placed_by_ray(engine, encoder, corpus, tmp_path, monkeypatch):
    """It is a process of the cluster, and is gone when the round is trained; this process replays it to the bit."""
    place, placed = type(engine).place, []
    monkeypatch.setattr(type(engine), "place", lambda *given: placed.append(place(*given)) or placed[-1])
    some, qrels = topics(40), standard_library(None).qrels
    recipe = recipes.ance(
        1, warm_up=0, loss="contrastive", steps=24, refresh_every=4, max_staleness=8, batch_size=8, depth=20,
        negatives_per_query=4,
    )  # fmt: skip
    options = dict(recipe=recipe, verbose=False)
    live = DanceRetriever(encoder, corpus, tmp_path / "live", refresh="beside", engine=engine, **options)
    live.fit(some, qrels)
    assert live.history.iloc[-1]["refreshes"] >= 1
    assert len(placed) == 1 and placed[0].poll() == -signal.SIGKILL
    with pytest.raises(FileNotFoundError) as error:  # as if it were started here
        engine.place("nothing", tmp_path / "gone", b"")
    assert "\n" not in str(error.value)
    options |= dict(refresh="replay", replay_of=tmp_path / "live")
    with forked_refreshers():
        again = DanceRetriever(encoder, corpus, tmp_path / "again", **options).fit(some, qrels)
    assert again.encoder.fingerprint == live.encoder.fingerprint


def _overlap() -> pt.Transformer:
    return pt.apply.doc_score(lambda row: float(len(set(row["query"].split()) & set(row["text"].split()))))


# ------------------------------------------------------------------------------------------------ what an engine leaves


_KILLED = """
import os, signal
from pt_dance.engines import Ray
engine = Ray(workers=1)
engine._started()
print(engine._cluster.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_a_killed_program(engine):
    child = subprocess.run([sys.executable, "-c", _KILLED], capture_output=True, text=True, timeout=600)
    assert child.returncode == -signal.SIGKILL, child.stderr
    folder = Path(child.stdout.strip())
    until = time.monotonic() + 300
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not folder.exists()
    assert not list(processes_of(str(folder)))
    assert Path(engine._cluster.folder).exists(), "another program's cluster was ended, too"


def test_the_same_call_goes_on_after_ray_itself_was_killed(engine, encoder, corpus, tmp_path, monkeypatch):
    make(tmp_path / "one", encoder, corpus)
    add, added = parts.IndexWriter.add, []

    def add_then_kill(writer, docnos, *rest):
        add(writer, docnos, *rest)
        if not added:
            found = [(status_of(pid)[0], pid) for pid in processes_of(engine._cluster.folder, os.getpid())]
            # The workers last, which nobody starts again.
            for pid in [pid for name, pid in sorted(found, reverse=True) if name.startswith(("raylet", "ray::Worker"))]:
                os.kill(pid, signal.SIGKILL)
        added.append(len(docnos))

    monkeypatch.setattr(parts.IndexWriter, "add", add_then_kill)
    with pytest.raises(RuntimeError, match=r"^Ray's own processes on this machine ended early .* goes on from there$"):
        make(tmp_path / "two", encoder, corpus, engine)
    make(tmp_path / "two", encoder, corpus, engine)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert sum(added) == len(corpus)


def test_nothing_is_left_of_a_closed_engine(engine):
    """Comes last: the engine starts again if it is asked again."""
    engine._started()
    folder = engine._cluster.folder
    started = [psutil.Process(pid) for pid in processes_of(folder, os.getpid())]
    assert len(started) >= 4
    # they listen on the machine's addresses, and answer no one who has not the token
    servers = [process for process in started if process.name() in ("gcs_server", "raylet")]
    assert len(servers) == 2
    assert {(p.environ()["RAY_AUTH_MODE"], len(p.environ()["RAY_AUTH_TOKEN"])) for p in servers} == {("token", 64)}
    assert "RAY_AUTH_TOKEN" not in os.environ
    engine.close()
    assert not os.path.exists(folder)
    assert not list(processes_of(folder, os.getpid()))

"""Approximate retrieval: exact scores, recall told truthfully, kept once for an index, never trusted blindly."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import faiss
import numpy as np
import pandas as pd
import pyterrier as pt
import pytest

from pt_dance import DenseIndex
from pt_dance.retriever.ann import AnnRetriever

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((40, 24))
VECTORS = (CENTRES[RNG.integers(0, 40, 3000)] + 0.4 * RNG.standard_normal((3000, 24))).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
QUERIES = pd.DataFrame({"qid": [str(i) for i in range(60)], "query_vec": list(VECTORS[:60] + 0.05)})


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    records = ({"docno": f"d{i:05}", "doc_vec": v} for i, v in enumerate(VECTORS))
    return DenseIndex(tmp_path_factory.mktemp("ann") / "index", verbose=False).index(records)


@pytest.mark.parametrize("method", ["hnsw", "ivfpq"])
def test_exact_scores_and_true_recall(index, method):
    ann, exact = index.ann_retriever(20, method), index.retriever(20)
    found, best = ann(QUERIES), exact(QUERIES)
    assert list(found.columns) == list(best.columns)
    everything = index.retriever(3000)(QUERIES).set_index(["qid", "docno"])["score"]
    assert all(everything[q, d] == s for q, d, s in zip(found["qid"], found["docno"], found["score"], strict=True))
    shares = []
    for qid, mine in found.groupby("qid", sort=False):
        assert mine["score"].is_monotonic_decreasing and mine["rank"].tolist() == list(range(len(mine)))
        top = set(best[(best["qid"] == qid) & (best["rank"] < 10)]["docno"])
        shares.append(len(top & set(mine[mine["rank"] < 10]["docno"])) / 10)
    assert ann.recall(QUERIES, 10) == pytest.approx(np.mean(shares))
    assert ann.recall(QUERIES, 10) > (0.98 if method == "hnsw" else 0.5)
    # More candidates find more.
    wide = index.ann_retriever(20, method, candidates=400)
    assert wide.recall(QUERIES, 20) >= max(0.95, ann.recall(QUERIES, 20))
    assert index.ann_retriever(20, method, candidates=3000, search_options=None).recall(QUERIES, 20) > 0.97


def test_results_are_rescored_as_exactly(index):
    results = index.retriever(300)(QUERIES).sample(500, random_state=1)
    pd.testing.assert_frame_equal(index.ann_retriever(5)(results), index.retriever(5)(results))


def test_built_once_and_kept_with_the_index(index, monkeypatch):
    first = index.ann_retriever(10)
    expected = first(QUERIES)
    folders = sorted(p.name for p in (index.index_path / "ann").iterdir())
    monkeypatch.setattr(AnnRetriever, "_write", lambda *_: pytest.fail("built again"))
    again = DenseIndex(index.index_path, verbose=False).ann_retriever(10, search_options={"ef_search": 128})
    assert again == first and hash(again) == hash(first)
    pd.testing.assert_frame_equal(again(QUERIES), expected)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(first))(QUERIES), expected)
    assert sorted(p.name for p in (index.index_path / "ann").iterdir()) == folders
    assert index.built()
    with pytest.raises(pytest.fail.Exception, match="built again"):
        index.ann_retriever(10, build_options={"neighbours": 8})


def test_threads_that_ask_for_it_wait_for_it(tmp_path, monkeypatch):
    index = DenseIndex(tmp_path / "i", verbose=False)
    index.index({"docno": str(i), "doc_vec": v} for i, v in enumerate(VECTORS[:300]))
    write, written = AnnRetriever._write, []

    def slowly(self, folder):
        written.append(folder)
        time.sleep(0.5)
        write(self, folder)

    monkeypatch.setattr(AnnRetriever, "_write", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: index.ann_retriever(10)(QUERIES), range(4)))
    assert len(written) == 1 and all(frame.equals(found[0]) for frame in found)


def test_cut_off_keeps_the_candidates(index):
    ann = index.ann_retriever(50, "ivfpq")
    fused = (ann % 5).compile()
    assert isinstance(fused, AnnRetriever) and fused.num_results == 5
    pd.testing.assert_frame_equal(fused(QUERIES), (ann % 5)(QUERIES))
    assert fused != ann and ann != index.retriever(50) and index.retriever(50) != ann
    assert ann != index.ann_retriever(50, "ivfpq", search_options={"probes": 3})


def test_other_vectors_are_noticed(tmp_path):
    def build(seed, mode):
        vectors = np.random.default_rng(seed).standard_normal((300, 8)).astype(np.float32)
        index = DenseIndex(tmp_path / "i", verbose=False)
        return index.indexer(mode=mode).index({"docno": str(i), "doc_vec": v} for i, v in enumerate(vectors))

    index = build(1, "create")
    ann = index.ann_retriever(10)
    queries = pd.DataFrame({"qid": ["a"], "query_vec": [np.ones(8)]})
    assert ann(queries)["docno"].tolist() == index.retriever(10)(queries)["docno"].tolist()
    index = build(2, "overwrite")
    # The same object, and one that was made for the old vectors: both follow what is open in them.
    ann.index.forget()
    assert ann(queries)["docno"].tolist() == index.retriever(10)(queries)["docno"].tolist()
    index.append([{"docno": "best", "doc_vec": np.full(8, 10)}])
    assert index.ann_retriever(10)(queries)["docno"][0] == "best"


@pytest.mark.parametrize("damage", ["cut", "changed", "no metadata", "hostile metadata"])
def test_damaged_files(tmp_path, damage):
    index = DenseIndex(tmp_path / "i", verbose=False)
    index.index({"docno": str(i), "doc_vec": v} for i, v in enumerate(VECTORS[:300]))
    ann = index.ann_retriever(10)
    expected = ann(QUERIES)
    file, meta = ann._folder() / "index.faiss", ann._folder() / "pt_meta.json"
    raw = file.read_bytes()
    if damage == "cut":
        file.write_bytes(raw[:100])
    elif damage == "changed":
        file.write_bytes(raw[:200] + bytes(50) + raw[250:])
    elif damage == "no metadata":
        meta.unlink()
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "digest": ["x"], "of": 7}))
    again = DenseIndex(tmp_path / "i", verbose=False)
    if damage == "changed":
        with pytest.raises(ValueError, match=r"index.faiss is not what was written there: remove"):
            again.ann_retriever(10)(QUERIES)
    else:
        pd.testing.assert_frame_equal(again.ann_retriever(10)(QUERIES), expected)


def test_bad_options(index, tmp_path):
    for arguments, says in (
        ({"method": "lsh"}, "method='lsh' is unknown; choose one of 'hnsw', 'ivfpq'"),
        ({"build_options": {"lists": 5}}, "hnsw has no option 'lists': it has neighbours, ef_construction"),
        ({"build_options": {"neighbours": 0}}, "neighbours=0 must be a whole number of at least 1"),
        ({"search_options": {"ef_search": "many"}}, "ef_search='many' must be a whole number"),
        ({"candidates": -5}, "candidates=-5 must be a whole number"),
        ({"threads": None}, "threads=None must be a whole number"),
        ({"num_results": 0}, "num_results=0 must be"),
        ({"method": "ivfpq", "build_options": {"subvectors": 7}}, "subvectors must divide the vectors' 24 numbers"),
        ({"method": "ivfpq", "build_options": {"lists": 5000}}, "ivfpq needs at least 5000 documents and the index"),
    ):
        with pytest.raises(ValueError, match=says):
            index.ann_retriever(**arguments)
    assert not [p for p in (index.index_path / "ann").iterdir() if p.name.startswith(".")]
    with pytest.raises(ValueError, match="recall needs queries and a k from 1 to num_results"):
        index.ann_retriever(10).recall(QUERIES, 11)


class TestContract(pt.testing.transformer_test_class(lambda: None)):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def make(cls, index):
        cls.transformer = index.ann_retriever(10)


def test_an_ivfpq_merged_on_disk_is_the_one_made_in_memory(tmp_path, monkeypatch, capfd):
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((30, 16))
    vectors = (centres[rng.integers(0, 30, 1000)] + 0.3 * rng.standard_normal((1000, 16))).astype(np.float32)
    index = DenseIndex(tmp_path / "i", verbose=False)
    index.index({"docno": f"d{i}", "doc_vec": v} for i, v in enumerate(vectors))
    queries = pd.DataFrame({"qid": [str(i) for i in range(50)], "query_vec": list(vectors[::20])})
    whole = index.ann_retriever(20, "ivfpq", build_options={"lists": 40})
    expected, recall = whole(queries), whole.recall(queries, k=20)
    in_memory = names(whole)
    monkeypatch.setattr("pt_dance.retriever.ann._ROWS_IN_MEMORY", 300)
    again = DenseIndex(tmp_path / "i", verbose=False).ann_retriever(20, "ivfpq", build_options={"lists": 40})
    merged = again(queries)
    assert in_memory == ["index.faiss", "pt_meta.json"]
    assert names(again) == ["index.faiss", "lists.ivfdata", "pt_meta.json"]
    pd.testing.assert_frame_equal(merged, expected)
    assert again.recall(queries, k=20) == recall > 0.5
    # The folder can be moved, and another process opens it; lists that were cut are made again.
    (tmp_path / "i").rename(tmp_path / "moved")
    moved = DenseIndex(tmp_path / "moved", verbose=False).ann_retriever(20, "ivfpq", build_options={"lists": 40})
    pd.testing.assert_frame_equal(moved(queries), expected)
    lists = moved._folder() / "lists.ivfdata"
    # another file in its place: FAISS maps this one, and its threads may still be reading
    (tmp_path / "cut").write_bytes(lists.read_bytes()[:-1])
    (tmp_path / "cut").replace(lists)
    assert not moved._is_there(moved._folder()) and not capfd.readouterr().out


def test_a_graph_finds_the_lists_where_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr("pt_dance.retriever.ann._MOST_FLAT_LISTS", 10)
    index = DenseIndex(tmp_path / "i", verbose=False)
    index.index({"docno": str(i), "doc_vec": v} for i, v in enumerate(VECTORS))
    graph = index.ann_retriever(20, "ivfpq", candidates=200, search_options={"probes": 20})
    assert "HNSW" in type(faiss.downcast_index(graph._ann().quantizer)).__name__ and graph.recall(QUERIES, k=10) > 0.8


class Gpu:
    """What pt_dance asks of FAISS's GPU functions, done on the CPU and written down."""

    def __init__(self, monkeypatch, refuses=False):
        self.calls, self.refuses = [], refuses
        for name in ("index_cpu_to_all_gpus", "index_cpu_to_gpu", "index_gpu_to_cpu"):
            monkeypatch.setattr(faiss, name, getattr(self, name), raising=False)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
        monkeypatch.setattr(faiss, "GpuClonerOptions", lambda: SimpleNamespace(useFloat16=False), raising=False)

    def index_cpu_to_all_gpus(self, index):
        self.calls.append(("centres", type(index).__name__, index.metric_type))
        self.centres = index
        return index

    def index_cpu_to_gpu(self, resources, device, index, options):
        self.calls.append(("fill", resources, device, index.is_trained, index.ntotal, options.useFloat16))
        if self.refuses:
            raise RuntimeError("Error: not implemented on GPU")
        return faiss.clone_index(index)

    def index_gpu_to_cpu(self, index):
        self.calls.append(("back", index.ntotal))
        return index


@pytest.mark.parametrize("refuses", [False, True])
def test_gpus_train_and_fill_an_ivfpq_where_faiss_has_them(tmp_path, monkeypatch, refuses):
    index = DenseIndex(tmp_path / "i", verbose=False)
    index.index({"docno": f"d{i}", "doc_vec": v} for i, v in enumerate(VECTORS[:1000]))

    def build():
        shutil.rmtree(index.index_path / "ann", ignore_errors=True)
        whole = index.ann_retriever(20, "ivfpq", build_options={"lists": 20}).build()
        with monkeypatch.context() as patch:
            patch.setattr("pt_dance.retriever.ann._ROWS_IN_MEMORY", 400)
            merged = index.ann_retriever(20, "ivfpq", build_options={"lists": 21}).build()
        graph = index.ann_retriever(20, "hnsw").build()
        return {
            file.relative_to(index.index_path): file.read_bytes()
            for retriever in (whole, merged, graph)
            for file in retriever._folder().iterdir()
            if file.name != "pt_meta.json"
        }

    on_cpu = build()
    gpu = Gpu(monkeypatch, refuses)
    assert build() == on_cpu and len(on_cpu) == 4
    centres = ("centres", "IndexFlat", faiss.METRIC_INNER_PRODUCT)
    empty, back = ("fill", "resources", 0, True, 0, True), [] if refuses else ["back"]
    assert [call if call[0] != "back" else call[0] for call in gpu.calls] == [
        *(centres, empty, *back),
        *(centres, *(empty, *back), *(empty, *back), *(empty, *back)),
    ]
    assert [call[1] for call in gpu.calls if call[0] == "back"] == ([] if refuses else [1000, 400, 400, 200])
    # The centres were sought there: the last ones of a search are left in the index of that search.
    assert gpu.centres.ntotal == 21


def names(retriever):
    return sorted(file.name for file in retriever._folder().iterdir())

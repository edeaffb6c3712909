"""Exact search: nothing is lost, scores are right to float32, and the same however it is cut into blocks."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_dance.retriever.search.arrays import ArrayBlock, best_first
from pt_dance.retriever.search.exact import exact_search, iter_exact_search, open_vectors, score_pairs
from pt_dance.retriever.search.prefilter import HALF_ULP, Prefilter
from pt_dance.retriever.search.tensors import TensorVectors
from pt_dance.retriever.search.vectors import Vectors


def by_definition(queries, docs, k, tie_order):
    """Scores as exact sums rounded once, all pairs sorted by score and tie order."""
    exact = [[math.fsum(map(float, q.astype(np.float64) * d)) for d in docs.astype(np.float64)] for q in queries]
    scores = np.array(exact, dtype=np.float64).reshape(len(queries), len(docs)).astype(np.float32)
    rows = np.stack([np.lexsort((tie_order, -line))[:k] for line in scores]) if len(queries) else np.empty((0, k))
    return np.take_along_axis(scores, rows.astype(np.int64), 1), rows.astype(np.int64)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_the_definition_with_many_ties(data):
    n, d, q = (data.draw(st.integers(1, most)) for most in (90, 9, 7))
    seed, values = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from([1, 2, 5]))
    rng = np.random.default_rng(seed)
    docs = rng.integers(-values, values + 1, (n, d)).astype(data.draw(st.sampled_from(["float32", "float16"])))
    queries = rng.integers(-values, values + 1, (q, d)).astype(np.float32)
    tie_order = rng.permutation(n).astype(np.uint32)
    k = data.draw(st.integers(1, n + 3))
    blocks = {"query_block": data.draw(st.integers(1, 9)), "doc_block": data.draw(st.integers(1, 100))}
    scores, rows = exact_search(queries, docs, k, tie_order=tie_order, device="cpu", **blocks)
    expected_scores, expected_rows = by_definition(queries, docs, k, tie_order)
    assert scores.shape == (q, min(k, n)) and scores.dtype == np.float32 and rows.dtype == np.int64
    assert (scores == expected_scores).all() and (rows == expected_rows).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ulps=st.integers(0, 3))
def test_products_that_float32_cannot_order(seed, ulps):
    # Documents that differ in the last bits only: their float32 products come out in any order.
    rng = np.random.default_rng(seed)
    docs = np.repeat(rng.standard_normal((1, 48)).astype(np.float32), 300, axis=0)
    docs = (docs.view(np.int32) + rng.integers(-ulps, ulps + 1, docs.shape, dtype=np.int32)).view(np.float32)
    queries = rng.standard_normal((3, 48)).astype(np.float32)
    tie_order = rng.permutation(300)
    expected = by_definition(queries, docs, 20, tie_order)
    for block in (7, 64, 300):
        scores, rows = exact_search(queries, docs, 20, tie_order=tie_order, doc_block=block, device="cpu")
        assert (scores == expected[0]).all() and (rows == expected[1]).all()


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(5)
    docs = rng.standard_normal((6000, 96)).astype(np.float32)
    docs /= np.linalg.norm(docs, axis=1, keepdims=True)
    docs[1000:1300] = docs[999]
    queries = rng.standard_normal((70, 96)).astype(np.float32)
    queries[5] = docs[999]
    queries[6] = 0
    return queries, docs


def test_same_bits_whatever_the_blocks(vectors):
    queries, docs = vectors
    first = exact_search(queries, docs, 50, device="cpu")
    reference = np.sort((queries.astype(np.float64) @ docs.T.astype(np.float64)).astype(np.float32))[:, ::-1][:, :50]
    assert np.abs(first[0] - reference).max() <= 1e-7
    for query_block, doc_block in ((1, 6000), (70, 61), (9, 4096), (256, 1), (33, 1000)):
        if doc_block == 1:
            again = exact_search(queries[:4], docs[:400], 50, query_block=query_block, doc_block=1, device="cpu")
            one = exact_search(queries[:4], docs[:400], 50, device="cpu")
            assert (again[0] == one[0]).all() and (again[1] == one[1]).all()
            continue
        again = exact_search(queries, docs, 50, query_block=query_block, doc_block=doc_block, device="cpu")
        assert (again[0] == first[0]).all() and (again[1] == first[1]).all()
    alone = exact_search(queries[5:6], docs, 50, device="cpu")
    assert (alone[0] == first[0][5]).all() and (alone[1] == first[1][5]).all()
    assert alone[1][0].tolist() == list(range(999, 1049))
    assert (first[0][6] == 0).all() and first[1][6].tolist() == list(range(50))


def test_scores_of_pairs_are_the_same_bits(vectors):
    queries, docs = vectors
    scores, rows = exact_search(queries, docs, 50, device="cpu")
    query_of = np.repeat(np.arange(len(queries)), 50)
    assert (score_pairs(queries, docs, query_of, rows.ravel(), device="cpu") == scores.ravel()).all()
    shuffled = np.random.default_rng(0).permutation(len(query_of))[:777]
    some = score_pairs(queries, docs, query_of[shuffled], rows.ravel()[shuffled], device="cpu")
    assert (some == scores.ravel()[shuffled]).all()
    assert score_pairs(queries, docs, [], []).shape == (0,)
    strided = np.repeat(docs, 2, axis=0)[::2]
    in_runs = score_pairs(queries, strided, query_of, rows.ravel(), device="cpu")
    assert not strided.flags.c_contiguous and in_runs.tobytes() == scores.tobytes()
    with pytest.raises(IndexError, match="query numbers must be 0 to 69, not -1"):
        score_pairs(queries, docs, [-1], [0])
    for bad in (-1, 6000):
        with pytest.raises(IndexError, match="rows must be 0 to 5999"):
            score_pairs(queries, docs, [0], [bad])


def test_scores_are_products_in_float64_rounded_once_whatever_is_scored_beside():
    # 1 + 2^-24 is the middle between two float32 numbers, and 2^-53 more is lost in float64, unless two of them meet
    # first: the order of adding decides. A pair's score must not depend on where in which call it stands.
    rng = np.random.default_rng(6)
    docs = np.zeros((600, 96), dtype=np.float32)
    docs[:, :6] = 1, 2.0**-24, 2.0**-53, 2.0**-53, 2.0**-53, -(2.0**-53)
    docs = rng.permuted(docs, axis=1)
    docs[400:] = rng.standard_normal((200, 96))
    docs[500:550, ::2], docs[500:550, 1::2] = 1e18 / 7, -1e18 / 7
    docs[550:580] *= np.float32(1e-35)
    docs[580:590], docs[590:] = 0, -0.0
    queries = np.stack([np.ones(96), -np.ones(96), rng.standard_normal(96), np.zeros(96)]).astype(np.float32)
    query_of, row_of = np.repeat(np.arange(4), 600), np.tile(np.arange(600), 4)
    for width in (np.float32, np.float16):
        vectors = Vectors(docs if width == np.float32 else np.clip(docs, -6e4, 6e4).astype(width))
        scores = vectors.score_pairs(queries, query_of, row_of)
        pairs = zip(queries[query_of], vectors.docs[row_of].astype(float), strict=True)
        exact = [math.fsum(map(float, query * doc)) for query, doc in pairs]
        sizes = (np.abs(vectors.docs).astype(float) @ np.abs(queries).astype(float).T).T.ravel()
        assert (np.abs(scores - exact) <= 2.0**-24 * np.abs(exact) + 96 * 2.0**-53 * sizes + 1e-45).all()
        assert width == np.float16 or len(np.unique(scores[:400])) == 2, "these vectors do not test what they should"
        for order in (rng.permutation(2400), np.lexsort((query_of, row_of)), np.arange(2400)[::-1]):
            for size in (1, 3, 700, 2400):
                parts = [order[start : start + size] for start in range(0, 2400, size)]
                again = [vectors.score_pairs(queries, query_of[part], row_of[part]) for part in parts]
                assert (np.concatenate(again) == scores[order]).all()


def test_best_first_is_a_sort_by_score_and_tie():
    rng = np.random.default_rng(9)
    scores = rng.choice(np.array([-np.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.5, 3e38], np.float32), (50, 40))
    ties = np.stack([rng.choice(2**32, 40, replace=False) for _ in range(50)])
    assert (best_first(scores, ties) == np.lexsort((ties, -scores), axis=-1)).all()
    assert (best_first(scores, ties.astype(np.uint32)) == best_first(scores, ties)).all()


def test_order_of_rows_does_not_matter(vectors):
    queries, docs = vectors
    tie_order = np.random.default_rng(1).permutation(len(docs))
    scores, rows = exact_search(queries, docs, 40, tie_order=tie_order, device="cpu")
    order = np.random.default_rng(2).permutation(len(docs))
    again = exact_search(queries, docs[order], 40, tie_order=tie_order[order], device="cpu")
    assert (again[0] == scores).all() and (order[again[1]] == rows).all()


def test_the_worst_orders_of_documents():
    # Every document beats all before it; then all are equal and only the ties decide.
    rising = np.linspace(-1, 1, 20000, dtype=np.float32)[:, None] * np.ones((1, 8), np.float32)
    query = np.ones((2, 8), np.float32)
    assert exact_search(query, rising, 30, doc_block=512, device="cpu")[1][1].tolist() == list(range(19999, 19969, -1))
    equal = np.ones((20000, 8), np.float32)
    tie_order = np.random.default_rng(3).permutation(20000)
    _, rows = exact_search(query, equal, 30, tie_order=tie_order, doc_block=512, device="cpu")
    assert rows[0].tolist() == np.argsort(tie_order)[:30].tolist()


def test_precision_settings_of_training_do_not_reach_it(vectors):
    queries, docs = vectors
    first = exact_search(queries, docs, 50, device="cpu")
    setting = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            again = exact_search(queries, docs, 50, device="cpu")
    finally:
        torch.set_float32_matmul_precision(setting)
    assert (again[0] == first[0]).all() and (again[1] == first[1]).all()


def test_memory_mapped_and_read_only(vectors, tmp_path):
    queries, docs = vectors
    docs.astype("<f2").tofile(tmp_path / "v")
    mapped = np.memmap(tmp_path / "v", dtype="<f2", mode="r", shape=docs.shape)
    expected = exact_search(queries, docs.astype(np.float16).astype(np.float32), 20, device="cpu")
    found = exact_search(queries, mapped, 20, doc_block=1000, device="cpu")
    assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()


def test_blocks_bound_the_memory(vectors):
    _, docs = vectors
    queries = np.random.default_rng(0).standard_normal((20000, 96)).astype(np.float32)
    tracemalloc.start()
    count = sum(len(rows) for _, _, rows in iter_exact_search(queries, docs[:2000], 10, device="cpu"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All products would take 160 MB.
    assert count == 20000 and peak < 40 << 20


def test_progress_counts_queries(vectors):
    queries, docs = vectors
    done = []
    exact_search(queries, docs, 5, query_block=32, progress=done.append, device="cpu")
    assert sum(done) == 70 and len(done) == 3


def test_threads_change_nothing(vectors):
    queries, docs = vectors
    first = exact_search(queries, docs, 50, device="cpu")
    query_of, row_of = np.repeat(np.arange(70), 300), np.random.default_rng(0).integers(0, 6000, 21000)
    for threads in (1, 3):
        with threadpoolctl.threadpool_limits(threads):
            again = exact_search(queries, docs, 50, query_block=8, device="cpu")
            pairs = score_pairs(queries, docs, query_of, row_of, device="cpu")
            assert max(lib["num_threads"] for lib in threadpoolctl.threadpool_info()) == threads
        assert (again[0] == first[0]).all() and (again[1] == first[1]).all()
        assert (pairs == score_pairs(queries, docs, query_of, row_of, device="cpu")).all()
    # Stopping half-way leaves no thread and no limit behind.
    next(iter_exact_search(queries, docs, 50, query_block=8, device="cpu"))


@pytest.mark.parametrize(
    ("queries", "docs", "k", "says"),
    [
        (np.ones((2, 3)), np.ones((4, 5)), 1, "cannot be searched"),
        (np.ones(3), np.ones((4, 3)), 1, "cannot be searched"),
        (np.ones((2, 3)), np.ones((4, 3)), 0, "at least 1"),
        (np.full((1, 3), np.nan), np.ones((4, 3)), 1, "query vectors must be finite"),
        (np.full((1, 3), 1e30), np.ones((4, 3)), 1, "query vectors must be finite"),
        (np.ones((1, 3)), np.array([[1, 1, 1], [1, np.nan, 1]]), 1, "rows 0 to 1 is not"),
        (np.ones((1, 3)), np.array([[1, 1, 1], [1, np.inf, 1]]), 1, "rows 0 to 1 is not"),
    ],
)
def test_bad_input(queries, docs, k, says):
    with pytest.raises(ValueError, match=says):
        exact_search(queries.astype(np.float32), docs.astype(np.float32), k)


def test_no_queries(vectors):
    scores, rows = exact_search(np.empty((0, 96), np.float32), vectors[1], 10)
    assert scores.shape == rows.shape == (0, 10)


def test_the_path_of_a_gpu_on_a_cpu(vectors):
    # The same tensors and operations as on a GPU, where one is missing.
    queries, docs = vectors
    for keep in (True, False):
        vectors = TensorVectors(docs, torch.device("cpu"))
        vectors.kept = torch.from_numpy(docs.copy()) if keep else None
        for tie_order in (None, np.random.default_rng(0).permutation(len(docs))):
            first = exact_search(queries, docs, 50, tie_order=tie_order, device="cpu")
            with torch.autocast("cpu", torch.bfloat16):
                again = exact_search(queries, vectors, 50, tie_order=tie_order, doc_block=700)
            assert (again[0] == first[0]).all() and (again[1] == first[1]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_gives_the_same_bits(vectors):
    queries, docs = vectors
    on_cpu = exact_search(queries, docs, 50, device="cpu")
    kept = open_vectors(docs, "cuda")
    assert kept.kept is not None
    streamed = open_vectors(docs, "cuda")
    streamed.kept = None
    for where in (kept, streamed):
        on_gpu = exact_search(queries, where, 50, doc_block=1024)
        assert (on_gpu[0] == on_cpu[0]).all() and (on_gpu[1] == on_cpu[1]).all()


@pytest.mark.parametrize("kind", ["apart", "close", "equal", "negative", "tiny", "long"])
@pytest.mark.parametrize("k", [1, 20, 150])
def test_a_first_look_in_bfloat16_changes_no_bit(kind, k):
    rng = np.random.default_rng(7)
    docs, queries = (rng.standard_normal((n, 64)).astype(np.float32) for n in (3000, 40))
    if kind == "close":
        # Far closer together than bfloat16 can tell.
        docs = docs[0] + 1e-4 * docs
    elif kind == "equal":
        docs[200:2800] = docs[3]
    elif kind == "negative":
        docs, queries = np.abs(docs), -np.abs(queries)
    elif kind == "tiny":
        docs, queries = docs * np.float32(1e-20), queries * np.float32(1e-18)
    elif kind == "long":
        docs *= np.geomspace(1e-3, 1e6, 3000, dtype=np.float32)[:, None]
    tie_order = rng.permutation(3000)
    plain = exact_search(queries, docs, k, tie_order=tie_order, query_block=40, doc_block=400, device="cpu")
    for start in (0, 5):
        norms = np.linalg.norm(queries[start:], axis=1)
        block = ArrayBlock(queries[start:], norms, Vectors(docs), k, tie_order, prefilter=True)
        for first in range(0, 3000, 400):
            block.add(first, min(first + 400, 3000))
        scores, rows = block.best()
        assert (scores == plain[0][start:]).all() and (rows == plain[1][start:]).all()


def test_the_bound_of_the_first_look_holds_and_is_of_use():
    rng = np.random.default_rng(8)
    docs, queries = (rng.standard_normal((n, 96)).astype(np.float32) for n in (500, 40))
    docs *= rng.lognormal(0, 2, (500, 1)).astype(np.float32)
    look = Prefilter(queries, np.linalg.norm(queries, axis=1))
    exact = queries.astype(np.float64) @ docs.T.astype(np.float64)
    error = look.error(np.linalg.norm(docs, axis=1).max(), Vectors(docs).rounding(0, docs))
    at, products = look.passing(look.products(docs), np.sort(exact, axis=1)[:, -20].astype(np.float32))
    query, column = np.divmod(at, 500)
    difference = np.abs(products - exact[query, column])
    assert (difference <= error[query] + np.abs(products) * HALF_ULP).all()
    # A bound a hundred times too large would pass, too, and filter nothing.
    assert (difference / (error[query] + np.abs(products) * HALF_ULP)).max() > 0.05

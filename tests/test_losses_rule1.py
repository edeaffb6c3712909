"""Rule 1: no known-relevant pair is ever a negative, in any direction of any loss."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import losses_reference as reference
from pt_dance import losses

MODEL = torch.nn.Identity()
ALL = sorted(reference.LOSSES)


@st.composite
def batches(draw):
    """Random judgements, in which queries share documents and documents queries, and a batch of rows on them."""
    queries, documents = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    density = draw(st.sampled_from([0.2, 0.5, 0.9]))
    size, n, m = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng, reference.random_rows(rng, size, n, m, queries, documents, density)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_masks_equal_sets_of_pairs(drawn):
    rng, rows = drawn
    queries, documents = rows.relevance.shape
    relevant = {(int(q), int(d)) for q, d in zip(*rows.relevance.nonzero(), strict=True)}
    some_queries, some_documents = rng.integers(queries, size=7), rng.integers(-1, documents, size=9)
    found = rows.relevant(some_queries, some_documents)
    assert found.tolist() == [[(q, d) in relevant for d in some_documents] for q in some_queries]
    own = rng.integers(-1, documents, size=(7, 3))
    expected = [[(q, d) in relevant for d in mine] for q, mine in zip(some_queries, own, strict=True)]
    assert rows.relevant_to_own(some_queries, own).tolist() == expected

    def judged(query):
        return {d for q, d in relevant if q == query}

    def queries_of(document):
        return {q for q, d in relevant if d == document}

    others = rng.integers(queries, size=5)
    expected = [[a == b or bool(judged(a) & judged(b)) for b in others] for a in some_queries]
    assert rows.related_queries(some_queries, others).tolist() == expected
    there, others = rng.integers(documents, size=6), rng.integers(documents, size=5)
    expected = [[a == b or bool(queries_of(a) & queries_of(b)) for b in others] for a in there]
    assert rows.related_documents(there, others).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(batches())
def test_every_loss_equals_its_formula_over_allowed_pairs(drawn):
    rng, rows = drawn
    numbers = np.arange(len(rows))
    batch = reference.texts(rng, rows, numbers)
    for name in ALL:
        value = reference.make(name, MODEL, rows).compute_loss_from_embeddings(batch.columns(), torch.tensor(numbers))
        assert value.item() == pytest.approx(reference.LOSSES[name][1](batch), rel=1e-6, abs=1e-6), name


def known(rows, queries, documents):
    """Three matrices from a dense one: relevant pairs, related queries, related documents; -1 is related to nothing."""
    judged = np.pad(rows.relevance.toarray().astype(int), (0, 1))  # number -1 finds the empty row or column
    by_query, by_document = judged[queries], judged[:, documents].T
    same_query = (queries[:, None] == queries) & (queries >= 0)
    same_document = (documents[:, None] == documents) & (documents >= 0)
    return (
        by_query[:, documents] > 0,
        (by_query @ by_query.T > 0) | same_query,
        (by_document @ by_document.T > 0) | same_document,
    )


def influence(loss, rows, numbers, rng):
    """The derivatives of a loss by each score: of queries and documents, two queries, two documents.

    The vectors of all texts are linearly independent and every loss is a function of their products, so a vector's
    gradient is a sum of the other vectors in one way only, and the coefficients are the derivatives by the products.
    Texts: the rows' own, then their mined ones, column by column.
    """
    size, n, m = len(numbers), rows.negatives.shape[1], rows.query_negatives.shape[1]
    q, d = size * (1 + m), size * (1 + n)
    vectors = torch.eye(q + d, dtype=torch.float64)
    # The scores; the rest makes the vectors independent. Small ones, so that no softmax saturates.
    vectors[q:, :q] = torch.tensor(rng.normal(0, 0.3, size=(d, q)))
    queries, documents = vectors[:q].clone().requires_grad_(), vectors[q:].clone().requires_grad_()
    parts = [queries[:size], documents[:size], *documents[size:].split(size), *queries[size:].split(size)]
    value = loss.compute_loss_from_embeddings(parts, torch.tensor(numbers))
    inverse = torch.linalg.inv(vectors)
    by_query, by_document = ((grad @ inverse).numpy() for grad in torch.autograd.grad(value, [queries, documents]))
    np.testing.assert_allclose(by_query[:, q:], by_document[:, :q].T, atol=1e-12)
    query_ids = np.concatenate([rows.query[numbers], *rows.query_negatives[numbers].T])
    document_ids = np.concatenate([rows.positive[numbers], *rows.negatives[numbers].T])
    return by_query[:, q:], by_query[:, :q], by_document[:, q:], query_ids, document_ids


# Similarity "dot", so that the products of the vectors are the scores.
INFLUENCES = {
    "contrastive": ("contrastive", {}),
    "contrastive-own": ("contrastive", {"in_batch": False}),
    "pairwise": ("pairwise", {}),
    "samtone-query": ("samtone", {}),
    "samtone-both": ("samtone", {"sides": "both"}),
    "margin-mse": ("margin_mse", {}),
    "distill-kl": ("distill_kl", {}),
    "sum": ([("margin_mse", 1.0, {"similarity": "dot"}), ("contrastive", 1.0, {"similarity": "dot"})], {}),
}


def build(name, rows, dual):
    loss, options = INFLUENCES[name]
    options = options if name == "sum" else {**options, "similarity": "dot", "temperature": 1.0}
    return losses.make(loss, MODEL, rows, **options, **({"dual": True, "dual_weight": 0.5} if dual else {}))


CASES = [(name, dual) for name in INFLUENCES for dual in (False, True) if not (dual and name == "samtone-both")]


@settings(max_examples=40, deadline=None)
@given(batches())
def test_no_score_of_a_known_relevant_pair_is_pushed_down(drawn):
    rng, rows = drawn
    numbers = np.arange(len(rows))
    for name, dual in CASES:
        across, queries, documents, q, d = influence(build(name, rows, dual), rows, numbers, rng)
        relevant, related_queries, related_documents = known(rows, q, d)
        own = np.zeros_like(relevant)
        own[numbers, numbers] = True
        missing = (q < 0)[:, None] | (d < 0)[None, :]
        zero = 1e-12
        assert (np.abs(across[(relevant | missing) & ~own]) < zero).all(), name
        learns_from_teacher = name in ("margin-mse", "distill-kl", "sum")  # may push a positive down, to its score
        if not learns_from_teacher:
            assert (across[own] < zero).all(), name
            assert (across[~relevant] > -zero).all(), name
        # A text's product with itself is in no loss, only in its own gradient.
        assert (np.abs(queries[related_queries & ~np.eye(len(q), dtype=bool)]) < zero).all(), name
        assert (np.abs(documents[related_documents & ~np.eye(len(d), dtype=bool)]) < zero).all(), name
        # And what may be a negative is one.
        size = len(rows)
        if name == "contrastive":
            assert (across[:size][~(relevant | missing)[:size]] > zero).all()
        if name.startswith("samtone"):
            assert (queries[:size, :size][~related_queries[:size, :size]] > zero).all()
        if name == "samtone-both" or (name == "samtone-query" and dual):
            assert (documents[:size, :size][~related_documents[:size, :size]] > zero).all()


def shared_rows(relevant):
    """Three queries of one document each; query 1 mined document 0 and query 0, query 2 has a second positive."""
    pairs = np.array(sorted(relevant)).T
    relevance = sp.csr_matrix((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(4, 6))
    ids = np.arange(3)
    scores = np.array([1.0, 2, 3]), np.array([[0.5], [1], [2]]), np.array([[0.1], [0.2], [0.3]])
    return losses.TrainingRows(ids, ids, relevance, [[4], [0], [5]], [[3], [0], [3]], *scores)


ROWS_OWN = {(0, 0), (1, 1), (2, 2)}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("more", "felt"),
    [
        # One more judgement, and the losses in which the pair stood as a negative before.
        ({(1, 0)}, "all"),  # mined, and in the batch
        ({(0, 1)}, "dual, in-batch or same-tower"),  # mined query of document 1
        ({(2, 1)}, "in-batch or same-tower"),
        ({(0, 3), (1, 3)}, "same-tower"),  # a shared document outside the batch
    ],
)
def test_one_judgement_more_changes_the_losses_it_concerns(name, more, felt):
    vectors = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    before, after = (
        reference.make(name, MODEL, shared_rows(pairs)).compute_loss_from_embeddings(vectors, torch.arange(3)).item()
        for pairs in (ROWS_OWN, ROWS_OWN | more)
    )
    same_tower = "samtone" in name or "regularized" in name
    in_batch = name in ("contrastive", "contrastive-dot", "regularized", "mnrl-dual", "margin-mse-mnrl-dual")
    dual = "dual" in name or "dance" in name
    expected = {
        "all": True,
        "dual, in-batch or same-tower": dual or in_batch or same_tower,
        "in-batch or same-tower": in_batch or same_tower,
        "same-tower": same_tower,
    }[felt]
    assert (abs(before - after) > 1e-9) == expected


@pytest.mark.parametrize("name", [name for name in ALL if name not in reference.NEEDS_TEACHER])
def test_without_rows_relevant_pairs_are_pushed_apart(name):
    """What the masks are for: the same batch, its rows unknown, has another loss."""
    rows = shared_rows(ROWS_OWN | {(1, 0), (0, 1), (2, 1)})
    vectors = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    known = reference.make(name, MODEL, rows).compute_loss_from_embeddings(vectors, torch.arange(3))
    unknown = reference.make(name, MODEL, None, query_negatives=1).compute_loss_from_embeddings(vectors)
    assert abs(known.item() - unknown.item()) > 1e-6


def test_a_query_twice_in_the_batch_is_no_negative_of_itself():
    relevance = sp.csr_matrix(np.array([[1, 1, 0], [0, 0, 1]], bool))
    rows = losses.TrainingRows([0, 0, 1], [0, 1, 2], relevance)
    queries = torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    documents = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]], dtype=torch.float64)
    known = losses.SamToneLoss(MODEL, sides="both", rows=rows)
    known = known.compute_loss_from_embeddings([queries, documents], torch.arange(3))
    assert known < 1e-4
    assert losses.SamToneLoss(MODEL, sides="both").compute_loss_from_embeddings([queries, documents]) > 0.5

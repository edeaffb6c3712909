from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sentence_transformers.sentence_transformer import losses as st_losses
from sentence_transformers.util import pairwise_cos_sim

import losses_reference as reference
from pt_dance import losses

MODEL = torch.nn.Identity()  # these tests hand embeddings to the losses


def columns(rng, size, n, dim=7, dtype=torch.float64):
    return [torch.tensor(rng.normal(size=(size, dim)), dtype=dtype, requires_grad=True) for _ in range(2 + n)]


def close(a, b, tolerance=1e-6):
    a, b = (x.item() if isinstance(x, torch.Tensor) else x for x in (a, b))
    assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def same_gradients(first, second, inputs):
    # a column that a loss does not read has a gradient of zeros
    options = dict(allow_unused=True, materialize_grads=True)
    grads = (torch.autograd.grad(value, inputs, **options) for value in (first, second))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# --- values against the formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.LOSSES)
@pytest.mark.parametrize(("size", "n", "m"), [(1, 1, 1), (2, 1, 2), (5, 2, 1), (12, 3, 3)])
def test_value_equals_formula_with_known_rows(name, size, n, m):
    for seed in range(4):
        rng = np.random.default_rng([seed, size, n, m])
        rows = reference.random_rows(rng, 20, n, m)
        numbers = rng.integers(20, size=size)  # rows may come twice
        batch = reference.texts(rng, rows, numbers)
        loss = reference.make(name, MODEL, rows)
        value = loss.compute_loss_from_embeddings(batch.columns(), torch.tensor(numbers))
        # the teacher's scores are kept in float32
        close(value, reference.LOSSES[name][1](batch), 1e-6 if name in reference.NEEDS_TEACHER else 1e-9)


@pytest.mark.parametrize("name", [name for name in reference.LOSSES if name not in reference.NEEDS_TEACHER])
@pytest.mark.parametrize(("size", "n", "m"), [(1, 0, 0), (1, 2, 1), (4, 0, 0), (4, 0, 2), (4, 3, 0), (7, 2, 2)])
def test_value_equals_formula_without_rows(name, size, n, m):
    rng = np.random.default_rng([size, n, m])
    batch = reference.Texts(*(rng.normal(size=shape) for shape in [(size, 5), (size, 5), (size, n, 5), (size, m, 5)]))
    loss = reference.make(name, MODEL, None, query_negatives=m)
    close(loss.compute_loss_from_embeddings(batch.columns(), None), reference.LOSSES[name][1](batch), 1e-9)


@pytest.mark.parametrize("name", ["contrastive", "mnrl-dual", "samtone-query", "samtone-both"])
def test_value_equals_formula_without_mined_texts(name):
    rng = np.random.default_rng(5)
    rows = reference.random_rows(rng, 20, 0, 0)
    numbers = rng.integers(20, size=9)
    batch = reference.texts(rng, rows, numbers)
    value = reference.make(name, MODEL, rows).compute_loss_from_embeddings(batch.columns(), torch.tensor(numbers))
    close(value, reference.LOSSES[name][1](batch), 1e-9)


# --- the same as sentence-transformers' own losses, where those exist ------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contrastive_is_multiple_negatives_ranking(n, dtype):
    inputs = columns(np.random.default_rng(n), 6, n, dtype=dtype)
    ours = losses.ContrastiveLoss(MODEL, temperature=0.02).compute_loss_from_embeddings(inputs)
    theirs = st_losses.MultipleNegativesRankingLoss(MODEL, scale=50).compute_loss_from_embeddings(inputs, None)
    close(ours, theirs)
    if dtype == torch.float64:
        same_gradients(ours, theirs, inputs)


def test_contrastive_without_knowledge_of_other_positives_is_multiple_negatives_ranking():
    # Every query has one positive and no document is mined for the query it is relevant to: nothing to mask.
    rng = np.random.default_rng(0)
    ids = np.arange(5)
    rows = losses.TrainingRows(ids, ids, sp.identity(10, dtype=bool), rng.integers(5, 10, (5, 2)))
    inputs = columns(rng, 5, 2)
    ours = losses.ContrastiveLoss(MODEL, rows=rows).compute_loss_from_embeddings(inputs, torch.arange(5))
    close(ours, st_losses.MultipleNegativesRankingLoss(MODEL).compute_loss_from_embeddings(inputs, None))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_samtone_is_multiple_negatives_ranking_with_query_to_query(n):
    inputs = columns(np.random.default_rng(n), 6, n)
    ours = losses.SamToneLoss(MODEL).compute_loss_from_embeddings(inputs)
    theirs = st_losses.MultipleNegativesRankingLoss(
        MODEL, directions=("query_to_doc", "query_to_query"), partition_mode="joint"
    ).compute_loss_from_embeddings(inputs, None)
    close(ours, theirs)
    same_gradients(ours, theirs, inputs)


@pytest.mark.parametrize("n", [0, 2])
def test_dual_contrastive_is_symmetric_multiple_negatives_ranking(n):
    inputs = columns(np.random.default_rng(n), 6, n)
    loss = losses.DualLoss(losses.ContrastiveLoss(MODEL), weight=0.5, document_weight=0.5)
    theirs = st_losses.MultipleNegativesRankingLoss(
        MODEL, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ).compute_loss_from_embeddings(inputs, None)
    ours = loss.compute_loss_from_embeddings(inputs)
    close(ours, theirs)
    same_gradients(ours, theirs, inputs)


def test_samtone_on_both_sides_is_both_directions_of_the_query_side():
    inputs = columns(np.random.default_rng(3), 6, 2)
    both = losses.SamToneLoss(MODEL, sides="both").compute_loss_from_embeddings(inputs)
    close(both, losses.DualLoss(losses.SamToneLoss(MODEL), weight=1.0).compute_loss_from_embeddings(inputs))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("labels", ["margins", "scores"])
def test_margin_mse_is_sentence_transformers_margin_mse(n, kind, labels):
    rng = np.random.default_rng(n)
    inputs = columns(rng, 6, n)
    label = torch.tensor(rng.normal(0, 5, (6, n + (labels == "scores"))))
    label = label[:, 0] if label.shape[1] == 1 else label
    ours = losses.MarginMSELoss(MODEL, similarity=kind).compute_loss_from_embeddings(inputs, label)
    theirs = st_losses.MarginMSELoss(MODEL, **({} if kind == "dot" else {"similarity_fct": pairwise_cos_sim}))
    theirs = theirs.compute_loss_from_embeddings(inputs, label)
    close(ours, theirs)
    same_gradients(ours, theirs, inputs)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize(("temperature", "of_teacher"), [(1.0, 1.0), (0.3, 2.0)])
def test_distill_kl_is_sentence_transformers_distill_kl(n, kind, temperature, of_teacher):
    rng = np.random.default_rng(n)
    inputs, label = columns(rng, 6, n), torch.tensor(rng.normal(0, 5, (6, n + 1)))
    ours = losses.DistillKLLoss(MODEL, temperature, kind, teacher_temperature=of_teacher)
    ours = ours.compute_loss_from_embeddings(inputs, label)
    options = {} if kind == "dot" else {"similarity_fct": pairwise_cos_sim}
    theirs = st_losses.DistillKLDivLoss(
        MODEL, student_temperature=temperature, teacher_temperature=of_teacher, **options
    ).compute_loss_from_embeddings(inputs, label)
    close(ours, theirs / temperature**2)
    same_gradients(ours, theirs / temperature**2, inputs)


def test_regularisers_are_those_of_dances_release():
    """The release's own lines, over queries and documents of norm 1, none of them related."""
    q, d, _ = columns(np.random.default_rng(2), 6, 1)
    options = dict(alignment=0.3, uniformity=0.2, uniformity_sum=True)
    with_both = losses.RegularizedLoss(losses.PairwiseLoss(MODEL), **options).compute_loss_from_embeddings([q, d, d])
    x, y = (torch.nn.functional.normalize(part) for part in (q, d))
    align = (x - y).norm(dim=1).pow(2).mean()
    uniform = [torch.pdist(part, p=2).pow(2).mul(-5).exp().mean().log() for part in (x, y)]
    close(with_both, np.log(2) + 0.3 * align + 0.2 * torch.mean(uniform[0] + uniform[1]))


def test_pairwise_with_one_negative_is_cross_entropy_of_two():
    inputs = columns(np.random.default_rng(1), 6, 1)
    own = losses.ContrastiveLoss(MODEL, temperature=1, similarity="dot", in_batch=False)
    close(losses.PairwiseLoss(MODEL).compute_loss_from_embeddings(inputs), own.compute_loss_from_embeddings(inputs))


@pytest.mark.parametrize("name", ["contrastive", "ance", "margin-mse", "samtone-query"])
def test_dual_of_weight_0_is_the_document_loss(name):
    rng = np.random.default_rng(4)
    rows = reference.random_rows(rng, 20, 2, 0)
    numbers = torch.arange(8)
    inputs = reference.texts(rng, rows, numbers.numpy()).columns(requires_grad=True)
    loss = reference.make(name, MODEL, rows)
    dual = losses.DualLoss(loss, weight=0).compute_loss_from_embeddings(inputs, numbers)
    alone = loss.compute_loss_from_embeddings(inputs, numbers)
    assert torch.equal(dual, alone)
    same_gradients(dual, alone, inputs)


def test_dual_of_weight_0_needs_nothing_of_the_dual_direction():
    rng = np.random.default_rng(4)
    inputs, margins = columns(rng, 5, 2), torch.tensor(rng.normal(size=(5, 2)))
    loss = losses.MarginMSELoss(MODEL)
    dual = losses.DualLoss(loss, weight=0).compute_loss_from_embeddings(inputs, margins)
    assert torch.equal(dual, loss.compute_loss_from_embeddings(inputs, margins))


# --- derivatives and numbers at the edge -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.LOSSES)
def test_gradcheck(name):
    rng = np.random.default_rng(2)
    rows = reference.random_rows(rng, 10, 2, 2)
    numbers = torch.arange(4)
    loss = reference.make(name, MODEL, rows)
    batch = reference.texts(rng, rows, numbers.numpy(), dim=3)
    # Missing texts get vectors too: at a zero vector the cosine has no derivative.
    batch.negatives[batch.negative_ids < 0] = batch.query_negatives[batch.query_negative_ids < 0] = 1.0
    inputs = batch.columns(requires_grad=True)
    assert torch.autograd.gradcheck(lambda *c: loss.compute_loss_from_embeddings(list(c), numbers), inputs)


def only_pair(n=2, m=2):
    """A batch in which everything but the rows' own pairs is masked."""
    everything = sp.csr_matrix(np.ones((3, 3), bool))
    ids = np.arange(3)
    scores = (np.zeros(3), np.zeros((3, n)), np.zeros((3, m)))
    mined = np.full((3, n), -1), np.full((3, m), -1)
    mined[0][0, 0] = 2  # relevant after all, as everything is
    return losses.TrainingRows(ids, ids, everything, *mined, *scores)


@pytest.mark.parametrize("name", reference.LOSSES)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("vectors", ["random", "zero"])
def test_no_nan_where_everything_is_masked(name, size, vectors):
    rows = only_pair()
    inputs = [
        torch.zeros(size, 4, requires_grad=True) if vectors == "zero" else torch.randn(size, 4, requires_grad=True)
        for _ in range(6)
    ]
    loss = reference.make(name, MODEL, rows).compute_loss_from_embeddings(inputs, torch.arange(size))
    loss.backward()
    grads = [column.grad for column in inputs if column.grad is not None]
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads)
    if "regularized" not in name:
        assert loss.item() == 0
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("name", [name for name in reference.LOSSES if name not in reference.NEEDS_TEACHER])
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("zero", ["all", "first query", "last column"])
def test_zero_vectors_give_finite_gradients(name, n, zero):
    inputs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(k)) for k in range(2 + 2 * n)]
    for k, column in enumerate(inputs):
        if zero == "all" or (zero == "last column" and k == len(inputs) - 1):
            column.zero_()
    if zero == "first query":
        inputs[0][0] = 0
    inputs = [column.requires_grad_() for column in inputs]
    loss = reference.make(name, MODEL, None, query_negatives=n).compute_loss_from_embeddings(inputs)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(c.grad).all() and c.grad.abs().max() < 1e4 for c in inputs if c.grad is not None)


@pytest.mark.parametrize("name", ["ance", "dance", "margin-mse"])
def test_batch_without_usable_negatives_is_0_and_differentiable(name):
    rows = only_pair()
    inputs = [torch.randn(3, 4, requires_grad=True) for _ in range(6)]
    loss = reference.make(name, MODEL, rows).compute_loss_from_embeddings(inputs, torch.arange(3))
    assert loss.item() == 0
    assert loss.requires_grad
    loss.backward()
    assert all((column.grad == 0).all() for column in inputs[:2])


@pytest.mark.parametrize("name", reference.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_float32_under_autocast(name, dtype):
    rng = np.random.default_rng(6)
    rows = reference.random_rows(rng, 20, 2, 2)
    inputs = [column.to(dtype) for column in reference.texts(rng, rows, np.arange(8)).columns()]
    loss = reference.make(name, MODEL, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss.compute_loss_from_embeddings(inputs, torch.arange(8))
    exact = loss.compute_loss_from_embeddings([column.double() for column in inputs], torch.arange(8))
    assert half.dtype == torch.float32
    close(half, exact, 1e-4)


def test_large_scores_do_not_overflow():
    inputs = [1e4 * column.detach() for column in columns(np.random.default_rng(0), 4, 2, dtype=torch.float32)]
    for loss in (losses.ContrastiveLoss(MODEL, 0.001, "dot"), losses.PairwiseLoss(MODEL), losses.SamToneLoss(MODEL)):
        leaves = [column.clone().requires_grad_() for column in inputs]
        value = loss.compute_loss_from_embeddings(leaves)
        value.backward()
        assert torch.isfinite(value)
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


# --- rows that only fill a batch up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.LOSSES)
def test_a_batch_filled_up_with_rows_of_number_minus_one_is_the_batch(name):
    rng = np.random.default_rng(4)
    rows = reference.random_rows(rng, 20, 2, 2)
    numbers = rng.integers(20, size=5)
    loss = reference.make(name, MODEL, rows)
    inputs = reference.texts(rng, rows, numbers).columns(requires_grad=True)
    value = loss.compute_loss_from_embeddings(inputs, torch.tensor(numbers))
    # The texts that fill it up are those of a real row, as a sampler would repeat one.
    filled = [torch.cat([column[:2], column[:1], column[2:], column[3:]]) for column in inputs]
    labels = torch.tensor([*numbers[:2], -1, *numbers[2:], -1, -1])
    filled_value = loss.compute_loss_from_embeddings(filled, labels)
    close(filled_value, value, 1e-12)
    same_gradients(filled_value, value, inputs)


@pytest.mark.parametrize("name", reference.LOSSES)
def test_a_batch_of_filling_alone_has_no_loss_and_no_gradient(name):
    rng = np.random.default_rng(4)
    rows = reference.random_rows(rng, 20, 2, 2)
    inputs = reference.texts(rng, rows, np.arange(3)).columns(requires_grad=True)
    value = reference.make(name, MODEL, rows).compute_loss_from_embeddings(inputs, torch.full((3,), -1))
    assert value.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(value, inputs, materialize_grads=True, allow_unused=True))


# --- losses by name --------------------------------------------------------------------------------------------------


def test_make_builds_what_the_classes_build():
    rng = np.random.default_rng(0)
    rows = reference.random_rows(rng, 10, 2, 2)
    dance = losses.make("pairwise", MODEL, rows, similarity="cosine", temperature=0.01, dual=True, uniformity=0.1)
    assert isinstance(dance, losses.RegularizedLoss)
    assert isinstance(dance.loss, losses.DualLoss)
    assert dance.loss.weight == 0.1
    assert dance.loss.document_weight == 1.0
    assert isinstance(dance.loss.loss, losses.PairwiseLoss)
    assert dance.loss.loss.temperature == 0.01
    assert isinstance(losses.make(losses.SamToneLoss, MODEL, sides="both"), losses.SamToneLoss)
    total = losses.make([("margin_mse", 1), ("contrastive", 0.5, {"temperature": 0.1})], MODEL, rows)
    assert total.weights == [1, 0.5]
    assert total.losses[1].temperature == 0.1
    assert [loss.similarity for loss in total.losses] == ["dot", "cosine"]
    parts = [("margin_mse", 1, {"similarity": "dot"}), ("pairwise", 1), ("contrastive", 1)]
    total = losses.make(parts, MODEL, rows, similarity="cosine", mini_batch_size=4)
    assert [loss.similarity for loss in total.losses] == ["dot", "cosine", "cosine"]
    assert total.mini_batch_size == 4


def test_options_are_exactly_what_make_takes():
    rng = np.random.default_rng(0)
    rows = reference.random_rows(rng, 10, 2, 2)
    for name in ("contrastive", "pairwise", "samtone", "margin_mse", "distill_kl"):
        defaults = losses.options(name)
        assert {"dual", "dual_weight", "temperature", "mini_batch_size", "gather_across_devices"} <= set(defaults)
        need_another = {"dual_weight", "document_weight", "alignment_alpha", "uniformity_t", "uniformity_sum"}
        own = {key: value for key, value in defaults.items() if key not in need_another}
        assert type(losses.make(name, MODEL, rows, **own)) is type(losses.make(name, MODEL, rows))
    assert losses.options("samtone")["sides"] == "query"
    assert "temperature" not in losses.options([("margin_mse", 1), ("contrastive", 1)])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: losses.make("mnrl", MODEL), ValueError, "unknown loss 'mnrl'; valid losses: contrastive, pairwise"),
        (lambda: losses.options("x"), ValueError, "unknown loss 'x'"),
        (lambda: losses.make(torch.nn.Linear, MODEL), TypeError, "a loss is one of the names"),
        (lambda: losses.make(losses.DualLoss, MODEL), TypeError, "not put around another loss"),
        (lambda: losses.make("pairwise", MODEL, in_batch=True), ValueError, "unknown option 'in_batch' of loss"),
        (lambda: losses.make("pairwise", MODEL, temprature=1), ValueError, "valid options: temperature, similarity"),
        (lambda: losses.make([("pairwise", 1, {"x": 1})], MODEL), ValueError, "unknown option 'x' of loss 'pairwise'"),
        (lambda: losses.make([("pairwise", 1)], MODEL, sides="x"), ValueError, "unknown option 'sides' of a list"),
        (lambda: losses.make(["pairwise"], MODEL), ValueError, "holds (loss, weight)"),
        (lambda: losses.make([], MODEL), ValueError, "(loss, weight) pairs, one or more"),
        (lambda: losses.make("pairwise", MODEL, dual_weight=0.1), ValueError, "does nothing without the option dual"),
        (lambda: losses.make("pairwise", MODEL, uniformity_t=2), ValueError, "nothing without the option uniformity"),
        (lambda: losses.make("samtone", MODEL, sides="both", dual=True), ValueError, "both directions already"),
        (
            lambda: losses.make("samtone", MODEL, sides="left"),
            ValueError,
            "sides='left' is unknown; choose one of 'query', 'both'",
        ),
        (lambda: losses.ContrastiveLoss(MODEL, temperature=0), ValueError, "temperature=0 must be a number above 0"),
        (
            lambda: losses.ContrastiveLoss(MODEL, temperature=float("nan")),
            ValueError,
            "temperature=nan must be a number",
        ),
        (lambda: losses.ContrastiveLoss(MODEL, temperature="1"), ValueError, "temperature='1' must be a number"),
        (lambda: losses.PairwiseLoss(MODEL, similarity="l2"), ValueError, "choose one of 'cosine', 'dot'"),
        (lambda: losses.PairwiseLoss(MODEL, mini_batch_size=0), ValueError, "mini_batch_size=0 must be a whole number"),
        (lambda: losses.PairwiseLoss(MODEL, mini_batch_size=1.5), ValueError, "mini_batch_size=1.5 must be"),
        (lambda: losses.PairwiseLoss("model"), TypeError, "model must be a SentenceTransformer, not str"),
        (lambda: losses.PairwiseLoss(MODEL, rows=[1]), TypeError, "rows must be a TrainingRows, not list"),
        (
            lambda: losses.DualLoss(losses.PairwiseLoss(MODEL), -1),
            ValueError,
            "weight=-1 must be a number of at least 0",
        ),
        (lambda: losses.DualLoss(losses.PairwiseLoss(MODEL), 0, 0), ValueError, "both 0"),
        (lambda: losses.DualLoss(MODEL), TypeError, "works on the losses of pt_dance.losses"),
        (lambda: losses.DualLoss(losses.DualLoss(losses.PairwiseLoss(MODEL))), ValueError, "both directions"),
        (lambda: losses.SumLoss([(losses.PairwiseLoss(MODEL), 0)]), ValueError, "all 0"),
        (
            lambda: losses.SumLoss([(losses.PairwiseLoss(MODEL), 1), (losses.PairwiseLoss(torch.nn.Identity()), 1)]),
            ValueError,
            "must have the same model",
        ),
        (lambda: losses.RegularizedLoss(losses.PairwiseLoss(MODEL)), ValueError, "both 0"),
        (
            lambda: losses.RegularizedLoss(losses.PairwiseLoss(MODEL), 1, t=0),
            ValueError,
            "t=0 must be a number above 0",
        ),
    ],
)
def test_bad_options_give_one_sentence(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "n", "m", "words"),
    [
        ("ance", 0, 0, "the training rows have no negatives"),
        ("contrastive-own", 0, 0, "the training rows have no negatives"),
        ("margin-mse", 0, 0, "the training rows have no negatives"),
        ("distill-kl", 0, 0, "the training rows have no negatives"),
        ("dance", 2, 0, "the training rows have no query negatives"),
        ("margin-mse-dual", 2, 0, "the training rows have no query negatives"),
        ("margin-mse-mnrl-dual", 2, 0, "the training rows have no query negatives"),
    ],
)
def test_rows_a_loss_cannot_learn_from(name, n, m, words):
    with pytest.raises(ValueError, match=words):
        reference.make(name, MODEL, reference.random_rows(np.random.default_rng(0), 5, n, m))


def test_margin_mse_needs_teacher_scores():
    rng = np.random.default_rng(0)
    rows = reference.random_rows(rng, 5, 2, 2, padding=0)
    plain = losses.TrainingRows(rows.query, rows.positive, rows.relevance, rows.negatives, rows.query_negatives)
    with pytest.raises(ValueError, match="needs the teacher's scores of the positives and of the negatives"):
        losses.MarginMSELoss(MODEL, rows=plain)
    rows.teacher_negatives[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 rows lack some, the first of them row 3"):
        losses.MarginMSELoss(MODEL, rows=rows)
    rows.teacher_negatives[3, 1] = 0
    rows.teacher_query_negatives = None
    losses.MarginMSELoss(MODEL, rows=rows)
    with pytest.raises(ValueError, match="scores of the positives and of the query negatives"):
        losses.make("margin_mse", MODEL, rows, dual=True)
    inputs = columns(rng, 4, 2)
    with pytest.raises(ValueError, match="needs the teacher's scores: from the training rows"):
        losses.MarginMSELoss(MODEL).compute_loss_from_embeddings(inputs)
    with pytest.raises(ValueError, match=r"2 margins a row, or its 3 scores, .* its shape is \(4, 5\)"):
        losses.MarginMSELoss(MODEL).compute_loss_from_embeddings(inputs, torch.zeros(4, 5))


@pytest.mark.parametrize(
    ("labels", "mined", "words"),
    [
        (None, 4, "needs a column label with each row's number"),
        (torch.zeros(3), 4, "one whole number a row; it holds float32"),
        (torch.zeros(3, 1, dtype=int), 4, "one whole number a row"),
        (torch.tensor([0, 1, 99]), 4, "row numbers from 0 to 99, but there are 10 training rows"),
        (torch.tensor([0, -2, 1]), 4, "row numbers from -2 to 1"),
        (torch.arange(2), 4, "there are 2 labels for 3 rows"),
        (torch.arange(3), 1, "there are 1 columns after query and positive, but the training rows have 2 negatives"),
        (torch.arange(3), -1, "the columns query and positive are needed"),
    ],
)
def test_batches_that_do_not_fit_the_rows(labels, mined, words):
    rng = np.random.default_rng(0)
    loss = losses.ContrastiveLoss(MODEL, rows=reference.random_rows(rng, 10, 2, 2))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        loss.compute_loss_from_embeddings(columns(rng, 3, mined), labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": [0, 9]}, "query must lie between 0 and 2, by the shape of relevance; it holds 0 to 9"),
        ({"query": [0.0, 1.0]}, "query must hold whole numbers, not float64"),
        ({"positive": [0, -1]}, "positive must lie between 0 and 3"),
        ({"positive": [0]}, "positive must hold one number a row, shape (2,), not (1,)"),
        ({"negatives": [[4], [0]]}, "negatives must lie between -1 and 3"),
        ({"negatives": [1, 2]}, "negatives must have shape (2, columns), not (2,)"),
        ({"query_negatives": [[0]]}, "query_negatives must have shape (2, columns), not (1, 1)"),
        ({"teacher_negatives": [[1.0, 2.0], [0, 0]]}, "teacher_negatives must have shape (2, 1), not (2, 2)"),
        ({"positive": [0, 2]}, "the positive document 2 of row 1 is not relevant to its query 1"),
    ],
)
def test_bad_training_rows(change, words):
    relevance = sp.csr_matrix(([True, True, True, False], ([0, 1, 1, 1], [0, 1, 0, 2])), shape=(3, 4))
    good = {"query": [0, 1], "positive": [0, 1], "relevance": relevance, "negatives": [[3], [-1]]}
    losses.TrainingRows(**good)
    with pytest.raises(ValueError) as raised:
        losses.TrainingRows(**{**good, **change})
    assert words in str(raised.value)


def test_config_and_citation_fit_model_cards():
    rng = np.random.default_rng(0)
    rows = reference.random_rows(rng, 10, 2, 2)
    for name in reference.LOSSES:
        loss = reference.make(name, MODEL, rows)
        assert loss.citation.strip().startswith("@")
        plain = {k: v for k, v in loss.get_config_dict().items() if not isinstance(v, torch.nn.Module)}
        json.dumps(plain)

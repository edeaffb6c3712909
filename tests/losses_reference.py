"""The formulas of every loss once more, in NumPy, pair by pair: no masks, no matrices, nothing of the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from pt_dance import losses


@dataclass
class Texts:
    """A batch: embeddings, ids (None: unknown) and teacher scores; everything float64."""

    queries: np.ndarray  # (B, d)
    positives: np.ndarray  # (B, d)
    negatives: np.ndarray  # (B, n, d)
    query_negatives: np.ndarray  # (B, m, d)
    query_ids: np.ndarray | None = None
    positive_ids: np.ndarray | None = None
    negative_ids: np.ndarray | None = None  # (B, n)
    query_negative_ids: np.ndarray | None = None  # (B, m)
    relevant: frozenset = frozenset()  # of (query id, document id)
    teacher_positive: np.ndarray | None = None
    teacher_negatives: np.ndarray | None = None
    teacher_query_negatives: np.ndarray | None = None

    def swapped(self) -> Texts:
        return Texts(
            self.positives,
            self.queries,
            self.query_negatives,
            self.negatives,
            self.positive_ids,
            self.query_ids,
            self.query_negative_ids,
            self.negative_ids,
            frozenset((d, q) for q, d in self.relevant),
            self.teacher_positive,
            self.teacher_query_negatives,
            self.teacher_negatives,
        )

    # The three questions of rule 1, answered from the set of pairs.
    def is_relevant(self, i: int, document: int) -> bool:
        return self.query_ids is not None and (int(self.query_ids[i]), int(document)) in self.relevant

    def usable(self, i: int, j: int, k: int) -> bool:
        """Whether mined negative k of row j may be a negative of query i."""
        if self.negative_ids is None:
            return True
        document = self.negative_ids[j, k]
        return document >= 0 and not self.is_relevant(i, document)

    def related(self, i: int, j: int) -> bool:
        if self.query_ids is None:
            return i == j
        a, b = int(self.query_ids[i]), int(self.query_ids[j])
        shared = {d for q, d in self.relevant if q == a} & {d for q, d in self.relevant if q == b}
        return i == j or a == b or bool(shared)

    def columns(self, requires_grad: bool = False, dtype=torch.float64) -> list[torch.Tensor]:
        arrays = [self.queries, self.positives]
        arrays += [self.negatives[:, k] for k in range(self.negatives.shape[1])]
        arrays += [self.query_negatives[:, k] for k in range(self.query_negatives.shape[1])]
        return [torch.tensor(array, dtype=dtype, requires_grad=requires_grad) for array in arrays]


def similarity(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    """Of two vectors; of texts that are lists of passages, the best pair's."""
    if a.ndim == 2 or b.ndim == 2:
        return max(similarity(x, y, kind) for x in np.atleast_2d(a) for y in np.atleast_2d(b))
    return float(a @ b) if kind == "dot" else float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))


def contrastive(t: Texts, temperature=0.05, kind="cosine", in_batch=True, same_tower=False) -> float:
    total = 0.0
    size, n = t.negatives.shape[:2]
    for i in range(size):
        own = similarity(t.queries[i], t.positives[i], kind) / temperature
        scores = [own]
        for j in range(size) if in_batch else [i]:
            if j != i and not (t.positive_ids is not None and t.is_relevant(i, t.positive_ids[j])):
                scores.append(similarity(t.queries[i], t.positives[j], kind) / temperature)
            scores += [
                similarity(t.queries[i], t.negatives[j, k], kind) / temperature for k in range(n) if t.usable(i, j, k)
            ]
        if same_tower:
            scores += [
                similarity(t.queries[i], t.queries[j], kind) / temperature for j in range(size) if not t.related(i, j)
            ]
        top = max(scores)
        total += -(own - top - np.log(sum(np.exp(score - top) for score in scores)))
    return total / size


def samtone(t: Texts, temperature=0.05, kind="cosine", sides="query") -> float:
    value = contrastive(t, temperature, kind, same_tower=True)
    return value + contrastive(t.swapped(), temperature, kind, same_tower=True) if sides == "both" else value


def own_pairs(t: Texts, temperature: float, kind: str) -> list[tuple[float, int, int]]:
    pairs = []
    for i in range(len(t.queries)):
        for k in range(t.negatives.shape[1]):
            if t.usable(i, i, k):
                positive = similarity(t.queries[i], t.positives[i], kind) / temperature
                pairs.append((positive - similarity(t.queries[i], t.negatives[i, k], kind) / temperature, i, k))
    return pairs


def pairwise(t: Texts, temperature=1.0, kind="dot") -> float:
    pairs = own_pairs(t, temperature, kind)
    return float(np.mean([np.logaddexp(0, -margin) for margin, _, _ in pairs])) if pairs else 0.0


def margin_mse(t: Texts, temperature=1.0, kind="dot") -> float:
    pairs = own_pairs(t, temperature, kind)
    errors = [(margin - (t.teacher_positive[i] - t.teacher_negatives[i, k])) ** 2 for margin, i, k in pairs]
    return float(np.mean(errors)) if errors else 0.0


def distill_kl(t: Texts, temperature=0.05, kind="cosine", teacher_temperature=1.0) -> float:
    values = []
    for i in range(len(t.queries)):
        usable = [k for k in range(t.negatives.shape[1]) if t.usable(i, i, k)]
        texts = [t.positives[i], *(t.negatives[i, k] for k in usable)]
        scores = np.array([similarity(t.queries[i], text, kind) / temperature for text in texts])
        teacher = np.array([t.teacher_positive[i], *t.teacher_negatives[i, usable]]) / teacher_temperature
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (teacher, scores))
        if usable:
            values.append(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
    return float(np.mean(values)) if values else 0.0


def alignment(t: Texts, alpha=2.0) -> float:
    squared = [2 - 2 * similarity(q, d, "cosine") for q, d in zip(t.queries, t.positives, strict=True)]
    return float((np.maximum(squared, 0) ** (alpha / 2)).mean())


def uniformity(t: Texts, tt=5.0) -> float:
    pairs = [
        np.exp(-tt * (2 - 2 * similarity(t.queries[i], t.queries[j], "cosine")))
        for i in range(len(t.queries))
        for j in range(i + 1, len(t.queries))
        if not t.related(i, j)
    ]
    return float(np.log(np.mean(pairs))) if pairs else 0.0


def dual(loss, t: Texts, weight=0.1, document_weight=1.0, **options) -> float:
    return document_weight * loss(t, **options) + weight * loss(t.swapped(), **options)


# Every loss of the package beside its formula: options of losses.make, and the reference value.
LOSSES = {
    "contrastive": (("contrastive", {}), contrastive),
    "contrastive-dot": (
        ("contrastive", {"similarity": "dot", "temperature": 0.7}),
        lambda t: contrastive(t, 0.7, "dot"),
    ),
    "contrastive-own": (("contrastive", {"in_batch": False}), lambda t: contrastive(t, in_batch=False)),
    "mnrl-dual": (
        ("contrastive", {"dual": True, "dual_weight": 0.7, "document_weight": 0.4}),
        lambda t: dual(contrastive, t, 0.7, 0.4),
    ),
    "ance": (("pairwise", {}), pairwise),
    "dance": (
        ("pairwise", {"similarity": "cosine", "temperature": 0.01, "dual": True}),
        lambda t: dual(pairwise, t, temperature=0.01, kind="cosine"),
    ),
    "dance-regularized": (
        (
            "pairwise",
            {"similarity": "cosine", "temperature": 0.1, "dual": True, "alignment": 0.3, "uniformity": 0.2},
        ),
        lambda t: (
            dual(pairwise, t, temperature=0.1, kind="cosine")
            + 0.3 * alignment(t)
            + 0.2 * (uniformity(t) + uniformity(t.swapped())) / 2
        ),
    ),
    "regularized": (
        ("contrastive", {"alignment": 0.3, "uniformity": 0.2, "alignment_alpha": 1.0, "uniformity_t": 2.0}),
        lambda t: (
            contrastive(t) + 0.3 * alignment(t, 1.0) + 0.2 * (uniformity(t, 2.0) + uniformity(t.swapped(), 2.0)) / 2
        ),
    ),
    "samtone-query": (("samtone", {}), samtone),
    "samtone-both": (("samtone", {"sides": "both"}), lambda t: samtone(t, sides="both")),
    "samtone-dual": (("samtone", {"dual": True, "dual_weight": 0.3}), lambda t: dual(samtone, t, 0.3)),
    "margin-mse": (("margin_mse", {}), margin_mse),
    "margin-mse-dual": (
        ("margin_mse", {"similarity": "cosine", "temperature": 0.05, "dual": True, "dual_weight": 0.6}),
        lambda t: dual(margin_mse, t, 0.6, temperature=0.05, kind="cosine"),
    ),
    "distill-kl": (("distill_kl", {}), distill_kl),
    "distill-kl-dual": (
        ("distill_kl", {"similarity": "dot", "temperature": 1.0, "teacher_temperature": 3.0, "dual": True}),
        lambda t: dual(distill_kl, t, temperature=1.0, kind="dot", teacher_temperature=3.0),
    ),
    "dance-regularized-sum": (
        (
            "pairwise",
            {"similarity": "cosine", "dual": True, "alignment": 0.3, "uniformity": 0.2, "uniformity_sum": True},
        ),
        lambda t: (
            dual(pairwise, t, kind="cosine") + 0.3 * alignment(t) + 0.2 * (uniformity(t) + uniformity(t.swapped()))
        ),
    ),
    "margin-mse-mnrl-dual": (
        ([("margin_mse", 1.0), ("contrastive", 0.5, {"temperature": 0.1})], {"dual": True, "dual_weight": 0.6}),
        lambda t: dual(margin_mse, t, 0.6) + 0.5 * dual(contrastive, t, 0.6, temperature=0.1),
    ),
}


NEEDS_TEACHER = [name for name in LOSSES if "mse" in name or "distill" in name]


def make(name: str, model, rows: losses.TrainingRows | None, **more) -> losses.RetrievalLoss:
    (loss, options), _ = LOSSES[name]
    return losses.make(loss, model, rows, **options, **more)


def random_rows(rng, size, n, m, queries=6, documents=8, density=0.3, padding=0.2) -> losses.TrainingRows:
    """Rows with several positives, shared documents, mined texts that are relevant after all, duplicates and gaps."""
    relevance = rng.random((queries, documents)) < density
    relevance[rng.integers(queries), rng.integers(documents)] = True
    pairs = np.argwhere(relevance)[rng.integers(relevance.sum(), size=size)]
    negatives = rng.integers(documents, size=(size, n))
    query_negatives = rng.integers(queries, size=(size, m))
    negatives[rng.random(negatives.shape) < padding] = -1
    query_negatives[rng.random(query_negatives.shape) < padding] = -1
    scores = [rng.normal(0, 3, shape) for shape in (size, (size, n), (size, m))]
    scores[1][negatives < 0] = np.nan
    scores[2][query_negatives < 0] = np.nan
    return losses.TrainingRows(pairs[:, 0], pairs[:, 1], sp.csr_matrix(relevance), negatives, query_negatives, *scores)


def texts(rng, rows: losses.TrainingRows, numbers: np.ndarray, dim=5) -> Texts:
    """The batch of some rows, every query and document with a random vector of its own, missing ones with zeros."""
    query_vectors = rng.normal(size=(rows.relevance.shape[0] + 1, dim))
    document_vectors = rng.normal(size=(rows.relevance.shape[1] + 1, dim))
    query_vectors[-1] = document_vectors[-1] = 0  # what number -1 finds
    return Texts(
        query_vectors[rows.query[numbers]],
        document_vectors[rows.positive[numbers]],
        document_vectors[rows.negatives[numbers]],
        query_vectors[rows.query_negatives[numbers]],
        rows.query[numbers],
        rows.positive[numbers],
        rows.negatives[numbers],
        rows.query_negatives[numbers],
        frozenset(zip(*(ids.tolist() for ids in rows.relevance.nonzero()), strict=True)),
        rows.teacher_positive[numbers].astype(float),
        rows.teacher_negatives[numbers].astype(float),
        rows.teacher_query_negatives[numbers].astype(float),
    )

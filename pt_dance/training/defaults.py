"""What a round leaves open and the encoder decides: learning rate, temperature, and the scale of a teacher's margins.

No number here fits one encoder only. Steps follow from the size of the weights, temperatures of dot products from the
length of the vectors, and a teacher's margins are brought to the scale of the encoder's own. What came out is in the
history of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pt_dance.training.examples import Examples

#: Temperature of cosines.
TEMPERATURE = 0.05
#: Peak learning rate of a transformer.
TRANSFORMER_RATE = 2e-5
#: Peak learning rate of a static tower, as a share of the root mean square of its weights.
STATIC_SHARE = 0.02
#: Peak learning rate of a schedule that begins with the best round's encoder, as a share of the usual one.
REFINING_SHARE = 1 / 3
#: Root mean square of the margins that a teacher asks for, in that of the encoder's own before training.
STRETCH = 2.0
#: Losses that learn from a teacher's scores.
TEACHER_LOSSES = ("margin_mse", "distill_kl")
#: Losses whose temperature a round may leave open.
OPEN = ("contrastive", "pairwise", "samtone", *TEACHER_LOSSES)
#: Rows whose vectors are looked at.
ROWS = 64


@dataclass(frozen=True)
class Settled:
    """A round and its training rows with nothing left open.

    Attributes:
        round: The round, its ``learning_rate``, ``similarity`` and every temperature given.
        examples: Its rows; a teacher's scores are in units of the root mean square of its margins where the loss
            left its temperature open.
        report: What was decided, by name, for the history.
    """

    round: object
    examples: Examples
    report: dict[str, float | str]


def learning_rate(encoder) -> float:
    """Return the peak learning rate for an encoder.

    2e-5 for transformers. An entry of a static tower's table moves by about the learning rate in each step of Adam,
    so there the rate is a fiftieth of the entries' root mean square: about .01 for a tower from nothing, .001 for one
    of MiniLM's embeddings, which the same steps would wipe out. Where a projection or head is behind the table, the
    smallest of their weights count.

    Args:
        encoder: ``DualEncoder`` at the start of the fit.
    """
    if not encoder.is_static:
        return TRANSFORMER_RATE
    sizes = [
        float(weights.detach().double().square().mean().sqrt())
        for weights in encoder.model.parameters()
        if weights.ndim > 1
    ]
    return float(f"{STATIC_SHARE * min(size for size in sizes if size > 0):.3g}")


def settle(round_, encoder, examples: Examples, initial, *, refines: bool = False) -> Settled:
    """Return a round with everything decided that it left open.

    - ``learning_rate``: by the encoder that the fit began with, see :func:`learning_rate`, so that rounds share it; a
      third of it where a schedule refines the best of the encoders trained so far, which larger steps would undo.
    - temperature of cosines: .05.
    - temperature of dot products: .05 times the mean product of the lengths of a query's and its positive's vector, so
      that both similarities give the same softmax where lengths are alike.
    - "margin_mse", "distill_kl": the teacher's scores are divided by the root mean square of its margins, and the
      temperature is twice that of the encoder's own. So margins are within reach, where a cross-encoder's of 10 are
      not for two cosines, and yet larger than those the encoder has: asked for margins as large as before, it could
      only trade some for others.

    Lengths and margins are those of the first rows of a round, before it is trained.

    Args:
        round_: ``Round``.
        encoder: ``DualEncoder`` that the round begins with, of the round's similarity.
        examples: The round's rows.
        initial: ``DualEncoder`` that the fit began with.
        refines: Whether the round's schedule begins with the best round's encoder.
    """
    loss, options = round_.loss, dict(round_.loss_options)
    is_sum = isinstance(loss, (list, tuple))
    parts = [tuple(part) for part in loss] if is_sum else [(loss, 1.0, options)]
    rate = round_.learning_rate
    if rate is None:
        rate = learning_rate(initial) * (REFINING_SHARE if refines else 1)
    report: dict[str, float | str] = {"learning_rate": rate, "similarity": encoder.similarity}
    looks: dict[str, dict[str, float]] = {}
    done = []
    for name, weight, *more in parts:
        own: dict = dict(more[0]) if more else {}
        if "temperature" not in own and name in OPEN:
            similarity = own.get("similarity") or options.get("similarity") or encoder.similarity
            if name in TEACHER_LOSSES or similarity == "dot":
                looks[similarity] = looks.get(similarity) or _look(encoder, examples, similarity)
            looked = looks.get(similarity, {})
            if name in TEACHER_LOSSES:
                own["temperature"] = STRETCH * looked["margin"]
                unit = _scale(examples)
                report["teacher_scale"] = float(report.get("teacher_scale", 1.0)) * unit
                examples = in_units(examples, unit)
            else:
                own["temperature"] = TEMPERATURE * (looked["length"] if similarity == "dot" else 1.0)
        if "temperature" in own:
            report[f"temperature of {name}" if is_sum else "temperature"] = own["temperature"]
        done.append((name, weight, own))
    if is_sum:
        return Settled(replace(round_, loss=done, learning_rate=rate), examples, report)
    return Settled(replace(round_, loss_options=done[0][2], learning_rate=rate), examples, report)


def _look(encoder, examples: Examples, similarity: str) -> dict[str, float]:
    """Return the mean product of lengths, and the root mean square margin, of the first rows."""
    rows = examples.rows
    with_negatives = np.flatnonzero((rows.negatives >= 0).any(axis=1))
    looked_at = (with_negatives if len(with_negatives) else np.arange(len(rows)))[:ROWS]
    texts = examples.dataset[looked_at.tolist()]
    queries, positives = encoder.encode_queries(texts["query"]), encoder.encode_docs(texts["positive"])
    lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(positives, axis=1)
    margin = 1.0
    if "negative_1" in texts:
        negatives = encoder.encode_docs(texts["negative_1"])
        if similarity == "cosine":
            queries, positives, negatives = map(_unit, (queries, positives, negatives))
        margins = (queries * (positives - negatives)).sum(axis=1)[rows.negatives[looked_at, 0] >= 0]
        margin = float(np.sqrt(np.mean(np.square(margins)))) if len(margins) else 1.0
    return {"length": float(lengths.mean()), "margin": margin or 1.0}


def _scale(examples: Examples) -> float:
    """Return the root mean square of the teacher's margins; 1 where it has none."""
    rows = examples.rows
    assert rows.teacher_positive is not None and rows.teacher_negatives is not None  # checked when the loss is made
    margins = (rows.teacher_positive[:, None] - rows.teacher_negatives)[rows.negatives >= 0]
    scale = float(np.sqrt(np.mean(np.square(margins, dtype=np.float64)))) if len(margins) else 1.0
    return scale if scale and np.isfinite(scale) else 1.0


def in_units(examples: Examples, scale: float) -> Examples:
    """Return the rows with the teacher's scores divided by a scale."""
    rows = examples.rows
    scaled = {
        name: (values / scale).astype(np.float32)
        for name in ("teacher_positive", "teacher_negatives", "teacher_query_negatives")
        if (values := getattr(rows, name)) is not None
    }
    return replace(examples, rows=replace(rows, **scaled))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)

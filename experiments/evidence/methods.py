"""The rows of the study: each method as rounds of equal budget, spelled out, and the encoder it starts from.

Every method takes eight units of steps. Where negatives are refreshed, that is four rounds of two units. Pairs, as in
ANCE's and DANCE's releases, take one unit on BM25's negatives and one on their own (the checkpoint that DANCE's four
cells share), then three rounds of two units, of which DANCE's second stage is the last two. Optimiser and schedule go
on over all rounds of a method, or of a stage that starts from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pyterrier as pt

from evidence.data import Collection
from pt_dance import DualEncoder, Round
from pt_dance.recipes import current_model

BASELINES = ("bm25", "untrained")
# A method that is another one by definition, so that it is not trained twice.
SAME = {"ance": "dance-none"}
CHECKPOINT = "ance-checkpoint"
# What starts from one checkpoint goes on with the learning rate that was chosen for this one.
FIRST_CELL = "dance-none"


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    learning_rate: float
    temperature: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        rounds: from setting, unit of steps, collection and teacher to the rounds; their batch size is set later.
        start: which encoder: "sde" (one tower), "ade" (two), "ade-spl" (two, one shared projection), "head" (one tower
            that ends in Linear and LayerNorm).
        temperature: whether the grid's temperatures apply.
        weight: whether the grid's weights of the dual direction apply.
        after: the method whose encoder it starts from, with the same seed.
        teacher: whether it needs one.
        text: what it is, for the pages.
    """

    rounds: Callable[[Setting, int, Collection, pt.Transformer | None], list[Round]]
    text: str
    start: str = "sde"
    temperature: bool = False
    weight: bool = False
    after: str | None = None
    teacher: bool = False


def _whole(unit: int, only: Round) -> list[Round]:
    """All steps in one round: what is learnt from does not change."""
    return [replace(only, steps=8 * unit)]


def _refreshed(unit: int, first: Round, later: Round) -> list[Round]:
    """Four rounds of two units, the first on BM25's negatives and each later one on the model's own."""
    later = replace(later, steps=2 * unit, carry_optimizer=True)
    return [replace(first, steps=2 * unit), later, later, later]


def _contrastive(setting: Setting, *, loss: str = "contrastive", dual: bool = False, **more) -> Round:
    options = {"temperature": setting.temperature, **more.pop("loss_options", {})}
    if dual:
        options |= {"dual": True, "dual_weight": setting.weight}
    return Round(loss=loss, loss_options=options, learning_rate=setting.learning_rate, negatives_per_row=2, **more)


def _mnrl(setting, unit, collection, teacher):
    return _whole(unit, _contrastive(setting, name="mnrl"))


def _mnrl_ance(setting, unit, collection, teacher):
    number, depth = collection.protocol.pool
    refreshed = dict(negatives=current_model, negatives_per_query=number, depth=depth)
    return _refreshed(unit, _contrastive(setting, name="bm25"), _contrastive(setting, name="refreshed", **refreshed))


def _samtone(sides: str):
    def rounds(setting, unit, collection, teacher):
        return _whole(unit, _contrastive(setting, loss="samtone", loss_options={"sides": sides}, name="samtone"))

    return rounds


def _mnrl_dual(mined: bool):
    def rounds(setting, unit, collection, teacher):
        more = dict(query_negatives=collection.query_source(), query_negatives_per_row=2) if mined else {}
        return _whole(unit, _contrastive(setting, dual=True, name="mnrl-dual", **more))

    return rounds


def _pairs(setting: Setting, collection: Collection, *, norm: bool, dual: bool = False, **more) -> Round:
    """ANCE's loss, or DANCE's: temperature .01 where embeddings are normalised, 1 on raw dot products."""
    options: dict[str, object] = {"temperature": 0.01 if norm else 1.0}
    if dual:
        options |= {"dual": True, "dual_weight": setting.weight}
    number, depth = collection.protocol.pool
    return Round(
        loss="pairwise", loss_options=options, similarity="cosine" if norm else "dot",
        learning_rate=setting.learning_rate, negatives_per_row=2, negatives_per_query=number, depth=depth,
        name=f"{'norm' if norm else 'dot'}{' dual' if dual else ''}", **more,
    )  # fmt: skip


def _pairwise(setting, unit, collection, teacher):
    """What ANCE's loss learns from BM25's negatives alone, with the two schedules of checkpoint and stage."""
    plain = _pairs(setting, collection, norm=False)
    return [replace(plain, steps=2 * unit), replace(plain, steps=6 * unit)]


def _checkpoint(setting, unit, collection, teacher):
    """Warm-up on BM25's negatives, then ANCE: where the four cells of DANCE's ablation start."""
    warm = _pairs(setting, collection, norm=False)
    refreshed = replace(warm, negatives=current_model, carry_optimizer=True)
    return [replace(warm, steps=unit), replace(refreshed, steps=unit)]


def _ablation(norm: bool, dual: bool, *, shuffled: bool = False):
    def rounds(setting, unit, collection, teacher):
        given = dict(norm=norm, negatives=current_model, steps=2 * unit)
        stage = _pairs(setting, collection, **given)
        last = stage
        if dual:
            source = collection.query_source(shuffled=True) if shuffled else "dense"
            last = _pairs(setting, collection, dual=True, query_negatives=source, query_negatives_per_row=2, **given)
        return [stage, replace(last, carry_optimizer=True), replace(last, carry_optimizer=True)]

    return rounds


def _distilled(loss: str | list, *, dual: bool = False):
    def rounds(setting, unit, collection, teacher):
        given = dict(learning_rate=setting.learning_rate, negatives_per_row=2, teacher=teacher, name=str(loss))
        chosen = loss
        if isinstance(loss, list):
            chosen = [(loss[0], 1.0), (loss[1], 1.0, {"temperature": setting.temperature})]
        if not dual:
            return _whole(unit, Round(loss=chosen, **given))
        options = {"dual": True, "dual_weight": setting.weight}
        queries = dict(query_negatives=collection.query_source(), query_negatives_per_row=2)
        return _whole(unit, Round(loss=chosen, loss_options=options, **queries, **given))

    return rounds


METHODS: dict[str, Method] = {
    "mnrl": Method(_mnrl, "MNRL", temperature=True),
    "mnrl-ance": Method(_mnrl_ance, "MNRL, ANCE negatives", temperature=True),
    "samtone": Method(_samtone("query"), "SamToNe, query side", temperature=True),
    "samtone-both": Method(_samtone("both"), "SamToNe, both sides", temperature=True),
    "ade-mnrl": Method(_mnrl, "MNRL, two towers", start="ade", temperature=True),
    "ade-samtone": Method(_samtone("query"), "SamToNe, two towers", start="ade", temperature=True),
    "adespl-mnrl": Method(_mnrl, "MNRL, two towers, shared projection", start="ade-spl", temperature=True),
    "adespl-samtone": Method(
        _samtone("query"), "SamToNe, two towers, shared projection", start="ade-spl", temperature=True
    ),
    "mnrl-dual": Method(_mnrl_dual(True), "MNRL-Dual", temperature=True, weight=True),
    "mnrl-dual-in-batch": Method(_mnrl_dual(False), "MNRL-Dual, no mined queries", temperature=True, weight=True),
    "pairwise": Method(_pairwise, "ANCE's loss, BM25's negatives", start="head"),
    CHECKPOINT: Method(_checkpoint, "ANCE, the checkpoint DANCE starts from", start="head"),
    "dance-none": Method(_ablation(False, False), "ANCE (= DANCE −norm −dual)", after=CHECKPOINT),
    "dance-dual": Method(_ablation(False, True), "DANCE −norm +dual", after=CHECKPOINT, weight=True),
    "dance-norm": Method(_ablation(True, False), "DANCE +norm −dual", after=CHECKPOINT),
    "dance-norm-dual": Method(_ablation(True, True), "DANCE +norm +dual", after=CHECKPOINT, weight=True),
    "dance-shuffled": Method(
        _ablation(True, True, shuffled=True), "DANCE, shuffled query negatives", after=CHECKPOINT, weight=True
    ),
    "margin-mse": Method(_distilled("margin_mse"), "Margin-MSE", teacher=True),
    "margin-mse-dual": Method(_distilled("margin_mse", dual=True), "Margin-MSE-Dual", weight=True, teacher=True),
    "margin-mse-mnrl-dual": Method(
        _distilled(["margin_mse", "contrastive"], dual=True), "Margin-MSE + MNRL, dual", temperature=True, weight=True,
        teacher=True,
    ),
    "distill-kl": Method(_distilled("distill_kl"), "KL to the teacher", teacher=True),
}  # fmt: skip


# The rows of the tables: the checkpoint is no method of its own.
ROWS = (*BASELINES, *(name for name in METHODS if name != CHECKPOINT))


def grid(method: Method, collection: Collection) -> list[Setting]:
    """Every setting of a method: the same learning rates, temperatures and weights for all, where they apply."""
    protocol, budget = collection.protocol, collection.budget
    has_layer = method.start in ("head", "ade-spl") or method.after is not None
    return [
        Setting(rate, temperature, weight)
        for rate in (budget.layer_rates if has_layer else budget.learning_rates)
        for temperature in (protocol.temperatures if method.temperature else (None,))
        for weight in (protocol.weights if method.weight else (None,))
    ]


def first_encoder(name: str, collection: Collection, seed: int, minilm: str) -> DualEncoder:
    """The untrained encoder of a cell, as one tower.

    Args:
        name: "static", "static-minilm" or "minilm".
        collection: its texts train a static tower's tokenizer.
        seed: fixes the first weights of a static tower.
        minilm: folder of all-MiniLM-L6-v2.
    """
    protocol, length = collection.protocol, collection.budget.max_length
    if name == "static":
        texts = (document["text"] for document in collection.corpus.get_corpus_iter(verbose=False))
        texts = [*texts, *collection.train[0]["query"]]
        return DualEncoder.static(texts, dim=protocol.dim, vocab_size=protocol.vocab_size, seed=seed, max_length=length)
    if name == "static-minilm":
        return DualEncoder.static_from(minilm, dim=protocol.dim, max_length=length)
    return DualEncoder(minilm, max_length=length)


def with_start(encoder: DualEncoder, start: str, seed: int) -> DualEncoder:
    """What a method starts from, made of one tower.

    Args:
        encoder: the tower.
        start: see :class:`Method`.
        seed: fixes the first weights of a head or a projection.
    """
    if start == "head":
        return encoder.with_head("layernorm", dim=encoder.dim, seed=seed)
    if start in ("ade", "ade-spl"):
        projection = encoder.dim if start == "ade-spl" else None
        return DualEncoder.two_towers(encoder.model, encoder.model, shared_projection=projection, seed=seed)
    return encoder

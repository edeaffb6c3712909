r"""Rounds and the published recipes.

A recipe is a list of :class:`Round`\\ s. Each function here spells one published method out, so that reading it tells
what the method does; ``dataclasses.replace(round, ...)`` changes what you want changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyterrier as pt

from pt_dance.mining.candidates import check_options
from pt_dance.mining.sources import FIRST_STAGE, check_source, needs_dense
from pt_dance.storage.display import facts
from pt_dance.storage.options import number, whole
from pt_dance.training import published as release
from pt_dance.training.options import check_choices, check_loss
from pt_dance.training.round_table import round_settings
from pt_dance.training.schedule import check_carried

__all__ = [
    "Round", "ance", "check_recipe", "current_model", "dance", "distill_kl", "margin_mse", "margin_mse_dual",
    "margin_mse_mnrl_dual", "mnrl", "mnrl_dual", "samtone",
]  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One round: mine negatives, train, refresh the index, validate.

    Attributes:
        loss: Name of a loss in :mod:`pt_dance.losses` ("contrastive", "pairwise", "samtone", "margin_mse",
            "distill_kl"), or a list of (name, weight) or (name, weight, options) for a weighted sum.
        loss_options: Options of that loss, ``dual=True`` and ``dual_weight`` among them. A ``temperature`` that is left
            out follows from the encoder, see :mod:`pt_dance.training.defaults`.
        negatives: Where document negatives come from: None (in-batch only), ``"first_stage"`` (the result frame that
            ``fit`` was given; in-batch only where plain topics came), a pipeline, a function from the current dense
            retriever to a pipeline, or a list of these, perhaps with weights.
        query_negatives: Where query negatives come from: None, ``"dense"`` (an index over the training queries with the
            current weights), or a pipeline over the training queries that takes documents as queries.
        depth: How many of the best candidates of a query (or document) negatives are drawn from.
        rank_range: ``(first, last)`` ranks to draw from; None for all within ``depth``.
        sampling: ``"uniform"`` or ``"top"``.
        negatives_per_query: How many negatives are kept for each query (or document).
        negatives_per_row: How many document negatives a training row carries.
        query_negatives_per_row: How many query negatives a training row carries, where there are any.
        filters: False-negative filters, see :mod:`pt_dance.mining`.
        share_of_queries: Part of the training queries that is mined for and trained on in this round, taking turns.
        teacher: Any pipeline that scores (query, text) rows, for "margin_mse" and "distill_kl".
        epochs: Passes over the (query, positive) pairs.
        steps: Optimiser steps of this round, whatever ``epochs`` says: the index is refreshed every so many steps, as
            ANCE's release does. A pass may then go on in the next round; None trains ``epochs`` passes.
        refresh_every: Refresh negatives that depend on the current weights every so many steps within the round, as
            ``DanceRetriever(refresh=...)`` says: between parts of it, or beside its training; None: they stay.
        max_staleness: How many steps old the weights of negatives may get that are refreshed beside the training,
            before it waits for newer ones; None: four times ``refresh_every``.
        carry_optimizer: Go on with the optimiser and the learning rate schedule of the round before, instead of
            starting both anew. Rounds that go on so share one schedule over all their steps, whose ``learning_rate``,
            ``warmup``, ``scheduler`` and ``training_arguments`` must be the same in all of them. Means nothing in the
            first round of a recipe.
        start: Which round's encoder this one begins with and mines with: that of the "last" round, or of the "best"
            one that was trained before it.
        batch_size: Rows of a batch, over all processes.
        learning_rate: Peak learning rate; None follows from the encoder, see :mod:`pt_dance.training.defaults`.
        warmup: Share of the steps over which the learning rate rises linearly; from 1 on, their number.
        scheduler: How it falls afterwards, a name of transformers' schedulers.
        similarity: "cosine" or "dot": changes the encoder's similarity from this round on; None leaves it.
        checkpoint_steps: Training steps between checkpoints; a killed fit goes on from the last.
        training_arguments: Anything else for ``SentenceTransformerTrainingArguments`` (bf16,
            gradient_accumulation_steps, weight_decay, optim, report_to, ...). Beside its own, ``optim`` may be "lamb"
            (You et al., arXiv 1904.00962, as ANCE's release has it), by the extra ``pt_dance[lamb]``.
        name: What the round is called in the history.
    """

    loss: str | Sequence = "contrastive"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    negatives: object = FIRST_STAGE
    query_negatives: object = None
    depth: int = 200
    rank_range: tuple[int, int] | None = None
    sampling: str = "uniform"
    negatives_per_query: int = 20
    negatives_per_row: int = 1
    query_negatives_per_row: int = 1
    filters: Sequence = ()
    share_of_queries: float = 1.0
    teacher: object = None
    epochs: int = 1
    steps: int | None = None
    refresh_every: int | None = None
    max_staleness: int | None = None
    carry_optimizer: bool = False
    start: str = "last"
    batch_size: int = 64
    learning_rate: float | None = None
    warmup: float = 0.1
    scheduler: str = "linear"
    similarity: str | None = None
    checkpoint_steps: int = 500
    training_arguments: Mapping[str, object] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self):
        """Raise ValueError or TypeError where an option makes no sense."""
        check_loss(self.loss, self.loss_options)
        check_source(self.negatives, "negatives")
        if self.query_negatives not in (None, "dense") and not isinstance(self.query_negatives, pt.Transformer):
            raise TypeError(
                f"query_negatives={self.query_negatives!r} is no source of query negatives; give 'dense', a pipeline "
                "over the training queries that takes documents as queries, or None"
            )
        mined = ("depth", "negatives_per_query", "negatives_per_row", "query_negatives_per_row")
        for option in (*mined, "epochs", "batch_size", "checkpoint_steps"):
            self._set(option, whole(option, getattr(self, option)))
        check_options(self.depth, self.negatives_per_query, self.sampling, self.rank_range)
        for option in ("steps", "refresh_every", "max_staleness"):
            self._set(option, whole(option, getattr(self, option), or_none=True))
        if not isinstance(self.carry_optimizer, bool):
            raise TypeError(f"carry_optimizer={self.carry_optimizer!r} must be True or False")
        self._set("learning_rate", number("learning_rate", self.learning_rate, above=0, or_none=True))
        self._set("share_of_queries", number("share_of_queries", self.share_of_queries, above=0, highest=1))
        share = number("warmup", self.warmup, lowest=0)
        self._set("warmup", share if share < 1 else whole("warmup", self.warmup))
        check_choices(self)

    def _set(self, option: str, value: object) -> None:
        """Keep an option as a plain number, whichever library's number was given."""
        object.__setattr__(self, option, value)

    @property
    def loss_name(self) -> str:
        """The loss in words: its name, or the weighted sum."""
        if isinstance(self.loss, (list, tuple)):
            return " + ".join(f"{part[1]:g} {getattr(part[0], '__name__', part[0])}" for part in self.loss)
        return str(getattr(self.loss, "__name__", self.loss))

    @property
    def is_dual(self) -> bool:
        """Whether the loss also ranks queries for documents."""
        return bool(self.loss_options.get("dual"))

    @property
    def is_refreshed(self) -> bool:
        """Whether negatives are mined anew while the round is trained."""
        is_dense = needs_dense(self.negatives) or (self.is_dual and self.query_negatives == "dense")
        return self.refresh_every is not None and is_dense

    def _repr_html_(self) -> str:
        return facts(f"Round: {self.name or self.loss_name}", round_settings(self))


def current_model(dense):
    """Return the dense retriever itself: ANCE's negative source, what the current weights find."""
    return dense


# Functions of the current dense retriever that a saved recipe knows by their names.
SOURCES = {"current_model": current_model}


def mnrl(
    epochs: int = 1, *, negatives: object = FIRST_STAGE, temperature: float | None = None, **options
) -> list[Round]:
    """Multiple-negatives ranking: cross-entropy with in-batch negatives and those of the first stage, one round.

    Args:
        epochs: Passes over the training pairs.
        negatives: Where hard negatives come from; None trains with in-batch negatives only.
        temperature: Divides the similarities; None follows from the encoder.
        **options: Any other attribute of :class:`Round`.
    """
    return [_round(dict(name="mnrl", loss="contrastive", negatives=negatives, epochs=epochs), options, temperature)]


def ance(
    rounds: int = 3, *, published: bool = False, loss: str = "contrastive", warm_up: int = 1, epochs: int = 1,
    temperature: float | None = None, **options,
) -> list[Round]:  # fmt: skip
    """ANCE (Xiong et al., ICLR 2021, arXiv 2007.00808): warm-up on first-stage negatives, then the model's own.

    From the paper: the top 200 of the current model, refreshed again and again; one optimiser over all of it. Where the
    release keeps one positive of a query and may mine its others as negatives, here all positives are removed. Ours, so
    that it works with any encoder: its own similarity at the temperature that follows from it (dot products that
    nothing keeps alike in length ruin a static tower), and cross-entropy with in-batch negatives where the paper has
    pairs of a positive and a negative: those of a small collection are soon in order, and leave little to learn.

    ``published=True`` is the release's setting for MS MARCO passages: dot products at temperature 1, in the warm-up,
    too; LAMB, 1e-6 with 5,000 steps of warm-up, 64 rows; 20 of the top 200 uniformly for a fifth of the queries;
    a refresh every 10,000 steps (its ``save_steps``; in fact whenever its second process is done); the warm-up with
    2e-4, 1,000 steps of warm-up, 32 rows, best with ``warm_up=2``. It is meant for
    ``encoder.with_head("layernorm", dim=768, init="normal")``. Its schedule ends at step 1,000,000, ours with the last
    round; the model released is that of step 600,000 (``rounds=60``). Neither paper nor release fixes the number of
    refreshes.

    Args:
        rounds: Refreshes of the index, each followed by training on the negatives it gives.
        published: The release's settings instead of those that follow from the encoder.
        loss: "contrastive", or "pairwise" (always, where ``published``), in all rounds but the warm-up.
        warm_up: Epochs of warm-up on the first stage's negatives (in-batch negatives alone where plain topics are
            given to ``fit``); 0 starts with the model's own negatives.
        epochs: Passes over the training pairs in each round, where it has no ``steps``.
        temperature: Divides the similarities; None follows from the encoder.
        **options: Any other attribute of :class:`Round`, for all rounds.
    """
    rounds, warm_up = whole("rounds", rounds, 0), whole("warm_up", warm_up, 0)
    first = dict(loss="contrastive", carry_optimizer=True) | (release.ANCE_WARM_UP if published else {})
    then = dict(loss=loss, negatives=current_model, carry_optimizer=True) | (release.ANCE if published else {})
    warm = [_round(first | dict(name="warm-up", epochs=warm_up), options, temperature)] if warm_up else []
    refreshed = [_round(then | dict(name="ance", epochs=epochs), options, temperature)] * rounds
    # the release trains its warm-up in a run of its own
    return _anew(warm) + _anew(refreshed) if published else _anew(warm + refreshed)


def dance(
    rounds: int = 1, *, published: bool = False, loss: str = "contrastive", warm_up: int = 1, ance_rounds: int = 1,
    epochs: int = 1, normalize: bool | None = None, dual: bool = True, temperature: float | None = None,
    dual_weight: float | None = None, query_negatives: object = "dense", **options,
) -> list[Round]:  # fmt: skip
    """DANCE (Li et al., arXiv 2107.07773): from an ANCE model, normalisation tuning, then dual training.

    From the paper: stage 1 trains ANCE's loss on L2-normalised embeddings; stage 2 adds the dual loss, whose negatives
    are training queries mined with the positive documents' vectors. Document and query negatives of a round come from
    the same weights. From the release: stage 2 is a training of its own, from stage 1's best checkpoint. Ours: ANCE's
    rounds before, in one schedule with stage 1; the encoder's similarity at the temperature that follows from it (.05
    for cosines; the paper's .01 forgets more of an encoder that is no ANCE model); and cross-entropy with in-batch
    negatives where the paper has pairs, the dual direction at weight 1 instead of .1, at a third of the rate: after
    stage 1 hardly a pair of a small collection is out of order (a loss of .01), so that pairs changed nothing there.

    ``published=True`` is the release's setting for MS MARCO documents: pairs, temperature .01, dual weight .1, LAMB,
    5e-6 with 3,000 steps of warm-up, 64 rows, a refresh every 5,000 steps with one optimiser and schedule a stage,
    stage 2 from stage 1's best round, regularisers off. It starts from an ANCE model of yours (``warm_up`` and
    ``ance_rounds`` are 0 then) and is meant for :func:`ance`'s head. The release's schedule ends at step 1,000,000,
    ours with the stage. Neither paper nor release fixes how many refreshes a stage has.

    Args:
        rounds: Rounds of each stage, every one with refreshed negatives.
        published: The release's settings instead of those that follow from the encoder.
        loss: "contrastive", or "pairwise" as published, in all rounds but the warm-up.
        warm_up: Epochs on the first stage's negatives before; 0 where the encoder is an ANCE model already.
        ance_rounds: Rounds of ANCE before; 0 where the encoder is an ANCE model already.
        epochs: Passes over the training pairs in each round, where it has no ``steps``.
        normalize: True for cosines, False for dot products (with ``dual`` the 2x2 ablation of the paper); None leaves
            the encoder's similarity, or cosines where ``published``.
        dual: Whether to add the dual loss in stage 2.
        dual_weight: Weight of the dual loss; None for .1 with pairs, as published, and 1 otherwise.
        query_negatives: Where query negatives come from, see :class:`Round`.
        temperature: Divides the similarities of both stages; None follows from the encoder.
        **options: Any other attribute of :class:`Round`, for all rounds.
    """
    rounds, ance_rounds = whole("rounds", rounds, 0), whole("ance_rounds", ance_rounds, 0)
    if published:
        warm_up, ance_rounds, loss = 0, 0, "pairwise"
        normalize = True if normalize is None else normalize
    if dual_weight is None:
        dual_weight = 0.1 if loss == "pairwise" else 1.0
    similarity = {None: None, True: "cosine", False: "dot"}[normalize]
    before = ance(ance_rounds, loss=loss, warm_up=warm_up, epochs=epochs, **options) if warm_up or ance_rounds else []
    given: dict[str, Any] = dict(loss=loss, negatives=current_model, similarity=similarity, epochs=epochs)
    given["carry_optimizer"] = True
    if published:
        given |= release.DANCE | dict(loss_options={"temperature": 0.01 if normalize else 1.0})
    first = _round(given | dict(name="norm" if normalize else "document"), options, temperature)
    last = first
    if dual:
        both = given.get("loss_options", {}) | {"dual": True, "dual_weight": dual_weight}
        last = _round(
            given | dict(name="dual", loss_options=both, query_negatives=query_negatives), options, temperature
        )
    return _anew(before + [first] * rounds) + _anew([last] * rounds, start="best")


def samtone(
    epochs: int = 1, *, published: bool = False, sides: str = "query", negatives: object = FIRST_STAGE,
    temperature: float | None = None, **options,
) -> list[Round]:  # fmt: skip
    """SamToNe (Moiseev et al., Findings of ACL 2023, arXiv 2306.02516): the batch's other queries as negatives too.

    From the paper: the loss, one softmax without a weight. Ours: similarity and temperature, which follow from the
    encoder, and the first stage's hard negatives. ``published=True`` has cosines, temperature .01 and in-batch
    negatives only; the paper's optimiser settings (T5, Adafactor, large batches) are for another model family, no code
    was released, and its learning rate and batch size are yours to give. Its towers are ``DualEncoder.two_towers``
    without (ADE) or with ``shared_projection`` (ADE-SPL).

    Args:
        epochs: Passes over the training pairs.
        published: The paper's settings as far as it gives any.
        sides: "query" adds query-query terms to the one softmax; "both" adds the mirrored loss with document-document
            terms.
        negatives: Where hard negatives come from; None trains with the batch's own texts only.
        temperature: Divides the similarities; None follows from the encoder.
        **options: Any other attribute of :class:`Round`.
    """
    loss = {"sides": sides} | ({"temperature": 0.01} if published else {})
    given = dict(name=f"samtone {sides}", loss="samtone", loss_options=loss, epochs=epochs)
    given |= dict(negatives=None, similarity="cosine") if published else dict(negatives=negatives)
    return [_round(given, options, temperature)]


def mnrl_dual(
    epochs: int = 1, *, dual_weight: float = 1.0, document_weight: float = 1.0, temperature: float | None = None,
    negatives: object = FIRST_STAGE, query_negatives: object = "dense", **options,
) -> list[Round]:  # fmt: skip
    """MNRL-Dual (S. He): cross-entropy over documents for the query, and over queries for the document.

    Args:
        epochs: Passes over the training pairs.
        dual_weight: Weight of the direction from documents to queries; the source does not give it.
        document_weight: Weight of the direction from queries to documents.
        negatives: Where document negatives come from.
        query_negatives: Where query negatives come from, see :class:`Round`.
        temperature: Divides the similarities; None follows from the encoder.
        **options: Any other attribute of :class:`Round`.
    """
    loss = {"dual": True, "dual_weight": dual_weight, "document_weight": document_weight}
    given = dict(name="mnrl-dual", loss="contrastive", loss_options=loss, negatives=negatives, epochs=epochs)
    return [_round(given | dict(query_negatives=query_negatives), options, temperature)]


def margin_mse(
    teacher: pt.Transformer, epochs: int = 1, *, published: bool = False, negatives: object = FIRST_STAGE,
    temperature: float | None = None, **options,
) -> list[Round]:  # fmt: skip
    """Margin-MSE (Hofstätter et al., arXiv 2010.02666): the teacher's margin between positive and negative as target.

    From the paper: the loss. Ours: the encoder's similarity, and the teacher's margins scaled to twice those of the
    encoder before training, so that a cross-encoder's are within the reach of cosines. ``published=True``, for an
    encoder with dot products: raw margins at temperature 1 and one BM25 negative a row as in the paper, and the
    defaults of the release, which is not the code of the paper's runs: Adam with 7e-6, no weight decay, 32 rows,
    gradients as they are. Neither fixes the number of steps: both stop early by validation.

    Args:
        teacher: Any pipeline that scores (query, text) rows; raw scores, not their sigmoid. Each pair is scored once.
        epochs: Passes over the training pairs.
        published: The paper's settings instead of those that follow from encoder and teacher.
        negatives: Where document negatives come from.
        temperature: Divides the similarities, with the teacher's scores as they are; None follows from both.
        **options: Any other attribute of :class:`Round`.
    """
    given = dict(name="margin-mse", loss="margin_mse", teacher=teacher, negatives=negatives, epochs=epochs)
    return [_round(given | (release.MARGIN_MSE if published else {}), options, temperature)]


def margin_mse_dual(
    teacher: pt.Transformer, epochs: int = 1, *, dual_weight: float = 1.0, document_weight: float = 1.0,
    query_negatives: object = "dense", **options
) -> list[Round]:  # fmt: skip
    """Margin-MSE-Dual (S. He): the teacher's margins in both directions, between documents and between queries.

    Args:
        teacher: As for :func:`margin_mse`; it also scores (query negative, document).
        epochs: Passes over the training pairs.
        dual_weight: Weight of the margins between queries; the source does not give it.
        document_weight: Weight of the margins between documents.
        query_negatives: Where query negatives come from, see :class:`Round`.
        **options: Any other option of :func:`margin_mse`.
    """
    loss = {"dual": True, "dual_weight": dual_weight, "document_weight": document_weight}
    options["loss_options"] = {**loss, **options.get("loss_options", {})}
    return margin_mse(teacher, epochs, **{"name": "margin-mse-dual", "query_negatives": query_negatives, **options})


def margin_mse_mnrl_dual(
    teacher: pt.Transformer, epochs: int = 1, *, mnrl_weight: float = 1.0, mnrl_temperature: float | None = None,
    temperature: float | None = None, **options
) -> list[Round]:  # fmt: skip
    """Margin-MSE and MNRL together, in both directions: the next step that S. He's slides propose and never report.

    Args:
        teacher: As for :func:`margin_mse`.
        epochs: Passes over the training pairs.
        mnrl_weight: Weight of the cross-entropy against the squared margins.
        mnrl_temperature: Divides the similarities in the cross-entropy; None follows from the encoder.
        temperature: Divides the similarities in the squared margins; None follows from the encoder and the teacher.
        **options: Any other option of :func:`margin_mse_dual`.
    """
    if "temperature" in options.get("loss_options", {}):
        raise ValueError(
            "loss_options: the two losses have a temperature each; give temperature=... (squared margins) and "
            "mnrl_temperature=... (cross-entropy)"
        )
    parts = [
        (name, weight, {} if given is None else {"temperature": given})
        for name, weight, given in (("margin_mse", 1.0, temperature), ("contrastive", mnrl_weight, mnrl_temperature))
    ]
    rounds = margin_mse_dual(teacher, epochs, **{"name": "margin-mse + mnrl dual", **options})
    return [replace(round_, loss=parts) for round_ in rounds]


def distill_kl(
    teacher: pt.Transformer, epochs: int = 1, *, negatives: object = FIRST_STAGE, negatives_per_row: int = 4,
    temperature: float | None = None, **options,
) -> list[Round]:  # fmt: skip
    """Listwise distillation: the teacher's distribution over a row's positive and its mined negatives as target.

    Both distributions are softmaxes of scores on the scale that :func:`margin_mse` brings them to, unless
    ``temperature`` or, for the teacher, ``loss_options={"teacher_temperature": ...}`` say otherwise; with
    ``loss_options={"dual": True}`` and ``query_negatives="dense"`` in both directions.

    Args:
        teacher: As for :func:`margin_mse`.
        epochs: Passes over the training pairs.
        negatives: Where document negatives come from.
        negatives_per_row: Documents in a row's list beside the positive.
        temperature: Divides the similarities; None follows from the encoder.
        **options: Any other attribute of :class:`Round`.
    """
    given = dict(name="distill-kl", loss="distill_kl", teacher=teacher, negatives=negatives, epochs=epochs)
    return [_round(given | dict(negatives_per_row=negatives_per_row), options, temperature)]


def check_recipe(recipe: object) -> list[Round]:
    """Return the recipe as a list of rounds.

    Raises:
        TypeError: If it is no round and no list of rounds.
        ValueError: If it is empty.
    """
    rounds = [recipe] if isinstance(recipe, Round) else recipe
    if not isinstance(rounds, (list, tuple)):
        raise TypeError(f"recipe={recipe!r} must be a list of pt_dance.Round, such as recipes.ance() gives")
    for place, entry in enumerate(rounds, start=1):
        if not isinstance(entry, Round):
            raise TypeError(
                f"entry {place} of the recipe is {entry!r}; it must be a pt_dance.Round, like those of recipes.ance()"
            )
    if not rounds:
        raise ValueError("the recipe has no round; give at least one pt_dance.Round")
    check_carried(rounds)
    return list(rounds)


def _anew(rounds: list[Round], **options) -> list[Round]:
    """Return rounds of which the first starts its optimiser anew, whatever stands before them in a recipe."""
    return [replace(rounds[0], carry_optimizer=False, **options), *rounds[1:]] if rounds else []


def _round(given: dict[str, Any], options: Mapping[str, Any], temperature: float | None) -> Round:
    """Return a round in which the caller's options win, and their loss options are added to the recipe's own."""
    options = dict(options)
    own = {**given.pop("loss_options", {}), **options.pop("loss_options", {})}
    if temperature is not None:
        own["temperature"] = temperature
    names = {f.name for f in fields(Round)}
    unknown = sorted(set(options) - names)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; a round takes {', '.join(sorted(names))}")
    return Round(**{**given, **options, "loss_options": own})

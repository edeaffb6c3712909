r"""Rounds and the published recipes.

A recipe is a list of :class:`Round`\\ s. Each function here spells one published method out, so that reading it tells
what the method does; ``dataclasses.replace(round, ...)`` changes what you want changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyterrier as pt
from torch import nn

from pt_dance import losses
from pt_dance.mining.candidates import check_options
from pt_dance.mining.sources import FIRST_STAGE, check_source
from pt_dance.storage.display import facts
from pt_dance.storage.options import number, whole
from pt_dance.training.options import SCHEDULERS, check_training_arguments
from pt_dance.training.round_table import round_settings

__all__ = [
    "Round", "ance", "check_recipe", "current_model", "dance", "margin_mse", "margin_mse_dual", "margin_mse_mnrl_dual",
    "mnrl", "mnrl_dual", "samtone",
]  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One round: mine negatives, train, refresh the index, validate.

    Attributes:
        loss: name of a loss in :mod:`pt_dance.losses` ("contrastive", "pairwise", "samtone", "margin_mse"), or a list
            of (name, weight) or (name, weight, options) for a weighted sum.
        loss_options: options of that loss, ``dual=True`` and ``dual_weight`` among them.
        negatives: where document negatives come from: None (in-batch only), ``"first_stage"`` (the result frame that
            ``fit`` was given; in-batch only where plain topics came), a pipeline, a function from the current dense
            retriever to a pipeline, or a list of these, perhaps with weights.
        query_negatives: where query negatives come from: None, ``"dense"`` (an index over the training queries with the
            current weights), or a pipeline over the training queries that takes documents as queries.
        depth: how many of the best candidates of a query (or document) negatives are drawn from.
        rank_range: ``(first, last)`` ranks to draw from; None for all within ``depth``.
        sampling: ``"uniform"`` or ``"top"``.
        negatives_per_query: how many negatives are kept for each query (or document).
        negatives_per_row: how many document negatives a training row carries.
        query_negatives_per_row: how many query negatives a training row carries, where there are any.
        filters: false-negative filters, see :mod:`pt_dance.mining`.
        share_of_queries: part of the training queries that is mined for and trained on in this round, taking turns.
        teacher: any pipeline that scores (query, text) rows, for losses that learn from a teacher ("margin_mse").
        epochs: passes over the (query, positive) pairs.
        steps: optimiser steps of this round, whatever ``epochs`` says: the index is refreshed every so many steps, as
            ANCE's release does. A pass may then go on in the next round; None trains ``epochs`` passes.
        carry_optimizer: go on with the optimiser and the learning rate schedule of the round before, instead of
            starting both anew. Rounds that go on so share one schedule over all their steps, whose ``learning_rate``,
            ``warmup``, ``scheduler`` and ``training_arguments`` must be the same in all of them. Means nothing in the
            first round of a recipe.
        batch_size: rows of a batch.
        learning_rate: peak learning rate; None takes 2e-5 for transformers and 2e-2 for static towers.
        warmup: share of the steps over which the learning rate rises linearly.
        scheduler: how it falls afterwards, a name of transformers' schedulers.
        similarity: "cosine" or "dot": changes the encoder's similarity from this round on; None leaves it.
        checkpoint_steps: training steps between checkpoints; a killed fit goes on from the last.
        training_arguments: anything else for ``SentenceTransformerTrainingArguments`` (bf16,
            gradient_accumulation_steps, weight_decay, optim, report_to, ...).
        name: what the round is called in the history.
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
    carry_optimizer: bool = False
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
        self._check_loss()
        check_source(self.negatives, "negatives")
        if self.query_negatives not in (None, "dense") and not isinstance(self.query_negatives, pt.Transformer):
            raise TypeError(
                f"query_negatives={self.query_negatives!r} is no source of query negatives; give 'dense', a pipeline "
                "over the training queries that takes documents as queries, or None"
            )
        check_options(self.depth, self.negatives_per_query, self.sampling, self.rank_range)
        mined = ("depth", "negatives_per_query", "negatives_per_row", "query_negatives_per_row")
        for option in (*mined, "epochs", "batch_size", "checkpoint_steps"):
            self._set(option, whole(option, getattr(self, option)))
        self._set("steps", whole("steps", self.steps, or_none=True))
        if not isinstance(self.carry_optimizer, bool):
            raise TypeError(f"carry_optimizer={self.carry_optimizer!r} must be True or False")
        self._set("learning_rate", number("learning_rate", self.learning_rate, above=0, or_none=True))
        self._set("share_of_queries", number("share_of_queries", self.share_of_queries, above=0, highest=1))
        self._set("warmup", number("warmup", self.warmup, lowest=0, below=1))
        if self.teacher is not None and not isinstance(self.teacher, pt.Transformer):
            raise TypeError(f"teacher={self.teacher!r} must be a PyTerrier pipeline that scores (query, text) rows")
        if self.teacher is None and "margin_mse" in self._losses():
            raise ValueError("the loss 'margin_mse' learns from a teacher; give teacher=... (a pipeline that scores)")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={self.scheduler!r} is unknown; choose one of {', '.join(SCHEDULERS)}")
        if not isinstance(self.filters, (list, tuple)) or not all(callable(entry) for entry in self.filters):
            raise TypeError(f"filters={self.filters!r} must be a list of filters, such as mining.RankRange(10, 200)")
        check_training_arguments(self.training_arguments)
        if self.similarity not in (None, "cosine", "dot"):
            raise ValueError(f"similarity={self.similarity!r} is unknown; choose 'cosine', 'dot' or None")
        if self.negatives_per_row > self.negatives_per_query:
            raise ValueError(
                f"negatives_per_row={self.negatives_per_row} is more than "
                f"negatives_per_query={self.negatives_per_query}"
            )

    def _set(self, option: str, value: object) -> None:
        """Keep an option as a plain number, whichever library's number was given."""
        object.__setattr__(self, option, value)

    def _check_loss(self) -> None:
        if not isinstance(self.loss_options, Mapping):
            raise TypeError(f"loss_options={self.loss_options!r} must be a dict of option names and values")
        losses.check(self.loss, **self.loss_options)
        try:
            losses.make(self.loss, nn.Identity(), **self.loss_options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"loss={self.loss!r} with loss_options={dict(self.loss_options)!r}: {error}") from None

    def _losses(self) -> list[object]:
        return [part[0] for part in self.loss] if isinstance(self.loss, (list, tuple)) else [self.loss]

    @property
    def loss_name(self) -> str:
        """The loss in words: its name, or the weighted sum."""
        if isinstance(self.loss, (list, tuple)):
            return " + ".join(f"{part[1]:g} {_named(part[0])}" for part in self.loss)
        return _named(self.loss)

    @property
    def is_dual(self) -> bool:
        """Whether the loss also ranks queries for documents."""
        return bool(self.loss_options.get("dual"))

    def _repr_html_(self) -> str:
        return facts(f"Round: {self.name or self.loss_name}", round_settings(self))


def current_model(dense):
    """Return the dense retriever itself: ANCE's negative source, what the current weights find."""
    return dense


# Functions of the current dense retriever that a saved recipe knows by their names.
SOURCES = {"current_model": current_model}


def mnrl(epochs: int = 1, *, negatives: object = FIRST_STAGE, temperature: float = 0.05, **options) -> list[Round]:
    """Multiple-negatives ranking: cross-entropy with in-batch negatives and those of the first stage, one round.

    Args:
        epochs: passes over the training pairs.
        negatives: where hard negatives come from; None trains with in-batch negatives only.
        temperature: divides the similarities.
        **options: any other attribute of :class:`Round`.
    """
    return [Round(**_merge(dict(name="mnrl", loss="contrastive", loss_options={"temperature": temperature},
                                negatives=negatives, epochs=epochs), options))]  # fmt: skip


def ance(rounds: int = 3, *, loss: str = "pairwise", warm_up: int = 1, epochs: int = 1, **options) -> list[Round]:
    """ANCE (Xiong et al., ICLR 2021, arXiv 2007.00808): warm-up on first-stage negatives, then the model's own.

    As published: raw dot products, 2-way negative log-likelihood with one negative a row and no in-batch negatives; of
    the top 200 of the current model without the positives, 20 are drawn uniformly. Where the release keeps one positive
    of a query and may mine its others as negatives, here all positives are removed.

    Args:
        rounds: refreshes of the index, each followed by training on the negatives it gives.
        loss: "pairwise" as published; "contrastive" adds in-batch negatives, which small collections and encoders
            trained from nothing gain from.
        warm_up: epochs of warm-up on the first stage's negatives (in-batch negatives where plain topics are given to
            ``fit``); 0 starts with the model's own negatives.
        epochs: passes over the training pairs in each round.
        **options: any other attribute of :class:`Round`, for all rounds.
    """
    whole("rounds", rounds, 0)
    whole("warm_up", warm_up, 0)
    given: dict[str, Any] = dict(loss=loss)
    if loss == "pairwise":
        given |= dict(similarity="dot", loss_options={"temperature": 1.0})
    warm = [Round(**_merge(given | dict(name="warm-up", epochs=warm_up), options))] if warm_up else []
    refreshed = Round(**_merge(given | dict(name="ance", negatives=current_model, epochs=epochs), options))
    return warm + [refreshed] * rounds


def dance(
    rounds: int = 1, *, warm_up: int = 1, ance_rounds: int = 1, epochs: int = 1, normalize: bool = True,
    dual: bool = True, temperature: float = 0.01, dual_weight: float = 0.1, query_negatives: object = "dense", **options
) -> list[Round]:  # fmt: skip
    """DANCE (Li et al., arXiv 2107.07773): from an ANCE model, normalisation tuning, then dual training.

    Stage 1 trains ANCE's loss on L2-normalised embeddings with temperature .01; stage 2 adds the dual loss with
    weight .1, whose negatives are training queries mined with the positive documents' vectors. Document and query
    negatives of a round come from the same weights.

    Args:
        rounds: rounds of each stage, every one with refreshed negatives.
        warm_up: epochs on the first stage's negatives before; 0 where the encoder is an ANCE model already.
        ance_rounds: rounds of ANCE before; 0 where the encoder is an ANCE model already.
        epochs: passes over the training pairs in each round.
        normalize: whether to normalise; with ``dual`` the 2x2 ablation of the paper.
        dual: whether to add the dual loss in stage 2.
        temperature: divides cosines; without normalisation dot products are taken as they are.
        dual_weight: weight of the dual loss.
        query_negatives: where query negatives come from, see :class:`Round`.
        **options: any other attribute of :class:`Round`, for all rounds.
    """
    whole("rounds", rounds, 0)
    whole("ance_rounds", ance_rounds, 0)
    before = ance(ance_rounds, warm_up=warm_up, epochs=epochs, **options) if warm_up or ance_rounds else []
    loss = {"temperature": temperature if normalize else 1.0}
    given = dict(loss="pairwise", negatives=current_model, similarity="cosine" if normalize else "dot", epochs=epochs)
    first = Round(**_merge(given | dict(name="norm" if normalize else "document", loss_options=loss), options))
    last = first
    if dual:
        loss = loss | {"dual": True, "dual_weight": dual_weight}
        last = Round(**_merge(given | dict(name="dual", loss_options=loss, query_negatives=query_negatives), options))
    return before + [first] * rounds + [last] * rounds


def samtone(
    epochs: int = 1, *, sides: str = "query", temperature: float = 0.05, negatives: object = FIRST_STAGE, **options
) -> list[Round]:
    """SamToNe (Moiseev et al., Findings of ACL 2023, arXiv 2306.02516): the batch's other queries as negatives too.

    Args:
        epochs: passes over the training pairs.
        sides: "query" adds query-query terms to the one softmax; "both" adds the mirrored loss with document-document
            terms.
        temperature: divides the cosines.
        negatives: where hard negatives come from; None trains with the batch's own texts only.
        **options: any other attribute of :class:`Round`.
    """
    loss = {"sides": sides, "temperature": temperature}
    given = dict(name=f"samtone {sides}", loss="samtone", loss_options=loss, similarity="cosine", negatives=negatives)
    return [Round(**_merge(given | dict(epochs=epochs), options))]


def mnrl_dual(
    epochs: int = 1, *, dual_weight: float = 1.0, document_weight: float = 1.0, temperature: float = 0.05,
    negatives: object = FIRST_STAGE, query_negatives: object = "dense", **options
) -> list[Round]:  # fmt: skip
    """MNRL-Dual (S. He): cross-entropy over documents for the query, and over queries for the document.

    Both directions have mined negatives beside those of the batch.

    Args:
        epochs: passes over the training pairs.
        dual_weight: weight of ranking queries for documents; the source does not give it.
        document_weight: weight of ranking documents for queries.
        temperature: divides the similarities.
        negatives: where document negatives come from.
        query_negatives: where query negatives come from, see :class:`Round`.
        **options: any other attribute of :class:`Round`.
    """
    loss = {"temperature": temperature, "dual": True, "dual_weight": dual_weight, "document_weight": document_weight}
    given = dict(name="mnrl-dual", loss="contrastive", loss_options=loss, negatives=negatives)
    return [Round(**_merge(given | dict(query_negatives=query_negatives, epochs=epochs), options))]


def margin_mse(
    teacher: pt.Transformer, epochs: int = 1, *, negatives: object = FIRST_STAGE, temperature: float = 1.0,
    similarity: str | None = "dot", **options
) -> list[Round]:  # fmt: skip
    """Margin-MSE (Hofstätter et al., arXiv 2010.02666): the teacher's margin between positive and negative as target.

    Args:
        teacher: any pipeline that scores (query, text) rows; raw scores, not their sigmoid. Each pair is scored once.
        epochs: passes over the training pairs.
        negatives: where document negatives come from.
        temperature: divides the similarities; below 1 lets cosines reach a teacher's margins.
        similarity: "dot" as published; None leaves the encoder's.
        **options: any other attribute of :class:`Round`.
    """
    given = dict(name="margin-mse", loss="margin_mse", loss_options={"temperature": temperature}, similarity=similarity)
    return [Round(**_merge(given | dict(teacher=teacher, negatives=negatives, epochs=epochs), options))]


def margin_mse_dual(
    teacher: pt.Transformer, epochs: int = 1, *, dual_weight: float = 1.0, document_weight: float = 1.0,
    query_negatives: object = "dense", **options
) -> list[Round]:  # fmt: skip
    """Margin-MSE-Dual (S. He): the teacher's margins in both directions, between documents and between queries.

    Args:
        teacher: as for :func:`margin_mse`; it also scores (query negative, document).
        epochs: passes over the training pairs.
        dual_weight: weight of the margins between queries; the source does not give it.
        document_weight: weight of the margins between documents.
        query_negatives: where query negatives come from, see :class:`Round`.
        **options: any other option of :func:`margin_mse`.
    """
    loss = {"dual": True, "dual_weight": dual_weight, "document_weight": document_weight}
    given = dict(name="margin-mse-dual", query_negatives=query_negatives, loss_options=loss)
    return margin_mse(teacher, epochs, **_merge(given, options, known=False))


def margin_mse_mnrl_dual(
    teacher: pt.Transformer, epochs: int = 1, *, mnrl_weight: float = 1.0, mnrl_temperature: float = 0.05,
    temperature: float = 1.0, dual_weight: float = 1.0, document_weight: float = 1.0, **options
) -> list[Round]:  # fmt: skip
    """Margin-MSE and MNRL together, in both directions: the next step that S. He's slides propose and never report.

    Args:
        teacher: as for :func:`margin_mse`.
        epochs: passes over the training pairs.
        mnrl_weight: weight of the cross-entropy against the squared margins.
        mnrl_temperature: divides the cosines in the cross-entropy.
        temperature: divides the similarities in the squared margins.
        dual_weight: weight of the query direction of both.
        document_weight: weight of the document direction of both.
        **options: any other option of :func:`margin_mse_dual`.
    """
    if "temperature" in options.get("loss_options", {}):
        raise ValueError(
            "loss_options: the two losses have a temperature each; give temperature=... (squared margins) and "
            "mnrl_temperature=... (cross-entropy)"
        )
    parts = [
        ("margin_mse", 1.0, {"temperature": temperature}),
        ("contrastive", mnrl_weight, {"temperature": mnrl_temperature, "similarity": "cosine"}),
    ]
    rounds = margin_mse_dual(
        teacher,
        epochs,
        dual_weight=dual_weight,
        document_weight=document_weight,
        **{"name": "margin-mse + mnrl dual", **options},
    )
    return [
        replace(r, loss=parts, loss_options={k: v for k, v in r.loss_options.items() if k != "temperature"})
        for r in rounds
    ]


def check_recipe(recipe: object) -> list[Round]:
    """Return the recipe as a list of rounds.

    Raises:
        TypeError: if it is no round and no list of rounds.
        ValueError: if it is empty.
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
    for place, (before, entry) in enumerate(itertools.pairwise(rounds), start=2):
        for option in ("learning_rate", "warmup", "scheduler", "training_arguments"):
            if entry.carry_optimizer and getattr(entry, option) != getattr(before, option):
                raise ValueError(
                    f"round {place} of the recipe goes on with the optimiser of the round before (carry_optimizer), "
                    f"but has another {option}: {getattr(entry, option)!r} instead of {getattr(before, option)!r}"
                )
    return list(rounds)


def _named(loss: Any) -> str:
    return loss if isinstance(loss, str) else loss.__name__


def _merge(given: dict, options: Mapping[str, Any], *, known: bool = True) -> dict:
    """Let the caller's options win, and add their loss options to the recipe's own."""
    names = {f.name for f in fields(Round)}
    unknown = sorted(set(options) - names) if known else []
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; a round takes {', '.join(sorted(names))}")
    merged = given | dict(options)
    if "loss_options" in given and "loss_options" in options:
        merged["loss_options"] = {**given["loss_options"], **options["loss_options"]}
    return merged

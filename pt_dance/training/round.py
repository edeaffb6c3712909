"""One round of training and its options; the published methods are lists of these, see :mod:`pt_dance.recipes`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import pyterrier as pt
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import nn
from transformers import SchedulerType

from pt_dance import losses
from pt_dance.mining.candidates import check_options
from pt_dance.mining.sources import FIRST_STAGE, check_source

# The others follow a loss that is measured while training; here rounds are measured.
_SCHEDULERS = tuple(s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy"))

# What the estimator says itself: with others, a run could not be gone on with, or would not be what its settings say.
_SAID_ELSEWHERE = {
    "output_dir": "the estimator's path",
    "seed": "the estimator's seed",
    "data_seed": "the estimator's seed",
    "resume_from_checkpoint": "calling fit again",
}


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
    loss_options: Mapping[str, object] = field(default_factory=dict)
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
    batch_size: int = 64
    learning_rate: float | None = None
    warmup: float = 0.1
    scheduler: str = "linear"
    similarity: str | None = None
    checkpoint_steps: int = 500
    training_arguments: Mapping[str, object] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self):
        """Raises ValueError or TypeError where an option makes no sense."""
        self._check_loss()
        check_source(self.negatives, "negatives")
        if self.query_negatives not in (None, "dense") and not isinstance(self.query_negatives, pt.Transformer):
            raise TypeError(
                f"query_negatives={self.query_negatives!r} is no source of query negatives; give 'dense', a pipeline "
                "over the training queries that takes documents as queries, or None"
            )
        check_options(self.depth, self.negatives_per_query, self.sampling, self.rank_range)
        for option in ("negatives_per_row", "query_negatives_per_row", "epochs", "batch_size", "checkpoint_steps"):
            check_whole(option, getattr(self, option), 1)
        if self.learning_rate is not None and not (_is_number(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate={self.learning_rate!r} must be a number above 0, or None")
        if not (_is_number(self.share_of_queries) and 0 < self.share_of_queries <= 1):
            raise ValueError(f"share_of_queries={self.share_of_queries!r} must be a number above 0 and at most 1")
        if self.teacher is not None and not isinstance(self.teacher, pt.Transformer):
            raise TypeError(f"teacher={self.teacher!r} must be a PyTerrier pipeline that scores (query, text) rows")
        if self.teacher is None and "margin_mse" in self._losses():
            raise ValueError("the loss 'margin_mse' learns from a teacher; give teacher=... (a pipeline that scores)")
        if not (_is_number(self.warmup) and 0 <= self.warmup < 1):
            raise ValueError(f"warmup={self.warmup!r} must be a share of the steps, at least 0 and below 1")
        if self.scheduler not in _SCHEDULERS:
            raise ValueError(f"scheduler={self.scheduler!r} is unknown; choose one of {', '.join(_SCHEDULERS)}")
        if not isinstance(self.filters, (list, tuple)) or not all(callable(entry) for entry in self.filters):
            raise TypeError(f"filters={self.filters!r} must be a list of filters, such as mining.RankRange(10, 200)")
        self._check_training_arguments()
        if self.similarity not in (None, "cosine", "dot"):
            raise ValueError(f"similarity={self.similarity!r} is unknown; choose 'cosine', 'dot' or None")
        if self.negatives_per_row > self.negatives_per_query:
            raise ValueError(
                f"negatives_per_row={self.negatives_per_row} is more than "
                f"negatives_per_query={self.negatives_per_query}"
            )

    def _check_loss(self) -> None:
        if not isinstance(self.loss_options, Mapping):
            raise TypeError(f"loss_options={self.loss_options!r} must be a dict of option names and values")
        losses.check(self.loss, **self.loss_options)
        try:
            losses.make(self.loss, nn.Identity(), **self.loss_options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"loss={self.loss!r} with loss_options={dict(self.loss_options)!r}: {error}") from None

    def _check_training_arguments(self) -> None:
        if not isinstance(self.training_arguments, Mapping):
            raise TypeError(f"training_arguments={self.training_arguments!r} must be a dict of names and values")
        known = {f.name for f in fields(SentenceTransformerTrainingArguments)}
        for name in self.training_arguments:
            if name not in known:
                raise ValueError(
                    f"training_arguments: {name!r} is no argument of sentence-transformers' "
                    "SentenceTransformerTrainingArguments; remove it or mend its name"
                )
            if name in _SAID_ELSEWHERE:
                raise ValueError(f"training_arguments: {name!r} is not set here but by {_SAID_ELSEWHERE[name]}")

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


def _named(loss: object) -> str:
    return loss if isinstance(loss, str) else loss.__name__


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(option: str, value: object, lowest: int) -> None:
    """Raises ValueError where an option is no whole number of at least ``lowest``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{option}={value!r} must be a whole number of at least {lowest}")


def check_recipe(recipe: object) -> list[Round]:
    """The recipe as a list of rounds.

    Raises:
        TypeError: if it is no round and no list of rounds.
        ValueError: if it is empty.
    """
    rounds = [recipe] if isinstance(recipe, Round) else recipe
    if not isinstance(rounds, (list, tuple)):
        raise TypeError(f"recipe={recipe!r} must be a list of pt_dance.Round, such as recipes.ance() gives")
    for number, entry in enumerate(rounds, start=1):
        if not isinstance(entry, Round):
            raise TypeError(
                f"entry {number} of the recipe is {entry!r}; it must be a pt_dance.Round, like those of recipes.ance()"
            )
    if not rounds:
        raise ValueError("the recipe has no round; give at least one pt_dance.Round")
    return list(rounds)

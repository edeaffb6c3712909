"""What a call of ``fit`` works with, beyond what the retriever knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pt_dance.mining import share_of
from pt_dance.training.inputs import TrainingInput
from pt_dance.training.processes import Processes
from pt_dance.training.schedule import Span, plan


@dataclass
class Job:
    """A call of ``fit``.

    Attributes:
        training: the checked training topics and qrels.
        validation: the checked validation topics and qrels, or None.
        corpus: ``Corpus`` with the documents.
        recipe: the ``Round``s.
        seed: the fit's seed.
        processes: those that make the same call.
        verbose: whether this process shows progress.
        spans: the part of its schedule that each round trains.
    """

    training: TrainingInput
    validation: TrainingInput | None
    corpus: Any
    recipe: Sequence
    seed: int
    processes: Processes
    verbose: bool
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        numbers = range(1, len(self.recipe) + 1)
        counts = self.training.count_pairs(self.corpus, [self.qids(number) for number in numbers])
        self.spans = plan(self.recipe, counts, [self.seed_of(number) for number in numbers])

    def qids(self, number: int) -> pd.Series:
        """Return the topics that have their turn in a round."""
        share = self.recipe[number - 1].share_of_queries
        return share_of(self.training.topics["qid"], share, turn=number, seed=self.seed)

    def seed_of(self, number: int) -> int:
        """Return the seed of a round."""
        return self.seed + 1000 * number

"""What a call of ``fit`` works with, beyond what the retriever knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.mining import share_of
from pt_dance.storage.digests import text_id
from pt_dance.training.inputs import TrainingInput
from pt_dance.training.processes import Processes
from pt_dance.training.refresh.beside import Refreshes
from pt_dance.training.refresh.journal import Journal
from pt_dance.training.run_folder import JOURNAL, RunFolder
from pt_dance.training.schedule import Span, in_turn, plan, without_refreshes
from pt_dance.training.settings import fit_settings
from pt_dance.training.validation import measure_index


@dataclass
class Job:
    """A call of ``fit``.

    Attributes:
        run: The run's folder.
        training: The checked training topics and qrels.
        validation: The checked validation topics and qrels, or None.
        corpus: ``Corpus`` with the documents.
        recipe: The ``Round``s; where negatives are not refreshed beside the training, one for each refresh.
        seed: The fit's seed.
        processes: Those that make the same call.
        verbose: Whether this process shows progress.
        refresh: "between" rounds, "beside" the training, or "replay" of what was beside another run's training.
        replay_of: The folder of that run, or None.
        engine: Has workers that index, search, mine and ask the teacher: what was given, or else all of the processes;
            this process does where None.
        measures: What is computed on the validation topics.
        spans: The part of its schedule that each round trains.
        part_of: Of which round of the recipe as it was given each is a part, from round 0 on; None where each is one.
    """

    run: RunFolder
    training: TrainingInput
    validation: TrainingInput | None
    corpus: Any
    recipe: Sequence
    seed: int
    processes: Processes
    verbose: bool
    refresh: str = "between"
    replay_of: Path | None = None
    engine: Any = None
    measures: Sequence = ()
    spans: list[Span] = field(init=False)
    part_of: list[int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.engine = self.processes.engine if self.engine is None else self.engine
        # where nothing depends on the current weights, nothing is refreshed
        self.recipe = [entry if entry.is_refreshed else without_refreshes(entry) for entry in self.recipe]
        counts = self._pairs()
        if self.refresh == "between" and any(round_.is_refreshed for round_ in self.recipe):
            self.recipe, part_of = in_turn(self.recipe, counts)
            self.part_of = [0, *part_of]
            counts = self._pairs()
        self.spans = plan(self.recipe, counts, [self.seed_of(number) for number in range(1, len(counts) + 1)])

    def _pairs(self) -> list[int]:
        return self.training.count_pairs(self.corpus, [self.qids(n) for n in range(1, len(self.recipe) + 1)])

    def settings(self, encoder: DualEncoder) -> dict[str, object]:
        """Return what the fit depends on, see :func:`~pt_dance.training.settings.fit_settings`.

        Args:
            encoder: That the fit begins with.

        Raises:
            ValueError: If the run that is replayed had other settings, or was not refreshed beside its training.
        """
        own = fit_settings(
            encoder, self.corpus, self.seed, self.recipe, self.training, self.validation,
            processes=self.processes.count, refresh=self.refresh, replay_of=self._replay_of(),
        )  # fmt: skip
        if self.replay_of is not None:
            theirs = {**(RunFolder(self.replay_of).settings() or {}), "replay of": own["replay of"]}
            expected = {**own, "refresh": "beside"}
            del expected["processes"]  # which change nothing but roundings
            differing = [name for name in expected if theirs.get(name) != expected[name]]
            if differing:
                raise ValueError(
                    f"the run in {str(self.replay_of)!r} cannot be replayed with other settings than its own "
                    f"({', '.join(differing)})"
                )
        return own

    def _replay_of(self) -> str | None:
        if self.replay_of is None:
            return None
        numbers = (number for number, round_ in enumerate(self.recipe, start=1) if round_.is_refreshed)
        return text_id("\n".join(f"{number} {self._journal(number)!r}" for number in numbers))

    def _journal(self, number: int) -> Journal | None:
        return None if self.replay_of is None else Journal(RunFolder(self.replay_of).round(number) / JOURNAL)

    def refreshes(self, number: int) -> Refreshes | None:
        """Return the refreshes of a round's negatives beside its training; None where there are none."""
        round_ = self.recipe[number - 1]
        if not round_.is_refreshed:  # in_turn leaves none to be refreshed between rounds
            return None
        how = self.spans[number - 1], self.processes, self._journal(number), getattr(self.engine, "place", None)
        measure = None
        if self.validation is not None:
            measure = partial(measure_index, validation=self.validation, measures=self.measures)
        return Refreshes(self.run.round(number), round_, *how, measure)

    def qids(self, number: int) -> pd.Series:
        """Return the topics that have their turn in a round."""
        share = self.recipe[number - 1].share_of_queries
        return share_of(self.training.topics["qid"], share, turn=number, seed=self.seed)

    def seed_of(self, number: int) -> int:
        """Return the seed of a round."""
        return self.seed + 1000 * number

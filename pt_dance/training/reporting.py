"""Loggers (TensorBoard, W&B, whatever ``report_to`` names) over a whole fit: one run, whose steps go on over rounds."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from pt_dance.storage.texts import first_line
from pt_dance.training.validation import REVERSED

# The entries of a round's row that are reported beside its measures: those that count negatives, and others.
_COUNTS = (
    "negatives_per_query", "new_negatives", "queries_short_of_negatives", "query_negatives_per_document",
)  # fmt: skip
_PLAIN = (
    "round", "mine_seconds", "train_seconds", "refresh_seconds", "validate_seconds", "beside_seconds", "waited_seconds",
    "refreshes", "staleness", "longest_staleness",
)  # fmt: skip


class Reports:
    """The loggers of a fit, which begin with the first round that is trained and end with the fit.

    Args:
        folder: Folder of the run; TensorBoard's files go to its sub-folder ``logs`` unless the environment says where.
        recipe: The ``Round``s of the fit, whose training arguments name loggers (``report_to``).
        measures: Names of what rounds are measured by.

    Raises:
        ValueError: If there is no logger of a name, or it is not installed.
    """

    def __init__(self, folder: Path, recipe: Iterable, measures: Iterable[str]):
        self._measures = {name for measure in measures for name in (measure, REVERSED.format(measure))}
        self._loggers: dict[str, _Relay] = {}
        self._waiting: list[tuple[int, dict[str, float]]] = []
        for logger in (logger for round_ in recipe for logger in _classes(round_)):
            if logger.__name__ not in self._loggers:
                try:
                    self._loggers[logger.__name__] = _Relay(logger(), folder)
                except (ImportError, RuntimeError) as error:
                    reason = first_line(error)
                    raise ValueError(f"report_to: {logger.__name__} cannot be used: {reason}") from None

    def of_round(self, round_, steps_before: int) -> list[TrainerCallback]:
        """Return the callbacks that hand the training of a ``Round`` to its loggers.

        The fit's steps are ahead of those that the trainer counts by ``steps_before``.
        """
        relays = [self._loggers[logger.__name__] for logger in _classes(round_)]
        for relay in relays:
            relay.steps_before = steps_before
        return relays

    def add_round(self, row: dict, step: int) -> None:
        """Report measures and counts of a round's row of the history, at the step of the fit that it ended with.

        What a refresher measured before has steps of its own.
        """
        for measured in row.get("measured_beside", []):
            values = {f"eval_{name}": value for name, value in measured.items() if name != "step"}
            self._waiting.append((step - row["steps"] + measured["step"], values))
        logs: dict[str, float] = {}
        for name, value in row.items():
            if name in _COUNTS:
                logs[f"mining/{name}"] = value
            elif name in self._measures:
                logs[f"eval_{name}"] = value
            elif name in _PLAIN:
                logs[name] = value
        self._waiting.append((step, {name: value for name, value in logs.items() if value is not None}))
        begun = [relay for relay in self._loggers.values() if relay.begun]
        if begun or not self._loggers:
            for relay in begun:
                for at, entry in self._waiting:
                    relay.report(entry, at)
            self._waiting.clear()

    def close(self) -> None:
        """End the loggers' run."""
        for relay in self._loggers.values():
            relay.close()


class _Relay(TrainerCallback):
    """Hand what a trainer tells its loggers on to one that lives longer than the trainer."""

    def __init__(self, logger: TrainerCallback, folder: Path):
        self.logger = logger
        self.folder = folder
        self.steps_before = 0
        # What the logger was told when it began, empty before.
        self.begun: tuple[Any, ...] = ()
        if getattr(logger, "logging_dir", "") is None:  # TensorBoard's, where the environment does not say another
            logger.logging_dir = str(folder / "logs")

    def on_train_begin(self, args, state, control, **kwargs):
        is_first = not self.begun
        self.begun = (self._of_run(args), copy.copy(state), control)
        if is_first:
            self.logger.on_train_begin(*self._told(state), control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logger.on_log(*self._told(state), control, logs=dict(logs or {}), **kwargs)

    def report(self, logs: dict[str, float], step: int) -> None:
        args, state, control = self.begun
        state = copy.copy(state)
        state.global_step = step
        self.logger.on_log(args, state, control, logs=dict(logs))

    def close(self) -> None:
        if self.begun:
            self.logger.on_train_end(*self.begun)
            self.begun = ()

    def _of_run(self, args):
        args = copy.copy(args)
        args.output_dir = str(self.folder)
        return args

    def _told(self, state) -> tuple:
        state = copy.copy(state)
        state.global_step += self.steps_before
        return self.begun[0], state


def _classes(round_) -> list[type[TrainerCallback]]:
    names = round_.training_arguments.get("report_to")
    names = [names] if isinstance(names, str) else names
    names = [name for name in names or [] if name != "none"]
    return get_reporting_integration_callbacks("all" if "all" in names else names)

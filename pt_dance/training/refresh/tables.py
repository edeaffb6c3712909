"""What trainer and refresher hand each other through a folder: weights in one direction, tables in the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from pt_dance.losses.rows import TrainingRows
from pt_dance.storage.folders import publish_file, publish_folder, read_json, remove_folder, write_json

_ARRAYS = ("negatives", "query_negatives", "teacher_negatives", "teacher_query_negatives")
_ABOUT = "about.json"
_ERROR = "error.json"


class Exchange:
    """A folder through which weights and tables are handed over, each whole or not there.

    Both are named by the step of the round after which the weights were taken. A file of weights has another name while
    the refresher works with it.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    # ------------------------------------------------------------------ weights

    def weights(self) -> list[int]:
        """Return the steps of the weights that wait for the refresher, in order."""
        return self._steps("weights-*.safetensors")

    def hand_over(self, step: int, model: torch.nn.Module) -> None:
        """Write a model's weights for the refresher."""
        beside = self.folder / ".weights.new"
        save_model(model, str(beside))
        publish_file(beside, self._weights(step))

    def withdraw(self, steps: list[int]) -> None:
        """Remove weights that the refresher has not taken and need not take any more."""
        for step in steps:
            self._weights(step).unlink(missing_ok=True)

    def take(self, step: int, model: torch.nn.Module) -> bool:
        """Load weights into a model; return whether they were still there."""
        try:
            self._weights(step).rename(self._taken(step))
        except FileNotFoundError:
            return False
        load_model(model, str(self._taken(step)), device=str(next(model.parameters()).device))
        return True

    def put_back(self) -> None:
        """Let weights be taken again that a refresher took which is gone."""
        for step in self._steps("taken-*.safetensors"):
            self._taken(step).replace(self._weights(step))

    # ------------------------------------------------------------------ tables

    def tables(self) -> list[int]:
        """Return the steps of the tables that are there, in order."""
        return self._steps("table-*")

    def publish(self, step: int, rows: TrainingRows, about: Mapping[str, object]) -> None:
        """Write the table that came of weights, which then go.

        Args:
            step: Of the weights.
            rows: The training rows with what was mined.
            about: What is to be known of it, JSON values.
        """
        building = self.folder / ".table.building"
        remove_folder(building)
        building.mkdir()
        for name in _ARRAYS:
            if (values := getattr(rows, name)) is not None:
                np.save(building / f"{name}.npy", values, allow_pickle=False)
        write_json(building / _ABOUT, about)
        publish_folder(building, self._table(step))
        self._taken(step).unlink(missing_ok=True)

    def about(self, step: int) -> dict:
        """Return what :meth:`publish` was told of a table."""
        return read_json(self._table(step) / _ABOUT)

    def read(self, step: int) -> dict[str, np.ndarray]:
        """Return what :meth:`~pt_dance.losses.TrainingRows.with_mined` takes; memory maps, shared by processes.

        Raises:
            FileNotFoundError: If there is no such table.
        """
        folder = self._table(step)
        files = {name: folder / f"{name}.npy" for name in _ARRAYS}
        if not folder.is_dir():
            raise FileNotFoundError(f"the table of negatives {str(folder)!r} is not there")
        return {name: np.load(file, mmap_mode="r") for name, file in files.items() if file.exists()}

    def drop(self, steps: list[int]) -> None:
        """Remove tables."""
        for step in steps:
            gone = self.folder / ".table.dropped"
            remove_folder(gone)
            self._table(step).rename(gone)  # under another name first: half a table must not be taken for a whole one
            remove_folder(gone)

    # ------------------------------------------------------------------ errors

    def fail(self, error: BaseException) -> None:
        """Tell the trainer why there will be no more tables."""
        write_json(self.folder / _ERROR, {"error": type(error).__name__, "message": str(error)})

    def failure(self) -> str | None:
        """Return why the refresher ended, in one line, None where it did not say."""
        try:
            said = read_json(self.folder / _ERROR)
        except (FileNotFoundError, ValueError):
            return None
        message = (said.get("message") or "no reason given").splitlines()[0]
        return message if said.get("error") in ("ValueError", "KeyError") else f"{said.get('error')}: {message}"

    def forget_failure(self) -> None:
        """Begin without an error."""
        (self.folder / _ERROR).unlink(missing_ok=True)

    # ------------------------------------------------------------------ names

    def _weights(self, step: int) -> Path:
        return self.folder / f"weights-{step:08d}.safetensors"

    def _taken(self, step: int) -> Path:
        return self.folder / f"taken-{step:08d}.safetensors"

    def _table(self, step: int) -> Path:
        return self.folder / f"table-{step:08d}"

    def _steps(self, pattern: str) -> list[int]:
        digits = (entry.name.partition("-")[2].partition(".")[0] for entry in self.folder.glob(pattern))
        return sorted(int(step) for step in digits if step.isdecimal())

"""A run as a notebook shows it."""

from __future__ import annotations

from typing import Any

from pt_dance.storage.display import facts, grid
from pt_dance.training.history import history_table
from pt_dance.training.options import check_measures
from pt_dance.training.round_table import recipe_table


def run_view(dance: Any, schematic: str) -> str:
    """Return the schematic of a ``DanceRetriever``, what it is, its recipe and its rounds, as HTML."""
    history = dance.history
    about = {
        "state": f"trained, {int((history['round'] > 0).sum())} rounds" if len(history) else "not trained yet",
        "folder": str(dance.path),
        "starts from": repr(dance.initial_encoder),
        "corpus": None if dance.corpus is None else f"{dance.corpus!r}, {len(dance.corpus):,} documents",
        "results a query": dance.num_results,
        "seed": dance.seed,
    }
    tables = [recipe_table(dance.recipe or [], history.to_dict("records"))]
    if len(history):
        names = [str(measure) for measure in check_measures(dance.measure)]
        columns = ["round", "name", "training_loss", *names, "new_negatives", "mine_seconds", "train_seconds"]
        tables.append(grid(*history_table(history, columns)))
    return schematic + facts("DanceRetriever", about, *tables)

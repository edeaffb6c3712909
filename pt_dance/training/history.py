"""Reading the history of a fit: one dictionary a round, as ``DanceRetriever.history`` shows them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import pandas as pd

# The row of the encoder as it came, but for what is measured of it.
UNTRAINED = {
    "round": 0, "name": "untrained", "loss": None, "training_loss": None, "steps": 0, "mine_seconds": 0.0,
    "train_seconds": 0.0,
}  # fmt: skip


def training_row(number: int, round_, trained: dict, mined: dict, mined_queries: dict, seconds: dict) -> dict:
    """Return the part of a round's row that is known when it is trained.

    That is from the ``Round``, from what its training gave (``loss``, ``steps``, ``settled``, ``refreshed``), from the
    reports on document and query negatives, empty where there are none, and from the seconds that "mine" and "train"
    took.
    """
    return {
        "round": number,
        "name": round_.name or round_.loss_name,
        "loss": round_.loss_name,
        "training_loss": trained["loss"],
        "steps": trained["steps"],
        **trained.get("settled", {}),
        **trained.get("refreshed", {}),
        "negatives_per_query": mined.get("per_source", 0.0),
        "new_negatives": mined.get("new"),
        "queries_short_of_negatives": mined.get("short", 0),
        "query_negatives_per_document": mined_queries.get("per_source", 0.0),
        **{f"{step}_seconds": value for step, value in seconds.items()},
    }


def best_round(history: Sequence[dict], measure: object) -> int:
    """Return the number of the round with the highest value of a validation measure, the later one of equal ones.

    Round 0 is the untrained encoder. Where the measure was not computed, the last round is the best.
    """
    name = str(measure)
    if name not in history[-1]:
        return history[-1]["round"]
    measured = [row for row in history if name in row]
    return max(measured, key=lambda row: (row[name], row["round"]))["round"]


def begins_with(round_, history: Sequence[dict], measure: object) -> int:
    """Return which of the rounds before gives a ``Round`` the encoder that it begins with.

    The best one is the best of those that were trained, as a stage goes on from a checkpoint of the stage before it; it
    is round 0, the encoder as it came, only where nothing was.
    """
    trained = [row for row in history if row["round"] > 0] or history
    return best_round(trained, measure) if round_.start == "best" else history[-1]["round"]


def warn_if_worse(history: Sequence[dict], measure: object) -> None:
    """Warn where no round of training was as good as the encoder that it began with."""
    name = str(measure)
    trained = [row[name] for row in history if name in row and row["round"] > 0]
    if trained and best_round(history, measure) == 0:
        warnings.warn(
            f"training made the encoder worse: {name} was {history[0][name]:.4f} before and {max(trained):.4f} after "
            "the best round, so the untrained encoder stays; try a lower learning_rate, and look at the judgements",
            stacklevel=3,
        )


def describe_round(row: dict, rounds: int, measures: Sequence) -> str:
    """Return one line on a round: loss, validation measures and what took how long."""
    loss = "" if row["training_loss"] is None else f", loss {row['training_loss']:.4f}"
    measured = "".join(f", {m} {row[str(m)]:.4f}" for m in measures if str(m) in row)
    seconds = ", ".join(f"{step} {row[f'{step}_seconds']:.0f} s" for step in ("mine", "train", "refresh", "validate"))
    return f"round {row['round']}/{rounds} {row['name']}{loss}{measured} ({seconds})"


def history_table(history: pd.DataFrame, columns: Iterable[str]) -> tuple[list[str], list[list]]:
    """Return the headings and the rows of those of the columns that a history has, with seconds in tenths."""
    kept = [column for column in columns if column in history.columns]
    seconds = {column: history[column].map("{:.1f}".format) for column in kept if column.endswith("_seconds")}
    rows = history[kept].assign(**seconds).to_numpy(dtype=object).tolist()
    return [column.replace("_", " ") for column in kept], rows

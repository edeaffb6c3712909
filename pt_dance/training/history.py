"""Reading the history of a fit: one dictionary a round, as ``DanceRetriever.history`` shows them."""

from __future__ import annotations


def best_round(history: list[dict], measure: object) -> int:
    """Number of the round with the highest value of a validation measure, the later one where two are equal.

    Args:
        history: rows of the rounds, from round 1 on.
        measure: the measure; where it was not computed, the last round is the best.
    """
    name = str(measure)
    if name not in history[0]:
        return len(history)
    return max(range(len(history)), key=lambda i: (history[i][name], i)) + 1


def describe_round(row: dict, rounds: int, measures: list) -> str:
    """One line on a round: loss, validation measures and what took how long."""
    measured = "".join(f", {m} {row[str(m)]:.4f}" for m in measures if str(m) in row)
    seconds = ", ".join(f"{step} {row[f'{step}_seconds']:.0f} s" for step in ("mine", "train", "refresh", "validate"))
    return f"round {row['round']}/{rounds} {row['name']}: loss {row['training_loss']:.4f}{measured} ({seconds})"

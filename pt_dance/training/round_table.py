"""Rounds as a table that reads like the settings in a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pt_dance.mining.sources import describe_source
from pt_dance.storage.display import grid


def round_settings(round_: Any, chosen: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return a round's settings by the names that papers give them; what a round does not use is left out.

    Args:
        round_: ``Round``.
        chosen: The round's row of the history, where it was trained: what it left open and the encoder decided.
    """
    chosen = chosen or {}
    rate = chosen.get("learning_rate") if round_.learning_rate is None else round_.learning_rate
    suits = ["as suits the encoder"] if round_.learning_rate is None else []
    open_ = {name: value for name, value in chosen.items() if name.startswith("temperature") or name == "teacher_scale"}
    settings = {
        "starts from": "the best round so far" if round_.start == "best" else None,
        "loss": round_.loss_name + _options(round_.loss_options),
        "negatives": _source(round_.negatives),
        "query negatives": _source(round_.query_negatives) if round_.is_dual else None,
        "drawn from": f"{'uniformly from' if round_.sampling == 'uniform' else 'best of'} the top {round_.depth}"
        + (f", ranks {round_.rank_range[0]} to {round_.rank_range[1] - 1}" if round_.rank_range else ""),
        "negatives a query": f"{round_.negatives_per_query}, {round_.negatives_per_row} a row",
        "query negatives a row": str(round_.query_negatives_per_row) if round_.is_dual else None,
        "filters": ", ".join(map(repr, round_.filters)) or None,
        "teacher": None if round_.teacher is None else repr(round_.teacher),
        "queries": None if round_.share_of_queries == 1 else f"{round_.share_of_queries:.0%} in turn",
        "length": f"{round_.steps} steps" if round_.steps else f"{round_.epochs} epoch{'s' * (round_.epochs != 1)}",
        "refreshed": None
        if round_.refresh_every is None
        else f"every {round_.refresh_every} steps"
        + (f", at most {round_.max_staleness} steps old" if round_.max_staleness else ""),
        "batch size": str(round_.batch_size),
        "learning rate": ", ".join(([] if _missing(rate) else [f"{rate:g}"]) + suits),
        "schedule": f"{round_.scheduler}, warm-up "
        + (f"{round_.warmup:.0%}" if round_.warmup < 1 else f"{round_.warmup:,} steps")
        + (", goes on from the round before" if round_.carry_optimizer else ""),
        "similarity": round_.similarity or chosen.get("similarity"),
        **{
            name.replace("_", " "): f"{value:.4g}"
            for name, value in open_.items()
            if not _missing(value) and name not in round_.loss_options
        },
        "training arguments": _options(round_.training_arguments).strip(" ()") or None,
    }
    if round_.negatives is None:
        settings |= {"drawn from": None, "negatives a query": None}
    return {name: value for name, value in settings.items() if value is not None}


def recipe_table(rounds: Sequence[Any], history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a table of rounds as HTML, a column a round.

    Args:
        rounds: ``Round``s.
        history: Rows of those that were trained; of one that was trained in parts, the first counts.
    """
    rows = {row.get("recipe_round", row["round"]): row for row in reversed(history)}
    settings = [round_settings(round_, rows.get(number)) for number, round_ in enumerate(rounds, start=1)]
    names = list(dict.fromkeys(name for columns in settings for name in columns))
    # dictionaries of different rounds keep one order
    order = list(dict.fromkeys([*max(settings, key=len, default={}), *names]))
    titles = [f"round {n}" + (f": {r.name}" if r.name else "") for n, r in enumerate(rounds, start=1)]
    return grid(["", *titles], [[name, *(columns.get(name) for columns in settings)] for name in order])


def _missing(value: Any) -> bool:
    """Return whether a cell of a history is empty."""
    return value is None or value != value


def _options(options: Any) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""


def _source(source: Any) -> str:
    if source is None:
        return "the batch's only"
    # the digest tells functions apart, people it tells nothing
    return re.sub(r"#[0-9a-f]{8}\b", "", describe_source(source)).replace("_", " ")

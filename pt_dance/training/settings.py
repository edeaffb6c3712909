"""What a fit depends on, in a form that a later process can compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd
import pyterrier as pt

from pt_dance.mining import NearDuplicate, PositiveMargin, RankRange, TeacherScore, describe_source
from pt_dance.mining.sources import without_addresses
from pt_dance.storage.digests import frame_id, text_id
from pt_dance.training.inputs import TrainingInput
from pt_dance.training.teacher import teacher_identity

_FILTERS = {filter_.__name__: filter_ for filter_ in (NearDuplicate, PositiveMargin, RankRange, TeacherScore)}


def fit_settings(
    encoder,
    corpus,
    seed: int,
    recipe: Sequence,
    training: TrainingInput,
    validation: TrainingInput | None,
    *,
    processes: int = 1,
    refresh: str = "between",
    replay_of: str | None = None,
) -> dict[str, object]:
    """Return everything the weights of a fit depend on, and what its rounds are measured on.

    Args:
        encoder: The ``DualEncoder`` that training starts from.
        corpus: ``Corpus`` with the documents.
        seed: The fit's seed.
        recipe: Its ``Round``s.
        training: Its checked training input.
        validation: Its checked validation input, or None.
        processes: How many processes train together.
        refresh: How negatives are refreshed, see ``DanceRetriever``.
        replay_of: What identifies the refreshes that are replayed.

    Returns:
        Names and JSON values; content is represented by digests.
    """
    settings: dict[str, object] = {
        "encoder": encoder.fingerprint,
        "frozen weights": _frozen(encoder),
        "corpus": corpus.fingerprint,
        "seed": seed,
        "processes": processes,
        "refresh": refresh,
        "replay of": replay_of,
        "training topics": frame_id(training.topics[["qid", "query"]]),
        "training qrels": frame_id(training.qrels[["qid", "docno", "label"]]),
        "first stage": None if training.first_stage is None else frame_id(training.first_stage[["qid", "docno"]]),
        "validation topics": None if validation is None else frame_id(validation.topics[["qid", "query"]]),
        "validation qrels": None if validation is None else frame_id(validation.qrels[["qid", "docno", "label"]]),
        "rounds": len(recipe),
    }
    for number, round_ in enumerate(recipe, start=1):
        for option in fields(round_):
            settings[f"round {number} {option.name}"] = _plain(option.name, getattr(round_, option.name))
    return settings


class NotStored(pt.Transformer):
    """Stands in a recipe that was read back for a pipeline or function that could not be written down.

    Args:
        description: What it was.
    """

    def __init__(self, description: str):
        self.description = description

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Refuse: what stood here has to be given anew."""
        raise ValueError(
            f"{self.description} of the saved recipe was not stored with it; give it anew, as in "
            "dataclasses.replace(round, negatives=...)"
        )

    def __repr__(self) -> str:
        """Return what it was."""
        return self.description


def storable(recipe: Sequence | None, functions: Mapping[str, object]) -> list[dict] | None:
    """Return a recipe as JSON values; :func:`restored` is the way back.

    Args:
        recipe: Its ``Round``s; None gives None.
        functions: Functions that are known by their names.
    """
    if recipe is None:
        return None
    return [
        {option.name: _stored(getattr(round_, option.name), functions) for option in fields(round_)}
        for round_ in recipe
    ]


def restored(stored: Sequence[dict] | None, make: Callable, functions: Mapping[str, object]) -> list | None:
    """Return the rounds that :func:`storable` wrote down.

    Pipelines and functions of the user's own come back as :class:`NotStored`. Nothing is imported or run but the
    filters of :mod:`pt_dance.mining`.

    Args:
        stored: What was written.
        make: ``Round``.
        functions: Functions that are known by their names.

    Returns:
        The rounds; None where none were written, or one has a loss of the user's own.

    Raises:
        ValueError: If what was written is damaged.
    """
    if stored is None:
        return None
    try:
        options = [{name: _restored(value, functions) for name, value in round_.items()} for round_ in stored]
        if any(_holds_not_stored(round_.get("loss")) for round_ in options):
            return None
        return [make(**round_) for round_ in options]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the saved recipe is damaged ({type(error).__name__}: {error})") from None


def _holds_not_stored(value: object) -> bool:
    parts = value if isinstance(value, (list, tuple)) else []
    return isinstance(value, NotStored) or any(_holds_not_stored(part) for part in parts)


def _stored(value: Any, functions: Mapping[str, object]) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {"dict": {str(key): _stored(entry, functions) for key, entry in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_stored(entry, functions) for entry in value]}
    if type(value) in _FILTERS.values():
        options = {option.name: _stored(getattr(value, option.name), functions) for option in fields(value)}
        return {"filter": type(value).__name__, "options": options}
    name = next((name for name, function in functions.items() if function is value), None)
    return {"not stored": _plain("negatives", value)} if name is None else {"function": name}


def _restored(value, functions: Mapping[str, object]):
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _restored(entry, functions) for key, entry in value["dict"].items()}
    for kind in (list, tuple):
        if kind.__name__ in value:
            return kind(_restored(entry, functions) for entry in value[kind.__name__])
    if "filter" in value:
        options = {name: _restored(entry, functions) for name, entry in value["options"].items()}
        return _FILTERS[value["filter"]](**options)
    return functions[value["function"]] if "function" in value else NotStored(value["not stored"])


def _plain(name: str, value: Any) -> object:
    if name in ("negatives", "query_negatives"):
        value = describe_source(value)
    elif name == "teacher" and value is not None:
        value = teacher_identity(value)
    elif not isinstance(value, (int, float, str, type(None))):
        value = repr(value)
    return without_addresses(value) if isinstance(value, str) else value


def _frozen(encoder) -> str | None:
    names = [name for name, parameter in encoder.model.named_parameters() if not parameter.requires_grad]
    return text_id("\n".join(names)) if names else None

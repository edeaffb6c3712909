"""What a fit depends on, in a form that a later process can compare."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import pandas as pd

from pt_dance.mining import describe_source
from pt_dance.mining.sources import without_addresses
from pt_dance.training.inputs import TrainingInput
from pt_dance.training.teacher import teacher_identity


def fit_settings(dance, training: TrainingInput, validation: TrainingInput | None) -> dict[str, object]:
    """Everything the weights of a fit depend on: encoder, corpus, topics, qrels, seed and every option of every round.

    Args:
        dance: the ``DanceRetriever`` that is fitted.
        training: its checked training input.
        validation: its checked validation input, or None.

    Returns:
        Names and JSON values; content is represented by digests.
    """
    settings: dict[str, object] = {
        "encoder": dance.initial_encoder.fingerprint,
        "frozen weights": _frozen(dance.initial_encoder),
        "corpus": dance.corpus.fingerprint,
        "seed": dance.seed,
        "measure": [str(measure) for measure in dance.measures],
        "patience": dance.patience,
        "training topics": _digest(training.topics[["qid", "query"]]),
        "training qrels": _digest(training.qrels[["qid", "docno", "label"]]),
        "first stage": None if training.first_stage is None else _digest(training.first_stage[["qid", "docno"]]),
        "validation topics": None if validation is None else _digest(validation.topics[["qid", "query"]]),
        "validation qrels": None if validation is None else _digest(validation.qrels[["qid", "docno", "label"]]),
        "rounds": len(dance.recipe),
    }
    for number, round_ in enumerate(dance.recipe, start=1):
        for option in fields(round_):
            settings[f"round {number} {option.name}"] = _plain(option.name, getattr(round_, option.name))
    return settings


def _plain(name: str, value: object) -> object:
    if name in ("negatives", "query_negatives"):
        value = describe_source(value)
    elif name == "teacher" and value is not None:
        value = teacher_identity(value)
    elif not isinstance(value, (int, float, str, type(None))):
        value = repr(value)
    return without_addresses(value) if isinstance(value, str) else value


def _frozen(encoder) -> str | None:
    names = [name for name, parameter in encoder.model.named_parameters() if not parameter.requires_grad]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] if names else None


def _digest(frame: pd.DataFrame) -> str:
    hashed = pd.util.hash_pandas_object(frame.astype(str), index=False).to_numpy()
    return hashlib.sha256(hashed.tobytes()).hexdigest()[:16]

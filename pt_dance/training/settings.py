"""What a fit depends on, in a form that a later process can compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from pt_dance.mining import describe_source
from pt_dance.mining.sources import without_addresses
from pt_dance.storage.digests import frame_id, text_id
from pt_dance.training.inputs import TrainingInput
from pt_dance.training.teacher import teacher_identity


def fit_settings(
    encoder, corpus, seed: int, recipe: Sequence, training: TrainingInput, validation: TrainingInput | None
) -> dict[str, object]:
    """Return everything the weights of a fit depend on, and what its rounds are measured on.

    Args:
        encoder: the ``DualEncoder`` that training starts from.
        corpus: ``Corpus`` with the documents.
        seed: the fit's seed.
        recipe: its ``Round``s.
        training: its checked training input.
        validation: its checked validation input, or None.

    Returns:
        Names and JSON values; content is represented by digests.
    """
    settings: dict[str, object] = {
        "encoder": encoder.fingerprint,
        "frozen weights": _frozen(encoder),
        "corpus": corpus.fingerprint,
        "seed": seed,
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
    return text_id("\n".join(names)) if names else None

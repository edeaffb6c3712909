"""Where an encoder comes from: the models it was made of, their licences, and the runs that trained it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache
from sentence_transformers import SentenceTransformer

from pt_dance.encoder import published
from pt_dance.storage import folders
from pt_dance.storage.meta import META

FROM_NOTHING: dict[str, list] = {"bases": [], "trainings": []}


def origin_of(*given: Any) -> dict[str, list]:
    """Return the origin of an encoder made of encoders, folders, names on the hub, or ``SentenceTransformer``s.

    Returns:
        ``bases``: ``name``, ``model`` (its name on the hub, or None) and ``license`` (None where it is not known) of
        each model it is made of. ``trainings``: what :func:`with_training` noted of one model alone, the oldest first.
    """
    known = [_origin_of(model) for model in given]
    bases = [base for origin in known for base in origin["bases"]]
    distinct = [base for number, base in enumerate(bases) if base not in bases[:number]]
    return {"bases": distinct, "trainings": list(known[0]["trainings"]) if len(known) == 1 else []}


def with_training(origin: dict[str, list], training: dict[str, Any]) -> dict[str, list]:
    """Return the origin of the encoder that a run began with, to which the run's training is added.

    ``training`` has the ``fingerprint`` of the encoder it gave, and what :func:`pt_dance.encoder.card.model_card` says.
    """
    return {**origin, "trainings": [*origin["trainings"], training]}


def of_weights(origin: dict[str, list], fingerprint: str) -> dict[str, list]:
    """Return an origin without the trainings, where these weights are not those that the last of them gave."""
    trainings = origin["trainings"]
    return origin if trainings and trainings[-1].get("fingerprint") == fingerprint else {**origin, "trainings": []}


def _origin_of(given: Any) -> dict[str, list]:
    if not isinstance(given, (str, os.PathLike, SentenceTransformer)):
        return given.origin
    if isinstance(given, SentenceTransformer):
        model = given.model_card_data.base_model
        name = model.rsplit("/", 1)[-1] if model else type(given[0]).__name__
        return _base(name, model, given._model_card_text)
    folder = Path(os.path.expanduser(given))
    if folder.is_dir():
        noted = folders.read_json(folder / META) if (folder / META).is_file() else {}
        if _is_origin(noted.get("origin")):
            return noted["origin"]
        return _base(str(noted.get("name") or folder.absolute().name), None, _text_of(folder / "README.md"))
    model = str(given)
    known = published.find(model)
    if known is not None and known.towers is not None:
        return origin_of(*known.towers)
    if "/" not in model and isinstance(try_to_load_from_cache(f"sentence-transformers/{model}", "config.json"), str):
        model = f"sentence-transformers/{model}"
    card = try_to_load_from_cache(model, "README.md")
    return _base(model.rsplit("/", 1)[-1], model, _text_of(Path(card)) if isinstance(card, str) else None)


def _base(name: str, model: str | None, card: str | None) -> dict[str, list]:
    return {"bases": [{"name": name, "model": model, "license": _licence(card)}], "trainings": []}


def _licence(card: str | None) -> str | None:
    if card is None:
        return None
    try:
        found = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:  # someone else's card, of which only this is wanted
        return None
    return found if isinstance(found, str) else None


def _text_of(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _is_origin(noted: Any) -> bool:
    return isinstance(noted, dict) and all(
        isinstance(noted.get(key), list) and all(isinstance(entry, dict) for entry in noted[key])
        for key in FROM_NOTHING
    )

"""What trained an encoder, in the few facts that go with it and onto its model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from pt_dance import losses
from pt_dance.analysis.words import recipe_in_words
from pt_dance.encoder.origin import with_training
from pt_dance.recipes import current_model
from pt_dance.training.options import check_measures
from pt_dance.training.outcome import without_folders
from pt_dance.training.record import read_about
from pt_dance.training.run_folder import RunFolder


def with_facts(encoder: Any, dance: Any, number: int, history: list[dict]) -> Any:
    """Return a round's encoder, which now knows what trained it, for :func:`pt_dance.encoder.card.model_card`."""
    run = RunFolder(dance.path)
    trained = run.trained(number) if number else None
    if trained is None or dance.initial_encoder is None:
        return encoder
    settings = run.settings() or {}
    about = read_about(run) or {}
    data = {}
    if dance.corpus is not None:
        data["Corpus"] = f"{Path(dance.corpus.path).name}, {len(dance.corpus):,} documents"
    if about.get("queries"):
        data["Training queries"] = f"{about['queries']:,}, {about['pairs']:,} relevant pairs"
    names = list(map(str, check_measures(dance.measure)))
    rows = {row["round"]: {name: row[name] for name in names if name in row} for row in history}
    done = next((row.get("recipe_round", number) for row in history if row["round"] == number), number)
    measures = {"validation, before training": rows.get(0, {}), "validation": rows.get(number, {})}
    facts = {
        "fingerprint": trained["fingerprint"],
        "rounds": [without_folders(text) for text in recipe_in_words(settings)[:number]],
        "data": data | {"Seed": dance.seed},
        "measures": {split: values for split, values in measures.items() if values},
        "versions": about.get("versions", {}),
        "citations": [] if dance.recipe is None else citations(dance.recipe[:done]),
    }
    encoder.origin = with_training(dance.initial_encoder.origin, facts)
    return encoder


def citations(rounds: list) -> list[str]:
    """Return the BibTeX entries of the methods that rounds use, each once."""
    found: list[str] = []
    for round_ in rounds:
        loss: Any = losses.make(round_.loss, nn.Identity(), **round_.loss_options)
        found.append(getattr(loss, "citation", ""))
        if round_.negatives is current_model:
            ance: Any = losses.make("pairwise", nn.Identity())
            found.append(ance.citation)
    return list(dict.fromkeys(entry.strip() for text in found for entry in re.split(r"\n(?=@)", text) if entry.strip()))

"""A recipe in words, from the settings that a run's folder keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def recipe_in_words(settings: Mapping[str, Any]) -> list[str]:
    """Say in a few sentences, a text a round, what each round does, from the run's ``"round 1 loss"`` and so on."""
    texts = []
    for number in range(1, int(settings.get("rounds", 0)) + 1):
        start = f"round {number} "
        options = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
        texts.append(round_in_words(options, number))
    return texts


def round_in_words(round_: Mapping[str, Any], number: int) -> str:
    """Say what a round does, from its options by name."""
    title = f"Round {number}" + (f", {round_['name']}" if round_.get("name") else "")
    length = f"{round_['steps']} steps" if round_.get("steps") else _plural(round_.get("epochs", 1), "epoch")
    chosen = round_.get("chosen") or {}
    rate = round_.get("learning_rate") or chosen.get("learning_rate")
    rate = "the encoder's usual learning rate" if rate is None else f"learning rate {rate:g}"
    sentences = [f"{title}: {length} in batches of {round_.get('batch_size')} at {rate}"]
    options = _plain(round_.get("loss_options"))
    sentences.append(f"Loss: {_plain(round_.get('loss'))}" + (f" with {options}" if options else ""))
    left_open = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in chosen.items() if _is_scale(name, options)]
    if left_open:
        sentences[-1] += (", " if options else " with ") + ", ".join(left_open)
    if round_.get("similarity"):
        sentences[-1] += f"; {round_['similarity']} similarity from here on"
    sentences.append(_source("Negatives", "query", round_))
    if round_.get("query_negatives") not in (None, "none"):
        sentences.append(_source("Query negatives", "document", round_, "query_negatives"))
    if round_.get("refresh_every"):
        sentences.append(f"Refreshed every {round_['refresh_every']} steps while training goes on")
    if round_.get("filters") not in (None, "", "()", "[]"):
        sentences.append(f"Filtered by {round_['filters']}")
    if round_.get("teacher"):
        sentences.append(f"Teacher: {round_['teacher']}")
    share = round_.get("share_of_queries", 1.0)
    if share != 1.0:
        sentences.append(f"{share:.0%} of the queries take their turn")
    if round_.get("carry_optimizer"):
        sentences.append("The optimiser goes on from the round before")
    return ". ".join(sentences) + "."


def _is_scale(name: str, options: str) -> bool:
    """Return whether what a round chose is a temperature or scale that its options do not give."""
    is_open = name.startswith("temperature") and not re.search(rf"(^|, ){re.escape(name)} ", options)
    return name == "teacher_scale" or is_open


def _source(what: str, of: str, round_: Mapping[str, Any], key: str = "negatives") -> str:
    source = round_.get(key)
    if source in (None, "none"):
        return f"{what}: those of the batch only"
    # the digest tells functions apart, people it tells nothing
    source = re.sub(r"#[0-9a-f]{8}\b", "", str(source)).replace("_", " ")
    drawn = "drawn at random from" if round_.get("sampling") == "uniform" else "the best of"
    per_row = round_.get("negatives_per_row" if key == "negatives" else "query_negatives_per_row")
    ranks = f", ranks {round_['rank_range']}" if round_.get("rank_range") not in (None, "None") else ""
    return (
        f"{what}: {round_.get('negatives_per_query')} for each {of}, {drawn} the top {round_.get('depth')}{ranks} of "
        f"{source}, {per_row} in a row of training"
    )


def _plain(value: Any) -> str:
    """Return a dict or list as the settings keep it, without the signs of Python."""
    return re.sub(r"[{}'\"\[\]]", "", str(value)).replace(":", "") if value not in (None, "{}", {}) else ""


def _plural(number: Any, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

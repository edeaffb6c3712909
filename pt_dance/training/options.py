"""Options of ``DanceRetriever`` and ``Round``, refused before any work where they make no sense."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyterrier as pt
import torch
from ir_measures import DefaultPipeline, parse_measure
from ir_measures.measures import Measure
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import nn
from transformers import SchedulerType

from pt_dance import losses
from pt_dance.storage.options import choice, path_of, whole
from pt_dance.storage.texts import first_line
from pt_dance.training.defaults import TEACHER_LOSSES

# The others follow a loss that is measured while training; here rounds are measured.
SCHEDULERS = tuple(s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy"))

# What the estimator and the round set themselves: with other values a run could not be resumed, or would not be what
# its settings say.
_SAID_ELSEWHERE = {
    "output_dir": "the estimator's path",
    "seed": "the estimator's seed",
    "data_seed": "the estimator's seed",
    "resume_from_checkpoint": "calling fit again",
    "disable_tqdm": "the estimator's verbose",
    "num_train_epochs": "the round's epochs",
    "max_steps": "the round's steps",
    "per_device_train_batch_size": "the round's batch_size",
    "learning_rate": "the round's learning_rate",
    "warmup_steps": "the round's warmup",
    "warmup_ratio": "the round's warmup",
    "lr_scheduler_type": "the round's scheduler",
    "save_steps": "the round's checkpoint_steps",
    "save_strategy": "the round's checkpoint_steps",
}

# What the trainer could do but not here, and why.
_NOT_HERE = {
    "eval_strategy": "rounds are measured when they are trained, on the validation topics of fit",
    "eval_on_start": "the encoder is measured before it is trained whenever fit gets validation topics",
    "load_best_model_at_end": "the best round's encoder is taken whenever fit gets validation topics",
    "neftune_noise_alpha": "its noise is for language models that are trained to write",
    "auto_find_batch_size": "another batch size would be another training; set the round's batch_size",
    "save_only_model": "a fit that was killed could not go on without the optimiser's state",
    "ignore_data_skip": "a fit that was killed would train on the same rows again",
    "restore_callback_states_from_checkpoint": "a round would end where the round before did",
    "push_to_hub": "publish the encoder when fit is done, with its to_hf",
}


# Options of the estimator that one check each is enough for; rounds add to the seed, and NumPy and transformers take
# seeds of 32 bits.
ONE_CHECK: dict[str, Callable[[str, Any], Any]] = {
    "seed": lambda name, value: whole(name, value, 0, 2**31 - 1),
    "patience": lambda name, value: whole(name, value, or_none=True),
    "keep": lambda name, value: choice(name, value, ("all", "best")),
    "refresh": lambda name, value: choice(name, value, ("between", "beside", "replay")),
    "replay_of": lambda name, value: None if value is None else path_of(value),
}


def check_path(path: object) -> Path:
    """Return the absolute path of a run, which need not exist yet.

    Raises:
        TypeError: If it is no path.
        FileExistsError: If a file is in its way.
    """
    folder = path_of(path)
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise FileExistsError(f"{str(folder)!r} cannot be made, since {str(above)!r} is a file; give another path")
    return folder


def check_measures(measure: object) -> list[Measure]:
    """Return the measures as a list.

    Args:
        measure: An ir_measures measure, its name (``"nDCG@10"``), or a list of them.

    Raises:
        TypeError: If something else is among them; names it.
        ValueError: If there is none, or one that ir_measures cannot compute as it is; names it.
    """
    measures = list(measure) if isinstance(measure, (list, tuple)) else [measure]
    if not measures:
        raise ValueError("measure=[] names no measure; give at least one of ir_measures, such as nDCG @ 10")
    return [_checked_measure(entry) for entry in measures]


def _checked_measure(given: object) -> Measure:
    measure = given
    if isinstance(given, str):
        try:
            measure = parse_measure(given)
        except (NameError, SyntaxError, TypeError, ValueError):
            raise ValueError(f"measure={given!r} is no measure of ir_measures; give one such as 'nDCG@10'") from None
    if not isinstance(measure, Measure):
        raise TypeError(
            f"measure={given!r} is no measure of ir_measures; give one such as nDCG @ 10, after "
            "'from pyterrier.measures import nDCG'"
        )
    try:
        known = DefaultPipeline.supports(measure)
    except AssertionError:  # how ir_measures says that a measure lacks its cutoff
        known = False
    if not known:
        raise ValueError(f"measure={given!r} cannot be computed by ir_measures as it is; does it lack a cutoff (@ 10)?")
    return measure


def check_training_arguments(given: object) -> None:
    """Refuse training arguments of a round that sentence-transformers does not have or take, or that are set elsewhere.

    Args:
        given: As given to ``Round``.

    Raises:
        TypeError: If they are no dict.
        ValueError: If one makes no sense here; names it.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"training_arguments={given!r} must be a dict of names and values")
    known = {f.name for f in fields(SentenceTransformerTrainingArguments)}
    for name, value in given.items():
        if name in _SAID_ELSEWHERE:
            raise ValueError(f"training_arguments: {name!r} is not set here but by {_SAID_ELSEWHERE[name]}")
        if name not in known:
            raise ValueError(
                f"training_arguments: {name!r} is no argument of sentence-transformers' "
                "SentenceTransformerTrainingArguments; remove it or mend its name"
            )
        if name in _NOT_HERE and value not in (None, False, 0, "no"):
            raise ValueError(f"training_arguments: {name}={value!r} does not work here: {_NOT_HERE[name]}")
    given = trainer_arguments(given)
    if not given:
        return
    try:
        SentenceTransformerTrainingArguments(
            **{"output_dir": "unused", "use_cpu": not torch.cuda.is_available(), "report_to": "none", **given}
        )
    except Exception as error:  # whatever is wrong with a value, the user gets one line
        reason = first_line(error)
        raise ValueError(f"training_arguments={dict(given)!r} are refused by sentence-transformers: {reason}") from None


def trainer_arguments(given: Mapping[str, object]) -> dict[str, object]:
    """Return a round's training arguments without the optimiser "lamb", which transformers does not know.

    Raises:
        ValueError: If it is asked for and the package that has it is not installed.
    """
    if given.get("optim") != "lamb":
        return dict(given)
    if importlib.util.find_spec("pytorch_optimizer") is None:
        raise ValueError("training_arguments: optim='lamb' needs a package: pip install 'pt_dance[lamb]'")
    return {name: value for name, value in given.items() if name != "optim"}


def check_loss(loss: Any, options: object) -> None:
    """Refuse a loss that :func:`pt_dance.losses.make` would refuse.

    Args:
        loss: As given to ``Round``.
        options: Its options, as given.

    Raises:
        TypeError: If the options are no dict, or the loss is none.
        ValueError: If there is no such loss or option, or an option is out of its range; names it.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f"loss_options={options!r} must be a dict of option names and values")
    losses.check(loss, **options)
    try:
        losses.make(loss, nn.Identity(), **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"loss={loss!r} with loss_options={dict(options)!r}: {error}") from None


def check_choices(round_: Any) -> None:
    """Refuse options of a round that are out of their range or do not go together; names them.

    Args:
        round_: ``Round`` whose numbers and loss are checked.

    Raises:
        TypeError: If a teacher or filter is none, or the training arguments are no dict.
        ValueError: If an option makes no sense.
    """
    teacher, loss = round_.teacher, round_.loss
    if teacher is not None and not isinstance(teacher, pt.Transformer):
        raise TypeError(f"teacher={teacher!r} must be a PyTerrier pipeline that scores (query, text) rows")
    parts = [part[0] for part in loss] if isinstance(loss, (list, tuple)) else [loss]
    taught = [part for part in parts if part in TEACHER_LOSSES]
    if teacher is None and taught:
        raise ValueError(f"the loss {taught[0]!r} learns from a teacher; give teacher=... (a pipeline that scores)")
    choice("scheduler", round_.scheduler, SCHEDULERS)
    if not isinstance(round_.filters, (list, tuple)) or not all(callable(entry) for entry in round_.filters):
        raise TypeError(f"filters={round_.filters!r} must be a list of filters, such as mining.RankRange(10, 200)")
    check_training_arguments(round_.training_arguments)
    if round_.start not in ("last", "best") or (round_.start == "best" and round_.carry_optimizer):
        raise ValueError(f"start={round_.start!r} must be 'last', or 'best' without carry_optimizer")
    choice("similarity", round_.similarity, ("cosine", "dot"), or_none=True)
    if round_.negatives_per_row > round_.negatives_per_query:
        more, pool = round_.negatives_per_row, round_.negatives_per_query
        raise ValueError(f"negatives_per_row={more} is more than negatives_per_query={pool}")
    oldest, every = round_.max_staleness, round_.refresh_every
    if oldest is not None and (every is None or oldest < every):
        raise ValueError(
            f"max_staleness={oldest} steps cannot be kept with refresh_every={every}, which must not be more"
        )


def check_refresh(refresh: object, replay_of: object, recipe: Sequence) -> None:
    """Refuse a way of refreshing negatives that makes no sense with the recipe.

    Args:
        refresh: As given to ``DanceRetriever``.
        replay_of: As given: the folder of the run to repeat.
        recipe: Its ``Round``s.

    Raises:
        ValueError: If they do not go with each other.
    """
    if (refresh == "replay") != (replay_of is not None):
        raise ValueError(
            "refresh='replay' and replay_of=... (the folder of a run with refresh='beside') belong together; give both "
            "or neither"
        )
    refreshed = [(number, entry) for number, entry in enumerate(recipe, start=1) if entry.is_refreshed]
    if refresh != "between":
        if not refreshed:
            raise ValueError(
                f"refresh={refresh!r} needs a round whose negatives come from the current model and have "
                "refresh_every=... (steps), such as recipes.ance(refresh_every=1000) has"
            )
        for number, entry in refreshed:
            if entry.share_of_queries != 1:
                raise ValueError(
                    f"round {number} takes share_of_queries={entry.share_of_queries} in turn, which "
                    f"refresh={refresh!r} cannot; refresh between rounds, or take all queries"
                )

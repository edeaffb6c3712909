"""Options of ``DanceRetriever`` and ``Round``, refused before any work where they make no sense."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
from ir_measures import DefaultPipeline
from ir_measures.measures import Measure
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import SchedulerType

_KEEP = ("all", "best")

# The others follow a loss that is measured while training; here rounds are measured.
SCHEDULERS = tuple(s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy"))

# What the estimator says itself: with others, a run could not be gone on with, or would not be what its settings say.
_SAID_ELSEWHERE = {
    "output_dir": "the estimator's path",
    "seed": "the estimator's seed",
    "data_seed": "the estimator's seed",
    "resume_from_checkpoint": "calling fit again",
}


def check_options(*, num_results: object, seed: object, patience: object, keep: object, path: object) -> None:
    """Refuses options that make no sense.

    Args:
        num_results: as given to ``DanceRetriever``, like the others.
        seed: as given; rounds add to it, and NumPy and transformers take seeds of 32 bits.
        patience: rounds.
        keep: "all" or "best".
        path: of the run.

    Raises:
        TypeError: if the path is none.
        ValueError: if another option is out of its range; names it.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise TypeError(f"path={path!r} must be the path of a folder, which need not exist yet")
    if not is_whole(num_results) or num_results < 1:
        raise ValueError(f"num_results={num_results!r} must be a whole number of at least 1")
    if not is_whole(seed) or not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to {2**31 - 1}")
    if patience is not None and (not is_whole(patience) or patience < 1):
        raise ValueError(f"patience={patience!r} must be a whole number of at least 1, or None")
    if keep not in _KEEP:
        raise ValueError(f"keep={keep!r} is unknown; choose 'all' or 'best'")
    above = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
    if not above.is_dir():
        raise FileExistsError(f"{str(path)!r} cannot be made, since {str(above)!r} is a file; give another path")


def check_one_process() -> None:
    """Refuse to train in one of several processes, which would write to one folder at once.

    Raises:
        RuntimeError: if ``torchrun`` or ``accelerate launch`` started more than one process.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes.isdecimal() and int(processes) > 1:
        raise RuntimeError(
            f"fit runs in one process, but {processes} were started (WORLD_SIZE={processes}); start it with plain "
            "python, without torchrun or accelerate launch"
        )


def check_measures(measure: object) -> list[Measure]:
    """The measures as a list.

    Args:
        measure: an ir_measures measure or a list of them.

    Raises:
        TypeError: if something else is among them; names it.
        ValueError: if there is none, or one that ir_measures cannot compute as it is; names it.
    """
    measures = list(measure) if isinstance(measure, (list, tuple)) else [measure]
    if not measures:
        raise ValueError("measure=[] names no measure; give at least one of ir_measures, such as nDCG @ 10")
    for entry in measures:
        if not isinstance(entry, Measure):
            raise TypeError(
                f"measure={entry!r} is no measure of ir_measures; give one such as nDCG @ 10, after "
                "'from pyterrier.measures import nDCG'"
            )
        try:
            known = DefaultPipeline.supports(entry)
        except AssertionError:  # how ir_measures says that a measure lacks its cutoff
            known = False
        if not known:
            raise ValueError(
                f"measure={entry!r} cannot be computed by ir_measures as it is; does it lack a cutoff (@ 10)?"
            )
    return measures


def is_whole(value: object) -> bool:
    """Whether the value is a whole number: an int, of Python or NumPy, and no truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_training_arguments(given: object) -> None:
    """Refuses training arguments of a round that sentence-transformers does not have, or that are set elsewhere.

    Args:
        given: as given to ``Round``.

    Raises:
        TypeError: if they are no dict.
        ValueError: if one makes no sense here; names it.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"training_arguments={given!r} must be a dict of names and values")
    known = {f.name for f in fields(SentenceTransformerTrainingArguments)}
    for name in given:
        if name not in known:
            raise ValueError(
                f"training_arguments: {name!r} is no argument of sentence-transformers' "
                "SentenceTransformerTrainingArguments; remove it or mend its name"
            )
        if name in _SAID_ELSEWHERE:
            raise ValueError(f"training_arguments: {name!r} is not set here but by {_SAID_ELSEWHERE[name]}")


def check_whole(option: str, value: object, lowest: int) -> None:
    """Raises ValueError where an option is no whole number of at least ``lowest``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{option}={value!r} must be a whole number of at least {lowest}")


def is_number(value: object) -> bool:
    """Whether the value is a finite number and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

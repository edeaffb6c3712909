"""Options of ``DanceRetriever``, refused before any work where they make no sense."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from ir_measures import DefaultPipeline
from ir_measures.measures import Measure

_KEEP = ("all", "best")


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

"""What the user asked: the query before query rewriters made something else of it."""

from __future__ import annotations

import itertools
import warnings
from functools import cache

import pandas as pd


def users_queries(frame: pd.DataFrame) -> pd.Series:
    """Return the queries that an encoder should read: the user's own words.

    PyTerrier's rewriters (RM3, Bo1, SDM, ``pt.rewrite.tokenise``, ``pt.apply.query``) move the query they were given
    to ``query_0``, the one before to ``query_1`` and so on, and leave weights and operators in ``query``. The last of
    these columns is what the user asked. Where that is another text than the one in ``query``, a warning says so, once.

    Returns:
        The value of the last of ``query_0``, ``query_1``, ... that a row has, and of ``query`` where it has none; with
        the frame's row labels.
    """
    asked = frame["query"]
    for name in map("query_{}".format, itertools.count()):
        if name not in frame.columns:
            break
        asked = frame[name].where(frame[name].notna(), asked)
    if (asked.notna() & (asked != frame["query"])).any():
        _say_once()
    return asked


@cache
def _say_once() -> None:
    warnings.warn(
        "the queries were rewritten before they reached an encoder: it reads what the user asked, the last of the "
        "columns query_0, query_1, ...; drop these columns to have the rewritten queries encoded",
        stacklevel=3,
    )

"""The one check of options: what makes no sense is refused in one sentence that names the option and its value."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, of Python or NumPy; a truth value is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number, of Python or NumPy; a truth value is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: Any, lowest: int = 1, highest: int | None = None, *, or_none: bool = False) -> Any:
    """Return an option that is a whole number, of Python or NumPy, as an ``int``, or None where that is allowed.

    Raises:
        ValueError: If it is no such number.
    """
    if value is None and or_none:
        return None
    if not is_whole(value) or value < lowest or (highest is not None and value > highest):
        bounds = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name}={value!r} must be a whole number {bounds}{', or None' if or_none else ''}")
    return int(value)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    lowest: float | None = None,
    below: float | None = None,
    highest: float | None = None,
    or_none: bool = False,
) -> Any:
    """Return an option that is a finite number, of Python or NumPy, as a ``float``, or None where that is allowed.

    The number must be greater than ``above``, at least ``lowest``, less than ``below`` and at most ``highest``.

    Raises:
        ValueError: If it is no such number.
    """
    if value is None and or_none:
        return None
    good = is_number(value) and (above is None or value > above) and (lowest is None or value >= lowest)
    if not good or (below is not None and value >= below) or (highest is not None and value > highest):
        limits = (("above", above), ("of at least", lowest), ("below", below), ("of at most", highest))
        words = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        raise ValueError(f"{name}={value!r} must be a number {words}".rstrip() + (", or None" if or_none else ""))
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str], *, or_none: bool = False) -> Any:
    """Return an option that is one of a few words, or None where that is allowed.

    Raises:
        ValueError: If it is none of them; lists them.
    """
    if value is None and or_none:
        return None
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(map(repr, [*choices, *([None] if or_none else [])]))
        raise ValueError(f"{name}={value!r} is unknown; choose one of {known}")
    return str(value)


def column(name: str, value: Any, *, taken: Sequence[str] = ()) -> str:
    """Return an option that names a column, other than those that hold something else.

    Raises:
        ValueError: If it is no string, an empty one, or taken.
    """
    if not isinstance(value, str) or not value or value in taken:
        other = f" other than {' and '.join(map(repr, taken))}" if taken else ""
        raise ValueError(f"{name}={value!r} must be the name of a column{other}")
    return str(value)


def path_of(value: Any, name: str = "path") -> Path:
    """Return the absolute path that a user means: ``~`` is the home folder, and a relative path is meant from here.

    Every path that enters goes through this door, so that a process may change its working folder afterwards.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, holds a null character, or begins with the home folder of an unknown user.
    """
    path = value if isinstance(value, str) else os.fspath(value) if isinstance(value, os.PathLike) else None
    if not isinstance(path, str):
        raise TypeError(f"{name}={value!r} must be a path, a string or a pathlib.Path")
    if not path or "\0" in path:
        raise ValueError(f"{name}={value!r} is no path: it {'holds a null character' if path else 'is empty'}")
    # Before pathlib, which takes the "./" away from a folder called "./~".
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{name}={value!r} begins with a home folder that is not known: write it out")
    return Path(os.path.abspath(expanded))


def list_of(what: str, values: Iterable[Any], context: str) -> list[Any]:
    """Return a list of what was given as several things; one string is not a list of its characters.

    The message says what they are (e.g. "docnos"), and who asks for them (e.g. "Corpus.texts").

    Raises:
        TypeError: If it is one string, or no iterable.
    """
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{context} takes a list of {what}, not one string: write [{values!r}]")
    try:
        return list(values)
    except TypeError as err:
        raise TypeError(f"{context} takes a list of {what}, not {values!r}") from err

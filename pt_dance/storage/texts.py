"""What every stage that reads texts needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def lone_surrogate(text: str) -> int | None:
    """Return the index of the first lone surrogate in a text, which is no valid Unicode then; None if there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return err.start
    return None


def checked_texts(texts: Iterable[Any], name: Callable[[int], str]) -> list[str]:
    """Return texts as a list; ``name`` gives what a message calls the text at a position.

    Raises:
        TypeError: If one is no string.
        ValueError: If one is no valid Unicode.
    """
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name(position)} is {text!r}, not a string: give it a text or leave it out")
        if (place := lone_surrogate(text)) is not None:
            found = f"a lone surrogate at character {place}"
            raise ValueError(f"{name(position)} is no valid Unicode ({found}): clean it or leave it out")
    return texts


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

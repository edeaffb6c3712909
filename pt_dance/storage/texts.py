"""What every stage that reads texts needs to know of them."""

from __future__ import annotations


def lone_surrogate(text: str) -> int | None:
    """Return the index of the first lone surrogate in a text, which is no valid Unicode then; None if there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return err.start
    return None

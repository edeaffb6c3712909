"""How objects look in a notebook: small tables, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_TABLE = "border-collapse:collapse;font-size:.9em;margin:.2em 0 .8em"
_CELL = "text-align:left;vertical-align:top;padding:.15em .8em .15em 0"


def facts(title: str, rows: Mapping[str, Any], *below: str) -> str:
    """Return a title and a table of names and values, as HTML; values of None are left out.

    What follows ``below`` is HTML already.
    """
    body = "".join(
        f'<tr><th style="{_CELL};font-weight:normal;opacity:.7">{escape(name)}</th>'
        f'<td style="{_CELL}">{escape(_shown(value))}</td></tr>'
        for name, value in rows.items()
        if value is not None
    )
    return f'<div><b>{escape(title)}</b><table style="{_TABLE}">{body}</table>{"".join(below)}</div>'


def grid(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table with a header, as HTML."""
    head = "".join(f'<th style="{_CELL}">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(_shown(value))}</td>' for value in row) + "</tr>" for row in rows
    )
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def cut(text: str, most: int = 300) -> str:
    """Return a text, or its first characters where it has more than fit."""
    return text if len(text) <= most else text[:most] + " …"


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)

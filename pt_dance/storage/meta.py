"""The one reader of ``pt_meta.json``, the file that says what a folder of ours is and that makes it complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt_dance.storage.folders import read_json

META = "pt_meta.json"


@dataclass(frozen=True)
class Entry:
    """What an entry of the metadata must be.

    Attributes:
        fits: Says whether a value is right.
        wanted: What belongs there, for the message, e.g. "a text".
        missing: Whether the entry may be missing or null.
    """

    fits: Callable[[Any], bool]
    wanted: str
    missing: bool = False


def whole_entry(lowest: int = 0, highest: int | None = None) -> Entry:
    """Return the check of an entry that is a whole number."""
    bounds = f"of at least {lowest:,}" if highest is None else f"from {lowest:,} to {highest:,}"
    return Entry(
        lambda value: type(value) is int and value >= lowest and (highest is None or value <= highest),
        f"a whole number {bounds}",
    )


def entry_of(kind: type, wanted: str, *, missing: bool = False) -> Entry:
    """Return the check of an entry of a type."""
    return Entry(lambda value: isinstance(value, kind), wanted, missing)


def list_entry(kind: type, wanted: str, *, least: int = 0) -> Entry:
    """Return the check of an entry that is a list of a type's values."""
    return Entry(
        lambda value: isinstance(value, list) and len(value) >= least and all(isinstance(v, kind) for v in value),
        wanted,
    )


TEXT = entry_of(str, "a text")
TEXT_OR_NONE = entry_of(str, "a text", missing=True)
FLAG_OR_NONE = entry_of(bool, "true or false", missing=True)


def read_meta(
    folder: Path,
    what: str,
    *,
    type: str,
    formats: Sequence[str] | None = None,
    entries: Mapping[str, Entry] | None = None,
    advice: str,
) -> dict[str, Any]:
    """Read and check the metadata of a folder, which may be missing, damaged or of something else.

    Args:
        folder: The folder.
        what: What it should be, for messages, e.g. "corpus".
        type: The artifact type it must have.
        formats: The artifact formats it may have, None for any.
        entries: What its other entries must be.
        advice: What to do where nothing is there, e.g. "make one with Corpus.build()".

    Raises:
        FileNotFoundError: If there is no such folder, or no metadata in it.
        ValueError: If it is damaged, or of something else.
    """
    folder = Path(folder)
    try:
        meta = read_json(folder / META)
    except (FileNotFoundError, NotADirectoryError) as err:
        there = f"a folder without {META}" if folder.is_dir() else "a file" if folder.exists() else "nothing"
        raise FileNotFoundError(f"there is no {what} at {folder} ({there} is there): {advice}") from err
    if meta.get("type") != type or (formats is not None and meta.get("format") not in formats):
        raise ValueError(
            f"{folder} is no {what}: its {META} says type {meta.get('type')!r}, format {meta.get('format')!r}"
        )
    for name, entry in (entries or {}).items():
        value = meta.get(name)
        if not (entry.fits(value) or (value is None and entry.missing)):
            raise ValueError(
                f"{folder / META} is damaged: its {name!r} is {_short(value)} where {entry.wanted} belongs"
            )
    return meta


def check_sizes(folder: Path, sizes: Mapping[str, Any], what: str, advice: str) -> None:
    """Check that the files of a folder are there and have the ``sizes`` (by name; None for any) its metadata says.

    ``what`` and ``advice`` are as in :func:`read_meta`.

    Raises:
        ValueError: Naming the file that is missing or has another size.
    """
    for name, size in sizes.items():
        file = Path(folder) / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: the {what} is damaged; {advice}")
        if size is not None and type(size) is not int:
            raise ValueError(f"{file.with_name(META)} is damaged: the size of {name!r} is {_short(size)}")
        found = file.stat().st_size
        if size is not None and found != size:
            raise ValueError(f"{file} has {found:,} bytes where {size:,} belong: the {what} is damaged; {advice}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

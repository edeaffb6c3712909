"""``pt.Artifact.load`` for dense indexes: who wrote a folder in FLEX format decides as what it is opened."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pyterrier as pt
from pyterrier_dr import FlexIndex

from pt_dance.index.dense_index import DenseIndex
from pt_dance.storage.folders import read_json
from pt_dance.storage.meta import META

_GROUP = "pyterrier.artifact"
_OURS = {
    name: EntryPoint(name, "pt_dance.index.artifact:open_index", _GROUP)
    for name in ("dense_index.flex", "dense_index.flex_shards")
}
_entry_points = pt.utils.entry_points


def open_index(path: str | Path, **options: Any) -> FlexIndex:
    """Open an index that pt_dance wrote as a :class:`pt_dance.DenseIndex`, one of pyterrier_dr as its ``FlexIndex``."""
    ours = read_json(Path(path) / META).get("package_hint") == DenseIndex.ARTIFACT_PACKAGE_HINT
    return DenseIndex(path, **options) if ours else FlexIndex(str(path), **options)


def prefer_open_index() -> None:
    """Let PyTerrier ask :func:`open_index` where two packages open the same format.

    pyterrier_dr has an entry point for FLEX, too, and PyTerrier takes the one whose package the file system happens to
    list first.
    """
    if pt.utils.entry_points is _entry_points:
        pt.utils.entry_points = _ours_first


def _ours_first(group: str) -> tuple[EntryPoint, ...]:
    found = _entry_points(group)
    if group != _GROUP:
        return found
    return (*_OURS.values(), *(entry for entry in found if entry.name not in _OURS))

"""Progress bars over documents."""

from __future__ import annotations

from typing import Any

import pyterrier as pt


def progress_bar(verbose: bool, desc: str, total: int | None, initial: int = 0) -> Any:
    """Return a progress bar over documents; it shows nothing if not ``verbose``."""
    return pt.tqdm(desc=desc, total=total, initial=initial, unit="doc", disable=not verbose, delay=1)

"""Progress bars: one a phase, with the rate of what is counted."""

from __future__ import annotations

from typing import Any

import pyterrier as pt


def progress_bar(verbose: bool, desc: str, total: int | None, initial: int = 0, unit: str = "doc") -> Any:
    """Return a progress bar that counts documents or other units; it shows nothing if not ``verbose``."""
    return pt.tqdm(desc=desc, total=total, initial=initial, unit=unit, disable=not verbose, delay=1)

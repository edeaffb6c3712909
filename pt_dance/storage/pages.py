"""Pages of large mapped files, given back while they are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SMALL = 1 << 30  # bytes of files that may stay mapped as a whole
_KEPT = 512 << 20  # bytes that may be mapped between two releases
_LOOK = 64 << 20  # bytes that are read between two looks at how much is mapped
_AROUND = 256 << 10  # bytes that a row which lies apart counts as: the system maps 64 KiB to 2 MiB around it
_STATM = Path("/proc/self/statm")


class Pages:
    """The mapped pages of large files, given back while they are read.

    The system keeps what was read as long as it has room, but counts it as this process's memory: one that reads a
    corpus of 100 GB would seem to hold 100 GB, and job schedulers stop such processes. How much the system maps for a
    row that is asked for depends on how the file came into memory, so it is looked at rather than counted.

    Args:
        files: The files; read and never written to through the map.
    """

    def __init__(self, files: Iterable[mmap.mmap]) -> None:
        self._files, self._read = list(files), 0
        self.are_given_back = sum(map(len, self._files)) > _SMALL and hasattr(mmap, "MADV_DONTNEED")
        self._before = (_mapped_bytes() or 0) if self.are_given_back else 0

    @classmethod
    def of(cls, array: Any) -> Pages:
        """Return the pages of an array, or of the ``parts`` of one that has several; of none that is in memory."""
        return cls(file for part in getattr(array, "parts", [array]) if (file := _file_of(part)) is not None)

    def read(self, size: int, places: int = 0) -> None:
        """Count bytes that were read, or will be now, and give back what is mapped if it is too much.

        Args:
            size: How many lie side by side.
            places: How many rows lie apart.
        """
        if not self.are_given_back:
            return
        self._read += size + places * _AROUND
        if self._read >= _LOOK:
            self._read = 0
            mapped = _mapped_bytes()
            if mapped is None or mapped - self._before > _KEPT:
                self.release()

    def release(self) -> None:
        """Give back what is mapped now; whoever reads on has it mapped again."""
        if self.are_given_back:
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)
            self._before = _mapped_bytes() or 0


def _mapped_bytes() -> int | None:
    """Return how much of files this process has in memory; None where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[2]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None


def _file_of(array: Any) -> mmap.mmap | None:
    """Return the mapped file that a NumPy array reads."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array

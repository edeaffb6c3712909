"""Pages of large mapped files, given back while they are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

_SMALL = 1 << 30  # bytes of files that may stay mapped as a whole
_KEPT = 512 << 20  # bytes that may be mapped between two releases
_AROUND = 2 << 20  # bytes that the system maps, at most, around a row that lies apart


class Pages:
    """The mapped pages of large files, given back after so many bytes.

    The system keeps what was read as long as it has room, but counts it as this process's memory: one that reads a
    corpus of 100 GB would seem to hold 100 GB, and job schedulers stop such processes.

    Args:
        files: The files; read and never written to through the map.
    """

    def __init__(self, files: Iterable[mmap.mmap]) -> None:
        self._files, self._read = list(files), 0
        self.are_given_back = sum(map(len, self._files)) > _SMALL and hasattr(mmap, "MADV_DONTNEED")

    @classmethod
    def of(cls, array: Any) -> Pages:
        """Return the pages of an array, or of the ``parts`` of one that has several; of none that is in memory."""
        return cls(file for part in getattr(array, "parts", [array]) if (file := _mapped(part)) is not None)

    def read(self, size: int, places: int = 0) -> None:
        """Count bytes that were read, or will be now.

        Args:
            size: How many lie side by side.
            places: How many rows lie apart.
        """
        self._read += size + places * _AROUND
        if self._read >= _KEPT:
            self.release()

    def release(self) -> None:
        """Give back what is mapped now; whoever reads on has it mapped again."""
        self._read = 0
        if self.are_given_back:
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)


def _mapped(array: Any) -> mmap.mmap | None:
    """Return the mapped file that a NumPy array reads."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array

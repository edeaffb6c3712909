"""Memory that stays in the process while a model trains on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

# mallopt's names for its settings, in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc's own adjusting has come to after anything of 32 MiB was freed; setting a value ends the adjusting.
_LARGE = 32 * 2**20
_MOST_MAPS = 65536


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let new tensors take the memory that others have left.

    By default glibc gives large blocks back to the system as soon as they are freed, and the system clears every page
    of the next one: with all-MiniLM-L6-v2 that was a quarter of a training step. In here freed memory is kept, and
    given back at the end. With another C library, or where the environment says how malloc should work
    (``MALLOC_…``, ``GLIBC_TUNABLES``), nothing is changed.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MOST_MAPS)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return None
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None)
    return libc if all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None

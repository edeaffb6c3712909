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
    of the next one, which is a good part of a transformer's training step on a CPU. In here freed memory is kept; the
    peak is a few percent higher, as blocks of other sizes do not fit into gaps. With another C library, or where the
    environment says how malloc should work (``MALLOC_…``, ``GLIBC_TUNABLES``), nothing is changed.

    At the end what is free is given back. Two thresholds keep the values that they get in any process that frees a
    tensor of 32 MiB or more: smaller blocks are taken from memory that is kept, up to 64 MiB at its end.
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

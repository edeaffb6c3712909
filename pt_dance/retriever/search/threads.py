"""How many threads BLAS takes for a product: one number for the whole process, which searches in threads set to one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_limits: list[tuple[Any, int]] = []  # what is in force, and how many threads there were before, once for each search


@cache
def _libraries(api: str) -> ThreadpoolController:
    return ThreadpoolController().select(user_api=api)


def product_threads() -> int:
    """Return how many threads matrix products would take."""
    with _lock:
        return _limits[0][1] if _limits else _blas_threads()


def _blas_threads() -> int:
    return max((library["num_threads"] for library in _libraries("blas").info()), default=1)


@contextlib.contextmanager
def one_threaded_products() -> Iterator[None]:
    """Let matrix products take one thread each, until the last of the searches that asked for it is done.

    The number is one for the whole process: were it restored by each search, one that ends last could leave the number
    that another had set.
    """
    with _lock:
        before = _limits[0][1] if _limits else _blas_threads()
        _limits.append(_limits[0] if _limits else (_libraries("blas").limit(limits=1), before))
    try:
        yield
    finally:
        with _lock:
            limit, _ = _limits.pop()
            if not _limits:
                limit.restore_original_limits()


def use_one_thread() -> None:
    """Keep torch's operations in the calling thread to that thread; others are not touched."""
    # Torch sets a new thread's number of threads when it is first asked for, so ask before changing it.
    torch.get_num_threads()
    _libraries("openmp").limit(limits=1)

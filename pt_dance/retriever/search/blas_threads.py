"""How many threads BLAS takes for a product: one number for the whole process, which searches in threads set to one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


_limit_lock = threading.Lock()
_limits: list[Any] = []  # what is in force, and how many threads there were before, once for each search within


def product_threads() -> int:
    """As many threads as matrix products would take."""
    with _limit_lock:
        return _limits[0][1] if _limits else _blas_threads()


def _blas_threads() -> int:
    return max((library["num_threads"] for library in _libraries().info()), default=1)


@contextlib.contextmanager
def one_threaded_products() -> Iterator[None]:
    """Let matrix products take one thread each, until the last of the searches that asked for it is done.

    The number is one for the whole process: were it restored by each search, one that ends last could leave the number
    that another had set.
    """
    with _limit_lock:
        if not _limits:
            before = _blas_threads()
            _limits.append((_libraries().limit(limits=1), before))
        else:
            _limits.append(_limits[0])
    try:
        yield
    finally:
        with _limit_lock:
            limit, _ = _limits.pop()
            if not _limits:
                limit.restore_original_limits()

"""Keep what an engine written in C++ or Java says off the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send to nowhere what is written to the process's standard streams, but not what Python shows on stderr.

    Only libraries that write past Python are meant. Threads come one after the other, since the streams are the
    process's.
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = {number: os.dup(number) for number in (1, 2)}
        if sys.stderr is sys.__stderr__:  # a notebook's stderr is not the process's
            shown = stack.enter_context(os.fdopen(os.dup(2), "w", buffering=1))
            stack.enter_context(contextlib.redirect_stderr(shown))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            for number in saved:
                os.dup2(nowhere, number)
            yield
        finally:
            sys.stdout.flush()
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
            os.close(nowhere)

"""Disks that are full or cannot be written to: one plain error, whichever library found out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ._files import DiskError, building_path, replaced_path

_SURE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_OF_A_FILE = _SURE | {errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
# What libraries say that do not raise an OSError with a number.
_SAID = {
    errno.ENOSPC: ("No space left on device", "os error 28", "database or disk is full"),
    errno.EROFS: ("Read-only file system", "os error 30", "readonly database"),
}
_TORCH = ("PytorchStreamWriter failed", "unexpected pos")  # whatever the reason
_NEARLY_NOTHING = 64 << 20


@contextlib.contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever is raised because ``path`` cannot be written to into one error.

    Args:
        path: What is written.
        what: How the message calls it, e.g. "the index".

    Raises:
        DiskError: In the place of the error of another library; other errors pass as they are.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as err:
        code = _code_of(err, Path(os.path.abspath(path)))
        if code is None:
            raise
        raise DiskError(
            code,
            f"{what} could not be written ({os.strerror(code)}); what was finished before is kept, and the same call "
            "goes on from there",
            str(path),
        ) from None


def _code_of(err: Exception, path: Path) -> int | None:
    """The system's error number if an error came from writing to ``path``, else None."""
    if isinstance(err, OSError) and err.errno is not None:
        if err.filename is None or isinstance(err.filename, int):
            return err.errno if err.errno in _SURE else None
        file = Path(os.path.abspath(os.fsdecode(err.filename)))
        # Folders above are made where they are not there.
        places = (path, building_path(path), replaced_path(path))
        is_ours = any(file.is_relative_to(place) for place in places) or path.is_relative_to(file)
        return err.errno if is_ours and err.errno in _OF_A_FILE else None
    # Tokenizers raises a bare Exception, and torch and FAISS a RuntimeError.
    kinds = (shutil.Error, sqlite3.OperationalError, SafetensorError)
    if not (isinstance(err, kinds) or type(err) in (Exception, RuntimeError)):
        return None
    text = str(err)
    for code, sentences in _SAID.items():
        if any(sentence in text for sentence in sentences):
            return code
    if any(sentence in text for sentence in _TORCH) and _room(path) < _NEARLY_NOTHING:
        return errno.ENOSPC
    return None


def _room(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free

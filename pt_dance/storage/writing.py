"""Disks that are full or cannot be written to: one plain error, whichever library found out."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows has no flock; processes of a job do not wait for each other there
    fcntl = None  # type: ignore[assignment]

from pt_dance.storage.folders import (
    DiskError,
    building_path,
    lock_folder,
    publish_folder,
    remove_folder,
    replace_folder,
    replaced_path,
)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_OF_THE_DISK = _FULL | {errno.EROFS, errno.EFBIG}
_OF_A_FILE = _OF_THE_DISK | {errno.EACCES, errno.EPERM, errno.EIO}
# What libraries say that raise no OSError with a number: the system's own words (tokenizers, safetensors, FAISS),
# SQLite's, and torch's, whose writer gives no reason.
_SAID = {
    errno.ENOSPC: (
        os.strerror(errno.ENOSPC),
        "database or disk is full",
        "PytorchStreamWriter failed",
        "unexpected pos",
    ),
    errno.EROFS: (os.strerror(errno.EROFS), "readonly database"),
}
# More than any library leaves unused when it finds no room for its next block.
_NEARLY_FULL = 64 << 20

# A lock goes when no thread holds it or waits for it.
_LOCKS: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()
_GUARD = threading.Lock()
# Turns that this process has now.
_TURNS: set[Path] = set()

KEPT = "what was finished is kept, and the same call goes on from there"
NOTHING = "nothing of it is left"


@contextlib.contextmanager
def writing(path: str | Path, what: str, left: str) -> Iterator[None]:
    """Turn what is raised because ``path`` cannot be written to into one error.

    An error that names no file counts only if the disk is full, or read-only, indeed: another program's error, such as
    that of a stage of the user's pipeline, passes as it is.

    The message calls it ``what``, e.g. "the index", and says what is ``left`` of it, :data:`KEPT` or :data:`NOTHING`.

    Raises:
        DiskError: Instead of the error of another library.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as err:
        code, file = _cause(err, Path(os.path.abspath(path)))
        if code is None:
            raise
        done = "written" if code in _OF_THE_DISK else "read or written"
        message = f"{what} could not be {done} ({os.strerror(code)}); {left}"
        raise DiskError(code, message, str(file or path)) from None


@contextlib.contextmanager
def new_folder(path: Path, what: str, *, replace: bool = False) -> Iterator[Path]:
    """Write to an empty folder beside ``path``, which gets that name when the block ends, unless nothing was written.

    It is removed if the block raises. With ``replace`` a folder that has the name already gives way; it stays as it is
    until the new one is whole. Errors call it ``what``, e.g. "the corpus".

    Raises:
        BlockingIOError: If another process is making it.
        DiskError: If the disk is full or cannot be written to.
    """
    building = building_path(path)
    with writing(path, what, NOTHING):
        building.mkdir(parents=True, exist_ok=True)
    with lock_folder(building, f"another process is making {path}: wait for it"):
        try:
            # Inside the clean-up, so that the disk is still full when that is looked at.
            with writing(path, what, NOTHING):
                for old in building.iterdir():
                    remove_folder(old) if old.is_dir() else old.unlink()
                yield building
                if not any(building.iterdir()):
                    building.rmdir()
                elif replace and path.exists():
                    replace_folder(building, path)
                else:
                    publish_folder(building, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_folder(building)
            raise


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Let those who ask for the folder ``path`` come one after the other: threads, and processes of the same job.

    Whoever comes second finds what the first one made. Processes of other jobs are told apart by :func:`new_folder`.
    """
    with _GUARD:
        lock = _LOCKS.get(path)
        if lock is None:
            lock = _LOCKS[path] = threading.RLock()
    with lock, _one_process(path) if number_of_processes() > 1 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Wait for other processes that are in such a block for the same path; this one may be in it already."""
    lock = path.with_name(f".{path.name}.turn")
    if fcntl is None or lock in _TURNS:
        yield
        return
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # where nothing can be written, there is nothing to wait for
            lock.parent.mkdir(parents=True, exist_ok=True)
            _lock_file(lock, held)
            _TURNS.add(lock)
            held.callback(_TURNS.discard, lock)
        yield


def _lock_file(lock: Path, held: contextlib.ExitStack) -> None:
    while True:
        file = open(lock, "w")  # noqa: SIM115, closed with the others that are held
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever had it before has removed it: by now there may be a new file of that name, which others lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                held.callback(file.close)
                held.callback(lock.unlink, missing_ok=True)
                return
        file.close()


def number_of_processes() -> int:
    """Return how many processes ``torchrun`` or another launcher started for this job, 1 without one.

    Raises:
        ValueError: If the environment does not say it as a number.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"the environment says WORLD_SIZE={said!r}, which is no number of processes; unset it")
    return int(said)


def _cause(err: Exception, path: Path) -> tuple[int | None, Path | None]:
    """Return the system's number of an error that comes from writing to ``path``, and the file it names; else None."""
    if isinstance(err, OSError) and err.errno is not None:
        if isinstance(err.filename, (str, bytes)):
            file = Path(os.path.abspath(os.fsdecode(err.filename)))
            places = (path, building_path(path), replaced_path(path))
            # A folder above that is not there could not be made.
            is_ours = any(file.is_relative_to(place) for place in places) or (
                file in path.parents and not os.path.lexists(file)
            )
            return (err.errno, file) if is_ours and err.errno in _OF_A_FILE else (None, None)
        return (err.errno if _is_so(err.errno, path) else None), None
    # Tokenizers raises a bare Exception, torch and FAISS a RuntimeError, shutil an OSError without a number.
    if isinstance(err, (OSError, sqlite3.OperationalError, SafetensorError)) or type(err) in (Exception, RuntimeError):
        for code, sentences in _SAID.items():
            if any(sentence in str(err) for sentence in sentences) and _is_so(code, path):
                return code, None
    return None, None


def _is_so(code: int, path: Path) -> bool:
    """Return whether the disk of ``path`` is in the state that an error speaks of."""
    while not os.path.lexists(path):
        path = path.parent
    with contextlib.suppress(OSError):
        if code in _FULL:
            return shutil.disk_usage(path).free < _NEARLY_FULL or code == errno.EDQUOT
        if code == errno.EROFS and hasattr(os, "statvfs"):
            return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    return False

"""Folders and files that are either whole or not there.

Every artifact is built in a folder beside its final one (:func:`building_path`), written to the disk with ``fsync`` and
then renamed into place, so that a process killed at any moment never leaves half an artifact under the final name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no flock; the guard against two writers is not available there
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD = -100
_NOTICED, _PAUSE = 60.0, 0.02  # seconds in which a program notices that its parent is gone; between two tries
_RENAME_EXCHANGE = 2
_MAX_JSON_BYTES = 4 << 20


class DiskError(OSError):
    """Something cannot be written, in one plain sentence that stands for the system's own error."""


def building_path(final: str | Path) -> Path:
    """Return the folder beside ``final`` in which ``final`` is put together (``.NAME.building``)."""
    final = Path(os.path.abspath(final))
    return final.with_name(f".{final.name}.building")


def replaced_path(final: str | Path) -> Path:
    """Return where ``final`` is set aside while it is replaced, where folders cannot be exchanged in one step."""
    final = Path(os.path.abspath(final))
    return final.with_name(f".{final.name}.replaced")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as err:
        # Some file systems cannot sync a folder and say EINVAL; that is all they can offer.
        if err.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as JSON so that ``path`` holds either its old content or the whole new one, even after a crash."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w", encoding="utf-8") as out:
        json.dump(obj, out, indent=1, ensure_ascii=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, path)
    _sync(path.parent)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 4 MiB that may be missing, damaged or hostile.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is no JSON object; the message names the file.
    """
    path = Path(path)
    with open(path, "rb") as src:
        raw = src.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB: that is no metadata file")
    try:
        obj = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path} is not valid JSON: the file is damaged ({type(err).__name__})") from err
    if not isinstance(obj, dict):
        raise ValueError(f"{path} holds a {type(obj).__name__} where a JSON object belongs: the file is damaged")
    return obj


def sync_folder(path: str | Path) -> None:
    """Write every file and folder below ``path``, and ``path`` itself, through to the disk (used before a rename)."""
    path = Path(path)
    for root, _, names in os.walk(path, topdown=False):
        for name in names:
            file = Path(root) / name
            if file.is_file() and not file.is_symlink():
                _sync(file)
        _sync(Path(root))


def publish_file(building: str | Path, final: str | Path) -> None:
    """Give a finished file its final name in the same folder in one step, in place of an older one."""
    building, final = Path(building), Path(final)
    _sync(building)
    os.replace(building, final)
    _sync(final.absolute().parent)


def publish_folder(building: str | Path, final: str | Path) -> None:
    """Give a finished folder its final name, on the same file system, in one step.

    Raises:
        FileExistsError: If ``final`` exists.
    """
    building, final = Path(building), Path(final)
    sync_folder(building)
    if os.path.lexists(final):
        raise FileExistsError(f"{final} already exists: it is left as it is")
    os.rename(building, final)
    _sync(final.absolute().parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def replace_folder(building: str | Path, final: str | Path) -> None:
    """Put a finished folder in place of an existing one, on the same file system, and remove the old one.

    Where the system can exchange two folders, there is no moment at which ``final`` is missing; elsewhere a crash
    between two renames is mended by :func:`recover_folder`. Processes that hold the old files open can go on reading
    them.
    """
    building, final = Path(building), Path(final)
    sync_folder(building)
    # The lock says to recover_folder() of other processes that the old folder is being taken away already.
    with lock_folder(final, f"{final} is being replaced by another process"):
        old = replaced_path(final)
        remove_folder(old)
        if _exchange(building, final):
            os.rename(building, old)
        else:
            os.rename(final, old)
            os.rename(building, final)
        _sync(final.absolute().parent)
        remove_folder(old)


def recover_folder(final: str | Path) -> None:
    """Finish or undo a replacement of ``final`` that was killed half-way; does nothing otherwise."""
    final = Path(os.path.abspath(final))
    old, building = replaced_path(final), building_path(final)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        if old.exists():
            with lock_folder(old, f"{final} is being replaced by another process"):
                if final.exists():
                    remove_folder(old)
                else:
                    os.rename(old, final)
        # Killed right after the exchange: what stands beside is the folder that was replaced, complete and older.
        if (building / "pt_meta.json").stat().st_mtime_ns < (final / "pt_meta.json").stat().st_mtime_ns:
            with lock_folder(building, f"{final} is being replaced by another process"):
                os.rename(building, old)
                remove_folder(old)


def remove_folder(path: str | Path) -> None:
    """Remove a folder and all it holds; nothing happens if it is not there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextlib.contextmanager
def inherited_lock(file: Path, busy: str) -> Iterator[list[int]]:
    """Hold a lock on a file for as long as the block, or a program that is given its descriptors, lasts.

    A program whose parent was killed may have it yet, until it notices: it is waited for.

    Yields:
        What the program is given: the file's descriptor; nothing where there is no such lock.

    Raises:
        BlockingIOError: If another program has it and does not end; ``busy`` is its sentence.
    """
    if fcntl is None:
        yield []
        return
    with open(file, "w") as held:
        deadline = time.monotonic() + _NOTICED
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(busy) from None
                time.sleep(_PAUSE)
        yield [held.fileno()]


@contextlib.contextmanager
def lock_folder(path: str | Path, busy: str) -> Iterator[None]:
    """Hold an advisory lock on an existing folder, so that two processes never write to it at the same time.

    The lock goes with the process: a killed one leaves none behind.

    Raises:
        BlockingIOError: If another process (or another writer in this one) holds the lock; ``busy`` is its sentence.
    """
    if fcntl is None:
        yield
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise BlockingIOError(busy) from err
        yield
    finally:
        os.close(fd)


def human_bytes(count: int) -> str:
    """Return a number of bytes as people read it, e.g. ``1.5 GB``."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def require_space(path: str | Path, needed: int, what: str) -> None:
    """Refuse early what would not fit on the disk of ``path``, which need not exist yet.

    Raises:
        DiskError: If fewer than ``needed`` bytes are free; ``what`` says what they are for.
    """
    folder = Path(os.path.abspath(path))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            errno.ENOSPC,
            f"{what} needs {human_bytes(needed)} and the disk has {human_bytes(free)} left: free some or choose "
            "another path",
            str(path),
        )

"""Checkpoints of a round's training: each is whole or not there, and is checked before training goes on from it.

transformers writes a checkpoint file by file under its final name, and takes the one with the highest number for the
last, whole or not. Here it is written beside and renamed, with a list of its files and their digests. Its weights are
safetensors; the states of optimizer, scheduler and random numbers are files of ``torch.save``, which transformers reads
with ``weights_only=True``: they hold tensors and numbers, and nothing in them is run. ``training_args.bin``, a pickle
that nobody reads, is not written.
"""

from __future__ import annotations

import re
from pathlib import Path

from pt_dance.storage.digests import file_digest
from pt_dance.storage.folders import publish_folder, read_json, remove_folder, write_json

LIST = "files.json"
BUILDING = ".checkpoint.building"
_NAME = re.compile(r"checkpoint-(\d+)")


def publish(written: Path, folder: Path, about: dict[str, float]) -> None:
    """Move a checkpoint that transformers wrote beside to where checkpoints are, and remove those before it.

    ``about`` is what else is to be known when training goes on from it.
    """
    write_json(written / LIST, {"about": about, "files": _digests(written)})
    publish_folder(written, folder / written.name)
    for older in folder.iterdir():
        if _NAME.fullmatch(older.name) and older.name != written.name:
            remove_folder(older)


def newest(folder: Path) -> Path | None:
    """Return the checkpoint to go on from, None where there is none."""
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return after how many steps a checkpoint was written."""
    return int(_NAME.sub(r"\1", checkpoint.name))


def check(checkpoint: Path) -> dict[str, float]:
    """Return what :func:`publish` was told about a checkpoint, after checking that its files are as they were written.

    Raises:
        ValueError: If it is damaged; names the file.
    """
    advice = "remove the checkpoint, and this round is trained from its beginning"
    try:
        made = read_json(checkpoint / LIST)
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {str(checkpoint)!r} is damaged ({error}); {advice}") from None
    files, about = made.get("files"), made.get("about")
    if not isinstance(files, dict) or not isinstance(about, dict):
        raise ValueError(f"{str(checkpoint / LIST)!r} is damaged: it lists no files; {advice}")
    found = _digests(checkpoint)
    wrong = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{str(checkpoint / wrong[0])!r} is damaged: it is not what was written; {advice}")
    return about


def _digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file_digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / LIST
    }

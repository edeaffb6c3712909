"""The folder of a fit: one sub-folder a round, each step of a round finished or absent.

path/
  pt_meta.json          written last: which round is the best, so that the folder loads as a DanceRetriever
  settings.json         what the fit depends on; another fit on the same path must have the same
  corpus/               where the corpus was built here
  rounds/00/index       index of the encoder as it came
  rounds/01/negatives.parquet, query_negatives.parquet, checkpoints/, encoder/, index/, round.json
  rounds/02/...
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pt_dance._files import remove_folder, write_json

SETTINGS = "settings.json"
META = "pt_meta.json"


class RunFolder:
    """Reads and writes the parts of a run.

    Args:
        path: the run's folder; made when first written to.

    Raises:
        FileExistsError: if ``path`` is a file, or a folder with something else than a run in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{str(self.path)!r} is a file; give the path of a new folder or of a pt_dance run")
        if self.path.is_dir():
            names = {entry.name for entry in self.path.iterdir()}
            ours = {SETTINGS, META, "rounds", "corpus", ".corpus.building"}
            if names and not names & ours:
                raise FileExistsError(
                    f"the folder {str(self.path)!r} exists and is no pt_dance run; give a new path, or empty the folder"
                )

    def round(self, number: int) -> Path:
        """The folder of a round, 0 for the encoder as it came."""
        return self.path / "rounds" / f"{number:02d}"

    def settings(self) -> dict | None:
        """What the fit on this path depends on, None before the first."""
        return read_json(self.path / SETTINGS)

    def begin(self, settings: dict) -> None:
        """Starts a fit, or goes on with the one that was begun with the same settings.

        Raises:
            ValueError: if the fit on this path was begun with other settings; says which differ.
        """
        before = self.settings()
        if before is None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, settings)
            return
        differing = [key for key in settings if before.get(key) != settings[key]]
        if differing:
            details = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(settings[key])}" for key in differing)
            raise ValueError(
                f"the run in {str(self.path)!r} was begun with other settings ({details}); "
                "give another path to start anew"
            )

    def finished(self, number: int) -> dict | None:
        """The history row of a finished round, None where it is not finished."""
        return read_json(self.round(number) / "round.json")

    def finish(self, number: int, row: dict) -> None:
        """Marks a round as finished; what only a resumed round needs is removed."""
        write_json(self.round(number) / "round.json", row)
        remove_folder(self.round(number) / "checkpoints")

    def drop_indexes(self, keep: set[int]) -> None:
        """Removes the indexes of all rounds but these, to save disk; they can be made again from the encoders."""
        for folder in sorted((self.path / "rounds").iterdir()):
            if folder.name.isdigit() and int(folder.name) not in keep:
                remove_folder(folder / "index")

    def write_frame(self, number: int, name: str, frame: pd.DataFrame, about: dict) -> None:
        """Writes a frame and what is to be known about it, whole or not at all."""
        folder = self.round(number)
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        beside = folder / f".{name}.parquet.building"
        pq.write_table(
            table.replace_schema_metadata({**(table.schema.metadata or {}), b"about": json.dumps(about)}), beside
        )
        beside.replace(folder / f"{name}.parquet")

    def read_frame(self, number: int, name: str) -> tuple[pd.DataFrame, dict] | None:
        """What :meth:`write_frame` wrote, None where it wrote nothing."""
        path = self.round(number) / f"{name}.parquet"
        if not path.exists():
            return None
        table = pq.read_table(path)
        return table.to_pandas(), json.loads(table.schema.metadata[b"about"])


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, None where there is no such file.

    Raises:
        ValueError: if the file holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON object")
    return content


def read_meta(path: Path, artifact: type) -> dict:
    """The metadata of a fitted run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another kind of artifact.
    """
    meta = read_json(path / META)
    if meta is None:
        raise FileNotFoundError(f"there is no fitted {artifact.__name__} in {str(path)!r}: {META} is missing")
    if (meta.get("type"), meta.get("format")) != (artifact.ARTIFACT_TYPE, artifact.ARTIFACT_FORMAT):
        raise ValueError(
            f"{str(path)!r} holds no {artifact.__name__} but {meta.get('type')!r} of format {meta.get('format')!r}"
        )
    for key in ("round", "num_results", "seed"):
        if type(meta.get(key)) is not int or meta[key] < 0:
            raise ValueError(
                f"{str(path / META)!r} is damaged: {key!r} is {meta.get(key)!r}, no whole number of 0 or more"
            )
    if not isinstance(meta.get("corpus"), (str, type(None))):
        raise ValueError(f"{str(path / META)!r} is damaged: 'corpus' is {meta['corpus']!r}, no path")
    history = meta.get("history")
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise ValueError(f"{str(path / META)!r} is damaged: 'history' is no list of rounds")
    if not (path / "rounds" / f"{meta['round']:02d}").is_dir():
        raise ValueError(f"{str(path / META)!r} is damaged: round {meta['round']} is not in the folder")
    return meta


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

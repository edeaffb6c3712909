"""The folder of a fit: one sub-folder a round, each step of a round finished or absent.

path/
  pt_meta.json          written last: which round is the best, so that the folder loads as a DanceRetriever
  settings.json         what the fit depends on; another fit on the same path must have the same
  corpus/               where the corpus was built here
  logs/                 TensorBoard's files, where a round asks for them
  rounds/00/encoder/, index/, round.json    the encoder as it came, and what was measured of it
  rounds/01/negatives.parquet, query_negatives.parquet, checkpoints/, encoder/, trained.json, index/, round.json
  rounds/02/...
A round whose negatives are refreshed while it is trained has refreshes.jsonl, and refresh/ as long as it is trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pt_dance.corpus.corpus import Corpus
from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.index.dense_index import DenseIndex
from pt_dance.storage import folders
from pt_dance.storage import meta as meta_files
from pt_dance.storage.folders import publish_file, remove_folder, write_json
from pt_dance.storage.meta import META
from pt_dance.storage.texts import first_line
from pt_dance.training import checkpoints

SETTINGS = "settings.json"
TEACHER = "teacher.sqlite"
# Of a round whose negatives are refreshed while it is trained: which batches have which, and what trainer and refresher
# hand each other.
JOURNAL = "refreshes.jsonl"
EXCHANGE = "refresh"
_ENTRIES = {
    **dict.fromkeys(("round", "num_results", "seed"), meta_files.whole_entry()),
    "corpus": meta_files.entry_of(str, "a path", missing=True),
    "history": meta_files.list_entry(dict, "a list of rounds"),
}
# What runs of version 0.1 did where their settings say nothing of it.
_THEN = {"processes": 1, "start": "last", "refresh": "between"}
_ADVICE = "remove pt_meta.json, this round's folder and those of later rounds, and fit goes on from there"


class RunFolder:
    """Read and write the parts of a run.

    Args:
        path: The run's folder; made when first written to.

    Raises:
        FileExistsError: If ``path`` is a file, or a folder with something else than a run in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{str(self.path)!r} is a file; give the path of a new folder or of a pt_dance run")
        if self.path.is_dir():
            names = {entry.name for entry in self.path.iterdir()}
            ours = {SETTINGS, META, "rounds", "corpus", ".corpus.building", ".corpus.turn"}
            ours |= {f".{SETTINGS}.new", f".{META}.new"}
            if names and not names & ours:
                raise FileExistsError(
                    f"the folder {str(self.path)!r} exists and is no pt_dance run; give a new path, or empty the folder"
                )

    @property
    def is_saved(self) -> bool:
        """Whether the folder is one that ``save`` wrote: the outcome of a fit, without the fit."""
        return (self.path / META).exists() and not (self.path / SETTINGS).exists()

    def round(self, number: int) -> Path:
        """Return the folder of a round, 0 for the encoder as it came."""
        return self.path / "rounds" / f"{number:02d}"

    def settings(self) -> dict | None:
        """Return what the fit on this path depends on, and what trained rounds chose; None before the first."""
        return read_json(self.path / SETTINGS)

    def begin(self, settings: dict) -> None:
        """Start a fit, or go on with the one that was begun with the same settings.

        Where other settings were given but nothing was trained with them, they give way, and so does what was made with
        them.

        Raises:
            ValueError: If rounds were trained on this path with other settings; says which differ.
        """
        before = self.settings()
        if before is None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, settings)
            return
        before = {**{key: _THEN[key.split()[-1]] for key in settings if key.split()[-1] in _THEN}, **before}
        # other options that an older version did not have are off in its runs
        differing = [key for key in settings if before.get(key) != settings[key] and (key in before or settings[key])]
        if not differing:
            return
        if self._is_trained():
            details = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(settings[key])}" for key in differing)
            raise ValueError(
                f"the run in {str(self.path)!r} was begun with other settings ({details}); "
                "give another path to start anew"
            )
        remove_folder(self.path / "rounds")
        write_json(self.path / SETTINGS, settings)

    def _is_trained(self) -> bool:
        """Return whether any step was taken that is kept."""
        rounds = [folder for folder in self.path.glob("rounds/*") if folder.name.isdigit() and int(folder.name) > 0]
        return any(
            (folder / "encoder").exists()
            or (folder / "trained.json").exists()
            or checkpoints.newest(folder / "checkpoints") is not None
            for folder in rounds
        )

    def finished(self, number: int) -> dict | None:
        """Return the history row of a finished round, None where it is not finished.

        Raises:
            ValueError: If the row is damaged.
        """
        row = read_json(self.round(number) / "round.json")
        if row is None:
            return None
        missing = [key for key in ("round", "name", "loss", "training_loss", "steps") if key not in row]
        if missing or row["round"] != number:
            problem = f"{missing[0]!r} is missing" if missing else f"it is of round {row['round']!r}"
            raise ValueError(f"{str(self.round(number) / 'round.json')!r} is damaged: {problem}; {_ADVICE}")
        return row

    def finish(self, number: int, row: dict) -> None:
        """Mark a round as finished."""
        write_json(self.round(number) / "round.json", row)

    def checkpoints(self, number: int) -> Path:
        """Return where the checkpoints of a round's training are."""
        return self.round(number) / "checkpoints"

    def drop_work(self, number: int, *, carried_on: bool) -> None:
        """Remove what the training of a round, which is done, needed, but for what a round that goes on needs."""
        if not carried_on:
            remove_folder(self.checkpoints(number))
        remove_folder(self.checkpoints(number - 1))
        remove_folder(self.round(number) / EXCHANGE)

    def trained(self, number: int) -> dict | None:
        """Return what a round's training gave: ``loss``, ``steps``, ``fingerprint``; None where it is not done.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.round(number) / "trained.json"
        trained = read_json(path)
        kinds: dict[str, Any] = {"loss": (int, float), "steps": int, "fingerprint": str}
        for key, kind in kinds.items():
            if trained is not None and not isinstance(trained.get(key), kind):
                raise ValueError(f"{str(path)!r} is damaged: {key!r} is {trained.get(key)!r}; {_ADVICE}")
        return trained

    def finish_training(
        self, number: int, loss: float, steps: int, fingerprint: str, settled: dict, refreshed: dict
    ) -> dict:
        """Mark the training of a round, whose encoder is written, as done; return what :meth:`trained` will.

        ``settled`` is what the encoder decided, see :mod:`pt_dance.training.defaults`; the settings show it, too.
        ``refreshed`` is what the history tells of refreshes beside the training, empty where there were none.
        """
        write_json(self.path / SETTINGS, {**(self.settings() or {}), f"round {number} chosen": settled})
        trained = {"loss": loss, "steps": steps, "fingerprint": fingerprint, "settled": settled}
        trained |= {"refreshed": refreshed} if refreshed else {}
        write_json(self.round(number) / "trained.json", trained)
        return trained

    def encoder(self, number: int, given: DualEncoder) -> DualEncoder:
        """Return the encoder that a round's training gave.

        Args:
            number: Of the round.
            given: The encoder that the run began with, whose device and verbosity are taken.

        Raises:
            ValueError: If its weights are not those that were written.
        """
        folder = self.round(number) / "encoder"
        encoder = DualEncoder.load(folder, device=str(given.device), verbose=given.verbose)
        trained = self.trained(number)
        if trained is not None and trained["fingerprint"] != encoder.fingerprint:
            raise ValueError(f"{str(folder)!r} is damaged: its weights are not those that round {number} gave")
        return encoder

    def index(self, number: int, encoder: DualEncoder, corpus, *, engine: Any = None, verbose: bool) -> DenseIndex:
        """Return the index of a round, in a folder of its own; made where it is not there yet.

        Args:
            number: Of the round.
            encoder: Its encoder.
            corpus: ``Corpus`` to index; None where the index is there.
            engine: Has workers that encode; this process does where None.
            verbose: Shows progress.

        Raises:
            ValueError: If the index was made from another corpus, or is damaged.
        """
        path = self.round(number) / "index"
        index = DenseIndex(path, encoder, verbose=verbose)
        if not index.built():
            if path.exists():
                index.open()  # says which of its files is damaged
            return index.indexer(engine=engine).index(corpus)
        known = index.open().meta.get("corpus")
        if corpus is not None and known != corpus.fingerprint:
            raise ValueError(
                f"the index {str(path)!r} was made from another corpus than {str(corpus.path)!r}; give that one, "
                "or another path for this run"
            )
        return index

    def has(self, number: int) -> bool:
        """Return whether a round's encoder can be had from here: that of round 0 is the one that was given."""
        return not self.is_saved and (number == 0 or self.trained(number) is not None)

    def corpus_of(self, source: object, *, verbose: bool) -> Corpus | None:
        """Return a corpus as it is, or that in the run's folder, made of ``source`` where it is not there yet.

        Args:
            source: A ``Corpus``, None, or whatever ``Corpus.build`` takes.
            verbose: Shows progress.

        Raises:
            FileExistsError: If the folder holds a corpus of other documents.
        """
        if source is None or isinstance(source, Corpus):
            return source
        is_new = not self.path.exists()
        try:
            return Corpus.build(source, self.path / "corpus", verbose=verbose)
        except BaseException:
            if is_new and self.path.exists() and not any(self.path.iterdir()):
                self.path.rmdir()
            raise

    def drop_indexes(self, keep: set[int]) -> None:
        """Remove the indexes of all rounds but these, to save disk; they can be made again from the encoders."""
        for folder in sorted((self.path / "rounds").iterdir()):
            if folder.name.isdigit() and int(folder.name) not in keep:
                # under another name first: what a kill leaves of it must not lie where an index belongs
                dropped = folder / ".index.dropped"
                remove_folder(dropped)
                if (folder / "index").exists():
                    os.rename(folder / "index", dropped)
                    remove_folder(dropped)

    def write_frame(self, number: int, name: str, frame: pd.DataFrame, about: dict) -> None:
        """Write a frame and what is to be known about it, whole or not at all."""
        folder = self.round(number)
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        beside = folder / f".{name}.parquet.building"
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"about": json.dumps(about)})
        pq.write_table(table, beside, write_page_checksum=True)
        publish_file(beside, folder / f"{name}.parquet")

    def read_frame(self, number: int, name: str) -> tuple[pd.DataFrame, dict] | None:
        """Return what :meth:`write_frame` wrote, None where it wrote nothing.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.round(number) / f"{name}.parquet"
        if not path.exists():
            return None
        try:
            table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
            frame, about = table.to_pandas(), json.loads(table.schema.metadata[b"about"])
            damage = None if {"qid", "docno"} <= set(frame.columns) and isinstance(about, dict) else "it lacks columns"
        except Exception as error:  # whatever pyarrow makes of bytes that are no Parquet file, the user gets one line
            damage = first_line(error)
        if damage is not None:
            raise ValueError(f"{str(path)!r} is damaged ({damage}); remove it, and these negatives are mined again")
        return frame, about


def read_json(path: Path) -> dict | None:
    """Return the object in a JSON file, None where there is no such file.

    Raises:
        ValueError: If the file holds no JSON object.
    """
    try:
        return folders.read_json(path)
    except FileNotFoundError:
        return None


def read_meta(path: Path, artifact: Any) -> dict:
    """Return the metadata of a fitted run.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of another kind of artifact.
    """
    meta = meta_files.read_meta(
        path, f"fitted {artifact.__name__}", type=artifact.ARTIFACT_TYPE, formats=(artifact.ARTIFACT_FORMAT,),
        entries=_ENTRIES, advice="fit one there",
    )  # fmt: skip
    if not (path / "rounds" / f"{meta['round']:02d}").is_dir():
        raise ValueError(f"{str(path / META)!r} is damaged: round {meta['round']} is not in the folder")
    return meta


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

"""How a DanceRetriever is saved and loaded, apart from what it does."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.passages import open_corpus
from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.index.dense_index import DenseIndex
from pt_dance.storage.folders import write_json
from pt_dance.storage.writing import new_folder
from pt_dance.training.run_folder import META, RunFolder, read_meta


def keep_frozen(given: DualEncoder, encoder: DualEncoder) -> None:
    """Freeze in an encoder that was read from a round's folder what is frozen in the one a run was given.

    A folder of weights does not say which of them are to be trained; adapters come back frozen altogether.
    """
    wanted = {name: parameter.requires_grad for name, parameter in given.model.named_parameters()}
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(wanted.get(name, parameter.requires_grad))


class RunFiles:
    """The part of :class:`pt_dance.DanceRetriever` that has to do with files."""

    def save(self, path: str | Path) -> None:
        """Writes what retrieval needs (current encoder and index, history) to a new folder that :meth:`load` opens.

        Raises:
            FileExistsError: if ``path`` exists.
            OSError: if the disk is full or cannot be written to.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists; give the path of a new folder")
        encoder, index = self.encoder, self.index
        with new_folder(path, "the retriever") as building:
            folder = building / "rounds" / f"{self._round:02d}"
            (folder / "encoder").mkdir(parents=True)
            encoder._write(folder / "encoder")
            shutil.copytree(index.index_path, folder / "index")
            self._write_meta(building)

    @classmethod
    def load(cls, path: str | Path, *, corpus: Corpus | None = None, **kwargs) -> RunFiles:
        """Opens a fitted run, or a folder that :meth:`save` wrote; it gives the same results as the one that was saved.

        Args:
            path: the folder.
            corpus: the corpus, needed only to train further; the run's own is opened where it is still there.
            **kwargs: other options of the class; those of the saved one are taken where not given.

        Raises:
            FileNotFoundError: if there is no finished run in the folder.
            ValueError: if its metadata is damaged.
        """
        path = Path(path)
        meta = read_meta(path, cls)
        run = RunFolder(path)
        started = run.round(0 if (run.round(0) / "encoder").exists() else meta["round"])
        if corpus is None and meta["corpus"] is not None and (path / meta["corpus"]).exists():
            with contextlib.suppress(FileNotFoundError):  # passages whose whole documents are gone
                corpus = open_corpus(path / meta["corpus"])
        options = {"num_results": meta["num_results"], "seed": meta["seed"], "verbose": False, **kwargs}
        return cls(DualEncoder.load(started / "encoder"), corpus, path, **options)

    def _refreshed(self, number: int) -> DenseIndex:
        """The index of a round's encoder, in a folder of its own; made where it is not there yet."""
        path = self._run.round(number) / "index"
        index = DenseIndex(path, self._encoder_of(number), verbose=self.verbose)
        if not index.built():
            if path.exists():
                index.open()  # says which of its files is damaged
            return index.index(self.corpus)
        known = index.open().meta.get("corpus")
        if self.corpus is not None and known != self.corpus.fingerprint:
            raise ValueError(
                f"the index {str(path)!r} was made from another corpus than {str(self.corpus.path)!r}; give that one, "
                "or another path for this run"
            )
        return index

    def _encoder_of(self, number: int) -> DualEncoder:
        if number == 0:
            return self.initial_encoder
        folder, given = self._run.round(number) / "encoder", self.initial_encoder
        encoder = DualEncoder.load(folder, device=str(given.device), verbose=given.verbose)
        trained = self._run.trained(number)
        if trained is not None and trained["fingerprint"] != encoder.fingerprint:
            raise ValueError(f"{str(folder)!r} is damaged: its weights are not those that round {number} gave")
        return encoder

    def _own_corpus(self, source: object) -> Corpus:
        folder, is_new = self.path / "corpus", not self.path.exists()
        if folder.exists():
            return Corpus(folder)
        try:
            return Corpus.build(source, folder, verbose=self.verbose)
        except BaseException:
            if is_new and self.path.exists() and not any(self.path.iterdir()):
                self.path.rmdir()
            raise

    def _write_meta(self, folder: Path) -> None:
        corpus = None if self.corpus is None else os.path.relpath(self.corpus.path, folder)
        meta = {
            "type": self.ARTIFACT_TYPE,
            "format": self.ARTIFACT_FORMAT,
            "package_hint": self.ARTIFACT_PACKAGE_HINT,
            "num_results": self.num_results,
            "seed": self.seed,
            "corpus": corpus,
            "round": self._round,
            "history": self._history,
        }
        write_json(folder / META, meta)

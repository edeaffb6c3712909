"""An encoder on disk: a plain sentence-transformers folder with a note for PyTerrier."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyterrier as pt

from pt_dance.encoder import models
from pt_dance.storage import folders as _files
from pt_dance.storage.writing import new_folder

if TYPE_CHECKING:
    from pt_dance.encoder.dual_encoder import DualEncoder

_SETTINGS = ("batch_size", "text_field", "dtype", "max_length")


class EncoderFiles:
    """What :class:`pt_dance.DualEncoder` does with folders and packages."""

    def save(self, path: str | os.PathLike) -> DualEncoder:
        """Write a sentence-transformers folder (safetensors); it is written beside and renamed when complete.

        Args:
            path: The folder to make.

        Returns:
            The encoder itself, whose ``path`` is now that folder.

        Raises:
            FileExistsError: If there is something at ``path`` already.
            OSError: If the disk is full or cannot be written to.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise FileExistsError(f"{path} exists already; give a new folder.")
        with new_folder(path, "the encoder") as building:
            self._write(building)
        self.path = path
        return self

    def _write(self, folder: Path) -> None:
        """Write the files to an empty folder, as a part of something larger."""
        with models.no_bars():
            self.model.save(str(folder), create_model_card=self.model._model_card_text is not None)
        settings = {name: getattr(self, f"_{name}", getattr(self, name)) for name in _SETTINGS}
        _files.write_json(
            folder / "pt_meta.json",
            {
                "type": self.ARTIFACT_TYPE,
                "format": self.ARTIFACT_FORMAT,
                "package_hint": self.ARTIFACT_PACKAGE_HINT,
                "name": self.name,
                "fingerprint": self.fingerprint,
                "similarity": self.similarity,
                "settings": settings,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike, **kwargs: Any) -> DualEncoder:
        """Open a folder; options that are not given are those it was saved with.

        Args:
            path: A folder written by :meth:`save`, or any sentence-transformers folder.
            **kwargs: Options of :class:`DualEncoder`.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it holds no model that can be read.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"There is no encoder folder {path}.")
        meta = models.read_meta(path, cls.ARTIFACT_TYPE)
        saved = meta.get("settings", {})
        settings = {name: saved[name] for name in ("batch_size", "text_field", "dtype") if name in saved}
        encoder = cls(path, **(settings | kwargs))
        if isinstance(meta.get("name"), str):
            encoder.name = meta["name"]
        if "max_length" not in kwargs:
            encoder.max_length = saved.get("max_length")  # the saved tokenizer cuts there already
        return encoder

    def build_package(self, package_path: str | None = None, **kwargs: Any) -> str:
        """Package the encoder as it is now, saved or not; see :meth:`pyterrier.Artifact.build_package`."""
        if package_path is None:
            if not isinstance(self.path, Path):
                raise ValueError("Say where to write the package: this encoder has not been saved to a folder.")
            package_path = f"{self.path}.tar.lz4"
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            return pt.Artifact(folder).build_package(package_path, **kwargs)

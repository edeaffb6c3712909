"""The provider that PyTerrier finds through its entry point and asks for ``dance:`` data sets."""

from __future__ import annotations

from collections.abc import Iterable

from pyterrier.datasets import Dataset, DatasetProvider

from pt_dance.datasets.beir import BeirFolder
from pt_dance.datasets.pydocs import PyDocs
from pt_dance.storage import options


class DanceDatasetProvider(DatasetProvider):
    """Give ``pt.get_dataset("dance:pydocs")`` and ``pt.get_dataset("dance:<folder in BEIR layout>")``."""

    def get_dataset(self, name: str) -> Dataset:
        """Return a data set by what follows ``dance:``.

        Args:
            name: ``pydocs``, or the path of a folder in BEIR layout (``~`` stands for the home folder). A folder called
                pydocs in the working directory is reached as ``./pydocs``.

        Returns:
            A :class:`PyDocs` or a :class:`BeirFolder`.

        Raises:
            FileNotFoundError: If there is no such folder, or it holds no ``corpus.jsonl`` or ``corpus.jsonl.gz``.
        """
        if name == "pydocs":
            return PyDocs()
        folder = options.path_of(name, "the data set's folder")
        if not folder.is_dir():
            raise FileNotFoundError(
                f"there is no data set 'dance:{name}': after 'dance:' goes either 'pydocs' or the path of a folder in "
                "BEIR layout, and no folder of that name was found"
            )
        return BeirFolder(folder)

    def list_dataset_names(self) -> Iterable[str]:
        """Return the names that are the same everywhere; folders have the names of their paths."""
        return ["pydocs"]

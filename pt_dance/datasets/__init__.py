"""Collections behind ``pt.get_dataset("dance:...")``: docstrings of installed packages, and folders in BEIR layout."""

from pt_dance.datasets.beir import BeirFolder
from pt_dance.datasets.provider import DanceDatasetProvider
from pt_dance.datasets.pydocs import PyDocs

__all__ = ["BeirFolder", "DanceDatasetProvider", "PyDocs"]

"""Train dense retrievers inside PyTerrier.

The public names are loaded when they are first used, so that ``import pt_dance`` stays quick and loads neither
torch nor Java.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pt_dance import analysis, datasets, engines, losses, mining, recipes
    from pt_dance.corpus import Corpus, PassageCorpus, bm25
    from pt_dance.encoder import CrossEncoderScorer, DualEncoder
    from pt_dance.estimator import DanceRetriever
    from pt_dance.index import DenseIndex
    from pt_dance.recipes import Round
    from pt_dance.retriever import AnnRetriever, DenseRetriever

__version__ = "0.1.0"

_OBJECTS = {
    "AnnRetriever": "retriever",
    "Corpus": "corpus",
    "CrossEncoderScorer": "encoder",
    "DanceRetriever": "estimator",
    "DenseIndex": "index",
    "DenseRetriever": "retriever",
    "DualEncoder": "encoder",
    "PassageCorpus": "corpus",
    "Round": "recipes",
    "bm25": "corpus",
}
_MODULES = ("analysis", "datasets", "engines", "losses", "mining", "recipes")

# Spelled out, since type checkers and editors read it without running it; a test compares it with the tables above.
__all__ = [
    "AnnRetriever",
    "Corpus",
    "CrossEncoderScorer",
    "DanceRetriever",
    "DenseIndex",
    "DenseRetriever",
    "DualEncoder",
    "PassageCorpus",
    "Round",
    "__version__",
    "analysis",
    "bm25",
    "datasets",
    "engines",
    "losses",
    "mining",
    "recipes",
]


def __getattr__(name: str):
    if name in _OBJECTS:
        value = getattr(_import_module(f"pt_dance.{_OBJECTS[name]}"), name)
    elif name in _MODULES:
        value = _import_module(f"pt_dance.{name}")
    else:
        raise AttributeError(f"module 'pt_dance' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))

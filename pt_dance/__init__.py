"""Train dense retrievers inside PyTerrier.

The public names are loaded when they are first used, so that ``import pt_dance`` stays quick and loads neither
torch nor Java.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_CLASSES = {
    "AnnRetriever": "retriever",
    "Corpus": "corpus",
    "CrossEncoderScorer": "encoder",
    "DanceRetriever": "estimator",
    "DenseIndex": "index",
    "DenseRetriever": "retriever",
    "DualEncoder": "encoder",
    "PassageCorpus": "corpus",
    "Round": "recipes",
}
_MODULES = ("datasets", "losses", "mining", "recipes")

__all__ = ["__version__", *_CLASSES, *_MODULES]


def __getattr__(name: str):
    if name in _CLASSES:
        value = getattr(_import_module(f"pt_dance.{_CLASSES[name]}"), name)
    elif name in _MODULES:
        value = _import_module(f"pt_dance.{name}")
    else:
        raise AttributeError(f"module 'pt_dance' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))

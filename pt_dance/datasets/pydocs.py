"""A real test collection that needs no download: the docstrings of the Python packages that are installed here."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyterrier as pt

from pt_dance.datasets._docstrings import STANDARD_LIBRARY, Docstring, module_files, read_docstrings, split_docstring
from pt_dance.datasets.beir import BeirFolder
from pt_dance.storage.digests import file_digest, text_id
from pt_dance.storage.folders import publish_folder, read_json, replace_folder, write_json

PACKAGES = {
    STANDARD_LIBRARY: None,
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "torch": "torch",
    "transformers": "transformers",
    "sentence_transformers": "sentence-transformers",
    "datasets": "datasets",
}
"""The packages whose docstrings make the collection, by the name they are imported by, and their distributions."""

# Changes whenever the rules here or in _docstrings.py do, so that a collection made by other rules is not taken for
# one made by these.
_RULES = 1

_SPLITS = ("train", "dev", "test")
_FILES = ("corpus.jsonl", "queries.jsonl", *(f"qrels/{split}.tsv" for split in _SPLITS))

_ONE_BUILD = threading.Lock()


class PyDocs(BeirFolder):
    """The docstrings of the standard library and of the installed packages among :data:`PACKAGES`, as a collection.

    The query is a docstring's summary, the document is the qualified name (``title``) and the docstring without its
    summary (``text``). Several documents may have the same summary: all of them are relevant to the one query. Queries
    are split 80/10/10 into ``train``, ``dev`` and ``test`` by a hash of their first document's name, and every document
    answers one query only, so neither queries nor relevant documents are shared between splits.

    Sources are parsed, never imported or run. The collection is made when it is first asked for (about half a minute)
    and kept below PyTerrier's home, in a folder for each combination of installed versions, so that it is made again
    when a package changes. Folders for versions no longer installed may be deleted at will.
    """

    def __init__(self):
        self._folder = None
        self._verbose = True

    def _configure(self, *, verbose: bool = True) -> None:
        """Take the options of ``pt.get_dataset("dance:pydocs", verbose=False)``: whether to show progress bars."""
        self._verbose = verbose

    @property
    def folder(self) -> Path:
        """Where the collection is kept; makes it if need be."""
        if self._folder is None:
            self._folder = _cached(PACKAGES, Path(pt.io.pyterrier_home()) / "pt_dance", verbose=self._verbose)
        return self._folder

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(_SPLITS)

    @property
    def _name(self) -> str:
        return "pydocs"

    def __repr__(self) -> str:
        return "PyDocs()"

    def get_corpus_lang(self) -> str:
        """Return the language of the documents."""
        return "en"

    def get_topics_lang(self) -> str:
        """Return the language of the queries."""
        return "en"

    def info_url(self) -> str:
        """Return where docstrings and their summaries are defined."""
        return "https://peps.python.org/pep-0257/"


def make_collection(
    docstrings: Iterable[Docstring],
) -> tuple[list[dict[str, str]], list[dict[str, str]], list[tuple[str, str]]]:
    """Make a collection of docstrings.

    Of several docstrings with the same body only the first stays (copies in subclasses and generated files). Docstrings
    with the same summary, whatever its case and closing punctuation, share one query; its qid is the first one's name.

    Args:
        docstrings: Docstrings with distinct names.

    Returns:
        In the order of the docstrings, documents and queries as their files have them, and pairs of a relevant
        document's query and its own identifier.
    """
    documents: list[dict[str, str]] = []
    queries: dict[str, dict[str, str]] = {}
    qrels: list[tuple[str, str]] = []
    bodies: set[str] = set()
    for name, text in docstrings:
        parts = split_docstring(text)
        if parts is None or parts[1] in bodies:
            continue
        summary, body = parts
        bodies.add(body)
        documents.append({"_id": name, "title": name, "text": body})
        query = queries.setdefault(summary.casefold().rstrip(".!? "), {"_id": name, "text": summary})
        qrels.append((query["_id"], name))
    return documents, list(queries.values()), qrels


def _split_of(name: str) -> str:
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10
    return {8: "dev", 9: "test"}.get(tenth, "train")


def _cached(packages: dict[str, str | None], home: Path, *, verbose: bool) -> Path:
    """Return the folder of the collection for the installed versions of the packages, making it if need be."""
    versions = _versions(packages)
    final = home / f"pydocs-{text_id(json.dumps([_RULES, versions], sort_keys=True))}"
    # Python's parser is not safe to use from several threads at once ("recursion depth mismatch", 3.11).
    with _ONE_BUILD:
        if not _is_as_written(final):
            _make(versions, final, verbose=verbose)
    return final


def _is_as_written(folder: Path) -> bool:
    """Return whether a folder holds the collection that was written to it, with the very same content."""
    try:
        digests = read_json(folder / "about.json")["digests"]
        return all(file_digest(folder / name) == digests[name] for name in _FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(versions: dict[str, str], final: Path, *, verbose: bool) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own for every process: two may be making the same collection at the same time.
    building = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".building", dir=final.parent))
    try:
        _build(versions, building, verbose=verbose)
        building.chmod(0o755)
        # Another process may have been quicker; what it made is the same.
        if not _is_as_written(final):
            if final.exists():
                replace_folder(building, final)
            else:
                with contextlib.suppress(FileExistsError):
                    publish_folder(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _versions(packages: dict[str, str | None]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    versions = {}
    for package, distribution in packages.items():
        if package == STANDARD_LIBRARY:
            versions[package] = platform.python_version()
            continue
        files = module_files(package)
        if not files:
            continue
        try:
            versions[package] = importlib.metadata.version(distribution or package)
        except importlib.metadata.PackageNotFoundError:
            # Sources without an installation: nothing but the files themselves tells one state from another.
            states = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]
            versions[package] = text_id(json.dumps(states))
    return versions


def _build(versions: dict[str, str], folder: Path, *, verbose: bool) -> None:
    files = [file for package in versions for file in module_files(package)]
    unreadable: list[str] = []

    def docstrings() -> Iterator[Docstring]:
        for module, path in pt.tqdm(files, desc="pydocs: reading docstrings", unit="file", disable=not verbose):
            try:
                yield from read_docstrings(module, path)
            except (SyntaxError, ValueError):
                # Packages ship templates and files for other Python versions: what does not compile has no docstring.
                unreadable.append(module)

    documents, queries, qrels = make_collection(docstrings())
    _write_lines(folder / "corpus.jsonl", documents)
    _write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    for split in _SPLITS:
        lines = ["query-id\tcorpus-id\tscore"]
        lines += [f"{qid}\t{docno}\t1" for qid, docno in qrels if _split_of(qid) == split]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = {
        "rules": _RULES,
        "versions": versions,
        "files": len(files),
        "unreadable": sorted(unreadable),
        "documents": len(documents),
        "queries": len(queries),
        "digests": {name: file_digest(folder / name) for name in _FILES},
    }
    write_json(folder / "about.json", about)


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

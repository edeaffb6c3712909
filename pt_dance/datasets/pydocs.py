"""A real test collection that needs no download: the docstrings of the Python packages that are installed here."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyterrier as pt

from pt_dance._files import publish_folder
from pt_dance.datasets.beir import BeirFolder

STANDARD_LIBRARY = "standard library"

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

# Changes whenever the rules below do, so that a collection made by other rules is not taken for this one.
_RULES = 1

_SKIPPED_FOLDERS = {"__pycache__", "benchmarks", "examples", "test", "tests", "vendored", "extern", "externals"}
# Internals by its name, but home of what everybody calls numpy.sum and numpy.argsort.
_PUBLIC_FOLDERS = {"_core"}
# What the standard library's folder holds besides the library: an editor, demonstrations, an old grammar, pip.
_SKIPPED_IN_STANDARD_LIBRARY = {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}

# Escapes in a docstring can make characters that no tokenizer or file should have to meet: controls, lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`'\"(:*])")
# What stands in the summary's place without being one: a signature, a heading, an example, an argument's description.
_NO_SUMMARY = re.compile(r"[\w.*]+ ?\(|[\w ]{1,20}:|>>>|!!!|[-=~*#]")
_SUMMARY_WORDS = (4, 40)
_BODY_WORDS = 20


class Docstring(NamedTuple):
    """A docstring and the full name of the module, class or function it belongs to."""

    name: str
    text: str


class PyDocs(BeirFolder):
    """The docstrings of the standard library and of the installed packages among :data:`PACKAGES`, as a collection.

    The query is a docstring's summary, the document is the qualified name (``title``) and the docstring without its
    summary (``text``). Several documents may have the same summary: all of them are relevant to the one query. Queries
    are split 80/10/10 into ``train``, ``dev`` and ``test`` by a hash of the name, so no query is in two splits, and one
    that is in a split stays in it whatever else is installed.

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
        return ["train", "dev", "test"]

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


def module_files(package: str) -> list[tuple[str, Path]]:
    """List a package's public source files without importing anything.

    Args:
        package: The name of a top-level package or module, or :data:`STANDARD_LIBRARY`.

    Returns:
        (module name, path) of every source file, by name; empty if the package is not installed. Tests, examples,
        vendored packages and folders whose name starts with an underscore (a package's internals) are left out.
    """
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        return sorted(_walk(root, prefix="", skipped=_SKIPPED_FOLDERS | _SKIPPED_IN_STANDARD_LIBRARY))
    # For a name without dots this looks at the search path only; importing starts with the parents of a dotted name.
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return sorted(
            file
            for root in spec.submodule_search_locations
            for file in _walk(Path(root), prefix=f"{package}.", skipped=_SKIPPED_FOLDERS)
        )
    return [(package, Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []


def _walk(root: Path, *, prefix: str, skipped: set[str]) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, files in os.walk(root):
        # Only what can be imported by name: not site-packages, lib-dynload or build settings.
        subfolders[:] = [
            name
            for name in subfolders
            if name.isidentifier() and name not in skipped and (not name.startswith("_") or name in _PUBLIC_FOLDERS)
        ]
        parts = Path(folder).relative_to(root).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix != ".py" or not stem.isidentifier() or stem.startswith("test_") or stem == "conftest":
                continue
            name = prefix + ".".join(parts if stem == "__init__" else (*parts, stem))
            yield name.rstrip("."), Path(folder, file)


def read_docstrings(module: str, path: Path) -> list[Docstring]:
    """Read the docstrings of a module and of its public classes, methods and functions from its source.

    Args:
        module: The module's full name.
        path: Its source file.

    Returns:
        Docstrings in the order of the file; of a name that is defined more than once the first that has one.

    Raises:
        SyntaxError: If the file is not Python of the running version.
    """
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []  # parsing is what takes the time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown escape sequences in other people's strings
        tree = ast.parse(source, filename=str(path))
    found: dict[str, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.setdefault(name, text)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if not child.name.startswith("_"):
                    visit(child, f"{name}.{child.name}")
            elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                visit(child, name)

    visit(tree, module)
    return [Docstring(name, text) for name, text in found.items()]


def split_docstring(text: str) -> tuple[str, str] | None:
    """Take a docstring apart into its summary and the rest.

    Args:
        text: A docstring without indentation.

    Returns:
        The first sentence and everything after it, white space squeezed; None if it does not start with a sentence of
        4 to 40 words, or the rest has fewer than 20 words or repeats that sentence.
    """
    paragraph, _, rest = _UNPRINTABLE.sub(" ", text).strip().partition("\n\n")
    summary, *more = _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)
    body = " ".join([*more, *rest.split()])
    if _NO_SUMMARY.match(summary) or not _SUMMARY_WORDS[0] <= len(_WORD.findall(summary)) <= _SUMMARY_WORDS[1]:
        return None
    # A body that says the summary once more would make its query a matter of copying.
    if summary.rstrip(".") in body or len(_WORD.findall(body)) < _BODY_WORDS:
        return None
    return summary, body


class Collection(NamedTuple):
    """Documents, queries and judgements as they go into files.

    ``documents`` are dicts with docno, title and text; ``queries`` dicts with qid, query and split; ``qrels`` pairs of
    a qid and a docno.
    """

    documents: list[dict[str, str]]
    queries: list[dict[str, str]]
    qrels: list[tuple[str, str]]


def make_collection(docstrings: Iterable[Docstring]) -> Collection:
    """Make a collection of docstrings.

    Of several docstrings with the same body only the first stays (copies in subclasses and generated files). Docstrings
    with the same summary, whatever its case and closing punctuation, share one query; its qid is the first one's name.

    Args:
        docstrings: Docstrings with distinct names.

    Returns:
        The collection, in the order of the docstrings.
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
        documents.append({"docno": name, "title": name, "text": body})
        query = queries.setdefault(
            summary.casefold().rstrip(".!? "), {"qid": name, "query": summary, "split": _split_of(name)}
        )
        qrels.append((query["qid"], name))
    return Collection(documents, list(queries.values()), qrels)


def _split_of(name: str) -> str:
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10
    return {8: "dev", 9: "test"}.get(tenth, "train")


def _cached(packages: dict[str, str | None], home: Path, *, verbose: bool) -> Path:
    """Return the folder of the collection for the installed versions of the packages, making it if need be."""
    versions = _versions(packages)
    key = hashlib.sha256(json.dumps([_RULES, versions], sort_keys=True).encode()).hexdigest()[:16]
    final = home / f"pydocs-{key}"
    if final.is_dir():
        return final
    home.mkdir(parents=True, exist_ok=True)
    # A folder of its own for every process: two may be making the same collection at the same time.
    building = Path(tempfile.mkdtemp(prefix=f".pydocs-{key}.", suffix=".building", dir=home))
    try:
        _build(list(versions), versions, building, verbose=verbose)
        building.chmod(0o755)
        try:
            publish_folder(building, final)
        except OSError:
            if not final.is_dir():  # else another process was quicker; what it made is the same
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


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
            versions[package] = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
    return versions


def _build(packages: list[str], versions: dict[str, str], folder: Path, *, verbose: bool) -> None:
    files = [file for package in packages for file in module_files(package)]
    unreadable: list[str] = []

    def docstrings() -> Iterator[Docstring]:
        for module, path in pt.tqdm(files, desc="pydocs: reading docstrings", unit="file", disable=not verbose):
            try:
                yield from read_docstrings(module, path)
            except (SyntaxError, ValueError):
                # Packages ship templates and files for other Python versions: what does not compile has no docstring.
                unreadable.append(module)

    documents, queries, qrels = make_collection(docstrings())
    _write_lines(
        folder / "corpus.jsonl", ({"_id": d["docno"], "title": d["title"], "text": d["text"]} for d in documents)
    )
    _write_lines(folder / "queries.jsonl", ({"_id": query["qid"], "text": query["query"]} for query in queries))
    splits = {q["qid"]: q["split"] for q in queries}
    (folder / "qrels").mkdir()
    for split in ("train", "dev", "test"):
        lines = ["query-id\tcorpus-id\tscore"]
        lines += [f"{qid}\t{docno}\t1" for qid, docno in qrels if splits[qid] == split]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = {
        "rules": _RULES,
        "versions": versions,
        "files": len(files),
        "unreadable": sorted(unreadable),
        "documents": len(documents),
        "queries": len(queries),
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

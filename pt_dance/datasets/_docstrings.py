"""Reading docstrings out of source files, without importing or running anything."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STANDARD_LIBRARY = "standard library"

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

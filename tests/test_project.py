"""The package as a whole: what importing it costs, what it offers, what it depends on."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import jedi
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pt_dance

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest requires there

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "sentence_transformers", "datasets", "faiss", "matplotlib", "jnius", "pyterrier_dr"}


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stderr == ""
    return {name.split(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement",
    [
        "import pt_dance",
        "import pt_dance.datasets",
        "import pyterrier as pt; pt.get_dataset('dance:pydocs'); assert not pt.java.started()",
    ],
)
def test_import_loads_neither_torch_nor_java(statement):
    loaded = modules_after(statement)
    assert "pt_dance" in loaded
    assert not loaded & HEAVY


def test_every_public_name_is_there():
    assert pt_dance.__all__
    for name in pt_dance.__all__:
        assert getattr(pt_dance, name) is not None
    assert set(pt_dance.__all__) <= set(dir(pt_dance))
    with pytest.raises(AttributeError, match="no attribute 'surely_not'"):
        pt_dance.surely_not  # noqa: B018


def test_type_checkers_and_editors_see_the_same_public_names():
    """They read ``__all__`` and the imports under ``TYPE_CHECKING`` without running either."""
    assert sorted(pt_dance.__all__) == sorted(["__version__", *pt_dance._CLASSES, *pt_dance._MODULES])
    (checked,) = [node for node in ast.parse(Path(pt_dance.__file__).read_text()).body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in checked.body for alias in node.names}
    modules = dict.fromkeys(pt_dance._MODULES, "pt_dance")
    assert homes == {name: f"pt_dance.{home}" for name, home in pt_dance._CLASSES.items()} | modules


def test_editors_complete_the_public_names():
    offered = {found.name for found in jedi.Script("from pt_dance import ").complete()}
    assert set(pt_dance.__all__) - {"__version__"} <= offered
    (signature,) = jedi.Script("from pt_dance import DualEncoder\nDualEncoder(").get_signatures()
    assert [p.name for p in signature.params] == list(inspect.signature(pt_dance.DualEncoder).parameters)


def _imported(*folders: str) -> dict[str, set[str]]:
    """The modules of others that some folders import, late imports and all, with the distributions that hold each."""
    homes = packages_distributions()
    found: set[str] = set()
    for path in itertools.chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    found -= sys.stdlib_module_names | {"pt_dance"}
    return {name: {canonicalize_name(home) for home in homes[name]} for name in found if name in homes}


def _dependencies(*extras: str) -> list[Requirement]:
    """What pyproject.toml requires: the package itself, and some or (with "all") all of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    texts = project["dependencies"] + [text for extra in (optional if extras == ("all",) else extras)
                                       for text in optional[extra]]  # fmt: skip
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if canonicalize_name(requirement.name) != "pt-dance"]


def _names(*extras: str) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in _dependencies(*extras)}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    imported = _imported("pt_dance")
    declared = _names("pisa", "terrier", "lora")
    assert [name for name, homes in imported.items() if not homes & declared] == []
    # The Trainer asks for accelerate; matplotlib, scikit-learn and Jinja2 belong to pt_dance.analysis.
    assert _names() - set().union(*imported.values()) <= {"accelerate", "jinja2", "matplotlib", "scikit-learn"}
    others = _imported("tests", "experiments")
    assert [name for name, homes in others.items() if not homes & _names("all")] == []


def test_what_is_required_is_pinned_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==(\S+)", line).groups() for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    for requirement in _dependencies("all"):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_dependency_has_a_lower_bound():
    for requirement in _dependencies("all"):
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """import-linter over the package in a folder, with the contracts of pyproject.toml."""
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(cache_dir=None))"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=environment, timeout=120
    )


BROKEN = {
    "storage/folders.py": ("from pt_dance.corpus import Corpus", "storage is not allowed to import pt_dance.corpus"),
    "encoder/towers.py": ("from pt_dance.corpus import Corpus", "encoder is not allowed to import pt_dance.corpus"),
    "losses/rows.py": ("import pyterrier", "losses is not allowed to import pyterrier"),
    "mining/filters.py": ("import torch", "mining is not allowed to import torch"),
    "losses/base.py": ("from pt_dance.losses.dual import DualLoss", "No cycles are allowed in pt_dance.losses"),
}


@pytest.mark.parametrize("module", BROKEN)
def test_a_broken_layer_is_found(tmp_path, module):
    """A late import counts, too. The package as it is keeps every contract."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "pt_dance", tmp_path / "pt_dance", ignore=shutil.ignore_patterns("__pycache__"))
    if module is None:
        done = lint_imports(tmp_path)
        assert done.returncode == 0, done.stdout
    else:
        statement, complaint = BROKEN[module]
        with (tmp_path / "pt_dance" / module).open("a") as file:
            file.write(f"\n\ndef late():\n    {statement}\n")
        done = lint_imports(tmp_path)
        assert done.returncode == 1 and complaint in done.stdout, done.stdout + done.stderr

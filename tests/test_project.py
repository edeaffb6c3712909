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
import tarfile
from importlib.metadata import packages_distributions
from pathlib import Path

import jedi
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pt_dance

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest requires there

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "torch", "transformers", "sentence_transformers", "datasets", "faiss", "matplotlib", "jnius", "pyterrier_dr",
    "sklearn", "jinja2",
}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a statement loads in a fresh interpreter."""
    # what some package's .pth file loads when Python starts is not ours
    program = (
        f"import json, sys; old = set(sys.modules)\n{statement}\nprint(json.dumps(sorted({{*sys.modules}} - old)))"
    )
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
    assert sorted(pt_dance.__all__) == sorted(["__version__", *pt_dance._OBJECTS, *pt_dance._MODULES])
    (checked,) = [node for node in ast.parse(Path(pt_dance.__file__).read_text()).body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in checked.body for alias in node.names}
    modules = dict.fromkeys(pt_dance._MODULES, "pt_dance")
    assert homes == {name: f"pt_dance.{home}" for name, home in pt_dance._OBJECTS.items()} | modules


def test_editors_complete_the_public_names():
    offered = {found.name for found in jedi.Script("from pt_dance import ").complete()}
    assert set(pt_dance.__all__) - {"__version__"} <= offered
    (signature,) = jedi.Script("from pt_dance import DualEncoder\nDualEncoder(").get_signatures()
    assert [p.name for p in signature.params] == list(inspect.signature(pt_dance.DualEncoder).parameters)


def _imported(*folders: str) -> dict[str, set[str]]:
    """Return the modules of others that some folders import, late imports too, and the distributions that hold each."""
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
    """Return what pyproject.toml requires: the package itself, and some or (with "all") all of its extras."""
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
    declared = _names("pisa", "terrier", "lora", "lamb", "ray")
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
    """And what people install has no upper one, which would keep it from living beside other packages."""
    for requirement in _dependencies("all"):
        assert ">=" in {bound.operator for bound in requirement.specifier}, requirement
    for requirement in _dependencies("pisa", "terrier", "lora", "lamb", "ray", "test"):
        assert {bound.operator for bound in requirement.specifier} - {"!="} == {">="}, requirement


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter over the package in a folder, with the contracts of pyproject.toml."""
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


def test_broken_layers_are_found(tmp_path):
    """A late import counts, too. The package as it is keeps every contract."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "pt_dance", tmp_path / "pt_dance", ignore=shutil.ignore_patterns("__pycache__"))
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout
    for module, (statement, _) in BROKEN.items():
        with (tmp_path / "pt_dance" / module).open("a") as file:
            file.write(f"\n\ndef late():\n    {statement}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for _, complaint in BROKEN.values():
        assert complaint in done.stdout, done.stdout


def test_the_version_is_said_once_and_the_same_everywhere():
    """The release's workflow compares the tag with it; the changelog has a section of its own for it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pt_dance.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
    assert citation["repository-code"] == project["urls"]["Repository"]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] == "Unreleased" and pt_dance.__version__ in sections


def test_workflows_and_hooks_call_what_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = re.findall(r"^make ([a-z]+)", (ROOT / ".ci" / "run").read_text(), re.M)
    called += re.findall(r"`make ([a-z]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["docs", "release", "style", "test"]
    for path in workflows:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            steps = " ".join(step.get("run", "") for step in job["steps"])
            called += re.findall(r"\bmake ([a-z]+)", steps)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    called += [
        hook["entry"].removeprefix("make ") for repo in hooks if repo["repo"] == "local" for hook in repo["hooks"]
    ]
    assert {"test", "lint", "docs", "package"} <= set(called) <= targets
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().split()


def test_the_sdist_holds_all_that_its_tests_need(tmp_path):
    """Everything that belongs to the project's own work, and no leavings of a run."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "_build", "runs", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    (tmp_path / "copy" / "tests" / "__pycache__").mkdir()
    (tmp_path / "copy" / "tests" / "__pycache__" / "left.pyc").touch()
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), "."]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path / "copy", timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    needed = {
        path.relative_to(tmp_path / "copy").as_posix()
        for folder in ("docs", "experiments", "notebooks", "pt_dance", "tests")
        for path in (tmp_path / "copy" / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert needed | {"Makefile", "constraints.txt", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= inside
    assert not [name for name in inside if name.endswith(".pyc")]

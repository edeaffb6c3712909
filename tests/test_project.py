"""The package as a whole: what importing it costs, what it offers, what it depends on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pt_dance

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


def _dependencies() -> list[Requirement]:
    """What the package and all its extras require directly."""
    found = [Requirement(text) for text in requires("pt_dance") or []]
    return [requirement for requirement in found if canonicalize_name(requirement.name) != "pt-dance"]


def test_what_is_required_is_pinned_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==(\S+)", line).groups() for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    for requirement in _dependencies():
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_dependency_has_a_lower_bound():
    for requirement in _dependencies():
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement

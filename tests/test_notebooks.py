"""Notebooks run from top to bottom without a hub; the short one by default, all of them by make test-notebooks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pyterrier as pt
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = "4_your_own_data"
COLAB = "https://colab.research.google.com/github/terrierteam/pt_dance/blob/main/notebooks"


def names(notebook):
    return pytest.param(notebook, id=notebook.stem)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home for PyTerrier that needs no network, with the collection where it was made before."""
    folder = tmp_path_factory.mktemp("home")
    made = Path(pt.io.pyterrier_home()) / "pt_dance"
    made.mkdir(parents=True, exist_ok=True)
    (folder / "pt_dance").symlink_to(made)
    return folder


def test_there_are_four():
    assert [notebook.stem[0] for notebook in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("notebook", [names(notebook) for notebook in NOTEBOOKS])
def test_notebook_is_as_readers_need_it(notebook):
    """The badge opens this notebook, Colab installs what it needs, outputs are stored, nothing tells of a machine."""
    read = nbformat.read(notebook, as_version=4)
    nbformat.validate(read)
    assert f"{COLAB}/{notebook.name})" in read.cells[0].source
    install = next(cell.source for cell in read.cells if cell.cell_type == "code")
    assert "https://download.pytorch.org/whl/cpu" in install and "openjdk" in install
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r"/tmp/|/home/|/root/|/work/|/Users/|site-packages", text)
    cells = [cell for cell in read.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= 6
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    for link in re.findall(r"\]\((\d_\w+\.ipynb)\)", text):
        assert (notebook.parent / link).is_file()


def test_stored_outputs_tell_nothing_of_the_machine(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    from execute import cleaned

    shown = {"output_type": "execute_result", "data": {"text/html": "Corpus('/tmp/x1/runs/corpus') in /tmp/x1"}}
    warned = {"output_type": "stream", "name": "stderr", "text": "a warning"}
    printed = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("one\n", "two\n")]
    cells = [
        {"cell_type": "code", "outputs": [printed[0], warned, printed[1], shown]},
        {"cell_type": "markdown", "source": "text"},
    ]
    read = {"cells": cells, "metadata": {"language_info": {"name": "python", "version": "3.11.7"}}}
    code, text = (done := cleaned(read, "/tmp/x1"))["cells"]
    assert done["metadata"] == {"language_info": {"name": "python"}}
    assert [output.get("text") for output in code["outputs"]] == ["one\ntwo\n", None]
    assert code["outputs"][1]["data"] == {"text/html": "Corpus('runs/corpus') in ."}
    assert text == cells[1]


def run(notebook, home, folder, monkeypatch):
    """Execute a copy in an empty folder; what fails is raised."""
    monkeypatch.setenv("PYTERRIER_HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    read = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(read, timeout=400, kernel_name="python3", resources=resources).execute()
    return read


@pytest.mark.timeout(420)
def test_the_short_notebook_runs(home, tmp_path, monkeypatch):
    read = run(ROOT / "notebooks" / f"{SHORT}.ipynb", home, tmp_path, monkeypatch)
    printed = "".join(o.get("text", "") for c in read.cells if c.cell_type == "code" for o in c.outputs)
    assert "interrupted; on disk:" in printed and "# pandas-encoder" in printed


@pytest.mark.notebooks
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", [names(notebook) for notebook in NOTEBOOKS if notebook.stem != SHORT])
def test_notebook_runs(notebook, home, tmp_path, monkeypatch):
    run(notebook, home, tmp_path, monkeypatch)

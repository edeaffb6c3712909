"""README's code: type checkers accept it, and it runs as it stands on a small collection."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyterrier as pt
import pytest

from pt_dance import DanceRetriever
from small_collection import SmallCollection, standard_library

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


class Parts:
    """The small collection as a PyTerrier data set whose topics are in three parts."""

    def __init__(self, collection: SmallCollection) -> None:
        self.collection = collection
        self.get_corpus_iter = collection.get_corpus_iter

    def get_topics(self, part: str):
        topics = self.collection.topics
        share = {"train": (0, 1, 2, 3), "dev": (4,), "test": (5,)}[part]
        return topics[[number % 6 in share for number in range(len(topics))]].reset_index(drop=True)

    def get_qrels(self, part: str):
        qrels = self.collection.qrels
        return qrels[qrels["qid"].isin(self.get_topics(part)["qid"])].reset_index(drop=True)


def test_a_type_checker_accepts_the_code(tmp_path):
    """As it would in an editor. One wrong word among it is found, so the code is not merely unknown."""
    code = "\n".join(BLOCKS)
    (tmp_path / "right.py").write_text(code)
    (tmp_path / "wrong.py").write_text(code.replace("recipe=", "recipes="))
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent", "right.py", "wrong.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
    command = [sys.executable, "-m", "mypy", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "right.py:" not in done.stdout, done.stdout
    assert done.returncode == 1 and 'Unexpected keyword argument "recipes" for "DanceRetriever"' in done.stdout, done


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("pyterrier_pisa", reason="PISA has wheels for Linux on x86-64 only")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pt, "get_dataset", lambda name: {"dance:pydocs": Parts(standard_library())}[name])
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["dance"], DanceRetriever)
    table = names["table"].set_index("name")
    assert list(table.index) == ["BM25", "dense", "BM25 % 100 >> dense"]
    assert (table[["nDCG@10", "RR@10"]] > 0.1).all(axis=None)

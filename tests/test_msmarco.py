"""experiments/msmarco.py on a collection in exactly the form of ir_datasets' msmarco-passage, with local files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ir_datasets
import pandas as pd
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
from ir_datasets.util import LocalDownload

from small_collection import standard_library

pytest.importorskip("pyterrier_pisa", reason="BM25 without Java needs pyterrier-pisa")
SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "msmarco.py"


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    """The standard library's docstrings as a collection of ir_datasets: documents, a training and a dev split."""
    folder = tmp_path_factory.mktemp("irds")
    collection = standard_library()
    one_line = lambda text: " ".join(text.split())  # noqa: E731
    documents = [f"{d.docno}\t{one_line(d.text)}" for d in collection.documents.itertuples()]
    (folder / "docs.tsv").write_text("\n".join(documents) + "\n")
    docs = TsvDocs(LocalDownload(folder / "docs.tsv"))
    ir_datasets.registry.register("docstrings", Dataset(docs))
    for name, part in (("train", collection.topics.iloc[::2]), ("dev", collection.topics.iloc[1::2])):
        queries = [f"{q.qid}\t{one_line(q.query)}" for q in part.itertuples()]
        judged = collection.qrels[collection.qrels["qid"].isin(part["qid"])]
        (folder / f"{name}.tsv").write_text("\n".join(queries) + "\n")
        (folder / f"{name}.qrels").write_text("".join(f"{q.qid} 0 {q.docno} {q.label}\n" for q in judged.itertuples()))
        split = Dataset(
            docs,
            TsvQueries(LocalDownload(folder / f"{name}.tsv")),
            TrecQrels(LocalDownload(folder / f"{name}.qrels"), {0: "no", 1: "yes"}),
        )
        ir_datasets.registry.register(f"docstrings/{name}", split)
    return folder


@pytest.fixture(scope="module")
def msmarco():
    spec = importlib.util.spec_from_file_location("msmarco", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_ir_datasets_to_the_table_and_again(passages, msmarco, tmp_path, capsys):
    command = [
        "--corpus", "irds:docstrings", "--train", "irds:docstrings/train", "--dev", "irds:docstrings/dev", "--test",
        "--encoder", "static", "--rounds", "1", "--depth", "20", "--batch-size", "16", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    table = msmarco.main(command)
    assert set(table["name"]) == {"BM25", *msmarco.METHODS, *(f"BM25 >> {name}" for name in msmarco.METHODS)}
    assert table["RR@10"].between(0.05, 1).all()
    for method in msmarco.METHODS:
        first = pd.read_parquet(next((tmp_path / "out" / method).rglob("rounds/01/negatives.parquet")))
        assert first["rank"].between(0, 19).all(), "the first negatives come from BM25's best"
        trained = (tmp_path / "out" / method / "rounds" / "01" / "trained.json").stat().st_mtime_ns
        again = msmarco.main([*command[:-4], "--batch-size", "16", "--methods", method, "--out", str(tmp_path / "out")])
        assert (tmp_path / "out" / method / "rounds" / "01" / "trained.json").stat().st_mtime_ns == trained
        before = table[table["name"] == method].iloc[0]
        assert again[again["name"] == method].iloc[0]["RR@10"] == before["RR@10"], "a second call trains nothing"
    assert "irds:docstrings/dev" in capsys.readouterr().out


def test_every_flag_is_explained(msmarco):
    parser_text = SCRIPT.read_text()
    flags = parser_text.count("parser.add_argument(")
    assert flags == parser_text.count("help=") and flags >= 15


def test_of_several_processes_the_first_one_makes_the_table(passages, msmarco, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(msmarco.DanceRetriever, "fit", lambda self, *splits: self)
    command = [
        "--corpus", "irds:docstrings", "--train", "irds:docstrings/train", "--dev", "irds:docstrings/dev", "--test",
        "--encoder", "static", "--methods", "samtone", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert msmarco.main(command) is None
    assert not (tmp_path / "out" / "table.csv").exists()

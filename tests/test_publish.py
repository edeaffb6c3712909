"""What is published: a model with a card written from its run, and the outcome of a run without its texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyterrier as pt
import pytest
import requests
import yaml
from lz4.frame import LZ4FrameFile

from fake_hub import fake_hub
from pt_dance import Corpus, DanceRetriever, DualEncoder, recipes
from pt_dance.encoder.card import model_card
from pt_dance.training.outcome import without_folders
from small_collection import standard_library
from small_models import small_bert

ROOT = Path(__file__).resolve().parents[1]
BASE_CARD = "---\nlicense: cc-by-4.0\nlanguage: en\n---\n\n# A base\n\nTrained by somebody else on something else.\n"


def unpack(package: str, folder: Path) -> Path:
    with LZ4FrameFile(package) as packed, tarfile.open(fileobj=packed) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def small():
    return standard_library(("argparse", "json", "random", "statistics"))


@pytest.fixture(scope="module")
def dance(small, tmp_path_factory):
    """A run of two rounds on a base model that has a card and a licence."""
    folder = tmp_path_factory.mktemp("publish")
    base = DualEncoder.static(list(small.documents["text"]), dim=16, vocab_size=400)
    base.model.save(str(folder / "base-of-ours"), create_model_card=False)
    (folder / "base-of-ours" / "README.md").write_text(BASE_CARD)
    corpus = Corpus.build(small, folder / "docstrings", verbose=False)
    dance = DanceRetriever(
        DualEncoder(folder / "base-of-ours"), corpus, folder / "run", recipe=recipes.ance(rounds=1), verbose=False
    )
    return dance.fit(small.topics, small.qrels, small.topics, small.qrels)


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_card_is_written_from_the_run(dance):
    card = model_card(
        dance.encoder, "me/docstrings", data="docstrings | all", measures={"held out": {"RR@10": 0.25, "nDCG@10": 0.5}}
    )
    head = head_of(card)
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "sentence-transformers"
    assert "base_model" not in head, "a folder is no model on the hub"
    assert "somebody else" not in card and "base-of-ours" in card and "docstrings \\| all" in card
    history = dance.history.set_index("round")["nDCG@10"]
    best = history.idxmax()
    assert f"| validation, before training | {history[0]:.4f} |" in card
    assert f"| validation | {history[best]:.4f} |" in card and "| held out | 0.5000 | 0.2500 |" in card
    assert card.count("- Round ") == best and "Xiong" in card and "@inproceedings" in card
    assert f"{len(dance.corpus):,} documents" in card and dance.encoder.fingerprint in card
    assert str(dance.path.parent) not in card
    assert head_of(model_card(dance.encoder, "me/x", license="mit"))["license"] == "mit"


def test_card_tells_nothing_of_other_weights(dance, tmp_path):
    encoder = dance.encoder
    encoder.save(tmp_path / "kept")
    kept = DualEncoder.load(tmp_path / "kept")
    assert kept.origin == encoder.origin and len(kept.origin["trainings"]) == 1
    assert not (tmp_path / "kept" / "README.md").exists()
    changed = encoder.with_similarity("dot" if encoder.similarity == "cosine" else "cosine")
    card = model_card(changed, "me/x")
    assert "No run of pt_dance that gave these weights is known" in card and "Round 1" not in card
    assert head_of(card)["license"] == "cc-by-4.0"
    towers = DualEncoder.two_towers(kept, DualEncoder.static(["some other words"], dim=16, vocab_size=50))
    assert [base["name"] for base in towers.origin["bases"]] == ["base-of-ours"] and not towers.origin["trainings"]


def test_trainings_follow_each_other(dance, small, tmp_path):
    again = DanceRetriever(
        dance.encoder, dance.corpus, tmp_path / "again", recipe=recipes.mnrl(3, negatives=None), verbose=False
    ).fit(small.topics, small.qrels)
    first, second = again.encoder.origin["trainings"]
    assert first == dance.encoder.origin["trainings"][0]
    assert second["fingerprint"] == again.encoder.fingerprint != first["fingerprint"]


def test_package_has_no_text_and_no_other_round(dance, small, tmp_path):
    package = dance.build_package(str(tmp_path / "run.tar.lz4"))
    folder = unpack(package, tmp_path / "unpacked")
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    number = dance.history.set_index("round")["nDCG@10"].idxmax()
    assert {name.split("/")[1] for name in files if name.startswith("rounds/")} == {f"{number:02d}"}
    everything = b"\n".join(files.values())
    texts = [*small.documents["text"], *small.topics["query"]]
    pieces = [text[:30] for text in texts if len(text) >= 30]
    assert len(pieces) > 50
    for piece in pieces:
        for written in (piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1]):
            assert written.encode() not in everything
    assert str(dance.path.parent).encode() not in everything
    # What is looked for would be found: it is in the corpus.
    kept = b"\n".join(file.read_bytes() for file in dance.corpus.path.rglob("*") if file.is_file())
    assert sum(piece.encode() in kept for piece in pieces) > 20

    loaded = pt.Artifact.load(str(folder))
    assert isinstance(loaded, DanceRetriever) and loaded.corpus is None
    pd_equal(loaded(small.topics.head(5)), dance(small.topics.head(5)))
    assert loaded.history["nDCG@10"].tolist() == dance.history["nDCG@10"].tolist()
    assert loaded.encoder.origin == dance.encoder.origin
    again = unpack(loaded.build_package(str(tmp_path / "again.tar.lz4")), tmp_path / "again")
    assert (again / "pt_meta.json").read_bytes() == (folder / "pt_meta.json").read_bytes()
    with pytest.raises(ValueError, match="has no corpus"):
        loaded.build_package(str(tmp_path / "no.tar.lz4"), include_corpus=True)


def pd_equal(found, expected):
    assert found[["qid", "docno", "rank"]].values.tolist() == expected[["qid", "docno", "rank"]].values.tolist()
    assert np.abs(found["score"] - expected["score"]).max() < 1e-6


def test_package_with_the_corpus(dance, small, tmp_path, capsys):
    folder = unpack(dance.build_package(str(tmp_path / "run.tar.lz4"), include_corpus=True), tmp_path / "unpacked")
    assert capsys.readouterr().out == "", "the retriever is silent"
    loaded = pt.Artifact.load(str(folder))
    assert loaded.corpus.path == folder / "corpus" and loaded.corpus.fingerprint == dance.corpus.fingerprint


def test_package_with_passages(dance, small, tmp_path):
    passages = dance.corpus.to_passages(tmp_path / "passages", length=30, stride=15, verbose=False)
    run = DanceRetriever(dance.encoder, passages, tmp_path / "run", verbose=False)
    folder = unpack(run.build_package(str(tmp_path / "run.tar.lz4"), include_corpus=True), tmp_path / "elsewhere" / "x")
    loaded = pt.Artifact.load(str(folder))
    assert loaded.corpus.fingerprint == passages.fingerprint
    assert loaded.corpus.documents.path == folder / "documents"
    pd_equal(loaded(small.topics.head(3)), run(small.topics.head(3)))


def test_paths_of_the_machine_are_cut():
    assert without_folders("Index('/home/me/runs/bm25') >> x") == "Index('bm25') >> x"
    assert without_folders(r"Index('C:\Users\me\bm25')") == "Index('bm25')"
    for kept in ("https://example.org/a/b", "and/or", "a / b", "1/2/3"):
        assert without_folders(kept) == kept


ON_THE_HUB = """
import json, sys
import huggingface_hub, numpy as np, pyterrier as pt, pyterrier_dr
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer
from pt_dance import DanceRetriever, DualEncoder

run, endpoint, bert = sys.argv[1:]
dance = DanceRetriever.load(run)
encoder = dance.encoder
address = encoder.push_to_hub("me/encoder", data="docstrings", measures={"test": {"RR@10": 0.5}})
texts = ["parse arguments", "a random number"]
vectors = encoder.encode_queries(texts)
folder = snapshot_download("me/encoder")
opened = DualEncoder("me/encoder")
by_others = {
    "plain": SentenceTransformer("me/encoder").encode_query(texts),
    "ours": opened.encode_queries(texts),
    "artifact": pt.Artifact.load(folder).encode_queries(texts),
}
dance.to_hf("me/run", pretty_name="Docstrings")
try:
    encoder.push_to_hub("me/read-only")
    refused = ""
except OSError as error:
    refused = str(error)
huggingface_hub.constants.HF_HUB_DISABLE_XET = True  # as where there is no hf_xet
DualEncoder(bert).push_to_hub("me/bert")
of_pyterrier_dr = pyterrier_dr.SBertBiEncoder("me/bert").encode_queries(texts)
fetched = pt.Artifact.from_url(f"{endpoint}/datasets/me/run/resolve/main/artifact.tar.lz4")
topics = pt.new.queries(texts)
print(json.dumps({
    "address": address,
    "differences": {name: float(np.abs(found - vectors).max()) for name, found in by_others.items()},
    "pyterrier_dr": float(np.abs(of_pyterrier_dr - DualEncoder(bert).encode_queries(texts)).max()),
    "bases": opened.origin["bases"],
    "kept": DualEncoder.load(folder).origin == encoder.origin,
    "same": fetched(topics)["docno"].tolist() == dance(topics)["docno"].tolist(),
    "kind": type(fetched).__name__,
    "refused": refused,
}))
"""


@pytest.mark.timeout(400)
def test_hub(dance, small, tmp_path):
    """The real upload and download code; huggingface_hub reads its settings when it is imported, hence a process.

    Large files go up by Xet, as they do wherever hf_xet is installed, and those of one repository without it.
    """
    pytest.importorskip("hf_xet", reason="huggingface_hub brings hf_xet along on x86-64 and ARM only")
    bert = small_bert(list(small.topics["query"]), tmp_path)
    with fake_hub() as hub:
        surroundings = {
            "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_not_a_token", "HF_HUB_DISABLE_XET": "0",
            "HF_HOME": str(tmp_path / "hf"), "PYTERRIER_HOME": str(tmp_path / "pt"), "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(dance.path), hub.address, bert],
            env=os.environ | surroundings, capture_output=True, text=True, timeout=380, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        told = json.loads(done.stdout.splitlines()[-1])
    assert told["address"] == f"{hub.address}/me/encoder"
    assert max(told["differences"].values()) < 1e-6 and told["pyterrier_dr"] < 1e-6
    assert told["bases"] == [{"name": "encoder", "model": "me/encoder", "license": "cc-by-4.0"}]
    assert told["kept"] and told["same"] and told["kind"] == "DanceRetriever"
    assert told["refused"].startswith(f"'me/read-only' could not be published on {hub.address}: ")
    assert "403" in told["refused"] and "\n" not in told["refused"]
    model, run = hub.repositories["models/me/encoder"], hub.repositories["datasets/me/run"]
    by_xet = {call.split("/")[3] + "/" + call.split("/")[4] for call in hub.calls if "/xet-write-token/" in call}
    by_lfs = {call.split(".git")[0].removeprefix("POST /") for call in hub.calls if call.endswith("/objects/batch")}
    assert by_xet == {"me/encoder", "me/run", "me/read-only"} and by_lfs == {"me/bert"}
    card = model["README.md"].decode()
    assert "| test |  | 0.5000 |" in card and "somebody else" not in card and head_of(card)["license"] == "cc-by-4.0"
    assert {"modules.json", "pt_meta.json", "model.safetensors"} <= {name.split("/")[-1] for name in model}
    readme = run["README.md"].decode()
    assert "TODO" not in readme and "from_hf('me/run')" in readme and "The corpus is not part of it" in readme
    assert "pyterrier-artifact.dense_retriever.dance" in head_of(readme)["tags"]
    assert set(run) == {"README.md", "artifact.tar.lz4", "artifact.tar.lz4.json"}
    (tmp_path / "run.tar.lz4").write_bytes(run["artifact.tar.lz4"])
    assert not list(unpack(str(tmp_path / "run.tar.lz4"), tmp_path / "unpacked").rglob("*.arrow"))


def test_refusals_are_one_sentence(dance, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_hub() as hub:
        hub.refuses = (401, "Invalid username or password.")
        with pytest.raises(OSError, match=r"'me/x' could not be published on .*: ") as error:
            dance.encoder.push_to_hub("me/x", endpoint=hub.address, token="hf_wrong")
        assert "\n" not in str(error.value)
        address = hub.address
    with pytest.raises(OSError, match=r"'me/x' could not be published on .*: ") as error:
        dance.encoder.push_to_hub("me/x", endpoint=address, token="hf_wrong")  # nobody is there any more
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is no name of a repository"):
        dance.encoder.push_to_hub("not a name/at all/", endpoint=address)


def test_zenodo(dance, small, tmp_path, monkeypatch):
    send = requests.Session.request
    with fake_hub() as hub:
        monkeypatch.setattr(
            requests.Session,
            "request",
            lambda self, method, url, **options: send(
                self, method, url.replace("https://sandbox.zenodo.org", hub.address), **options
            ),
        )
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        dance.to_zenodo(sandbox=True, pretty_name="Docstrings")
        (files,), (about,) = hub.deposits, hub.described
    assert set(files) == {"artifact.tar.lz4", "artifact.tar.lz4.json"}
    assert about["title"] == "Docstrings" and "TODO" not in about["description"] and "Round 1" in about["description"]
    (tmp_path / "run.tar.lz4").write_bytes(files["artifact.tar.lz4"])
    loaded = pt.Artifact.load(str(unpack(str(tmp_path / "run.tar.lz4"), tmp_path / "unpacked")))
    pd_equal(loaded(small.topics.head(3)), dance(small.topics.head(3)))


def test_encoder_as_an_artifact_has_a_card(dance):
    readme = dance.encoder._hf_readme(repo="me/x", branch="v2", metadata={"type": "bi_encoder", "format": "f"})
    assert "from_hf('me/x@v2')" in readme and "TODO" not in readme and "Round 1" in readme

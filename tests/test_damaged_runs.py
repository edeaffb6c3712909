"""Folders of runs that are damaged or hostile: one plain error that names the file, nothing silent, nothing run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pyterrier as pt
import pytest
import torch
from ir_measures import nDCG
from safetensors.torch import load_file, save_file

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round, recipes
from small_collection import standard_library

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

WEIGHTS = "rounds/01/encoder/model.safetensors"
FAST = dict(batch_size=16, learning_rate=0.02, checkpoint_steps=2)


class Run:
    """A finished run of two rounds, and one that was interrupted when its second encoder was to be written."""

    def __init__(self, folder):
        small = standard_library()
        topics = small.topics[small.topics["qid"].isin(small.qrels["qid"])].head(60)
        self.train, self.dev, self.qrels = topics[topics.index % 4 > 0], topics[topics.index % 4 == 0], small.qrels
        self.corpus = Corpus.build(small, folder / "corpus", verbose=False)
        self.encoder = DualEncoder.static(small.documents["text"], dim=16, vocab_size=1000, seed=1)
        # each round with an optimiser of its own: the second one is trained again from what is left of the first
        self.recipe = recipes.ance(1, carry_optimizer=False, **FAST)
        self.first_stage = DanceRetriever(self.encoder, self.corpus, folder / "first", verbose=False)(topics)
        self.whole, self.interrupted = folder / "whole", folder / "interrupted"
        self.fit(self.whole)
        shutil.copytree(self.whole, self.interrupted)
        for name in ("rounds/02/round.json", "rounds/02/trained.json", "pt_meta.json"):
            (self.interrupted / name).unlink()
        for name in ("rounds/02/encoder", "rounds/02/index"):
            shutil.rmtree(self.interrupted / name)

    def dance(self, path, **options):
        options = {"recipe": self.recipe, "measure": nDCG @ 10, "verbose": False, **options}
        return DanceRetriever(self.encoder, self.corpus, path, **options)

    def fit(self, path, **options):
        results = self.first_stage[self.first_stage["qid"].isin(self.train["qid"])]
        return self.dance(path, **options).fit(results, self.qrels, self.dev, self.qrels)

    def search(self, path):
        return DanceRetriever.load(path)(self.dev)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("runs"))


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def garbage(file):
    file.write_bytes(np.random.default_rng(0).bytes(2000))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[200] ^= 0xFF
    file.write_bytes(bytes(content))


def put_pickle(file):
    file.write_bytes(pickle.dumps(Canary(file.with_name("canary"))))


def write(content):
    def change(file):
        file.write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def update(**values):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(key):
    return lambda file: file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))


def other_table(columns=("qid", "docno", "score", "rank"), about=b"{}"):
    def change(file):
        table = pq.read_table(file)
        pq.write_table(table.select(list(columns)).replace_schema_metadata({b"about": about} if about else {}), file)

    return change


def other_weights(file):
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def pickled_weights(file):
    file.unlink()
    put_pickle(file.with_name("pytorch_model.bin"))


def both_weights(file):
    torch.save({"embedding.weight": torch.zeros(1)}, file.with_name("pytorch_model.bin"))
    garbage(file)


def hostile_module(file):
    modules = json.loads(file.read_text())
    (file.parent / "evil.pkl").write_bytes(pickle.dumps(Canary(file.with_name("canary"))))
    modules[0] |= {"type": "joblib.numpy_pickle", "path": "evil.pkl"}
    file.write_text(json.dumps(modules))


def hostile_activation(file):
    modules = json.loads(file.read_text())
    folder = file.parent / "2_Dense"
    folder.mkdir()
    size = next(iter(load_file(file.with_name("model.safetensors")).values())).shape[1]
    settings = {"in_features": size, "out_features": size, "bias": False, "activation_function": "antigravity.fly"}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({"linear.weight": torch.eye(size)}, folder / "model.safetensors")
    modules.insert(1, {"idx": 1, "name": "dense", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    file.write_text(json.dumps(modules))


def lose(file):
    shutil.rmtree(file) if file.is_dir() else file.unlink()


DEEP = "[" * 100_000

# the file, what is done to it, and what the error must name besides
INTERRUPTED = {
    "negatives of garbage": ("rounds/02/negatives.parquet", garbage),
    "negatives cut": ("rounds/02/negatives.parquet", cut),
    "negatives of nothing": ("rounds/02/negatives.parquet", empty),
    "negatives with a bit turned": ("rounds/02/negatives.parquet", flip),
    "negatives that are a pickle": ("rounds/02/negatives.parquet", put_pickle),
    "negatives without docno": ("rounds/02/negatives.parquet", other_table(columns=("qid", "score"))),
    "negatives without their report": ("rounds/02/negatives.parquet", other_table(about=None)),
    "negatives with a report of garbage": ("rounds/02/negatives.parquet", other_table(about=b"{")),
    "earlier negatives of garbage": ("rounds/01/negatives.parquet", garbage, lambda run: lose(run / "rounds/02")),
    "history row of garbage": ("rounds/01/round.json", garbage),
    "history row cut": ("rounds/01/round.json", cut),
    "history row a list": ("rounds/01/round.json", write("[]")),
    "history row too deep": ("rounds/01/round.json", write(DEEP)),
    "history row of another round": ("rounds/01/round.json", update(round=2)),
    "history row without steps": ("rounds/01/round.json", without("steps")),
    "history row without loss": ("rounds/01/round.json", without("training_loss")),
    "training of garbage": ("rounds/01/trained.json", garbage),
    "training without its loss": ("rounds/01/trained.json", without("loss")),
    "training with steps in words": ("rounds/01/trained.json", update(steps="many")),
    "settings of garbage": ("settings.json", garbage),
    "settings a list": ("settings.json", write("[]")),
    "weights a pickle": (WEIGHTS, put_pickle, "rounds/01/encoder"),
    "weights pickled beside": (WEIGHTS, pickled_weights, "pytorch_model.bin"),
    "weights of garbage, and a pickle": (WEIGHTS, both_weights, "rounds/01/encoder"),
    "weights cut": (WEIGHTS, cut, "rounds/01/encoder"),
    "weights of another model": (WEIGHTS, other_weights, "rounds/01/encoder", "not those"),
    "weights gone": ("rounds/01/encoder", lose, "rounds/01/encoder"),
    "modules of garbage": ("rounds/01/encoder/modules.json", garbage, "rounds/01/encoder"),
    "a module that unpickles": ("rounds/01/encoder/modules.json", hostile_module, "rounds/01/encoder"),
    "a module that was put in": ("rounds/01/encoder/modules.json", hostile_activation, "rounds/01/encoder"),
    "tokenizer of garbage": ("rounds/01/encoder/tokenizer.json", garbage, "rounds/01/encoder"),
    "index cut": ("rounds/01/index/vecs.f4", cut, lambda run: lose(run / "rounds/02")),
    "index without its metadata": ("rounds/01/index/pt_meta.json", lose, "index", lambda run: lose(run / "rounds/02")),
}  # fmt: skip


def is_refused(call, folder, *words):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    message = str(caught.value.args[0])
    assert "\n" not in message and len(message.replace(str(folder), "")) < 500, message
    for word in words:
        assert word in message, message
    assert not list(folder.rglob("canary")), "something was unpickled"
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_an_interrupted_run_that_is_damaged(run, tmp_path, case):
    name, damage, *more = INTERRUPTED[case]
    shutil.copytree(run.interrupted, tmp_path / "run")
    for entry in more:
        if callable(entry):
            entry(tmp_path / "run")
    damage(tmp_path / "run" / name)
    words = [entry for entry in more if isinstance(entry, str)] or [name]
    is_refused(lambda: run.fit(tmp_path / "run"), tmp_path / "run", *words)


FINISHED = {
    "metadata of garbage": ("pt_meta.json", garbage),
    "metadata cut": ("pt_meta.json", cut),
    "metadata too deep": ("pt_meta.json", write(DEEP)),
    "metadata a list": ("pt_meta.json", write("[]")),
    "metadata gone": ("pt_meta.json", lose),
    "metadata of another artifact": ("pt_meta.json", update(type="sparse_index"), "sparse_index"),
    "round a path": ("pt_meta.json", update(round="../../elsewhere")),
    "round negative": ("pt_meta.json", update(round=-1)),
    "round true": ("pt_meta.json", update(round=True)),
    "round that is not there": ("pt_meta.json", update(round=10**9)),
    "history a number": ("pt_meta.json", update(history=3)),
    "history of numbers": ("pt_meta.json", update(history=[1, 2])),
    "no results": ("pt_meta.json", update(num_results=0), "num_results"),
    "seed in words": ("pt_meta.json", update(seed="x"), "'seed'"),
    "corpus a number": ("pt_meta.json", update(corpus=1), "'corpus'"),
    "first encoder gone": ("rounds/00/encoder/modules.json", lose, "rounds/00/encoder"),
    "weights a pickle": ("rounds/02/encoder/model.safetensors", put_pickle, "rounds/02/encoder"),
    "weights of another model": ("rounds/02/encoder/model.safetensors", other_weights, "rounds/02/encoder"),
    "vectors cut": ("rounds/02/index/vecs.f4", cut),
    "vectors gone": ("rounds/02/index/vecs.f4", lose),
    "docnos cut": ("rounds/02/index/docnos.txt", cut),
    "index metadata of garbage": ("rounds/02/index/pt_meta.json", garbage),
    "index metadata with a huge size": ("rounds/02/index/pt_meta.json", update(vec_size=10**12)),
}


@pytest.mark.parametrize("case", FINISHED)
def test_a_finished_run_that_is_damaged(run, tmp_path, case):
    name, damage, *words = FINISHED[case]
    shutil.copytree(run.whole, tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "pt_meta.json").read_text())
    (tmp_path / "run" / "pt_meta.json").write_text(json.dumps(meta | {"round": 2}))
    damage(tmp_path / "run" / name)
    is_refused(lambda: run.search(tmp_path / "run"), tmp_path / "run", *(words or [name]))


def test_the_runs_are_whole_where_nothing_is_damaged(run, tmp_path):
    shutil.copytree(run.interrupted, tmp_path / "interrupted")
    again = run.fit(tmp_path / "interrupted")
    assert run.search(run.whole).equals(run.search(tmp_path / "interrupted"))
    assert again.retriever(round=2).index.fingerprint == run.dance(run.whole).retriever(round=2).index.fingerprint


def test_other_settings_in_the_folder_are_named(run, tmp_path):
    shutil.copytree(run.interrupted, tmp_path / "run")
    update(seed=1)(tmp_path / "run" / "settings.json")
    is_refused(lambda: run.fit(tmp_path / "run"), tmp_path / "run", "seed was 1, is 42")


def test_a_damaged_checkpoint_is_named(run, tmp_path, monkeypatch):
    def full_disk(self, path):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        shutil.copytree(run.interrupted, tmp_path / "run")
        patch.setattr(DualEncoder, "save", full_disk)
        run.fit(tmp_path / "run")
    checkpoint = tmp_path / "run" / "rounds" / "02" / "checkpoints" / "checkpoint-2"
    state = checkpoint / "optimizer.pt"
    good = state.read_bytes()
    for damage in (put_pickle, cut, flip):
        state.write_bytes(good)
        damage(state)
        is_refused(lambda: run.fit(tmp_path / "run"), tmp_path / "run", str(state))
    state.write_bytes(good)
    assert run.fit(tmp_path / "run").retriever(round=2).index.fingerprint == (
        run.dance(run.whole).retriever(round=2).index.fingerprint
    )


def test_damaged_scores_of_a_teacher_are_named(run, tmp_path):
    teacher = run.corpus.text_loader() >> pt.apply.doc_score(lambda row: float(len(row["text"]) % 7))
    recipe = [Round(loss="margin_mse", teacher=teacher, **FAST)]
    run.fit(tmp_path / "run", recipe=recipe)
    shutil.rmtree(tmp_path / "run" / "rounds" / "01")
    lose(tmp_path / "run" / "pt_meta.json")
    garbage(tmp_path / "run" / "teacher.sqlite")
    with pytest.raises(ValueError, match=r"teacher\.sqlite.* is damaged"):
        run.fit(tmp_path / "run", recipe=recipe)

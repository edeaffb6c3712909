"""One cell: a method trained with one setting and one seed on one collection, and what is measured of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyterrier as pt
import torch

from common import minilm_path
from evidence.data import Collection
from evidence.evaluate import (
    MEASURES,
    Target,
    measure_bm25,
    measure_own,
    measure_zero_shot,
    own_target,
    score,
    zero_shot_target,
)
from evidence.methods import BASELINES, FIRST_CELL, METHODS, ROWS, Method, Setting, first_encoder, grid, with_start
from evidence.protocol import Protocol
from evidence.teacher import folder_of, scored
from pt_dance import DanceRetriever, DualEncoder, Round
from pt_dance.recipes import current_model
from pt_dance.storage.folders import lock_folder


@dataclass(frozen=True)
class Cell:
    """Which cell: everything but the setting, which tuning finds."""

    collection: str
    encoder: str
    method: str
    seed: int

    def file(self, runs: Path) -> Path:
        """Where its measures are kept."""
        return runs / "cells" / self.collection / self.encoder / f"{self.method}-{self.seed}.parquet"


class Study:
    """The study at one size, with what its cells share opened once in this process.

    Args:
        protocol: sizes.
        data: folder of the collections.
        runs: folder for everything that is made.
    """

    def __init__(self, protocol: Protocol, data: Path, runs: Path) -> None:
        self.protocol, self.data, self.runs = protocol, data, runs
        self._collections: dict[tuple, Collection] = {}
        self._teachers: dict[str, pt.Transformer] = {}

    @contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Hold what is made in a folder below ``runs``, and wait for another worker that is making it."""
        held = self.runs / "locks" / folder.relative_to(self.runs)
        held.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(lock_folder(held, "another worker is making this"))
                    break
                except BlockingIOError:
                    time.sleep(0.2)
            yield

    def collection(self, name: str, encoder: str) -> Collection:
        """A training collection with the queries of an encoder's budget."""
        budget = self.protocol.budgets[encoder]
        key = (name, encoder)
        if key not in self._collections:
            made = Collection(name, self.data, self.runs / "data", self.protocol, budget)
            with self.alone(made.folder):
                _ = made.corpus, made.document_pool, made.query_pool
            self._collections[key] = made
            sizes = self.runs / "sizes" / f"{name}-{encoder}.json"
            sizes.parent.mkdir(parents=True, exist_ok=True)
            sizes.write_text(json.dumps(self._collections[key].describe()))
        return self._collections[key]

    def taught_on(self, encoder: str) -> list[Collection]:
        """What the teacher learns from."""
        return [self.collection(name, encoder) for name in self.protocol.taught_on]

    def teacher(self, collection: Collection, encoder: str) -> pt.Transformer:
        """The cross-fitted teacher of a collection."""
        key = collection.folder.name
        if key not in self._teachers:
            with self.alone(folder_of(collection)):
                self._teachers[key] = scored(collection, self.taught_on(encoder))
        return self._teachers[key]

    def first_encoder(self, name: str, start: str, collection: Collection, seed: int) -> DualEncoder:
        """The untrained encoder of a cell; one tower is made once, as its tokenizer reads all documents."""
        budget = self.protocol.budgets[name]
        folder = self.runs / "first" / collection.name / f"{name}-{budget.queries}-{seed}"
        with self.alone(folder):
            if not folder.exists():
                first_encoder(name, collection, seed, minilm_path()).save(folder)
        return with_start(DualEncoder.load(folder), start, seed)

    def cells(self, methods: Sequence[str] | None = None) -> list[Cell]:
        """Every cell, in the order in which they are made.

        A seed after the other, so that all methods are compared wherever the study ends; those with a teacher after
        three seeds of the others; collections in turn.
        """
        names = [name for name in ROWS if methods is None or name in methods]
        taught = [name for name in names if name in METHODS and METHODS[name].teacher]
        return [
            Cell(collection, encoder, method, seed)
            for encoder in self.protocol.encoders
            for seeds in (self.protocol.budgets[encoder].seeds[:3], self.protocol.budgets[encoder].seeds[3:])
            for part in ([name for name in names if name not in taught], taught)
            for seed in seeds
            for method in part
            if not (method in BASELINES and is_fixed(method, encoder, seed))
            for collection in self.protocol.training
        ]

    # --- training -----------------------------------------------------------------------------------------------------

    def train(
        self, collection: Collection, encoder: str, method: Method, seed: int, setting: Setting, unit: int, folder: Path
    ) -> tuple[DualEncoder, dict]:
        """Train a method, or what it starts from and then it; returns its encoder and what it cost.

        Args:
            collection: what is trained on.
            encoder: name of the encoder.
            method: what is trained.
            seed: fixes first weights, order of training and dropout.
            setting: a point of the grid.
            unit: steps of a unit.
            folder: where the run is kept while it trains.
        """
        before: dict = {}
        if method.after is None:
            start = self.first_encoder(encoder, method.start, collection, seed)
        else:
            # The same learning rate: a stage goes on as its checkpoint was trained.
            shared = folder.parent / f"{method.after}-{setting.learning_rate:g}-{unit}"
            start, before = self.train(
                collection, encoder, METHODS[method.after], seed, Setting(setting.learning_rate), unit, shared
            )
        with self.alone(folder):
            if (folder / "about.json").exists():
                return DualEncoder.load(folder / "encoder"), json.loads((folder / "about.json").read_text())
            teacher = self.teacher(collection, encoder) if method.teacher else None
            recipe = method.rounds(setting, unit, collection, teacher)
            recipe = [replace(one, batch_size=collection.budget.batch_size) for one in recipe]
            return _fit(start, collection, recipe, seed, folder, before)

    # --- tuning -------------------------------------------------------------------------------------------------------

    def tune(self, collection: Collection, encoder: str, method: str) -> Setting:
        """The best setting by nDCG@10 of the tuning queries, by successive halving; read back where it was found."""
        file = self.runs / "tuned" / collection.name / encoder / f"{method}.json"
        if file.exists():
            return Setting(**json.loads(file.read_text())["chosen"])
        settings = grid(METHODS[method], collection)
        if METHODS[method].after is not None and method != FIRST_CELL:
            rate = self.tune(collection, encoder, FIRST_CELL).learning_rate
            settings = [setting for setting in settings if setting.learning_rate == rate]
        target = own_target(collection, "tune")
        tried = []
        unit = collection.budget.unit
        for share in (*self.protocol.halving, 1.0):
            if len(settings) == 1:
                break
            ranked = []
            for setting in settings:
                steps = max(1, round(unit * share))
                name = "-".join(f"{value:g}" for value in asdict(setting).values() if value is not None)
                folder = self.runs / "tuning" / collection.name / encoder / f"{method}-{name}-{steps}"
                trained, _ = self.train(collection, encoder, METHODS[method], 0, setting, steps, folder)
                value = score(target, trained)
                tried.append({**asdict(setting), "unit": steps, "nDCG@10": value})
                ranked.append((value, setting))
            ranked.sort(key=lambda pair: -pair[0])
            settings = [setting for _, setting in ranked[: max(1, len(ranked) // 3)]]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"chosen": asdict(settings[0]), "tried": tried}, indent=1))
        return settings[0]

    # --- measuring ----------------------------------------------------------------------------------------------------

    def targets(self, without: str) -> list[Target]:
        """The zero-shot collections; a collection's own documents are left out."""
        names = [name for name in self.protocol.zero_shot if name != without]
        most, words, folder = self.protocol.zero_shot_queries, self.protocol.words, self.runs / "data"
        targets = []
        for name in names:
            with self.alone(folder / "zero-shot" / name):
                targets.append(zero_shot_target(name, self.data, folder, most, words))
        return targets

    def trained(self, cell: Cell) -> tuple[DualEncoder, dict]:
        """The encoder of a cell and what it cost, its setting included; trained where it is not on disk."""
        collection = self.collection(cell.collection, cell.encoder)
        if cell.method == "untrained":
            return self.first_encoder(cell.encoder, "sde", collection, cell.seed), {}
        setting = self.tune(collection, cell.encoder, cell.method)
        folder = self.runs / "training" / cell.collection / cell.encoder / str(cell.seed) / cell.method
        unit = collection.budget.unit
        method = METHODS[cell.method]
        encoder, cost = self.train(collection, cell.encoder, method, cell.seed, setting, unit, folder)
        return encoder, {"setting": asdict(setting), **cost}

    def run(self, cell: Cell) -> None:
        """Make a cell, unless it is there."""
        file = cell.file(self.runs)
        if file.exists():
            return
        collection = self.collection(cell.collection, cell.encoder)
        target = own_target(collection, "reported")
        about: dict = asdict(cell)
        if cell.method == "bm25":
            measured = measure_bm25(target, collection.folder, MEASURES)
            others = []
            for other in self.targets(cell.collection):
                with self.alone(other.folder):
                    others.append(measure_bm25(other, other.folder, MEASURES[:1]))
        else:
            encoder, cost = self.trained(cell)
            about |= cost
            measured = measure_own(target, encoder)
            others = [measure_zero_shot(self.targets(cell.collection), encoder)]
        measured = measured.assign(cluster=collection.cluster_of(measured))
        others = [other.assign(cluster=other["qid"]) for other in others]
        write(file, pd.concat([measured, *others], ignore_index=True), about)


def _fit(
    start: DualEncoder, collection: Collection, recipe: list[Round], seed: int, folder: Path, before: dict
) -> tuple[DualEncoder, dict]:
    """Train by a recipe; keep the encoder and what it cost, together with what was spent before."""
    began = time.perf_counter()
    dance = DanceRetriever(
        start, collection.corpus, folder / "run", recipe=recipe, num_results=100, seed=seed, keep="best", verbose=False
    )
    dance.fit(collection.document_pool, collection.train[1])
    trained = dance.history[dance.history["round"] > 0]
    mined = sum(recipe_mines(recipe)) * (len(collection.corpus) + len(collection.train[0]))
    about = {
        "seconds": time.perf_counter() - began,
        "steps": int(trained["steps"].sum()),
        "mine_seconds": float(trained["mine_seconds"].sum()),
        "train_seconds": float(trained["train_seconds"].sum()),
        "texts_for_mining": mined,
    }
    about = {name: value + before.get(name, 0) for name, value in about.items()}
    about["last_loss"] = float(trained["training_loss"].iloc[-1])
    about["device"] = torch.cuda.get_device_name() if start.device.type == "cuda" else start.device.type
    folder.mkdir(parents=True, exist_ok=True)
    encoder = dance.encoder
    if not (folder / "encoder").exists():
        encoder.save(folder / "encoder")
    (folder / "about.json").write_text(json.dumps(about))
    shutil.rmtree(folder / "run", ignore_errors=True)
    return encoder, about


def is_fixed(method: str, encoder: str, seed: int) -> bool:
    """Whether another seed would give the same numbers as the first one, which is seed 1."""
    return seed != 1 and (method == "bm25" or encoder != "static")


def recipe_mines(recipe: list) -> list[bool]:
    """Which rounds encode the collection to mine from the model."""
    return [r.negatives is current_model or r.query_negatives == "dense" for r in recipe]


def write(file: Path, frame: pd.DataFrame, about: dict) -> None:
    """A frame and what is to be known of it, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({b"about": json.dumps(about).encode()})
    pq.write_table(table, file.with_suffix(".new"), compression="zstd")
    file.with_suffix(".new").rename(file)


def read(file: Path) -> tuple[pd.DataFrame, dict]:
    """What :func:`write` wrote."""
    table = pq.read_table(file, partitioning=None)
    return table.to_pandas(), json.loads(table.schema.metadata[b"about"])

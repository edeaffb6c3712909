"""From cells to what is committed, and from that to tables."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from evidence.cells import Cell, read, write
from evidence.inference import MAIN, ZERO_SHOT
from evidence.methods import METHODS, ROWS
from evidence.protocol import REPORTED, Protocol

BACKWARDS = "d→q nDCG@10"
IN_CELL = ["collection", "measure", "qid", "cluster"]
NAMES = {"bm25": "BM25", "untrained": "untrained", **{name: method.text for name, method in METHODS.items()}}
ENCODERS = {
    "static": "a static tower from nothing",
    "static-minilm": "a static tower from MiniLM's token embeddings",
    "minilm": "all-MiniLM-L6-v2",
}


def name_of(protocol: Protocol, encoder: str) -> str:
    """What tells cells of one protocol from another's: a digest of everything that a cell of an encoder depends on."""
    fixed = replace(protocol, name="", training=(), encoders=(), resamples=0, budgets={})
    budget = replace(protocol.budgets[encoder], seeds=())
    return xxhash.xxh3_64_hexdigest(f"{fixed} {budget}".encode())


def collect(protocol: Protocol, runs: Path, results: Path) -> None:
    """Put the cells that are there together, for each encoder and collection: values in Parquet, the rest in JSON.

    Args:
        protocol: which cells there are.
        runs: where they were made.
        results: where the files go.
    """
    results.mkdir(parents=True, exist_ok=True)
    for folder in sorted((runs / "cells").glob("*/*")):
        parts, abouts = [], []
        for file in sorted(folder.glob("*.parquet")):
            frame, about = read(file)
            abouts.append(about)
            parts.append(frame.assign(method=about["method"], seed=about["seed"]))
        name = f"{folder.parent.name}-{folder.name}"
        table = pa.Table.from_pandas(wide(pd.concat(parts, ignore_index=True)), preserve_index=False)
        pq.write_table(table, results / f"{name}.parquet", compression="zstd", compression_level=19)
        tuned = {
            file.stem: json.loads(file.read_text())
            for file in sorted((runs / "tuned" / folder.parent.name / folder.name).glob("*.json"))
        }
        sizes = json.loads((runs / "sizes" / f"{name}.json").read_text())
        queries = protocol.budgets[folder.name].queries
        spread = runs / "data" / f"{folder.parent.name}-{queries or 'all'}" / "teacher" / "spread.json"
        if spread.exists():
            sizes["teacher"] = json.loads(spread.read_text())
        told = {"protocol": name_of(protocol, folder.name), "sizes": sizes, "cells": abouts, "tuning": tuned}
        (results / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a query and measure, a column a cell (``method/seed``): a tenth of the bytes of a row a value."""
    cell = frame["method"].astype("str") + "/" + frame["seed"].astype("str")
    table = frame.assign(cell=cell).pivot(index=IN_CELL, columns="cell", values="value")
    return table.astype("float32").reset_index().rename_axis(columns=None)


def long(table: pd.DataFrame) -> pd.DataFrame:
    """What :func:`wide` made, as a row a value again: ``IN_CELL``, method, seed, value."""
    frame = table.melt(id_vars=IN_CELL, var_name="cell", value_name="value").dropna(subset="value")
    cell, names = pd.factorize(frame.pop("cell"))  # a few dozen names, of a row a value
    named = pd.Series(names, dtype=str).str.rsplit("/", n=1, expand=True)
    seed = named[1].to_numpy(dtype=int)
    return frame.assign(method=named[0].array[cell], seed=seed[cell]).reset_index(drop=True)


def unpack(protocol: Protocol, results: Path, runs: Path) -> None:
    """Put the committed cells of this protocol back where they were made, so that they are not made again."""
    files = [(name, file) for name in protocol.budgets for file in files_of(results, name, ".json").values()]
    for encoder, file in files:
        told = json.loads(file.read_text())
        if told["protocol"] != name_of(protocol, encoder):
            continue
        frame = long(pq.read_table(file.with_suffix(".parquet"), partitioning=None).to_pandas())
        for about in told["cells"]:
            cell = Cell(about["collection"], about["encoder"], about["method"], about["seed"])
            if not cell.file(runs).exists():
                mine = frame[(frame["method"] == cell.method) & (frame["seed"] == cell.seed)]
                write(cell.file(runs), mine[[*IN_CELL, "value"]].reset_index(drop=True), about)
            for method, found in told["tuning"].items():
                tuned = runs / "tuned" / cell.collection / encoder / f"{method}.json"
                if not tuned.exists():
                    tuned.parent.mkdir(parents=True, exist_ok=True)
                    tuned.write_text(json.dumps(found, indent=1))
        sizes = runs / "sizes" / file.name
        sizes.parent.mkdir(parents=True, exist_ok=True)
        sizes.write_text(json.dumps(told["sizes"]))


def files_of(results: Path, encoder: str, suffix: str) -> dict[str, Path]:
    """Files of an encoder's cells by training collection; what else lies in the folder has other names."""
    files = {name: results / f"{name}-{encoder}{suffix}" for name in sorted(REPORTED)}
    return {name: file for name, file in files.items() if file.exists()}


@lru_cache
def load(results: Path, encoder: str) -> pd.DataFrame:
    """All committed cells of an encoder, read once; empty where there are none."""
    parts = [
        long(pq.read_table(file, partitioning=None).to_pandas()).assign(trained_on=name)
        for name, file in files_of(results, encoder, ".parquet").items()
    ]
    if not parts:
        return pd.DataFrame()
    # Hundreds of pieces are cut out of a million rows, and Arrow's strings would be copied for each.
    kinds = dict.fromkeys(("qid", "cluster"), object)
    kinds |= dict.fromkeys(("collection", "measure", "method", "trained_on"), "category")
    return pd.concat(parts, ignore_index=True).astype(kinds)


@lru_cache
def scores(results: Path, encoder: str) -> pd.Series:
    """Mean over the queries of a collection, by method, trained_on, collection, measure and seed."""
    cells = load(results, encoder)
    return cells.groupby(["method", "trained_on", "collection", "measure", "seed"], observed=True)["value"].mean()


def means(found: pd.Series, method: str, trained_on: str, measure: str) -> tuple[float, float, int] | None:
    """Mean over queries and seeds (and over collections, where zero-shot), its deviation over seeds, how many seeds.

    Args:
        found: what :func:`scores` gives.
        method: name of the method.
        trained_on: the training collection.
        measure: as in :meth:`evidence.inference.Cells.select`.
    """
    name = MAIN if measure == ZERO_SHOT else measure
    try:
        mine = found.loc[method, trained_on, :, name]
    except KeyError:
        return None
    own = mine.index.get_level_values("collection") == trained_on
    by_seed = mine[~own if measure == ZERO_SHOT else own].groupby("seed").mean()
    if not len(by_seed):
        return None
    return float(by_seed.mean()), float(by_seed.std(ddof=1)) if len(by_seed) > 1 else float("nan"), len(by_seed)


def table(found: pd.Series, measure: str) -> list[list[str]]:
    """A row a method, a column a training collection, of what :func:`scores` gives."""
    collections = list(found.index.unique("trained_on"))
    rows = [["method", *collections]]
    for method in ROWS:
        cells = [means(found, method, name, measure) for name in collections]
        if any(cells):
            rows.append([NAMES[method], *(_cell(cell) for cell in cells)])
    return rows


def short(value: float) -> str:
    """A number between 0 and 1 as papers print it."""
    return f"{value:.3f}".replace("0.", ".", 1)


def _cell(cell: tuple[float, float, int] | None) -> str:
    if cell is None:
        return ""
    mean, deviation, seeds = cell
    return short(mean) if seeds < 2 else f"{short(mean)} ± {short(deviation)}"


def zero_shot(results: pd.DataFrame) -> list[list[str]]:
    """A row a method, a column a collection that it was not trained on, averaged over the training collections."""
    own = results["collection"].astype(object) == results["trained_on"].astype(object)
    mine = results[~own & (results["measure"] == MAIN)]
    by = mine.groupby(["method", "collection"], observed=True)["value"].mean().unstack()
    rows = [["method", *by.columns, "mean"]]
    for method in ROWS:
        if method in by.index:
            values = by.loc[method]
            rows.append([NAMES[method], *map(short, (*values, values.mean()))])
    return rows


def verdicts(decided: pd.DataFrame) -> list[list[str]]:
    """The claims of one encoder, as :func:`evidence.inference.decide` gives them."""
    rows = [["claim", "source", "difference", "interval", "seeds", "p (Holm)", "could have seen", "verdict"]]
    for c in decided.itertuples():
        rows.append(
            [
                f"{c.text} ({c.better} against {c.than}, {c.measure})", c.source, f"{c.mean:+.4f}",
                f"{c.low:+.4f} to {c.high:+.4f}", str(c.seeds), "" if pd.isna(c.p) else f"{c.p:.3g}",
                f"{c.could_see:.4f}", c.verdict,
            ]
        )  # fmt: skip
    return rows

"""From cells to what is committed, and from that to tables."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from evidence.cells import Cell, read, write
from evidence.inference import MAIN, ZERO_SHOT, Cells, decide
from evidence.methods import METHODS, ROWS, SAME
from evidence.protocol import REPORTED, Protocol

BACKWARDS = "d→q nDCG@10"
MADE = ".. Made by experiments/evidence/run.py --pages from the committed cells; do not edit.\n"
IN_CELL = ["collection", "measure", "qid", "cluster"]
NAMES = {"bm25": "BM25", "untrained": "untrained", **{name: method.text for name, method in METHODS.items()}}
# What claims.toml, which stays as it was before the runs, does not say of where a claim is from.
SAID = {
    "ance-refreshed": "this study, after ANCE, whose loss has no in-batch negatives",
    "mnrl-beats-untrained": "this study: a control",
    "dance-mined-queries": "this study: a control, after DANCE, section 3",
    "samtone-both": "this study: the paper compares neither with the other",
    "mnrl-dual": "S. He, slides, where it has .3884 against .3894",
    "mnrl-dual-mined": "this study: a control",
    "mnrl-dual-zero-shot": "S. He, slides, table 3: .365 against .361",
    "margin-mse-dual": "S. He, slides, where it has .4244 against .4268: a loss",
    "margin-mse-dual-zero-shot": "S. He, slides, table 3: .399 against .405, a loss",
}
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
def told_of(results: Path, encoder: str) -> dict[str, dict]:
    """What is committed of an encoder's cells beside their values, by training collection, read once."""
    return {name: json.loads(file.read_text()) for name, file in files_of(results, encoder, ".json").items()}


@lru_cache
def load(results: Path, encoder: str) -> dict[str, pd.DataFrame]:
    """All committed cells of an encoder by training collection, as :func:`wide` makes them, read once."""
    return {
        name: pq.read_table(file, partitioning=None).to_pandas().astype(dict.fromkeys(IN_CELL, object))
        for name, file in files_of(results, encoder, ".parquet").items()
    }


def own_queries(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """nDCG@10 of a training collection's own reported queries, of what :func:`load` read for it."""
    return table[(table["collection"] == name) & (table["measure"] == MAIN)]


def own_documents(results: Path, encoder: str) -> dict[str, pd.DataFrame]:
    """nDCG@10 of the reported queries for documents that no training query asked for, of all cells of an encoder."""
    parts = {}
    for name, table in load(results, encoder).items():
        seen = told_of(results, encoder)[name]["sizes"]["seen"]
        own = own_queries(table, name)
        parts[name] = own[~own["qid"].isin(seen)]
    return parts


@lru_cache
def scores(results: Path, encoder: str) -> pd.Series:
    """What :func:`scores_of` gives of all committed cells of an encoder, computed once."""
    return scores_of(load(results, encoder))


def scores_of(tables: dict[str, pd.DataFrame]) -> pd.Series:
    """Mean over the queries of a collection, by method, trained_on, collection, measure and seed."""
    by = {
        name: table.groupby(["collection", "measure"])[[cell for cell in table if "/" in cell]].mean()
        for name, table in tables.items()
    }
    found = pd.concat(by, names=["trained_on"]).rename_axis(columns="cell").stack().dropna()
    cells = found.index.to_frame(index=False)
    cells[["method", "seed"]] = cells["cell"].str.rsplit("/", n=1, expand=True)
    cells["seed"] = cells["seed"].astype(int)
    names = ["method", "trained_on", "collection", "measure", "seed"]
    return pd.Series(found.to_numpy(), pd.MultiIndex.from_frame(cells[names]), name="value").sort_index()


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


def zero_shot(found: pd.Series, macro: dict[str, tuple[float, float, float]]) -> list[list[str]]:
    """A row a method, a column a collection that it was not trained on, averaged over the training collections.

    Args:
        found: what :func:`scores` gives.
        macro: the mean of each method over the training collections, with its interval.
    """
    cells = found.rename("value").reset_index()
    mine = cells[(cells["collection"] != cells["trained_on"]) & (cells["measure"] == MAIN)]
    by = mine.groupby(["method", "collection"])["value"].mean().unstack()
    rows = [["method", *by.columns, "mean, 95 % interval"]]
    for method in ROWS:
        if method in macro:
            mean, low, high = map(short, macro[method])
            rows.append([NAMES[method], *map(short, by.loc[method]), f"{mean} ({low} to {high})"])
    return rows


def claim_of(claim) -> str:
    """A claim and the rows that it compares, as they are printed."""
    names = (NAMES[SAME.get(name, name)] for name in (claim.better, claim.than))
    text = f"{claim.text} ({' against '.join(names)}"
    return text + ("" if claim.measure == MAIN else f", {claim.measure}") + ")"


def verdicts(decided: pd.DataFrame) -> list[list[str]]:
    """Claims of one encoder, as :func:`evidence.inference.compared` or ``decide`` give them."""
    is_decided = "verdict" in decided
    rows = [["claim", "source", "difference", "95 % interval", "seeds"]]
    rows[0] += ["p (Holm)", "could have seen", "verdict"] if is_decided else []
    for c in decided.itertuples():
        interval = f"{c.low:+.4f} to {c.high:+.4f}"
        rows.append([claim_of(c), SAID.get(c.id, c.source), f"{c.mean:+.4f}", interval, str(c.seeds)])
        if is_decided:
            rows[-1] += ["" if pd.isna(c.p) else f"{c.p:.3g}", f"{c.could_see:.4f}", c.verdict]
    return rows


def by_collection(decided: pd.DataFrame, on_own: pd.DataFrame) -> list[list[str]]:
    """Claims by training collection, and on queries with documents of their own.

    Args:
        decided: the claims on all reported queries.
        on_own: the same on what :func:`own_documents` gives.
    """
    names = list(dict.fromkeys(name for parts in decided["parts"] for name in parts))
    rows = [["claim", *names, "documents not trained on", "95 % interval", "verdict"]]
    own = {c.id: c for c in on_own.itertuples()}
    for c in decided.itertuples():
        cells = [_part(*c.parts[name]) if name in c.parts else "" for name in names]
        o = own.get(c.id)
        told = ["", "", ""] if o is None else [f"{o.mean:+.4f}", f"{o.low:+.4f} to {o.high:+.4f}", o.verdict]
        rows.append([claim_of(c), *cells, *told])
    return rows


def _part(mean: float, low: float, high: float) -> str:
    return f"{mean:+.4f}" + (r"\*" if low > 0 or high < 0 else "")


@lru_cache
def cells_of(encoder: str, results: Path) -> Cells:
    """All cells of an encoder, cut out once."""
    return Cells(load(results, encoder))


@lru_cache
def decided_of(encoder: str, resamples: int, results: Path, *, only_own: bool = False) -> pd.DataFrame:
    """The claims of an encoder, decided once, on all reported queries or on those for documents of their own."""
    cells = Cells(own_documents(results, encoder)) if only_own else cells_of(encoder, results)
    return decide(cells, number=resamples)


def measured(results: Path) -> dict[str, str]:
    """The encoders that have cells, and what they are called."""
    return {encoder: words for encoder, words in ENCODERS.items() if len(load(results, encoder))}


def rst_table(rows: list[list[str]], title: str = "") -> str:
    """A list-table of reStructuredText."""
    lines = [f".. list-table:: {title}".rstrip(), "    :header-rows: 1", "    :widths: auto", ""]
    for row in rows:
        # "S. He" would begin a numbered list
        row = [rf"\{value}" if re.match(r"\w\. ", value) else value for value in row]
        lines += [f"    {'* -' if i == 0 else '  -'} {value}".rstrip() for i, value in enumerate(row)]
    return "\n".join(lines) + "\n"


def heading(text: str, line: str = "-") -> str:
    """A title of reStructuredText."""
    return f"{text}\n{line * 55}\n"


def unlinked(text: str) -> str:
    """ReStructuredText in which no measure, such as nDCG with a cutoff, is taken for a mail address."""
    return re.sub(r"(``[^`]*``)|(?<=\w)@(?=\d)", lambda found: found[1] or r"\@", text)

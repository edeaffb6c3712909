"""Does the embedding space explain who wins? Measures of every trained encoder beside its nDCG@10.

Every encoder of the study is measured on the same relevant pairs of its reported queries (``analysis.compare``). Within
each training collection the cells' ranks by a measure are compared with their ranks by nDCG@10 (Spearman); the mean
over the collections has an interval from resampling methods, as seeds of one method are not independent.

    python experiments/evidence/space.py --data ../shared/data --encoder static
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from evidence.cells import Cell, Study, read
from evidence.inference import MAIN
from evidence.methods import CHECKPOINT, METHODS
from evidence.protocol import FULL, SMALL
from evidence.run import RESULTS
from pt_dance import analysis

FIRST = ["collection", "method", "seed", MAIN]
FAMILIES = {
    "pairs": lambda name: name.startswith(("dance", "pairwise", CHECKPOINT)),
    "teacher": lambda name: name in METHODS and METHODS[name].teacher,
}


def measure(study: Study, encoder: str, seeds: list[int], *, sample: int) -> pd.DataFrame:
    """A row a trained encoder: its nDCG@10 and each measure of its space. Measured ones are read back."""
    file = study.runs / "space" / f"{encoder}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=FIRST)
    done = set(zip(known["collection"], known["method"], known["seed"], strict=True))
    for name in study.protocol.training:
        collection = study.collection(name, encoder)
        for method in ("untrained", *METHODS):
            for seed in seeds:
                cell = study.runs / "cells" / name / encoder / f"{method}-{seed}.parquet"
                if (name, method, seed) in done or not cell.exists():
                    continue
                values, _ = read(cell)
                own = values[(values["collection"] == name) & (values["measure"] == MAIN)]
                trained, _ = study.trained(Cell(name, encoder, method, seed))
                row = analysis.compare(
                    {method: trained}, *collection.reported, collection.corpus, sample=sample, resamples=2
                ).drop(columns="system")
                row = row[[column for column in row if not column.endswith((" low", " high"))]]
                told = pd.DataFrame([[name, method, seed, float(own["value"].mean())]], columns=FIRST)
                known = pd.concat([known, told.join(row)], ignore_index=True)
                known.to_csv(file, index=False)
                print(f"{name} {method} {seed}", flush=True)
    return known


def correlations(measured: pd.DataFrame, *, number: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Spearman's rank correlation of each measure with nDCG@10, mean over collections, with its interval.

    Beside it stands the correlation within each family of losses: pairs, a teacher's, and cross-entropies.

    Args:
        measured: what :func:`measure` gives.
        number: bootstrap samples, of methods.
        seed: source of chance.
    """
    trained = measured[measured["method"] != "untrained"]
    names = [column for column in measured if column not in FIRST and trained[column].nunique() > 2]
    methods = trained["method"].unique()
    rng = np.random.default_rng(seed)
    groups = {collection: dict(iter(mine.groupby("method"))) for collection, mine in trained.groupby("collection")}

    def spearman(drawn: np.ndarray) -> pd.Series:
        by_collection = []
        for parts in groups.values():
            chosen = pd.concat([parts[method] for method in drawn if method in parts])
            ranks = chosen[[*names, MAIN]].rank()
            by_collection.append(ranks[names].corrwith(ranks[MAIN]))
        return pd.concat(by_collection, axis=1).mean(axis=1)

    families: dict[str, list[str]] = {"cross-entropies": [], **{name: [] for name in FAMILIES}}
    for method in methods:
        mine = (name for name, holds in FAMILIES.items() if holds(method))
        families[next(mine, "cross-entropies")].append(method)
    within = {name: spearman(np.array(part)).loc[names].to_numpy() for name, part in families.items() if len(part) > 1}
    samples = pd.concat([spearman(rng.choice(methods, len(methods))) for _ in range(number)], axis=1)
    return pd.DataFrame(
        {
            "measure": names,
            "correlation": spearman(methods).loc[names].to_numpy(),
            "low": samples.quantile(0.025, axis=1).loc[names].to_numpy(),
            "high": samples.quantile(0.975, axis=1).loc[names].to_numpy(),
            **within,
            "cells": len(trained),
        }
    ).sort_values("correlation", key=abs, ascending=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="where the study's cells are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is committed")
    parser.add_argument("--encoder", default="static")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sample", type=int, default=1000, help="relevant pairs")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    protocol = SMALL if args.small else FULL
    study = Study(protocol, args.data, args.runs / protocol.name)
    measured = measure(study, args.encoder, args.seeds, sample=args.sample)
    told = correlations(measured)
    print(told.round(3).to_string(index=False))
    results = study.runs / "results" if args.small else args.results
    results.mkdir(parents=True, exist_ok=True)
    measured.round(5).to_csv(results / f"space-{args.encoder}.csv", index=False)
    told.round(4).to_csv(results / f"space-{args.encoder}-correlations.csv", index=False)


if __name__ == "__main__":
    main()

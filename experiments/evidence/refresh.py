"""How often, how deep and how negatives are drawn: quality against seconds at equal steps.

Each variant trains MNRL (contrastive, the setting that the study chose for ``mnrl-ance``) for the study's steps. The
first quarter always learns from BM25's negatives; what follows differs in one thing at a time from the reference, which
refreshes every two units from the best 100, uniformly, without a filter.

    python experiments/evidence/refresh.py --data ../shared/data --collections scifact nfcorpus-preprocessed
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from evidence import methods
from evidence.cells import Study
from evidence.data import Collection
from evidence.evaluate import measure_own, own_target
from evidence.methods import Method, Setting
from evidence.protocol import FULL, SMALL
from pt_dance import Round, mining
from pt_dance.recipes import current_model


def variant(*, refreshes: int = 3, depth: int = 100, sampling: str = "uniform", filters: tuple = ()) -> Method:
    """MNRL with so many refreshes of the negatives after a first quarter on BM25's."""

    def rounds(setting: Setting, unit: int, collection: Collection, teacher: object) -> list[Round]:
        first = methods._contrastive(setting, name="bm25")
        if not refreshes:
            return methods._whole(unit, first)
        number = collection.protocol.pool[0]
        later = replace(
            first, name="refreshed", negatives=current_model, negatives_per_query=number, depth=depth,
            sampling=sampling, filters=filters, carry_optimizer=True,
        )  # fmt: skip
        left = 6 * unit
        steps = [left // refreshes + (i < left % refreshes) for i in range(refreshes)]
        return [replace(first, steps=2 * unit), *(replace(later, steps=n) for n in steps)]

    return Method(rounds, "", temperature=True)


VARIANTS = {
    "never": variant(refreshes=0),
    "1 refresh": variant(refreshes=1),
    "2 refreshes": variant(refreshes=2),
    "3 refreshes (reference)": variant(),
    "5 refreshes": variant(refreshes=5),
    "10 refreshes": variant(refreshes=10),
    "depth 20": variant(depth=20),
    "depth 500": variant(depth=500),
    "top instead of uniform": variant(sampling="top"),
    "without near-duplicates": variant(filters=(mining.NearDuplicate(0.8),)),
    "without the best 5": variant(filters=(mining.RankRange(5, 100),)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--collections", nargs="+", default=["scifact", "nfcorpus-preprocessed"])
    parser.add_argument("--encoder", default="static")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="write every query's values to this .parquet and the table to .csv")
    args = parser.parse_args()
    protocol = SMALL if args.small else FULL
    study = Study(protocol, args.data, args.runs / protocol.name)
    rows, values = [], []
    for name in args.collections:
        collection = study.collection(name, args.encoder)
        setting = study.tune(collection, args.encoder, "mnrl-ance")
        target = own_target(collection, "reported")
        for variant_name, method in VARIANTS.items():
            for seed in args.seeds:
                folder = study.runs / "refresh" / name / args.encoder / str(seed) / variant_name.replace(" ", "-")
                encoder, cost = study.train(
                    collection, args.encoder, method, seed, setting, collection.budget.unit, folder
                )
                measured = measure_own(target, encoder, only_main=True).assign(variant=variant_name, seed=seed)
                values.append(measured)
                row = {"collection": name, "variant": variant_name, "seed": seed, **cost}
                rows.append(row | {"nDCG@10": float(measured["value"].mean())})
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    by = table.groupby(["collection", "variant"], sort=False)
    print(by[["nDCG@10", "seconds", "mine_seconds"]].mean().round(4).to_string())
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(values).to_parquet(args.out, index=False, compression="zstd")
        table.round(5).to_csv(args.out.with_suffix(".csv"), index=False)


if __name__ == "__main__":
    main()

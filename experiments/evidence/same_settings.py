"""MNRL at the setting of the row that it is compared with: what do the negatives change, and what the setting?

With all-MiniLM tuning, which has 74 queries of SciFact, chose a third of the rate for MNRL that it chose for MNRL with
ANCE negatives, and temperature .05 for MNRL with two towers where SamToNe with two towers has .02. Here MNRL is
trained at theirs, in bfloat16, which takes about an hour a row on a CPU.

    python experiments/evidence/same_settings.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from evidence.cells import Study
from evidence.evaluate import measure_own, own_target
from evidence.methods import METHODS, Method, Setting
from evidence.protocol import FULL
from evidence.run import RESULTS
from evidence.tables import told_of

COLLECTION, ENCODER = "scifact", "minilm"
SETTING_OF = {"mnrl": "mnrl-ance", "ade-mnrl": "ade-samtone"}


def in_bfloat16(method: Method) -> Method:
    """The method, trained under autocast to bfloat16."""

    def rounds(*given) -> list:
        return [
            replace(one, training_arguments={**one.training_arguments, "bf16": True}) for one in method.rounds(*given)
        ]

    return replace(method, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    study = Study(FULL, args.data, args.runs / FULL.name)
    tuning = told_of(args.results, ENCODER)[COLLECTION]["tuning"]
    collection = study.collection(COLLECTION, ENCODER)
    parts = []
    for name, against in SETTING_OF.items():
        setting = Setting(**tuning[against]["chosen"])
        key = f"{name}-{setting.learning_rate:g}-{setting.temperature:g}-{args.seed}"
        folder = study.runs / "same-settings" / COLLECTION / ENCODER / key
        method = in_bfloat16(METHODS[name])
        encoder, cost = study.train(collection, ENCODER, method, args.seed, setting, collection.budget.unit, folder)
        found = measure_own(own_target(collection, "reported"), encoder, only_main=True)
        parts.append(
            found.assign(
                encoder=ENCODER, method=name, against=against, seed=args.seed, learning_rate=setting.learning_rate,
                temperature=setting.temperature, precision="bfloat16", device=cost["device"],
            )
        )  # fmt: skip
        print(name, setting, f"{found['value'].mean():.4f}", flush=True)
    pd.concat(parts, ignore_index=True).to_parquet(args.results / "same-settings.parquet", index=False)


if __name__ == "__main__":
    main()

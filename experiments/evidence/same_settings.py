"""MNRL at the setting of the row that it is compared with: what do the negatives change, and what the setting?

With all-MiniLM tuning, which has 74 queries of SciFact, chose other settings for MNRL than for MNRL with ANCE negatives
(a third of the rate) and for SamToNe with two towers (a higher temperature). Here MNRL is trained at theirs, in
bfloat16 on a CPU, which takes about an hour a row.

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
from evidence.methods import METHODS, Method
from evidence.protocol import FULL
from evidence.run import RESULTS
from evidence.tables import unpack

COLLECTION, ENCODER = "scifact", "minilm"
PAIRS = {"mnrl": "mnrl-ance", "ade-mnrl": "ade-samtone"}


def in_bfloat16(method: Method) -> Method:
    """The method, trained under autocast to bfloat16."""

    def rounds(*given) -> list:
        return [replace(one, training_arguments={"bf16": True}) for one in method.rounds(*given)]

    return replace(method, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    study = Study(FULL, args.data, args.runs / FULL.name)
    unpack(FULL, args.results, study.runs)  # what tuning chose
    collection = study.collection(COLLECTION, ENCODER)
    parts = []
    for name in args.methods:
        setting = study.tune(collection, ENCODER, PAIRS[name])
        folder = study.runs / "same-settings" / COLLECTION / ENCODER / f"{name}-{args.seed}"
        method = in_bfloat16(METHODS[name])
        encoder, _ = study.train(collection, ENCODER, method, args.seed, setting, collection.budget.unit, folder)
        found = measure_own(own_target(collection, "reported"), encoder, only_main=True)
        told = {"encoder": ENCODER, "method": name, "against": PAIRS[name], "seed": args.seed}
        parts.append(found.assign(**told, learning_rate=setting.learning_rate, temperature=setting.temperature))
        print(name, setting, f"{found['value'].mean():.4f}", flush=True)
    pd.concat(parts).to_parquet(args.results / "same-settings.parquet", index=False)


if __name__ == "__main__":
    main()

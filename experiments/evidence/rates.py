"""DANCE's 2x2 at every rate of the grid, over all steps: is what a cell shows that of its rate?

Tuning compares a method's few settings after a tenth of the steps. With the tower of MiniLM's token embeddings that
chooses the middle rate on NFCorpus, with which it ends far below the untrained encoder. Here the four cells are trained
at each rate to the end, and measured on the tuning queries, which say what a comparison at all steps would have
chosen, and on the reported ones.

    python experiments/evidence/rates.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from evidence.cells import Study
from evidence.evaluate import own_target, score
from evidence.inference import MAIN
from evidence.methods import METHODS, Setting
from evidence.protocol import FULL
from evidence.run import RESULTS

CELLS = ("dance-none", "dance-norm", "dance-dual", "dance-norm-dual")
SEEDS = (1, 2, 3)
WEIGHT = 0.1  # of the dual loss, as published and as tuning chose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--collection", default="nfcorpus-preprocessed")
    parser.add_argument("--encoder", default="static-minilm")
    args = parser.parse_args()
    study = Study(FULL, args.data, args.runs / FULL.name)
    collection = study.collection(args.collection, args.encoder)
    targets = {part: own_target(collection, part) for part in ("tune", "reported")}
    rows = []

    def measure(encoder, **told: object) -> None:
        scores = {f"{MAIN}, {part}": score(target, encoder) for part, target in targets.items()}
        rows.append({"collection": args.collection, "encoder": args.encoder, **told, **scores})
        print(rows[-1], flush=True)

    measure(study.first_encoder(args.encoder, "sde", collection, 1), method="untrained")
    for rate, seed, cell in product(collection.budget.layer_rates, SEEDS, CELLS):
        method, unit = METHODS[cell], collection.budget.unit
        setting = Setting(rate, None, WEIGHT if method.weight else None)
        folder = study.runs / "rates" / args.collection / args.encoder / str(seed) / f"{cell}-{rate:g}"
        encoder, _ = study.train(collection, args.encoder, method, seed, setting, unit, folder)
        measure(encoder, method=cell, learning_rate=rate, seed=seed)
    args.results.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(args.results / "rates.csv", index=False)


if __name__ == "__main__":
    main()

"""Why the published pairs teach a static tower little: the rates, the pairs, or how sharp the scores are?

In the study ANCE's and DANCE's published losses leave a static tower from nothing about where it began on some
collections. Behind the head's LayerNorm a vector of d numbers has length √d, so a dot product at temperature 1 is a
cosine at temperature 1/d. Here pairs and the cross-entropy with in-batch negatives train 800 steps at two temperatures,
with one learning rate for all weights or another one for the head, and are measured on the tuning queries.

    python experiments/evidence/pairs_alone.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from evidence import methods
from evidence.cells import Study
from evidence.evaluate import own_target, score
from evidence.inference import MAIN
from evidence.methods import Method, Setting
from evidence.protocol import FULL
from evidence.run import RESULTS

LAYERS = r"(linear|norm)\."
UNIT = 100
TEMPERATURES = (1.0, 5.0)
RATES = ((0.003, None), (0.03, 0.0003))


def variant(layer_rate: float | None, temperature: float, *, in_batch: bool) -> Method:
    """Pairs, or the cross-entropy with in-batch negatives, on a tower with the head.

    Args:
        layer_rate: learning rate of the head; that of all weights where it is None.
        temperature: of the dot products.
        in_batch: whether it is the cross-entropy.
    """

    def rounds(setting, unit, collection, teacher):
        if in_batch:
            made = methods._whole(unit, methods._contrastive(setting, name="in-batch"))
        else:
            made = methods._pairwise(setting, unit, collection, teacher)
        apart = {} if layer_rate is None else {"learning_rate_mapping": {LAYERS: layer_rate}}
        options = [{**(one.loss_options or {}), "temperature": temperature} for one in made]
        return [
            replace(one, training_arguments=apart, loss_options=given) for one, given in zip(made, options, strict=True)
        ]

    return Method(rounds, "", start="head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--collections", nargs="+", default=["scifact", "nfcorpus-preprocessed"])
    args = parser.parse_args()
    study = Study(FULL, args.data, args.runs / FULL.name)
    rows = []
    for name in args.collections:
        collection = study.collection(name, "static")
        target = own_target(collection, "tune")

        untrained = study.first_encoder("static", "head", collection, 1)
        rows.append({"collection": name, "loss": "untrained", MAIN: score(target, untrained)})
        for in_batch, temperature, (rate, layer_rate) in product((False, True), TEMPERATURES, RATES):
            loss = "in-batch" if in_batch else "pairs"
            method = variant(layer_rate, temperature, in_batch=in_batch)
            folder = study.runs / "pairs-alone" / name / f"{loss}-{temperature}-{rate}-{layer_rate}"
            encoder, cost = study.train(collection, "static", method, 1, Setting(rate), UNIT, folder)
            told = {"temperature": temperature, "learning_rate": rate, "learning_rate_of_head": layer_rate}
            rows.append(
                {"collection": name, "loss": loss, **told, "last_loss": cost["last_loss"], MAIN: score(target, encoder)}
            )
            print(rows[-1], flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(args.results / "pairs-alone.csv", index=False)


if __name__ == "__main__":
    main()

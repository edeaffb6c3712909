"""DANCE's 2x2, {normalisation} x {dual}, with the head that ANCE's and DANCE's releases end in.

The encoder gets Linear + LayerNorm; each cell has its own warm-up, with the similarity that it goes on with, and then
two rounds of its stage. nDCG@10 on the test queries of the sample of :mod:`recipes_table`, last round.

    python experiments/layernorm_head.py --out runs/recipes --results experiments/results/layernorm-head
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from pt_dance import recipes
from recipes_table import ENCODERS, SIZES, SMALL, Sample, cell


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="medquad")
    parser.add_argument("--encoders", nargs="+", default=["static", "minilm"], choices=list(ENCODERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder for everything")
    parser.add_argument("--results", type=Path, default=Path("runs/layernorm-head"), help="write .csv here")
    return parser.parse_args()


def stages(normalize: bool, dual: bool) -> list:
    """One warm-up and two rounds of a cell of the ablation."""
    warm, first, *last = recipes.dance(loss="pairwise", ance_rounds=0, normalize=normalize, dual=dual)
    return [replace(warm, similarity="cosine" if normalize else "dot"), first, *last]


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    rows = []
    for name in args.encoders:
        sample = Sample(args.collection, SIZES["transformer" if name in SMALL else "static"], args.out)
        for seed in args.seeds:
            for normalize in (False, True):
                for dual in (False, True):
                    encoder = ENCODERS[name](sample, seed).with_head("layernorm", dim=768, seed=seed)
                    row = cell(sample, encoder, stages(normalize, dual), args.out / f"head-{name}", seed)
                    rows.append(dict(encoder=name, seed=seed, normalize=normalize, dual=dual) | row)
                    pd.DataFrame(rows).round(4).to_csv(args.results.with_suffix(".csv"), index=False)
                    print(
                        name,
                        seed,
                        f"norm={normalize} dual={dual}",
                        row["rounds"],
                        f"{row['seconds']:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

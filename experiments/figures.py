"""What training does to an embedding space: the figures of the documentation.

One encoder is trained by several methods behind BM25 with one seed: MNRL and SamToNe for three epochs, DANCE for two of
warm-up and one of each of its stages. Then all are measured and drawn on the same relevant pairs of the dev split,
after the last round: none is chosen on the split that is shown.

    python experiments/figures.py --dataset dance:../shared/data/medquad --out runs/figures-medquad \
        --figures pt_dance/pt_docs/figures --results experiments/results/space-medquad-static
    python experiments/figures.py --page    # only write the committed measures into the documentation
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyterrier as pt

from common import make_encoder, open_corpus, split
from evidence.tables import unlinked
from pt_dance import DanceRetriever, Round, analysis, bm25, recipes

TRAINING = dict(batch_size=256, learning_rate=0.03, negatives_per_row=2, temperature=0.03)


def dance() -> list[Round]:
    """Two epochs of MNRL, then one of each of DANCE's stages, gently."""
    stages = dict(loss="pairwise", warm_up=0, ance_rounds=0, normalize=True, temperature=0.01)
    norm, dual = recipes.dance(batch_size=256, learning_rate=0.003, **stages)
    # one schedule for both
    return [*recipes.mnrl(2, name="warm-up", **TRAINING), norm, replace(dual, start="last", carry_optimizer=True)]


METHODS = {
    "MNRL": lambda: recipes.mnrl(3, **TRAINING),
    "DANCE": dance,
    "SamToNe": lambda: recipes.samtone(3, sides="both", **TRAINING),
}
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "pt_dance" / "pt_docs" / "analysis.rst"
RESULTS = ROOT / "experiments" / "results" / "space-medquad-static"
MEASURED = re.compile(r"^\.\. measured: space\n.*?^\.\. end of space$", re.M | re.S)
SHOWN = (
    "alignment (pairs)", "uniformity, t = 2 (queries)", "uniformity, t = 2 (documents)", "mean cosine (queries)",
    "mean cosine (documents)", "isotropy (both)", "effective rank (queries)", "effective rank (documents)",
    "tower gap (both)", "told apart (chance .5) (both)", "s(q, q′) / s(q, d), median (pairs)",
    "cosine to best result (q→d)", "N10 Gini (q→d)", "N10 never found (q→d)", "N200 Gini (d→q)", "nDCG@10 (q→d)",
    "nDCG@10 (d→q)",
)  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="dance:pydocs", help="pt.get_dataset name (default: %(default)s)")
    parser.add_argument("--encoder", default="static", help="static, static-minilm, all-MiniLM-L6-v2, or a model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="(default: all)")
    parser.add_argument("--split", default="dev", help="split that is measured (default: %(default)s)")
    parser.add_argument("--topics", type=int, help="train on a random part of the topics")
    parser.add_argument("--sample", type=int, default=2000, help="relevant pairs measured (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder for everything")
    parser.add_argument("--figures", type=Path, help="folder for the pictures (default: the folder for everything)")
    parser.add_argument("--results", type=Path, help="write the measures to this path, as .csv")
    parser.add_argument("--page", action="store_true", help="only write the committed measures into the documentation")
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.page:
        PAGE.write_text(render(PAGE.read_text()))
        return
    started = time.perf_counter()
    dataset = pt.get_dataset(args.dataset)
    args.out.mkdir(parents=True, exist_ok=True)
    train_topics, train_qrels = split(dataset, "train", most=args.topics, seed=args.seed)
    topics, qrels = split(dataset, args.split)
    corpus = open_corpus(dataset, args.out / "corpus")
    first_stage = bm25(corpus, args.out / "bm25")
    encoder = make_encoder(args.encoder, corpus, queries=train_topics["query"], seed=args.seed)

    runs = {}
    for name in args.methods:
        runs[name] = DanceRetriever(
            encoder, corpus, args.out / name.lower(), recipe=METHODS[name](), seed=args.seed, verbose=False
        )
        (first_stage % 200 >> runs[name]).fit(train_topics, train_qrels, topics, qrels)
        print(f"{name}: trained ({time.perf_counter() - started:.0f} s)", flush=True)
        print(runs[name].history.iloc[:, :6].to_string(index=False), flush=True)
    last = {name: run.retriever(round=len(run.recipe)).index.encoder for name, run in runs.items()}
    systems = {"untrained": encoder} | last
    spaces = {
        name: analysis.space(system, topics, qrels, corpus, sample=args.sample, seed=args.seed)
        for name, system in systems.items()
    }
    table = analysis.compare(spaces)
    if args.results is not None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        table.round(5).to_csv(args.results.with_suffix(".csv"), index=False)
    shown = [column for column in table.columns if not column.endswith((" low", " high"))]
    with pd.option_context("display.width", 120, "display.max_rows", 100):
        print(table[shown].set_index("system").T.round(4).to_string())
    print(analysis.describe_sample(spaces["untrained"]))
    draw(spaces, args.figures or args.out)
    print(f"{time.perf_counter() - started:.0f} seconds")


def render(page: str) -> str:
    """Return the page with the committed measures in their place."""
    table = pd.read_csv(RESULTS.with_suffix(".csv")).set_index("system")
    lines = [".. list-table::", "    :header-rows: 1", "", "    * - Measure"]
    lines += [f"      - {system}" for system in table.index]
    for measure in SHOWN:
        lines.append(f"    * - {unlinked(measure)}")
        for system in table.index:
            value, low, high = (table.loc[system, f"{measure}{end}"] for end in ("", " low", " high"))
            digits = 1 if abs(value) >= 100 else 3
            lines.append(f"      - {value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
    made = "\n".join([".. measured: space", "", *lines, "", ".. end of space"])
    return MEASURED.sub(lambda _: made, page)


def draw(spaces: dict[str, analysis.SpaceReport], folder: Path) -> None:
    """Write the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "tsne": analysis.plot_tsne(spaces),
        "distances": analysis.plot_distances(spaces),
        "ratios": analysis.plot_ratios(spaces),
        "spectra": analysis.plot_spectra(spaces),
        "hubness": analysis.plot_hubness(spaces),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"space-{name}.png", dpi=110)


if __name__ == "__main__":
    main()

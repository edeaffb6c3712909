"""From a collection to a trained dense retriever and a table, with one command.

    python experiments/quickstart.py
    python experiments/quickstart.py --dataset dance:path/to/beir/folder --encoder all-MiniLM-L6-v2 --rounds 1

README's tables are made by `make pages` from what --results writes:

    python experiments/quickstart.py --results experiments/results/quickstart-pydocs.json
    python experiments/quickstart.py --dataset dance:../shared/data/medquad --test-split dev --out runs/medquad \
        --results experiments/results/quickstart-medquad.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyterrier as pt
from ir_measures import RR, R, nDCG

from common import make_encoder, open_corpus, split
from pt_dance import DanceRetriever, analysis, bm25, recipes


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="dance:pydocs", help="pt.get_dataset name (default: %(default)s)")
    parser.add_argument(
        "--encoder", default="static", help="static, static-minilm, all-MiniLM-L6-v2, or a model (default: %(default)s)"
    )
    parser.add_argument("--recipe", default="ance", choices=["mnrl", "ance", "dance"], help="(default: %(default)s)")
    parser.add_argument(
        "--published", action="store_true", help="ANCE and DANCE with the published loss, without in-batch negatives"
    )
    parser.add_argument("--rounds", type=int, default=2, help="ANCE rounds after the warm-up (default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=int, default=3, help="epochs on BM25's negatives before (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each round (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=None, help="rows of a batch (default: 256 static, 32 otherwise)"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=None,
        help="of the warm-up; a third of it afterwards (default: .03 static)",
    )
    parser.add_argument("--topics", type=int, default=None, help="train on a random part of the topics")
    parser.add_argument("--documents", type=int, help="keep about so many documents, all relevant ones among them")
    parser.add_argument("--test-split", default="test", help="split of the table (default: %(default)s)")
    parser.add_argument(
        "--backend", default="auto", choices=["auto", "pisa", "terrier"], help="BM25 by (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, help="write what is printed to this file too, as .json")
    return parser.parse_args()


def make_recipe(args: argparse.Namespace) -> list:
    """Return the rounds that the options ask for."""
    static = args.encoder.startswith("static")
    rate = args.learning_rate or (0.03 if static else 3e-5)
    more = dict(
        epochs=args.epochs,
        learning_rate=rate,
        batch_size=args.batch_size or (256 if static else 32),
        negatives_per_row=2 if static else 1,
        carry_optimizer=False,
    )
    if args.recipe == "mnrl":
        return recipes.mnrl(**{**more, "epochs": args.warm_up + args.rounds * args.epochs})
    if args.recipe == "dance":
        return gently(recipes.dance(rounds=args.rounds, warm_up=args.warm_up, **more), rate / 3)
    loss = "pairwise" if args.published else "contrastive"
    if loss == "contrastive":
        more["loss_options"] = {"temperature": 0.03}
    return gently(recipes.ance(rounds=args.rounds, warm_up=args.warm_up, loss=loss, **more), rate / 3)


def gently(rounds: list, learning_rate: float) -> list:
    """Return the same rounds with a smaller learning rate after the first: a trained encoder needs no large steps."""
    return [rounds[0], *(replace(round_, learning_rate=learning_rate) for round_ in rounds[1:])]


def show_rounds(dance: DanceRetriever, qrels: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Print, and return, what each round is worth on dev and how many of its negatives look like false ones.

    Args:
        dance: after its fit.
        qrels: those it was trained on.
        measure: its validation measure.
    """
    history = dance.history.set_index("round")
    copies = {number: copies_among(dance, qrels, number) for number in history.index if number}
    shown = pd.DataFrame({
        "round": history["name"], f"dev {measure}": history[measure], "loss": history["training_loss"],
        "new negatives": history["new_negatives"], "copies of a positive": pd.Series(copies),
    })  # fmt: skip
    print("\n" + shown.round(4).to_string(na_rep=""))
    return shown


def copies_among(dance: DanceRetriever, qrels: pd.DataFrame, number: int, least: float = 0.5) -> float:
    """Return which share of a round's negatives has at least half of its words in common with a positive."""
    mined = dance.negatives(number, texts=False).groupby("qid").head(3)
    mined = mined[mined["qid"].isin(mined["qid"].drop_duplicates().sample(frac=1, random_state=0).head(500))]
    pairs = mined.merge(qrels[qrels["label"] > 0][["qid", "docno"]], on="qid", suffixes=("", "_positive"))
    distinct = sorted({*pairs["docno"], *pairs["docno_positive"]})
    words = {
        docno: set(text.lower().split())
        for docno, text in zip(distinct, dance.corpus.texts(distinct), strict=True)
    }  # fmt: skip
    overlaps = [
        len(words[a] & words[b]) / max(len(words[a] | words[b]), 1)
        for a, b in zip(pairs["docno"], pairs["docno_positive"], strict=True)
    ]
    return float((pairs.assign(overlap=overlaps).groupby(["qid", "docno"])["overlap"].max() >= least).mean())


def draw(dance: DanceRetriever, measure: str, baselines: dict[str, float], folder: Path) -> None:
    """Write what each round is worth on dev, beside baselines, and what it costs, as pictures."""
    dance.plot_history(measure, baselines=baselines).savefig(folder / "history.png", dpi=120)
    analysis.plot_time(dance.history).savefig(folder / "time.png", dpi=120)


def show_examples(systems: dict, topics: pd.DataFrame, qrels: pd.DataFrame, number: int = 3) -> dict[str, list[str]]:
    """Print, and return by query, the best documents each system finds for a few; a star marks the relevant ones."""
    relevant = set(zip(qrels["qid"], qrels["docno"], qrels["label"] > 0, strict=True))
    chosen = topics.iloc[:: max(len(topics) // number, 1)].head(number)
    found = {name: system(chosen) for name, system in systems.items()}
    shown: dict[str, list[str]] = {}
    for topic in chosen.itertuples():
        shown[topic.query] = []
        for name, results in found.items():
            best = results[results["qid"] == topic.qid].sort_values("rank").head(3)["docno"]
            marked = [("*" if (topic.qid, docno, True) in relevant else " ") + docno for docno in best]
            shown[topic.query].append(f"  {name:<12} {'  '.join(marked)}")
        print("\n".join(["", topic.query, *shown[topic.query]]))
    return shown


def main() -> None:
    """Builds, trains, compares."""
    args = options()
    started = time.perf_counter()
    dataset = pt.get_dataset(args.dataset)
    args.out.mkdir(parents=True, exist_ok=True)
    train_topics, train_qrels = split(dataset, "train", most=args.topics, seed=args.seed)
    dev_topics, dev_qrels = split(dataset, "dev")
    test_topics, test_qrels = split(dataset, args.test_split)
    needed = {docno for qrels in (train_qrels, dev_qrels, test_qrels) for docno in qrels["docno"]}
    corpus = open_corpus(dataset, args.out / "corpus", most=args.documents, needed=needed)
    first_stage = bm25(corpus, args.out / f"bm25-{len(corpus)}", backend=args.backend)
    print(
        f"{len(corpus)} documents; {len(train_topics)} training, {len(dev_topics)} dev, {len(test_topics)} test queries"
    )

    encoder = make_encoder(args.encoder, corpus, queries=train_topics["query"], seed=args.seed)
    run = args.out / f"{args.encoder}-{args.recipe}-{len(corpus)}-{args.seed}".replace("/", "_")
    dance = DanceRetriever(encoder, corpus, run, recipe=make_recipe(args), seed=args.seed)
    before = dance.retriever(round=0)
    (first_stage % 100 >> dance).fit(train_topics, train_qrels, dev_topics, dev_qrels)

    systems = {
        "BM25": first_stage,
        "dense, untrained": before,
        "dense": dance,
        "BM25 % 100 >> dense": first_stage % 100 >> dance,
        "BM25 + dense (RRF)": reciprocal_rank_fusion(first_stage % 100, dance % 100),
    }
    table = pt.Experiment(
        list(systems.values()), test_topics, test_qrels, [nDCG @ 10, RR @ 10, R @ 100],
        names=list(systems), baseline=0, correction="holm", round=4,
    )  # fmt: skip
    table.to_csv(run / "table.csv", index=False)
    table["p (Holm)"] = table["nDCG@10 p-value corrected"].map(lambda p: "" if pd.isna(p) else f"{p:.1g}")
    print(f"\n{args.dataset}, {args.test_split} split (p: paired t-test of nDCG@10 against BM25, Holm-corrected)\n")
    print(table[["name", "nDCG@10", "p (Holm)", "RR@10", "R@100"]].to_string(index=False))
    rounds = show_rounds(dance, train_qrels, "nDCG@10")
    examples = show_examples({"BM25": first_stage, "untrained": before, "dense": dance}, test_topics, test_qrels)
    on_dev = pt.Experiment([first_stage], dev_topics, dev_qrels, [nDCG @ 10], names=["BM25"])
    draw(dance, "nDCG@10", {"BM25": on_dev["nDCG@10"].iloc[0]}, run)
    dance.history.to_csv(run / "history.csv", index=False)
    print(f"\npictures: {run / 'history.png'}, {run / 'time.png'}")
    print(f"the trained retriever: DanceRetriever.load({str(run)!r})")
    print(f"{time.perf_counter() - started:.0f} seconds")
    if args.results is not None:
        numbers = {
            "dataset": args.dataset, "split": args.test_split, "encoder": args.encoder, "recipe": args.recipe,
            "seed": args.seed, "documents": len(corpus), "training queries": len(train_topics),
            "test queries": len(test_topics),
        }  # fmt: skip
        save(args.results, numbers, table, rounds, examples)


def save(file: Path, numbers: dict, table: pd.DataFrame, rounds: pd.DataFrame, examples: dict) -> None:
    """Write what was printed, for the tables of the documentation."""
    kept = table[["name", "nDCG@10", "RR@10", "R@100", "nDCG@10 p-value corrected"]]
    frames = {
        name: json.loads(frame.to_json(orient="records", double_precision=15))
        for name, frame in (("table", kept), ("rounds", rounds.round(4)))
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**numbers, **frames, "examples": examples}, indent=2, ensure_ascii=False) + "\n")


def reciprocal_rank_fusion(*systems: pt.Transformer) -> pt.Transformer:
    """Reciprocal rank fusion (Cormack et al., SIGIR 2009) of the systems' results."""
    import pyterrier_alpha as pta

    return pta.fusion.RRFusion(*systems)


if __name__ == "__main__":
    main()

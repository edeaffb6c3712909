r"""Does refreshing negatives beside the training cost quality, and how much time does it hide?

For each seed, three fits of the same steps begin with an epoch of in-batch negatives: "never" goes on with the
negatives that this encoder finds, "between" stops every so many steps to refresh them, "beside" has a refresher that
does so while it goes on. Training has --threads threads; the refresher takes what cores are left, so that it needs one
of its own. No round is chosen on the split that is reported.

Hidden is what the refreshes took less what training lost by having them beside it (what it took longer than that of
"never"), as a share of what they took. With --replay the last fit beside is repeated from its journal; the weights must
be equal.

    python experiments/refresh_beside.py --encoder static --steps 1500 --every 300 --replay \
        --out experiments/results/refresh-beside-medquad-static.json
    python experiments/refresh_beside.py --encoder minilm --documents 1200 --topics 240 --test-topics 200 --steps 80 \
        --every 20 --batch-size 16 --max-length 64 --seeds 1 --replay \
        --out experiments/results/refresh-beside-medquad-minilm.json
    python experiments/refresh_beside.py --encoder minilm --test dev --documents 2400 --topics 480 --test-topics 400 \
        --steps 240 --every 60 --batch-size 16 --max-length 64 --replay \
        --out experiments/results/refresh-beside-medquad-minilm-gpu.json   # on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import nDCG
from scipy.stats import t as student

from common import make_encoder, open_corpus, split
from pt_dance import DanceRetriever, Round
from pt_dance.recipes import current_model

MODES = ("never", "between", "beside")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="dance:../shared/data/medquad")
    parser.add_argument("--encoder", default="static")
    parser.add_argument("--documents", type=int, help="about so many documents, those that are judged among them")
    parser.add_argument("--topics", type=int, help="so many training topics")
    parser.add_argument("--test", default="test", help="the split that is reported")
    parser.add_argument("--test-topics", type=int)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--every", type=int, default=160, help="steps between two refreshes")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text that MiniLM reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1, help="of the training; the refresher takes the other cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/refresh-beside"))
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    return parser.parse_args()


def recipe(args: argparse.Namespace, mode: str) -> list[Round]:
    first = Round(name="warm-up", negatives=None, batch_size=args.batch_size)
    every = None if mode == "never" else args.every
    own = Round(
        name="own negatives", negatives=current_model, steps=args.steps, refresh_every=every,
        batch_size=args.batch_size, carry_optimizer=True,
    )  # fmt: skip
    return [first, own]


def seconds(history: pd.DataFrame) -> dict[str, float]:
    """Return what the steps took that are compared, and what their refreshes took, without the warm-up."""
    own = history[history["name"] == "own negatives"]
    mined = own["mine_seconds"].iloc[1:].sum() + own["refresh_seconds"].iloc[:-1].sum()
    found = {"train_seconds": own["train_seconds"].sum(), "refresh_seconds": mined, "refreshes": len(own) - 1}
    if "refreshes" in own:
        names = ("refreshes", "staleness", "longest_staleness", "waited_seconds")
        found |= {name: own[name].iloc[0] for name in names} | {"refresh_seconds": own["beside_seconds"].iloc[0]}
    return {name: round(float(value), 3) for name, value in found.items()}


def interval(differences: pd.Series) -> list[float]:
    """Return the 95 % interval of a mean over queries, by Student's t."""
    half = student.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    return [round(float(differences.mean() + sign * half), 4) for sign in (-1, 1)]


def hidden(runs: pd.DataFrame) -> float | None:
    """Return the share of the refreshes' time that is hidden, by sums over the seeds; None where none was done."""
    total = runs.groupby("mode")[["train_seconds", "refresh_seconds"]].sum()
    lost = total.loc["beside", "train_seconds"] - total.loc["never", "train_seconds"]
    taken = total.loc["beside", "refresh_seconds"]
    # Steps beside a refresher are never faster, and no more than all can be lost: what is beyond is noise.
    return round(float(max(0.0, 1 - max(0.0, lost) / taken)), 3) if taken else None


def table(found: dict) -> str:
    """Return the means over the seeds as a Markdown table."""
    lines = [
        "| negatives | nDCG@10 | training (s) | refreshes | refreshing (s) | staleness (steps) | longest (steps) |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    runs = pd.DataFrame(found["runs"])
    for mode in MODES:
        mean = runs[runs["mode"] == mode].mean(numeric_only=True)
        stale = [f"{mean[name]:.0f}" if mode == "beside" else "" for name in ("staleness", "longest_staleness")]
        lines.append(
            f"| {mode} | {found['nDCG@10'][mode]:.4f} | {mean['train_seconds']:.0f} | {mean['refreshes']:.1f} "
            f"| {mean['refresh_seconds']:.0f} | {stale[0]} | {stale[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    dataset = pt.get_dataset(args.dataset)
    topics, qrels = split(dataset, "train", most=args.topics)
    test_topics, test_qrels = split(dataset, args.test, most=args.test_topics)
    needed = set(qrels["docno"]) | set(test_qrels["docno"])
    corpus = open_corpus(dataset, args.runs / "corpus", most=args.documents, needed=needed)
    rows, values = [], []
    for seed in args.seeds:
        encoder = make_encoder(args.encoder, corpus, queries=topics["query"], seed=seed, max_length=args.max_length)
        for mode in MODES:
            folder = args.runs / f"{args.encoder}-{seed}-{mode}"
            shutil.rmtree(folder, ignore_errors=True)
            refresh = "between" if mode == "never" else mode
            given = dict(recipe=recipe(args, mode), seed=seed, refresh=refresh, verbose=False)
            dance = DanceRetriever(encoder, corpus, folder, **given).fit(topics, qrels)
            measured = pt.Experiment([dance], test_topics, test_qrels, [nDCG @ 10], perquery=True, names=[mode])
            values.append(measured.assign(seed=seed))
            row = {"seed": seed, "mode": mode, "nDCG@10": round(float(measured["value"].mean()), 4)}
            rows.append(row | seconds(dance.history))
            print(json.dumps(rows[-1]), flush=True)
    runs, queries = pd.DataFrame(rows), pd.concat(values)
    by_query = queries.groupby(["name", "qid"])["value"].mean().unstack(0)
    result = {
        "dataset": args.dataset.rpartition("/")[2],
        "encoder": args.encoder,
        "documents": len(corpus),
        "training topics": len(topics),
        "test topics": len(test_topics),
        "max_length": args.max_length if args.encoder == "minilm" else None,
        "steps": args.steps,
        "refresh_every": args.every,
        "batch_size": args.batch_size,
        "threads of the training": args.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "runs": rows,
        "nDCG@10": {mode: round(float(by_query[mode].mean()), 4) for mode in MODES},
        "beside - between": round(float((by_query["beside"] - by_query["between"]).mean()), 4),
        "its 95 % interval over queries": interval(by_query["beside"] - by_query["between"]),
        "its value by seed": [
            round(float(group.set_index("mode")["nDCG@10"].diff().loc["beside"]), 4)
            for _, group in runs.groupby("seed")
        ],
        "hidden": hidden(runs),
    }
    if args.replay:
        given = dict(recipe=recipe(args, "beside"), seed=args.seeds[-1], refresh="replay", verbose=False)
        again = args.runs / f"{args.encoder}-{args.seeds[-1]}-again"
        shutil.rmtree(again, ignore_errors=True)
        replayed = DanceRetriever(encoder, corpus, again, replay_of=dance.path, **given).fit(topics, qrels)
        result["replay has the same weights"] = replayed.encoder.fingerprint == dance.encoder.fingerprint
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

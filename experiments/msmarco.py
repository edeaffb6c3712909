"""From MS MARCO, or any collection in its form, to a table of BM25, ANCE, DANCE and SamToNe.

    python experiments/msmarco.py                                        # passages, dev and TREC DL 2019 and 2020
    python experiments/msmarco.py --train-topics 50000 --rounds 1        # a first look
    torchrun --nproc_per_node=4 experiments/msmarco.py --bf16            # several GPUs

What it does, step by step, each step skipped where its result lies in ``--out`` already, so that the same command goes
on after a crash:

1. The corpus goes to disk (``pt_dance.Corpus``), and BM25 over it (PISA).
2. Every method trains from the same encoder: negatives come from BM25 at first and from the model later, as pipelines
   that are asked block by block, so that no frame of all candidates is ever in memory.
3. The table: BM25, each method as a retriever of the whole collection, and as re-ranker of BM25's best 1,000.

Cost on one H100, on paper, not measured: an encoder of base size takes some 22 GFLOP for a passage of 128 tokens, so
at a third of the card's 990 TFLOP/s in bfloat16 some 15,000 passages a second at best. With a third of that, an index
of the 8.8 million passages takes half an hour, and an epoch of 530,000 pairs with one negative (three texts, forwards
and backwards) a quarter of an hour. With three refreshes a stage, ANCE trains four rounds and makes five indexes, one
of them before it trains: three and a half hours. DANCE trains eight and makes nine: six and a half. SamToNe trains one
and makes two: an hour and a quarter. BM25's negatives for half a million queries come on top, once for each method: at
100 queries a second, an hour and a half of one thread. An index of 768 float32 numbers a passage is 27 GB on disk.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyterrier as pt
from ir_measures import RR, R, nDCG

from pt_dance import Corpus, DanceRetriever, DualEncoder, bm25, recipes
from pt_dance.mining.sources import FIRST_STAGE

METHODS = ("ance", "dance", "samtone")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", default="irds:msmarco-passage", help="pt.get_dataset name of the documents (default: %(default)s)"
    )
    parser.add_argument(
        "--train",
        default="irds:msmarco-passage/train/judged",
        help="topics and qrels to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--dev", default="irds:msmarco-passage/dev/small",
        help="topics and qrels that choose the best round; also in the table (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--test", nargs="*",
        default=["irds:msmarco-passage/trec-dl-2019/judged", "irds:msmarco-passage/trec-dl-2020/judged"],
        help="further topics and qrels for the table (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", default="distilbert/distilroberta-base",
        help="folder or name on the Hugging Face hub; 'static' for a tower from nothing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--pooling", choices=["cls", "mean"], help="of a plain transformer; the model's own otherwise")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default: %(default)s)")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="rows (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="refreshes of ANCE, and of each of DANCE's stages (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=1, help="passes over the pairs in each round")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="what suits the encoder where it is not given")
    parser.add_argument("--depth", type=int, default=200, help="results that negatives are drawn from")
    parser.add_argument("--train-topics", type=int, help="train on so many topics, drawn once")
    parser.add_argument("--dev-topics", type=int, default=1000, help="choose the best round on so many topics")
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 autocast, as a GPU should")
    parser.add_argument("--published", action="store_true", help="ANCE, DANCE and SamToNe with the published settings")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that BM25 searches with (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="fixes negatives, order and dropout")
    parser.add_argument("--out", type=Path, default=Path("runs/msmarco"), help="folder of everything")
    return parser.parse_args(arguments)


def topics_of(name: str, most: int | None = None, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Topics that have a relevant document, and their qrels; a random part of them where there are more."""
    dataset = pt.get_dataset(name)
    topics, qrels = dataset.get_topics(), dataset.get_qrels()
    if "query" not in topics.columns:
        topics = dataset.get_topics("text")
    relevant = qrels.loc[qrels["label"] > 0, "qid"]
    topics = topics.loc[topics["qid"].isin(relevant), ["qid", "query"]].reset_index(drop=True)
    if most is not None and most < len(topics):
        topics = topics.sample(most, random_state=seed).sort_index().reset_index(drop=True)
    return topics, qrels[qrels["qid"].isin(topics["qid"])].reset_index(drop=True)


def encoder_of(args: argparse.Namespace, corpus: Corpus) -> DualEncoder:
    """The encoder that every method starts from."""
    if args.encoder == "static":
        return DualEncoder.static(corpus, seed=args.seed)
    more = {} if args.pooling is None else {"pooling": args.pooling}
    return DualEncoder(args.encoder, max_length=args.max_length, **more)


def recipe_of(method: str, args: argparse.Namespace, first_stage: pt.Transformer) -> list:
    """A method's rounds, whose first negatives come from a pipeline rather than from a frame of all its results."""
    more: dict = dict(batch_size=args.batch_size, epochs=args.epochs, depth=args.depth)
    if args.learning_rate is not None:
        more["learning_rate"] = args.learning_rate
    if args.bf16:
        more["training_arguments"] = {"bf16": True}
    if method == "samtone":
        rounds = recipes.samtone(published=args.published, **more)
    elif method == "dance":
        rounds = recipes.dance(rounds=args.rounds, published=args.published, **more)
    else:
        rounds = recipes.ance(rounds=args.rounds, published=args.published, **more)
    mined = first_stage % args.depth
    return [replace(r, negatives=mined) if r.negatives == FIRST_STAGE else r for r in rounds]


def main(arguments: list[str] | None = None) -> pd.DataFrame | None:
    """Run everything that is not there yet, and print the table; of several processes the first one does."""
    args = options(arguments)
    corpus = Corpus.build(pt.get_dataset(args.corpus), args.out / "corpus")
    first_stage = bm25(corpus, args.out / "bm25", threads=args.threads)
    train, dev = topics_of(args.train, args.train_topics), topics_of(args.dev, args.dev_topics)
    encoder = encoder_of(args, corpus)
    trained = {}
    for method in args.methods:
        rounds = recipe_of(method, args, first_stage)
        dance = DanceRetriever(
            encoder, corpus, args.out / method, recipe=rounds, num_results=1000, measure=RR @ 10, seed=args.seed,
            keep="best",
        )  # fmt: skip
        trained[method] = dance.fit(*train, *dev)
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes have done their part
        return None
    systems = {"BM25": first_stage}
    for method, dance in trained.items():
        systems |= {method: dance, f"BM25 >> {method}": first_stage >> dance}
    tables = []
    for name in (args.dev, *args.test):
        table = pt.Experiment(
            list(systems.values()), *topics_of(name), [RR @ 10, nDCG @ 10, R @ 1000], names=list(systems), baseline=0,
            correction="holm", round=4,
        )  # fmt: skip
        tables.append(table.assign(topics=name))
        print(f"\n{name}\n{table.to_string(index=False)}")
    found = pd.concat(tables, ignore_index=True)
    found.to_csv(args.out / "table.csv", index=False)
    return found


if __name__ == "__main__":
    main()

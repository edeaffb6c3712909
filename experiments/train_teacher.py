"""Fine-tune a cross-encoder on a collection's own training split: a teacher for the Margin-MSE recipes.

The cross-encoder starts from all-MiniLM-L6-v2, whose six layers it needs (with the first two it stayed behind BM25);
short inputs keep it affordable on a laptop. It learns to tell relevant documents from BM25's negatives, and is then
compared with BM25 on the dev split, as the re-ranker of BM25's best 20.

    python experiments/train_teacher.py --dataset dance:../shared/data/medquad --out runs/teacher-medquad --bf16
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
from datasets import Dataset
from ir_measures import RR, nDCG

from common import minilm_path, open_corpus, split
from pt_dance import CrossEncoderScorer, bm25, mining


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="dance:pydocs", help="pt.get_dataset name (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"), help="folder of everything")
    parser.add_argument("--layers", type=int, default=6, help="layers of MiniLM to keep (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=80, help="tokens of a pair (default: %(default)s)")
    parser.add_argument("--negatives", type=int, default=1, help="BM25 negatives a pair (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=7e-5)
    parser.add_argument("--topics", type=int, help="train on a random part of the topics")
    parser.add_argument("--documents", type=int, help="keep about so many documents, all relevant ones among them")
    parser.add_argument("--freeze-embeddings", action="store_true", help="leave the token embeddings as they are")
    parser.add_argument("--bf16", action="store_true", help="train and score with bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def training_pairs(topics: pd.DataFrame, qrels: pd.DataFrame, mined: pd.DataFrame, corpus) -> Dataset:
    """Relevant pairs and mined ones, columns query, text and label (1 or 0)."""
    relevant = mining.positive_pairs(topics, qrels)[["qid", "docno"]].assign(label=1.0)
    pairs = pd.concat([relevant, mined[["qid", "docno"]].assign(label=0.0)], ignore_index=True)
    queries = topics.drop_duplicates("qid").set_index("qid")["query"]
    return Dataset.from_dict(
        {
            "query": queries.loc[pairs["qid"]].tolist(),
            "text": corpus.texts(pairs["docno"].tolist()),
            "label": pairs["label"].tolist(),
        }
    )


def train(pairs: Dataset, args: argparse.Namespace):
    """Train a ``CrossEncoder`` with one label; its logits are the scores."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from torch import tensor
    from torch.cuda import is_available
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    # MiniLM's folder is that of a bi-encoder, which CrossEncoder would open as such: only weights and tokenizer count.
    folder = args.out / "start"
    if folder.exists():
        shutil.rmtree(folder)
    config = AutoConfig.from_pretrained(minilm_path(), num_labels=1)
    config.num_hidden_layers = min(args.layers, config.num_hidden_layers)
    AutoModelForSequenceClassification.from_pretrained(minilm_path(), config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(folder)
    model = CrossEncoder(str(folder), num_labels=1, max_length=args.max_length)
    if args.freeze_embeddings:
        model.model.get_input_embeddings().requires_grad_(False)
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(args.out / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        bf16=args.bf16,
        use_cpu=not is_available(),
    )
    loss = BinaryCrossEntropyLoss(model, pos_weight=tensor(float(args.negatives)))
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
    shutil.rmtree(folder)
    return model


def main() -> None:
    args = options()
    started = time.perf_counter()
    dataset = pt.get_dataset(args.dataset)
    args.out.mkdir(parents=True, exist_ok=True)
    train_topics, train_qrels = split(dataset, "train", most=args.topics, seed=args.seed)
    dev_topics, dev_qrels = split(dataset, "dev")
    needed = {docno for qrels in (train_qrels, dev_qrels, dataset.get_qrels("test")) for docno in qrels["docno"]}
    corpus = open_corpus(dataset, args.out / "corpus", most=args.documents, needed=needed)
    first_stage = bm25(corpus, args.out / f"bm25-{len(corpus)}")

    # Not from the very top, where documents that nobody judged but that answer the question are.
    mined = mining.mine_documents(
        first_stage, train_topics, train_qrels, depth=50, rank_range=(2, 50), negatives=args.negatives, seed=args.seed
    )
    pairs = training_pairs(train_topics, train_qrels, mined, corpus)
    print(f"{len(pairs)} pairs of {len(train_topics)} queries")
    model = train(pairs, args)
    model.save_pretrained(str(args.out / "model"))
    trained = time.perf_counter()

    dtype = "bfloat16" if args.bf16 else "float32"
    teacher = CrossEncoderScorer(str(args.out / "model"), max_length=args.max_length, batch_size=128, dtype=dtype)
    reranked = first_stage % 20 >> pt.text.get_text(corpus, "text") >> teacher
    table = pt.Experiment(
        [first_stage, reranked], dev_topics, dev_qrels, [nDCG @ 10, RR @ 10],
        names=["BM25", "BM25 % 20 >> teacher"], baseline=0, round=4,
    )  # fmt: skip
    print(table[["name", "nDCG@10", "RR@10", "nDCG@10 p-value"]].to_string(index=False))
    about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    about |= {"pairs": len(pairs), "fingerprint": teacher.fingerprint}
    about |= {row["name"]: float(np.round(row["nDCG@10"], 4)) for _, row in table.iterrows()}
    (args.out / "teacher.json").write_text(json.dumps(about, indent=1))
    print(f"trained in {trained - started:.0f} s, {time.perf_counter() - started:.0f} s in all: {args.out / 'model'}")


if __name__ == "__main__":
    main()

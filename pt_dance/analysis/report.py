"""One self-contained page on a run: what was trained, what it did, what it cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from pt_dance.analysis import figures
from pt_dance.analysis.embedding_space import compare, space
from pt_dance.analysis.mined import MiningReport, mining
from pt_dance.analysis.results import per_query, wins_and_losses
from pt_dance.analysis.space_report import SpaceReport, describe_sample
from pt_dance.analysis.words import recipe_in_words
from pt_dance.storage.display import cut
from pt_dance.storage.folders import human_bytes, publish_file
from pt_dance.storage.options import path_of, whole
from pt_dance.storage.writing import writing
from pt_dance.training.history import history_table
from pt_dance.training.options import check_measures
from pt_dance.training.record import read_record
from pt_dance.training.run_folder import RunFolder

UNTRAINED, TRAINED = "untrained", "trained"
# What has no place in a page: control characters, half characters, and non-characters.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_LISTS = (("Most won", "most won"), ("Most lost", "most lost"))
_SPACE_MEASURES = (
    ("alignment", "pairs"), ("uniformity", "queries"), ("uniformity", "documents"), ("mean cosine", "queries"),
    ("mean cosine", "documents"), ("isotropy", "both"), ("effective rank", "queries"), ("effective rank", "documents"),
    ("tower gap", "both"), ("told apart", "both"), ("s(q, q′) / s(q, d), median", "pairs"),
    ("cosine to best result", "q→d"), ("N10 Gini", "q→d"), ("N10 never found", "q→d"), ("N10 Gini", "d→q"),
    ("nDCG@10", "q→d"), ("nDCG@10", "d→q"),
)  # fmt: skip


def write_report(
    dance: Any,
    path: str | Path,
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    *,
    baselines: Mapping[str, Callable[[pd.DataFrame], pd.DataFrame]] | None = None,
    teacher: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    sample: int = 1000,
    examples: int = 5,
    seed: int = 42,
) -> Path:
    """Write a page on a fitted run: an HTML file that needs no network and runs no scripts.

    Args:
        dance: A fitted ``DanceRetriever`` with a corpus.
        path: File to write; one that is there is replaced.
        topics: Columns ``qid`` and ``query``, better not those of training.
        qrels: Columns ``qid``, ``docno``, ``label``.
        baselines: Systems to compare with by name, wins and losses against the first; the untrained encoder where None.
        teacher: As in :func:`pt_dance.analysis.mining`.
        sample: Relevant pairs for the measures of the space.
        examples: How many of the largest wins, and losses, are shown.
        seed: Fixes the samples.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing to report on, or the topics have no qrels.
        OSError: If the file cannot be written.
    """
    path = path_of(path)
    whole("sample", sample, 2)
    whole("examples", examples, 0)
    if dance.corpus is None:
        raise ValueError("a report shows documents: give corpus=... when loading the DanceRetriever")
    if not len(dance.history):
        raise ValueError("there is nothing to report on yet; fit first")
    run = RunFolder(dance.path)
    stored = read_record(run)
    made = {} if stored is None else stored[1]
    started = {} if dance.initial_encoder is None else {UNTRAINED: dance.initial_encoder}  # None where it was saved
    spaces = {
        name: space(encoder, topics, qrels, dance.corpus, sample=sample, seed=seed)
        for name, encoder in {**started, TRAINED: dance.encoder}.items()
    }
    if baselines is None:
        baselines = {UNTRAINED: dance.retriever(round=0)} if started else {}
    measures = check_measures(dance.measure)
    measured = {
        name: per_query(system, topics, qrels, measures) for name, system in {**baselines, TRAINED: dance}.items()
    }
    first = next(iter(baselines), None)
    told = None if first is None else wins_and_losses(measured[first], measured[TRAINED], str(measures[0]), examples)
    page = _environment().get_template("report.html").render(
        name=Path(dance.path).name,
        facts=_facts(dance, made),
        recipe=recipe_in_words(run.settings() or {}),
        history=_history(dance.history, measures),
        history_figures=_history_figures(dance.history, measures),
        sample=describe_sample(spaces[TRAINED]),
        spaces=list(spaces),
        space=_space_rows(spaces),
        space_figures=_space_figures(spaces),
        mining=None if stored is None else _mining(mining(dance, teacher=teacher, examples=2, seed=seed)),
        systems=[(name, *(frame[str(m)].mean() for m in measures)) for name, frame in measured.items()],
        measures=[str(measure) for measure in measures],
        baseline=first,
        queries=len(measured[TRAINED]),
        told=told,
        compared=[(title, _shown(told[key], dance.corpus, first)) for title, key in _LISTS] if told and first else [],
        disk=_disk(Path(dance.path)),
        seconds=float(dance.history.filter(like="_seconds").sum().sum()),
    )  # fmt: skip
    with writing(path.parent, "the report", "nothing of it is left"):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.building")
        beside.write_text(page, encoding="utf-8")
        publish_file(beside, path)
    return path


def _environment() -> jinja2.Environment:
    """Return the package's templates; what is put into them is escaped, and cleaned of what no page can show."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pt_dance.analysis"), autoescape=True, finalize=_clean,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _clean(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else _UNSHOWABLE.sub("\ufffd", value)


def _facts(dance: Any, made: dict) -> list[tuple[str, str]]:
    encoder, corpus = dance.initial_encoder or dance.encoder, dance.corpus
    in_use = int(Path(dance.index.index_path).parent.name)
    facts = [
        ("Encoder", f"{encoder!r}, {encoder.dim} dimensions, {encoder.similarity} similarity"),
        ("Corpus", f"{Path(corpus.path).name}, {len(corpus):,} documents, content {corpus.fingerprint}"),
        ("Seed", str(dance.seed)),
        ("Round in use", f"{in_use} of {dance.history['round'].max()}"),
    ]
    if made.get("queries"):
        facts.append(("Training", f"{made['queries']:,} queries, {made['pairs']:,} relevant pairs"))
    if made.get("command"):
        facts.append(("Command", made["command"]))
    if made.get("versions"):
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())))
    return facts


def _history(history: pd.DataFrame, measures: list) -> dict[str, list]:
    columns = ["round", "name", "loss", "training_loss", "steps"]
    columns += [name for m in measures for name in (str(m), f"d→q {m}") if name in history.columns]
    columns += [f"{phase}_seconds" for phase in figures.PHASES]
    headings, rows = history_table(history, columns)
    return {"columns": headings, "rows": [list(map(_number, row)) for row in rows]}


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _svg(figure: Any) -> Markup:
    return Markup(figures.to_svg(figure))  # made by matplotlib, which escapes what it is given


def _history_figures(history: pd.DataFrame, measures: list) -> list[tuple[str, Markup]]:
    shown = [("What each round costs", _svg(figures.plot_time(history)))]
    if (name := str(measures[0])) in history.columns:
        names = [column for column in (name, f"d→q {name}") if column in history.columns]
        shown.insert(
            0, ("What each round is worth, on the validation topics", _svg(figures.plot_history(history, names)))
        )
    return shown


def _space_rows(spaces: dict[str, SpaceReport]) -> list[tuple]:
    table = compare(spaces)
    rows = []
    for measure, of in _SPACE_MEASURES:
        for column in table.columns:
            if column.startswith(measure) and column.endswith(f"({of})"):
                values = (table[name] for name in (column, f"{column} low", f"{column} high"))
                rows.append((column, *zip(*values, strict=True)))
    return rows


def _space_figures(spaces: dict[str, SpaceReport]) -> list[tuple[str, Markup]]:
    drawn = {
        "Queries and documents by t-SNE, relevant pairs joined; told apart: by a linear classifier, chance .5":
            figures.plot_tsne(spaces),
        "Squared distances between queries and documents": figures.plot_distances(spaces),
        "SamToNe's ratio on random pairs; around 1 queries and documents share one space": figures.plot_ratios(spaces),
        "How much of the variance the first principal components hold": figures.plot_spectra(spaces),
        "How evenly results fall; on the diagonal all are found equally often": figures.plot_hubness(spaces),
    }  # fmt: skip
    return [(caption, _svg(figure)) for caption, figure in drawn.items()]


def _mining(report: MiningReport) -> dict[str, Any]:
    rounds = report.rounds.dropna(axis=1, how="all")
    examples = report.examples.to_dict("records")
    return {
        "columns": list(rounds.columns),
        "rows": [list(map(_number, row)) for row in rounds.to_numpy(dtype=object).tolist()],
        "examples": [example | {"query": cut(example["query"])} for example in examples],
        "sampled": report.sampled,
    }


def _shown(queries: pd.DataFrame, corpus: Any, baseline: str) -> list[dict[str, Any]]:
    """Return the queries of a list with the texts of what both systems found."""
    shown = []
    for row in queries.to_dict("records"):
        ranks = [(name, row[f"rank {side}"]) for name, side in ((baseline, "before"), (TRAINED, "after"))]
        said = ", ".join(f"{name}: " + ("not found" if rank != rank else f"rank {rank:.0f}") for name, rank in ranks)
        relevant = row["found after"] if isinstance(row["found after"], str) else row["found before"]
        roles: dict[str, list[str]] = {}
        for what, docno in (
            (f"best of {baseline}", row["top before"]),
            (f"best of {TRAINED}", row["top after"]),
            (f"relevant ({said})", relevant),
        ):
            if isinstance(docno, str):
                roles.setdefault(docno, []).append(what)
        documents = [
            {"what": ", ".join(whats), "docno": docno, "text": cut(text)}
            for (docno, whats), text in zip(roles.items(), corpus.texts(list(roles)), strict=True)
        ]
        shown.append(row | {"query": cut(row["query"]), "documents": documents})
    return shown


def _disk(path: Path) -> list[tuple[str, str]]:
    sizes: dict[str, int] = {}
    for file in path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            parts = file.relative_to(path).parts
            name = " ".join(parts[:2]) if parts[0] == "rounds" and len(parts) > 2 else parts[0]
            sizes[name] = sizes.get(name, 0) + file.stat().st_size
    rows = [(name.replace("rounds ", "round "), human_bytes(size)) for name, size in sorted(sizes.items())]
    return [*rows, ("all", human_bytes(sum(sizes.values())))]

"""Figures of embedding spaces and of training, to be placed in a paper.

Every function returns a ``matplotlib.figure.Figure`` of its own and touches no state of pyplot; a notebook shows it,
and ``figure.savefig("space.pdf")`` gives vectors. Colours are those of Okabe and Ito, which people with a colour vision
deficiency can tell apart; line styles and marks tell the same without colour.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from pt_dance.analysis.space_report import SpaceReport

# Okabe & Ito (2008); the first is for the system that others are compared with
COLOURS = ("#767676", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
QUERY, DOCUMENT, OTHER = "#D55E00", "#0072B2", "#767676"
PHASES = {
    "mine": ("#0072B2", ""),
    "train": ("#D55E00", "///"),
    "refresh": ("#009E73", "..."),
    "validate": ("#CC79A7", "xx"),
}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of systems and rounds are texts, whatever signs they hold
    "svg.hashsalt": "pt_dance",
    "pdf.fonttype": 42,
}


class _ShownFigure(Figure):
    """A figure that a notebook shows whether or not pyplot is in use there."""

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=110)
        return written.getvalue()


def _styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(function)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return styled


def to_svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element: the same text for the same figure, letters as text."""
    written = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = written.getvalue()
    return text[text.index("<svg") :]


def _reports(spaces: SpaceReport | Mapping[str, SpaceReport]) -> dict[str, SpaceReport]:
    reports = {"": spaces} if isinstance(spaces, SpaceReport) else dict(spaces)
    if not reports:
        raise ValueError("there is nothing to draw; give at least one report by its name")
    for name, report in reports.items():
        if not isinstance(report, SpaceReport):
            raise TypeError(f"{name!r} is a {type(report).__name__}; give the reports that analysis.space returns")
    if len({report.sample.digest for report in reports.values()}) > 1:
        raise ValueError("the reports are of different samples and do not compare; measure all with the same options")
    return reports


def _panels(number: int, width: float, height: float, **options) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels in rows of at most four."""
    columns = min(number, 4)
    rows = -(-number // columns)
    figure = _ShownFigure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:number])


def _bins(values: int) -> int:
    return int(np.clip(3 * values ** (1 / 3), 10, 100))


def _line(number: int) -> dict[str, object]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.4}


@_styled
def plot_tsne(
    spaces: SpaceReport | Mapping[str, SpaceReport], *, pairs: int = 300, perplexity: float = 30.0, seed: int = 42
) -> Figure:
    """Draw t-SNE of queries and documents together, a panel a system, relevant pairs joined by thin lines.

    A picture of neighbourhoods, and never evidence alone: distances between groups, and their sizes, mean nothing in
    t-SNE. It starts from the first two principal components, so that panels of similar spaces look alike. Below each
    system stands how often a linear classifier tells query from document in the whole space (chance .5).

    Args:
        spaces: A report, or several of the same sample by name.
        pairs: How many of the sample's pairs are drawn, at most.
        perplexity: Of t-SNE; cut to a third of the points.
        seed: Fixes the draw of pairs and t-SNE.
    """
    reports = _reports(spaces)
    drawn = next(iter(reports.values())).sample.pairs
    rng = np.random.default_rng(seed)
    drawn = drawn[np.sort(rng.choice(len(drawn), min(pairs, len(drawn)), replace=False))]
    figure, axes = _panels(len(reports), 2.6, 2.9)
    queries, query_of = np.unique(drawn[:, 0], return_inverse=True)
    documents, document_of = np.unique(drawn[:, 1], return_inverse=True)
    for axis, (name, report) in zip(axes, reports.items(), strict=True):
        vectors = np.concatenate([report.queries[queries], report.documents[documents]])
        reduced = TSNE(init="pca", perplexity=min(perplexity, (len(vectors) - 1) / 3), random_state=seed)
        with threadpool_limits(1):  # more threads add up in another order, which t-SNE makes another picture of
            places = reduced.fit_transform(vectors)
        of_queries, of_documents = places[: len(queries)], places[len(queries) :]
        joined = np.stack([of_queries[query_of], of_documents[document_of]], axis=1)
        axis.add_collection(LineCollection(joined, colors=OTHER, linewidths=0.35, alpha=0.45, zorder=1))
        filled = dict(c=DOCUMENT, marker="o", linewidths=0, alpha=0.85)
        hollow = dict(facecolors="none", edgecolors=QUERY, marker="^", linewidths=0.7)
        axis.scatter(*of_documents.T, s=9, zorder=2, label="document", **filled)
        axis.scatter(*of_queries.T, s=11, zorder=3, label="query", **hollow)
        axis.set(xticks=[], yticks=[], title=name, aspect="equal", adjustable="datalim")
        axis.spines[:].set(visible=True, linewidth=0.5, color=OTHER)
        for told in report.measures.query("measure.str.startswith('told apart')")["value"]:
            axis.set_xlabel(f"told apart: {told:.2f}", fontsize=8)
    entries = (part[::-1] for part in axes[0].get_legend_handles_labels())
    figure.legend(*entries, loc="outside lower center", ncols=2)
    return figure


@_styled
def plot_distances(spaces: SpaceReport | Mapping[str, SpaceReport], *, bins: int | None = None) -> Figure:
    """Draw the distances of queries to their relevant document, the best of the pool and another pair's document.

    Args:
        spaces: A report, or several of the same sample by name.
        bins: Of the histograms; more for a larger sample where None.
    """
    reports = _reports(spaces)
    bins = bins or _bins(len(next(iter(reports.values())).distributions["pair"]))
    figure, axes = _panels(len(reports), 2.6, 2.4, sharex=True, sharey=True)
    farthest = (r.distributions[key].max(initial=2.5) for r in reports.values() for key in ("pair", "random pair"))
    limit = np.ceil(2 * max(farthest)) / 2
    kinds = {
        "relevant document": ("pair", DOCUMENT, "-"),
        "best result": ("best", QUERY, "--"),
        "another pair's document": ("random pair", OTHER, ":"),
    }
    for axis, (name, report) in zip(axes, reports.items(), strict=True):
        values = report.distributions | {"best": 2 - 2 * report.distributions["best"]}
        for label, (key, colour, dash) in kinds.items():
            heights, edges = np.histogram(values[key], bins=bins, range=(0, limit), density=True)
            axis.stairs(heights, edges, fill=True, color=colour, alpha=0.15)
            axis.stairs(heights, edges, color=colour, linestyle=dash, linewidth=1.2, label=label)
        axis.set(title=name, xlabel="‖q − d‖²", xlim=(0, limit), ylim=(0, None))
    axes[0].set_ylabel("density")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@_styled
def plot_ratios(
    spaces: SpaceReport | Mapping[str, SpaceReport], *, limits: tuple[float, float] = (-2, 4), bins: int | None = None
) -> Figure:
    """Draw SamToNe's ratio s(q, q′) / s(q, d) on random pairs: around 1 both towers share one space.

    Args:
        spaces: A report, or several of the same sample by name.
        limits: Ends of the axis; the legend says how much lies beyond.
        bins: Of the histograms; more for a larger sample where None.
    """
    reports = _reports(spaces)
    bins = bins or _bins(len(next(iter(reports.values())).distributions["ratio"]))
    figure = _ShownFigure(figsize=(5.2, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(0.9, 1.1, color=OTHER, alpha=0.15, linewidth=0)
    for number, (name, report) in enumerate(reports.items()):
        ratios = report.distributions["ratio"]
        counts, edges = np.histogram(ratios, bins=bins, range=limits)
        beyond = 1 - counts.sum() / max(len(ratios), 1)
        heights = counts / max(len(ratios), 1) / np.diff(edges)
        axis.plot((edges[:-1] + edges[1:]) / 2, heights, label=f"{name} ({beyond:.0%} beyond)".strip(), **_line(number))
    axis.set(xlabel="s(q, q′) / s(q, d), random pairs", ylabel="density", xlim=limits, ylim=(0, None))
    axis.legend()
    return figure


@_styled
def plot_spectra(spaces: SpaceReport | Mapping[str, SpaceReport]) -> Figure:
    """Draw how much of the variance the first k principal components hold, of queries and of documents.

    Args:
        spaces: A report, or several of the same sample by name.
    """
    reports = _reports(spaces)
    figure, axes = _panels(2, 3.2, 2.8, sharey=True)
    for axis, of in zip(axes, ("queries", "documents"), strict=True):
        for number, (name, report) in enumerate(reports.items()):
            shares = np.cumsum(report.spectra[of])
            every, label = np.arange(1, len(shares) + 1), f"{name} (rank {report.value('effective rank', of):.0f})"
            axis.plot(every, shares, label=label.strip(), **_line(number))
        axis.plot(every, every / len(every), color="black", linewidth=0.6, label="uniform")
        axis.set(title=of, xlabel="principal components", xscale="log", xlim=(1, len(every)), ylim=(0, 1.02))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.legend(fontsize=7.5)
    axes[0].set_ylabel("share of variance")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@_styled
def plot_hubness(spaces: SpaceReport | Mapping[str, SpaceReport], *, k: int = 10) -> Figure:
    """Draw how evenly what is found falls (Lorenz curves): the diagonal is all equally often.

    Where a curve leaves the axis is the share of documents, or queries, that nothing finds.

    Args:
        spaces: A report, or several of the same sample by name.
        k: How many each query, or document, finds.

    Raises:
        ValueError: If the reports have no counts for this k.
    """
    reports = _reports(spaces)
    ways = {"q→d": "documents found by queries", "d→q": "queries found by documents"}
    known = next(iter(reports.values())).found
    ways = {way: title for way, title in ways.items() if (way, k) in known}
    if not ways:
        raise ValueError(f"k={k!r} was not counted; choose one of {sorted({counted for _, counted in known})}")
    figure, axes = _panels(len(ways), 3.2, 3.1, sharey=True)
    for axis, (way, title) in zip(axes, ways.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="black", linewidth=0.6)
        for number, (name, report) in enumerate(reports.items()):
            counts = np.sort(report.found[way, k])
            curve = np.concatenate([[0], np.cumsum(counts) / counts.sum()])
            label = f"{name} (Gini {report.value(f'N{k} Gini', way):.2f})".strip()
            axis.plot(np.linspace(0, 1, len(curve)), curve, label=label, **_line(number))
        axis.set(title=title, xlabel="share of them, least found first", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.legend(fontsize=7.5, loc="upper left")
    axes[0].set_ylabel(f"share of all results (top {k})")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@_styled
def plot_history(
    history: pd.DataFrame, measures: str | Sequence[str], *, baselines: Mapping[str, float] | None = None
) -> Figure:
    """Draw what each round is worth. The axis begins at 0, so that differences look as large as they are.

    Args:
        history: A row a round, with ``round``, ``name`` and the measures, as ``DanceRetriever.history``. Round 0, the
            encoder as it came, is drawn as a line, too.
        measures: Columns to draw; baselines are of the first.
        baselines: Values to draw as lines by name, such as BM25's.

    Raises:
        ValueError: If there is no round, or a measure was not computed.
    """
    measures = [measures] if isinstance(measures, str) else list(measures)
    figure, axis, places = _round_axis(history)
    if missing := [measure for measure in measures if measure not in history.columns]:
        raise ValueError(f"{missing[0]!r} was not computed; fit with validation topics and this measure")
    untrained = history.loc[history["round"] == 0, measures[0]].dropna()
    lines = ({"untrained": untrained.iloc[0]} if len(untrained) else {}) | dict(baselines or {})
    drawn = history[measures].to_numpy(dtype=float)
    top = np.nanmax([*drawn.ravel(), *lines.values()])
    for number, (measure, values) in enumerate(zip(measures, drawn.T, strict=True), start=1):
        axis.plot(places, values, marker=_MARKS[number % len(_MARKS)], label=measure, **_line(number))
        offsets = np.where(values >= np.fmax.reduce(drawn, axis=1), 5, -11)  # below a mark that has another above it
        for at, value, up in zip(places, values, offsets, strict=True):
            axis.annotate(f"{value:.3f}", (at, value), (0, up), textcoords="offset points", ha="center", fontsize=7.5)
    for number, (name, value) in enumerate(lines.items(), start=1):
        axis.axhline(value, color=OTHER, linewidth=1, linestyle=_DASHES[number % len(_DASHES)])
        # names of lines that lie close together stand above and below them
        beside = [other - value for key, other in lines.items() if key != name and abs(other - value) < 0.06 * top]
        axis.annotate(
            f"{name} {value:.3f}", (1, value), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center" if not beside else "top" if max(beside) > 0 else "bottom", fontsize=7.5, color="#555555",
            annotation_clip=False,
        )  # fmt: skip
    axis.set(xlim=(-0.5, len(history) - 0.5), ylim=(0, 1.12 * top or 1), ylabel=", ".join(measures))
    if len(measures) > 1:
        axis.legend(loc="lower right")
    return figure


@_styled
def plot_time(history: pd.DataFrame) -> Figure:
    """Draw what each round costs: seconds to mine, train, refresh the index and validate.

    Args:
        history: A row a round, with ``round``, ``name`` and ``mine_seconds``, ``train_seconds``, ``refresh_seconds``,
            ``validate_seconds``, as ``DanceRetriever.history``.

    Raises:
        ValueError: If there is no round.
    """
    figure, axis, places = _round_axis(history)
    bottom = np.zeros(len(history))
    for phase, (colour, hatch) in PHASES.items():
        seconds = history[f"{phase}_seconds"].fillna(0).to_numpy(dtype=float)
        look = dict(color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
        axis.bar(places, seconds, bottom=bottom, width=0.6, label=phase, **look)
        bottom += seconds
    axis.set(ylabel="seconds", xlim=(-0.6, len(history) - 0.4), ylim=(0, None))
    figure.legend(loc="outside right upper")
    return figure


def _round_axis(history: pd.DataFrame) -> tuple[Figure, Axes, np.ndarray]:
    """Return a figure, its axis with a tick a round, and the places of the ticks."""
    if not len(history):
        raise ValueError("there is no round to draw yet; fit first")
    figure = _ShownFigure(figsize=(max(4.2, 1.4 + 0.95 * len(history)), 3.2), layout="constrained")
    axis, places = figure.subplots(), np.arange(len(history))
    axis.set_xticks(
        places, [f"{number}\n{_short(name)}" for number, name in zip(history["round"], history["name"], strict=True)]
    )
    axis.set_xlabel("round")
    return figure, axis, places


def _short(name: object) -> str:
    return text if len(text := str(name)) <= 12 else text[:11] + "…"

"""Figures of pt_dance.analysis: what they show, that they are vectors, and that they leave pyplot alone."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from pt_dance import analysis
from small_collection import standard_library


class Random:
    """An encoder whose vectors follow from the text alone; queries lie apart from documents by ``gap``."""

    def __init__(self, gap: float):
        self.gap = gap

    def encode_queries(self, texts):
        return self.encode_docs(texts) + self.gap * np.eye(8)[0]

    def encode_docs(self, texts):
        return np.stack([np.random.default_rng(list(text.encode()[:60])).normal(size=8) for text in texts])


class Memory:
    """Documents of a collection by docno."""

    def __init__(self, documents):
        self.by_docno = documents.set_index("docno")["text"]

    def __len__(self):
        return len(self.by_docno)

    def rows(self, docnos):
        return self.by_docno.index.get_indexer(docnos)

    def docno(self, rows):
        return self.by_docno.index.to_numpy()[rows]

    def texts(self, docnos):
        return self.by_docno.loc[list(docnos)].tolist()


@pytest.fixture(scope="module")
def spaces():
    collection = standard_library()
    corpus = Memory(collection.documents)
    return {
        name: analysis.space(Random(gap), collection.topics, collection.qrels, corpus, sample=90, resamples=0)
        for name, gap in (("islands", 9.0), ("one space", 0.0))
    }


@pytest.fixture
def history():
    frame = pd.DataFrame({"round": [1, 2, 3], "name": ["warm-up", "ance", "a very long name"]})
    frame["nDCG@10"], frame["RR@10"] = [0.61, 0.64, 0.63], [0.5, 0.55, 0.54]
    for phase, seconds in (("mine", 2), ("train", 30), ("refresh", 4), ("validate", 1)):
        frame[f"{phase}_seconds"] = [seconds, seconds + 1, seconds]
    return frame


def drawings(spaces, history):
    yield analysis.plot_tsne(spaces, pairs=40)
    yield analysis.plot_distances(spaces)
    yield analysis.plot_ratios(spaces)
    yield analysis.plot_spectra(spaces)
    yield analysis.plot_hubness(spaces)
    yield analysis.plot_distances(spaces["islands"])
    yield analysis.plot_history(history, ["nDCG@10", "RR@10"], baselines={"BM25": 0.5})
    yield analysis.plot_time(history)


def test_figures_are_vectors_the_same_each_time_and_leave_pyplot_and_settings_alone(
    spaces, history, tmp_path, monkeypatch
):
    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it now fails
    assert not [
        file for file in Path(analysis.__file__).parent.glob("*.py") if re.search("import.*pyplot", file.read_text())
    ]
    for figure, again in zip(drawings(spaces, history), drawings(spaces, history), strict=True):
        assert isinstance(figure, Figure)
        svg = analysis.to_svg(figure)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "<image" not in svg and "<text" in svg  # nothing is rasterised, letters are letters
        assert svg == analysis.to_svg(again)
        figure.savefig(tmp_path / "figure.pdf")
        assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


def test_tsne_joins_the_pairs_of_the_same_sample_in_every_panel(spaces):
    figure = analysis.plot_tsne(spaces, pairs=40)
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["islands", "one space"]
    for axis in axes:
        lines, documents, queries = axis.collections
        ends = np.array(lines.get_segments())
        assert ends.shape == (40, 2, 2)
        assert set(map(tuple, ends[:, 0])) == set(map(tuple, queries.get_offsets().data))
        assert set(map(tuple, ends[:, 1])) == set(map(tuple, documents.get_offsets().data))
    told = [float(axis.get_xlabel().split()[-1]) for axis in axes]
    assert told[0] > 0.95 and told[1] < 0.7


def test_tsne_is_the_same_picture_on_any_number_of_threads(spaces):
    vectors = np.random.default_rng(0).normal(size=(600, 384)).astype(np.float32)  # smaller sets do not depend on them
    report = replace(spaces["islands"], queries=vectors[:300], documents=vectors[300:])
    report = replace(report, sample=replace(report.sample, pairs=np.tile(np.arange(300)[:, None], 2)))
    places = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            axis = analysis.plot_tsne(report).axes[0]
        places.append(axis.collections[1].get_offsets().data)
    assert np.array_equal(*places)


def test_histograms_hold_the_distributions(spaces):
    axis = analysis.plot_distances(spaces, bins=10).axes[0]
    farthest = max(report.distributions["random pair"].max() for report in spaces.values())
    assert farthest > 2.5 and axis.get_xlim() == (0, np.ceil(2 * farthest) / 2), "every distance has a place"
    lines = {patch.get_label(): patch for patch in axis.patches if not patch.get_label().startswith("_")}
    for label, values in (
        ("relevant document", spaces["islands"].distributions["pair"]),
        ("best result", 2 - 2 * spaces["islands"].distributions["best"]),
    ):
        expected = np.histogram(values, bins=10, range=axis.get_xlim(), density=True)[0]
        assert lines[label].get_data().values == pytest.approx(expected)
    axis = analysis.plot_ratios(spaces, limits=(0, 2), bins=4).axes[0]
    ratios = spaces["islands"].distributions["ratio"]
    inside = np.histogram(ratios, bins=4, range=(0, 2))[0]
    assert axis.lines[0].get_ydata() * 0.5 == pytest.approx(inside / len(ratios))
    assert axis.lines[0].get_label() == f"islands ({1 - inside.sum() / len(ratios):.0%} beyond)"


def test_lorenz_curves_and_spectra(spaces):
    figure = analysis.plot_hubness(spaces)
    assert len(figure.axes) == 2
    curve = figure.axes[0].lines[1]
    counts = spaces["islands"].found["q→d", 10]
    x, y = curve.get_xdata(), curve.get_ydata()
    # twice the area between diagonal and curve is the Gini coefficient
    assert 1 - 2 * np.trapezoid(y, x) == pytest.approx(spaces["islands"].value("N10 Gini", "q→d"))
    assert (y == 0).sum() - 1 == (counts == 0).sum()
    spectra = analysis.plot_spectra(spaces).axes[0].lines[0].get_ydata()
    assert spectra == pytest.approx(np.cumsum(spaces["islands"].spectra["queries"]))
    with pytest.raises(ValueError, match=r"k=7 was not counted; choose one of \[10"):
        analysis.plot_hubness(spaces, k=7)


def test_history_is_not_cropped_and_shows_baselines(history):
    axis = analysis.plot_history(history, "nDCG@10", baselines={"BM25": 0.7, "untrained": 0.2}).axes[0]
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 0.7
    assert axis.lines[0].get_ydata().tolist() == [0.61, 0.64, 0.63]
    texts = [text.get_text() for text in axis.texts]
    assert {"BM25 0.700", "untrained 0.200", "0.640"} <= set(texts)
    two = analysis.plot_history(history, ["nDCG@10", "RR@10"]).axes[0]
    heights = {text.get_text(): text.xyann[1] for text in two.texts}
    assert heights["0.610"] > 0 > heights["0.500"], "numbers of two lines do not stand on each other"
    close = analysis.plot_history(history, "nDCG@10", baselines={"BM25": 0.5, "tf-idf": 0.51, "random": 0.1}).axes[0]
    sides = {text.get_text().split()[0]: text.get_va() for text in close.texts if "0." not in text.get_text()[:2]}
    assert sides == {"BM25": "top", "tf-idf": "bottom", "random": "center"}, "names do not stand on each other"
    bars = analysis.plot_time(history).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == history.filter(like="_seconds").to_numpy().sum()


def test_what_cannot_be_drawn_is_named(spaces, history):
    with pytest.raises(ValueError, match="'AP' was not computed"):
        analysis.plot_history(history, "AP")
    with pytest.raises(ValueError, match="fit first"):
        analysis.plot_time(history.head(0))
    with pytest.raises(TypeError, match="'a' is a str"):
        analysis.plot_ratios({"a": "report"})
    with pytest.raises(ValueError, match="nothing to draw"):
        analysis.plot_tsne({})
    collection = standard_library()
    other = analysis.space(
        Random(0), collection.topics, collection.qrels, Memory(collection.documents), sample=30, resamples=0
    )
    with pytest.raises(ValueError, match="different samples"):
        analysis.plot_spectra({**spaces, "other": other})

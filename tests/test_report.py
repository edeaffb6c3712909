"""The report page: one file, nothing from the network, all text as text, in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from pt_dance import Corpus, DanceRetriever, DualEncoder, analysis, recipes
from pt_dance.analysis.report import _shown
from pt_dance.analysis.results import per_query, wins_and_losses
from pt_dance.analysis.words import recipe_in_words
from small_collection import standard_library

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
# What Chromium asks its maker for by itself, whatever page is open.
OF_THE_BROWSER = re.compile(r"^https?://[\w.-]*\.(google|googleapis|gvt1|gstatic)\.com[:/]")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")

HOSTILE = [
    "<script>document.title = 'taken'; alert(1)</script> fox",
    "</style></script><img src=x onerror=\"document.title='taken'\"> sky",
    "<iframe src='https://example.org/'></iframe><link rel=stylesheet href='https://example.org/a.css'> river",
    "\u202egnihtyreve nruter \u2066 isolates without an end \u202e moon",
    "{{ 7 * 7 }} {% raw %} ${7*7} $\\frac{1}{2}$ template",
    "emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\u200d\u2620\ufe0f \u0301\u0301\u0301\u0301 zalgo",
    "nul \x00 bell \x07 escape \x1b[31m backspace \x08 \x85 \ufffe control",
    "]]><!-- <![CDATA[ --> &lt;b&gt; &amp;amp; <b>bold</b> entity",
]


def finds_nothing(topics: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"qid": [], "docno": [], "score": []})


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A trained run over 200 documents that mean no good, one of them a megabyte long."""
    folder = tmp_path_factory.mktemp("hostile")
    documents = [
        {"docno": f'd{i}"><script>alert(2)</script>', "title": "", "text": f"{HOSTILE[i % len(HOSTILE)]} number {i}"}
        for i in range(200)
    ]
    documents[0]["text"] += " word" * 210_000
    corpus = Corpus.build(documents, folder / "corpus", verbose=False)
    topics = pd.DataFrame({"qid": [f"q{i}<i>" for i in range(60)]})
    topics["query"] = [f"{HOSTILE[i % len(HOSTILE)]} which {i}" for i in range(60)]
    qrels = pd.DataFrame({"qid": topics["qid"], "docno": [documents[i]["docno"] for i in range(60)], "label": 1})
    encoder = DualEncoder.static([d["text"][:2000] for d in documents], dim=16, vocab_size=300)
    recipe = recipes.mnrl(1, batch_size=16, name="<u>$x$ & \u202eround") + recipes.ance(
        1, warm_up=0, loss="contrastive", batch_size=16
    )
    dance = DanceRetriever(encoder, corpus, folder / "run <b>", recipe=recipe, verbose=False)
    dance.fit(topics, qrels, topics.head(20), qrels.head(20))
    path = folder / "report.html"
    path.write_text("written before")
    baselines = {"<script>alert('name')</script>": finds_nothing}  # so that almost every query is shown as won
    written = dance.report(path, topics, qrels, baselines=baselines, sample=60, examples=60)
    assert written == path
    return path, dance, topics, qrels


class Elements(HTMLParser):
    """The names of all elements, and their attributes, as a browser would see them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.seen: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def parsed(path) -> Elements:
    elements = Elements()
    elements.feed(path.read_text(encoding="utf-8"))
    return elements


def test_hostile_documents_stay_text(hostile):
    path, *_ = hostile
    assert path.stat().st_size < 5_000_000
    page = parsed(path)
    names = {tag for tag, _ in page.seen}
    assert not names & {"script", "iframe", "img", "object", "embed", "b>", "i", "u", "form", "base"}
    for _, attributes in page.seen:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "<script>document.title = 'taken'; alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text and "$\\frac{1}{2}$" in page.text
    text = path.read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe]", text)
    # what turns the direction of text stands in an element that ends the turn
    outside = re.sub(r"<svg.*?</svg>|<bdi>.*?</bdi>", "", text, flags=re.S)
    assert "\u202e" in text and "\u202e" not in outside and "\u2066" not in outside
    assert "url(http" not in text and "@import" not in text


def in_browser(path, tmp_path, *options) -> tuple[str, list[str], list[str]]:
    """Open a page: the document as the browser made it, what it complained of, and what it asked the network for."""
    log = tmp_path / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-default-apps", "--disable-sync", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=3000", *options,
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=170, check=True)
    complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    text = log.read_text()
    try:
        events = json.loads(text)
    except json.JSONDecodeError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")
    urls = [e["params"]["url"] for e in events["events"] if isinstance(e.get("params"), dict) and "url" in e["params"]]
    asked = [url for url in urls if url.startswith(("http", "ws", "ftp")) and not OF_THE_BROWSER.search(url)]
    return done.stdout.decode(), complaints, asked


@needs_chromium
def test_browser_opens_it_without_errors_or_requests(hostile, tmp_path):
    path, *_ = hostile
    document, complaints, requests = in_browser(path, tmp_path, "--dump-dom")
    assert complaints == [] and requests == []
    assert "<title>run &lt;b&gt;: training of a dense retriever</title>" in document  # nothing ran that changes it
    assert document.count("<svg") == 7 and "<script" not in document and "<img" not in document


@needs_chromium
def test_the_browser_check_sees_errors_and_requests(tmp_path):
    """The check itself: a page that complains and asks for something is caught."""
    page = tmp_path / "bad.html"
    page.write_text("<title>bad</title><script>console.error('oh no')</script><img src='http://localhost:9/a.png'>")
    _, complaints, requests = in_browser(page, tmp_path, "--dump-dom")
    assert any("oh no" in line for line in complaints)
    assert any(url.startswith("http://localhost:9/") for url in requests)


@needs_chromium
@pytest.mark.parametrize("options", [["--window-size=390,3000"], ["--window-size=1200,3000"]])
def test_nothing_is_wider_than_the_screen(hostile, tmp_path, options):
    """A copy with one script of ours says how wide its contents are; wide tables scroll in themselves."""
    path, *_ = hostile
    probe = tmp_path / "probe.html"
    text = path.read_text(encoding="utf-8").replace(
        "default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';"
    )
    probe.write_text(
        text + "<script>document.title = document.documentElement.scrollWidth + ' ' + window.innerWidth</script>",
        encoding="utf-8",
    )
    document, *_ = in_browser(probe, tmp_path, "--dump-dom", *options)
    wide, screen = map(int, re.search(r"<title>(\d+) (\d+)</title>", document).groups())
    assert wide <= screen


def test_page_tells_what_was_trained(hostile):
    path, dance, *_ = hostile
    text = parsed(path).text
    for told in (
        "DualEncoder('static'), 16 dimensions, cosine similarity", "200 documents", dance.corpus.fingerprint,
        "60 queries, 60 relevant pairs", "Python 3.", "torch ", shlex.join(sys.argv),
        "Round 2, ance: 1 epoch in batches of 16",
        "drawn at random from the top 200 of current model", "Results on 60 queries", "All 60 relevant pairs",
    ):  # fmt: skip
        assert told in text, told


def test_numbers_on_the_page_are_those_of_the_run(hostile):
    path, dance, topics, qrels = hostile
    text = path.read_text(encoding="utf-8")
    before = per_query(finds_nothing, topics, qrels, [dance.measure])
    after = per_query(dance, topics, qrels, [dance.measure])
    told = wins_and_losses(before, after, "nDCG@10", 5)
    for value in (before["nDCG@10"].mean(), after["nDCG@10"].mean()):
        assert f"{value:.4f}" in text
    assert f'<b class="up">{told["wins"]}</b>' in text and f'<b class="down">{told["losses"]}</b>' in text
    for number in dance.history["training_loss"].dropna():
        assert f"{number:.4f}" in text
    mined = dance.negatives(2, texts=False)
    assert f"<bdi>{len(mined)}</bdi>" in text


# --- the parts --------------------------------------------------------------------------------------------------------


def test_per_query_equals_ir_measures_in_blocks(monkeypatch):
    import ir_measures
    from ir_measures import RR, nDCG

    rng = np.random.default_rng(0)
    topics = pd.DataFrame({"qid": [f"q{i}" for i in range(7)], "query": "?"})
    run = pd.DataFrame(
        [(f"q{i}", f"d{j}", rng.random()) for i in range(6) for j in range(5)], columns=["qid", "docno", "score"]
    )
    qrels = pd.DataFrame(
        [(f"q{i}", f"d{i % 5}", 1 + i % 2) for i in (0, 1, 2, 3, 5, 6)], columns=["qid", "docno", "label"]
    )
    monkeypatch.setattr("pt_dance.analysis.results._BLOCK_QUERIES", 3)
    told = per_query(lambda block: run[run["qid"].isin(block["qid"])], topics, qrels, [nDCG @ 10, RR @ 10])
    assert told["qid"].tolist() == ["q0", "q1", "q2", "q3", "q5", "q6"]  # q4 is not judged
    expected = {(v.query_id, str(v.measure)): v.value for v in ir_measures.iter_calc(
        [nDCG @ 10, RR @ 10],
        qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"}),
        run.rename(columns={"qid": "query_id", "docno": "doc_id"}),
    )}  # fmt: skip
    for row in told.itertuples():
        assert row._3 == expected[row.qid, "nDCG@10"] and row._4 == expected[row.qid, "RR@10"]
        if row.qid == "q6":  # nothing was found for it
            assert row.top is None or row.top != row.top
            continue
        ranked = run[run["qid"] == row.qid].sort_values("score", ascending=False)["docno"].tolist()
        assert row.top == ranked[0] and row.found == f"d{int(row.qid[1:]) % 5}"
        assert row.rank == ranked.index(row.found) + 1 == round(1 / row._4)
    with pytest.raises(ValueError, match="none of the topics has qrels"):
        per_query(None, topics.assign(qid="x"), qrels, [nDCG @ 10])


def test_wins_and_losses():
    frame = pd.DataFrame({"qid": list("abcd"), "query": list("ABCD"), "top": "d", "found": "d", "rank": 1.0})
    told = wins_and_losses(frame.assign(m=[0.1, 0.5, 0.5, 0.2]), frame.assign(m=[0.9, 0.5, 0.1, 0.3]), "m", 1)
    assert (told["wins"], told["ties"], told["losses"]) == (2, 1, 1)
    assert told["most won"]["qid"].tolist() == ["a"] and told["most lost"]["qid"].tolist() == ["c"]
    assert wins_and_losses(frame.assign(m=0.5), frame.assign(m=0.5), "m", 3)["p"] == 1


def test_a_document_in_two_roles_is_shown_once():
    class Texts:
        def texts(self, docnos):
            return [f"text of {docno}" for docno in docnos]

    row = {"query": "?", "top before": "a", "top after": "b", "found before": "b", "found after": "b"}
    nothing = dict.fromkeys(row, None) | {"query": "!", "rank before": float("nan"), "rank after": float("nan")}
    both = _shown(pd.DataFrame([row | {"rank before": 3.0, "rank after": 1.0}, nothing]), Texts(), "BM25")
    assert both[0]["documents"] == [
        {"what": "best of BM25", "docno": "a", "text": "text of a"},
        {"what": "best of trained, relevant (BM25: rank 3, trained: rank 1)", "docno": "b", "text": "text of b"},
    ]
    assert both[1]["documents"] == []


def test_recipe_in_words_says_what_a_round_does():
    settings = {
        "rounds": 1, "round 1 name": "dual", "round 1 loss": "pairwise",
        "round 1 loss_options": "{'temperature': 0.01}",
        "round 1 epochs": 2, "round 1 batch_size": 64, "round 1 learning_rate": None, "round 1 similarity": "cosine",
        "round 1 negatives": "current_model#0123abcd", "round 1 query_negatives": "dense", "round 1 depth": 200,
        "round 1 negatives_per_query": 20, "round 1 negatives_per_row": 1, "round 1 query_negatives_per_row": 2,
        "round 1 sampling": "uniform", "round 1 rank_range": None, "round 1 filters": "()", "round 1 teacher": None,
        "round 1 share_of_queries": 0.2, "round 1 steps": None, "round 1 carry_optimizer": False, "round 10 name": "x",
    }  # fmt: skip
    assert recipe_in_words(settings) == [
        "Round 1, dual: 2 epochs in batches of 64 at the encoder's usual learning rate. Loss: pairwise with "
        "temperature 0.01; cosine similarity from here on. Negatives: 20 for each query, drawn at random from the top "
        "200 of current model, 1 in a row of training. Query negatives: 20 for each document, drawn at random from the "
        "top 200 of dense, 2 in a row of training. 20% of the queries take their turn."
    ]


def test_a_saved_retriever_has_a_page_without_its_training(hostile, tmp_path):
    _, dance, topics, qrels = hostile
    dance.save(tmp_path / "saved")
    loaded = DanceRetriever.load(tmp_path / "saved", corpus=dance.corpus)
    text = parsed(loaded.report(tmp_path / "deep" / "page.html", topics, qrels, sample=60)).text
    assert "This folder was saved without a record of training" in text
    loaded.corpus = None
    with pytest.raises(ValueError, match="a report shows documents"):
        loaded.report(tmp_path / "page.html", topics, qrels)


def test_a_run_that_was_not_fitted_says_so(tmp_path):
    collection = standard_library()
    encoder = DualEncoder.static(list(collection.documents["text"]), dim=4, vocab_size=200)
    dance = DanceRetriever(encoder, collection, tmp_path / "run", verbose=False)
    with pytest.raises(ValueError, match="fit first"):
        analysis.write_report(dance, tmp_path / "page.html", collection.topics, collection.qrels)
    assert not (tmp_path / "page.html").exists()


def test_page_is_replaced_whole(hostile):
    path, *_ = hostile
    assert "written before" not in path.read_text(encoding="utf-8")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["corpus", "report.html", "run <b>"]

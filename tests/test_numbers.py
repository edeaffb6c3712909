"""Every number that the documentation tells of a measurement is made from, or compared with, a committed result.

What stands between "measured" (or "study") marks is written from committed files; tests/test_docs.py and
tests/test_evidence.py compare. What stands in sentences is compared here. A number that is neither must be listed as
what it is: a setting, a size that the code fixes, or a time that names its machine.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCS = ROOT / "pt_dance" / "pt_docs"
NOTES = ROOT / "experiments" / "evidence" / "notes.rst"  # the end of results.rst, which is made as a whole
GENERATED = {"results", "choosing"}
FILES = {"README": ROOT / "README.md", "CONTRIBUTING": ROOT / "CONTRIBUTING.md", "notes": NOTES} | {
    path.stem: path for path in sorted(DOCS.glob("*.rst")) if path.stem not in GENERATED
}
COUNTS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COUNTS += ["eleven", "twelve", "thirteen", "fourteen", "fifteen"]


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def short(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def seconds(name: str, mode: str) -> str:
    """Training and refreshes of a fit, mean over seeds; beside each other only training takes time."""
    runs = pd.DataFrame(run for run in load(name)["runs"] if run["mode"] == mode)
    took = runs["train_seconds"] + (runs["refresh_seconds"] if mode == "between" else 0)
    return f"{took.mean():.0f}"


def facts() -> dict[str, list[str]]:
    """Return the sentences, by page, as the committed results make them."""
    disk, medquad = load("disk"), load("quickstart-medquad")
    static, minilm = "refresh-beside-medquad-static", "refresh-beside-medquad-minilm"
    gpu = f"{minilm}-gpu"
    refreshed, beside, between = load("kill-refresh-static"), *(seconds(static, m) for m in ("beside", "between"))
    within = [
        low <= 0 <= high for low, high in (load(n)["its 95 % interval over queries"] for n in (static, minilm, gpu))
    ]
    assert within == [True, False, True] and load(gpu)["hidden"] == 0, "scaling.rst says so"
    killed, fits = (COUNTS[count] for count in (sum(refreshed["kills"].values()), refreshed["fits"]))
    torchrun = COUNTS[sum(load("kill-torchrun")["kills"].values())]
    cells = pd.read_csv(RESULTS / "recipes.csv")
    change = cells["last"] - cells["untrained"]
    below = cells[change < 0]
    ance = cells.pivot_table(index=["collection", "encoder"], columns="recipe", values="last")
    ahead = ance["ance"] - ance["ance, pairs"]
    better = f"{(ahead > 0).sum()} of {len(ahead)} samples"
    rates = pd.read_csv(RESULTS / "evidence" / "rates.csv")
    ends = rates.pivot_table(index="learning_rate", columns="method", values="nDCG@10, reported")
    low, middle = ends.iloc[0], ends.iloc[1]
    before, apart = rates["nDCG@10, reported"][0], ends["dance-norm"] - ends["dance-none"]
    assert sorted(low > before) == [False, True, True, True] and (apart > 0).all() and middle.max() < before
    assert (ends["dance-dual"] < ends["dance-none"]).all() and (ends["dance-norm-dual"] < ends["dance-norm"]).all()
    again = pd.read_csv(RESULTS / "evidence" / "repeated-cells.csv").set_index("collection")
    higher = again["again"] - again["first"]
    own = pd.read_parquet(RESULTS / "evidence" / "same-settings.parquet").groupby("method")["value"].mean()
    scifact = pd.read_parquet(RESULTS / "evidence" / "scifact-minilm.parquet")
    scifact = scifact[(scifact["collection"] == "scifact") & (scifact["measure"] == "nDCG@10")]
    mnrl, mined, two = (scifact[f"{method}/1"].mean() for method in ("mnrl", "mnrl-ance", "ade-samtone"))
    assert abs(own["ade-mnrl"] - two) < 0.002, "MNRL with two towers is where SamToNe is"
    heads = pd.read_csv(RESULTS / "layernorm-head.csv").set_index(["encoder", "normalize", "dual"])["last"]
    start = pd.read_csv(RESULTS / "layernorm-head.csv").groupby("encoder")["untrained"].first()
    return {
        "README": [
            f"about {disk['GB']:.1f} GB, since PyPI's torch for Linux brings CUDA's libraries "
            f"({disk[CUDA]:.1f} GB of them)"
        ],
        "CONTRIBUTING": [f"brings CUDA's libraries (some {disk[CUDA]:.1f} GB)"],
        "ance": [f"it ends higher on {better} of"],
        "analysis": [
            f"({medquad['documents']:,} answers; {medquad['test queries']:,} questions on diseases",
            f'baselines={{"BM25": {medquad["table"][0]["nDCG@10"]:.3f}}}',
        ],
        "scaling": [
            f"training and refreshes took {beside} seconds instead of {between} with a static tower, "
            f"{seconds(minilm, 'beside')} instead of {seconds(minilm, 'between')} with MiniLM",
            f"they took {seconds(gpu, 'beside')} instead of {seconds(gpu, 'between')}",
            f"it was {short(-load(minilm)['beside - between'])} lower, which is more than that noise",
            f"in {fits} fits whose processes were killed {killed} times",
        ],
        "training": [
            f"Trainer or refresher were killed {killed} times at random moments of {fits} fits",
            f"one of two processes was killed {torchrun} times at random moments",
        ],
        "notes": [
            f"In {(change > 0).sum()} of {len(cells)} cells the last round is above the untrained encoder. "
            f"The other {COUNTS[len(below)]} are transformers on MedQuAD and SQuAD's sentences, untrained "
            f"{short(below['untrained'].min())} or more: at most {short(-change.min())} below",
            f"(paired t-test, p above {short(below['p'].min() - 0.005, 2)})",
            f"ends above the published pairs on {better}, and at most {short(-ahead.min())} below",
            f"{short(low['dance-none'])} without both, {short(low['dance-norm'])} with normalisation, "
            f"{short(low['dance-norm-dual'])} with both; the dual loss alone has {short(low['dance-dual'])}.",
            f"by {short(apart.iloc[0])} at the lowest and by {short(apart.iloc[1])} at the middle one",
            f"is ahead on all reported queries, {short(mined - mnrl)}, a run of MNRL at its rate has "
            f"{short(own['mnrl'] - mnrl)} (one seed",
            f"nDCG@10 is {short(higher['scifact'], 4)} higher on SciFact and "
            f"{short(higher['squad-train-nqg-sentences'], 4)} on SQuAD's sentences",
            f"(untrained {short(start['static'])}) has {short(heads['static', False, False])} by dot products without "
            f"and with the dual loss, and {short(heads['static', True, False])} by cosines without and with it; "
            f"all-MiniLM (untrained {short(start['minilm'])}) has {short(heads['minilm', True, True])} in all four",
        ],
    }


KINDS = ("markdown", "code")
CUDA = "GB of CUDA's libraries"

# Numbers that are no measurements: settings, sizes and constants of the code, other people's defaults; and times that
# name their machine.
SETTINGS = {
    "README": {
        "3.10": "Python",
        ".75": "Terrier's default",
        "three minutes": "of two cores: making .venv; each notebook, which notebooks/execute.py prints",
        "two minutes": "of two cores: the quickstart, which prints it",
        "two and a half minutes": "of two cores: the same with MedQuAD",
    },
    "CONTRIBUTING": {},
    "analysis": {"95 %": "of intervals, and of a margin"},
    "ance": {".05": "default", "10,000": "the release's setting"},
    "benchmarks": {
        "6,000": "setting", "50 times": "setting", "50,000": "setting", "half a second": "setting",
    },
    "dance": {".05": "default", ".01": "the release's setting", "5,000": "the release's setting"},
    "encoders": {"0.01": "setting", "1.2 times": "constant of pt_dance.encoder.precision"},
    "indexing": {
        "4 times": "default", "11,429": "an example's message", "8,192": "an example's message",
    },
    "margin-mse": {".05": "advice"},
    "margin-mse-mnrl-dual": {".05": "default"},
    "mnrl": {".05": "default"},
    "notes": {
        ".01": "arithmetic", "ten times": "of the protocol: how much lower one grid is",
        ".02": "of the grid", ".05": "of the grid", "three times": "of the grid",
    },
    "scaling": {
        "three times": "constant of pt_dance.engines", "ten times": "definition",
    },
    "training": {
        ".05": "default", ".05 times": "default", "1,000": "constant of pt_dance.mining", "95 %": "of a margin",
        "four times": "default",
    },
}  # fmt: skip

UNITS = r"%|percent\b|seconds?\b|minutes?\b|hours?\b|ms\b|[KMG]i?B\b|times\b"
NUMBER = re.compile(
    rf"(?<![\w.,/^-])(?:\d{{1,3}}(?:,\d{{3}})+|\d*\.\d{{2,}}|\d+(?:\.\d+)?(?=\s(?:{UNITS})))(?!\w)(?:\s(?:{UNITS}))?"
    rf"|\b(?:half an?|an? few|an? hundred|{'|'.join(COUNTS)})(?: and a half)? (?:{UNITS})"
)  # fmt: skip


def prose(page: str) -> str:
    """Return a page's sentences in one line, without what is generated, code, formulae and what papers report."""
    text = FILES[page].read_text(encoding="utf-8")
    if FILES[page].suffix == ".md":
        text = re.sub(r"^<!-- (?:measured: )?([\w-]+) -->\n.*?^<!-- end of \1 -->$", "", text, flags=re.M | re.S)
        text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        text = re.sub(r"^    .*$|`[^`\n]*`|\]\([^)]*\)|arXiv \d+\.\d+", "", text, flags=re.M)
    else:
        text = re.sub(r"^\.\. (?:measured|study): ([\w-]+)\n.*?^\.\. end of \1$", "", text, flags=re.M | re.S)
        text = re.sub(r"^What the papers report\n.*?^When it helps", "", text, flags=re.M | re.S)
        text = re.sub(r"^( *)\.\. (?:code-block|math)::.*\n(?:\1 +.*\n|\n)*", "", text, flags=re.M)
        text = re.sub(r"``[^`]*``|:math:`[^`]*`|`[^`]*<http[^`]*`__|arXiv \d+\.\d+", "", text)
    return " ".join(text.split())


@pytest.mark.parametrize("page", FILES)
def test_every_number_in_a_sentence_is_that_of_a_committed_result(page):
    whole, sentences = " ".join(FILES[page].read_text(encoding="utf-8").split()), prose(page)
    for fact in facts().get(page, []):
        assert fact in whole, f"{FILES[page].name} should say: {fact}"
        sentences = sentences.replace(fact, "")
    assert set(NUMBER.findall(sentences)) == set(SETTINGS.get(page, {}))


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_number_in_the_text_of_a_notebook_is_a_setting(notebook):
    """What is measured stands in its outputs, of which the text around them tells in words."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = {kind: " ".join("".join(c["source"]) for c in cells if c["cell_type"] == kind) for kind in KINDS}
    assert f"PyPI's brings {load('disk')[CUDA]:.1f} GB of CUDA's libraries along" in texts["code"]
    said = re.sub(r"`[^`]*`|\]\([^)]*\)", "", texts["markdown"])
    assert set(NUMBER.findall(said)) <= {"half a minute"}  # on a CPU, see what notebooks/execute.py prints


def test_numbers_are_seen():
    text = (
        "17,320 answers, .006 lower, 0.527, some 3 GB, 95 % of them, ten times, half a minute; no 2, .5, 1e-5, v1.10.2"
    )
    assert NUMBER.findall(text) == ["17,320", ".006", "0.527", "3 GB", "95 %", "ten times", "half a minute"]


def test_readme_says_of_the_quickstart_what_its_table_shows():
    """Of which the words around it are not made: as good as BM25, more is found, both together are better."""
    table = pd.DataFrame(load("quickstart-pydocs")["table"]).set_index("name")
    bm25, dense, fused = (table.loc[name] for name in ("BM25", "dense", "BM25 + dense (RRF)"))
    assert dense["nDCG@10 p-value corrected"] > 0.05 and dense["R@100"] > bm25["R@100"] + 0.02
    assert all(fused[measure] > max(bm25[measure], dense[measure]) + 0.02 for measure in ("nDCG@10", "R@100"))
    assert fused["nDCG@10 p-value corrected"] < 1e-6


def test_the_quickstart_of_readme_is_the_default_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.setattr("sys.argv", ["quickstart.py"])
    args = importlib.import_module("quickstart").options()
    for name, dataset in (("quickstart-pydocs", args.dataset), ("quickstart-medquad", "dance:../shared/data/medquad")):
        told = load(name)
        assert (told["dataset"], told["encoder"], told["recipe"], told["seed"]) == (
            dataset, args.encoder, args.recipe, args.seed
        )  # fmt: skip

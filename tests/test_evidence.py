"""The study runs at toy size, goes on after kill -9, and its pages say what the committed cells say."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "evidence" / "run.py"
RESULTS = ROOT / "experiments" / "results" / "evidence"
sys.path.insert(0, str(ROOT / "experiments"))


@pytest.mark.collections
@pytest.mark.timeout(1200)
def test_the_whole_study_at_toy_size_goes_on_after_a_kill(shared_data, tmp_path):
    data = shared_data("scifact").parent
    command = [sys.executable, str(SCRIPT), "--small", "--data", str(data), "--runs", str(tmp_path)]
    cells = tmp_path / "small" / "cells" / "scifact" / "static"
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while len(list(cells.glob("*.parquet"))) < 4:
            assert study.poll() is None and time.monotonic() < deadline, "the study ended before it was killed"
            time.sleep(0.5)
    finally:
        os.killpg(study.pid, signal.SIGKILL)
        study.wait()
    made = {file: file.stat().st_mtime_ns for file in cells.glob("*.parquet")}
    printed = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=True).stdout
    assert all(file.stat().st_mtime_ns == when for file, when in made.items()), (
        "cells that were there are not made again"
    )
    for words in (
        "MNRL-Dual",
        "SamToNe, both sides",
        "DANCE +norm +dual",
        "Margin-MSE + MNRL, dual",
        "KL to the teacher",
    ):
        assert words in printed
    assert "cannot be told here" in printed or "holds" in printed
    started = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert again[again.index("What Each") :] == printed[printed.index("What Each") :], f"{time.monotonic() - started}"


def committed():
    from evidence.tables import ENCODERS, files_of

    files = [file for encoder in ENCODERS for file in files_of(RESULTS, encoder, ".parquet").values()]
    if not files:
        pytest.skip("no cells are committed yet")
    return files


def test_the_pages_say_what_the_cells_say():
    """Three cells of each table, computed anew with nothing but pandas."""
    from evidence.pages import NAMES

    files = committed()
    page = (ROOT / "pt_dance" / "pt_docs" / "results.rst").read_text()
    found = 0
    for file in files:
        values = pq.read_table(file).to_pandas()
        encoder = next(name for name in ("static-minilm", "minilm", "static") if file.stem.endswith(f"-{name}"))
        trained_on = file.stem.removesuffix(f"-{encoder}")
        section = page[page.index({"static": "With a static tower from nothing\n",
                                   "static-minilm": "With a static tower from MiniLM's token embeddings\n",
                                   "minilm": "With all-MiniLM-L6-v2\n"}[encoder]) :]  # fmt: skip
        own = values["collection"] == trained_on
        others = ~own & (values["measure"] == "nDCG@10")
        for title, rows in (
            ("nDCG@10 by training collection", own & (values["measure"] == "nDCG@10")),
            ("nDCG@10 of queries found by documents", own & (values["measure"] == "d→q nDCG@10")),
            ("nDCG@10 on all other collections, zero-shot, by", others),
        ):
            table = section[section.index(title.replace("@", r"\@")) :]
            header = re.findall(r"\* - method\n((?:      - .*\n)+)", table)[0]
            column = [line.strip("- ") for line in header.splitlines()].index(trained_on)
            for method in ("bm25", "mnrl", "samtone"):
                cells = values.loc[rows, [name for name in values if name.split("/")[0] == method]].dropna(how="all")
                if not cells.size:
                    continue
                # a collection counts once, however many queries it has
                means = cells.groupby(values.loc[cells.index, "collection"]).mean().mean()
                row = re.search(rf"\* - {re.escape(NAMES[method])}\n((?:      -.*\n)+)", table).group(1).splitlines()
                assert float(row[column].strip("- ").split(" ")[0]) == pytest.approx(means.mean(), abs=0.00051)
                found += 1
    assert found >= 8 * len(files)


def test_mnrl_at_the_settings_of_others_is_what_was_measured():
    from evidence.side_studies import same_settings_section
    from evidence.tables import told_of

    found = pd.read_parquet(RESULTS / "same-settings.parquet")
    seen = set(told_of(RESULTS, "minilm")["scifact"]["sizes"]["seen"])
    printed = " ".join("\n".join(same_settings_section(RESULTS)).split())
    for setting, method in (("3e-05 - 0.05", "mnrl"), ("1e-05 - 0.02", "ade-mnrl")):
        mine = found[found["method"] == method]
        parts = mine, mine[mine["qid"].isin(seen)], mine[~mine["qid"].isin(seen)]
        assert len(parts[0]) == 300 and len(parts[1]) == 176
        numbers = " - ".join(f"{part['value'].mean():.3f}".lstrip("0") for part in parts)
        assert f"{setting} - {numbers}" in printed


def test_committed_pages_are_those_of_the_committed_cells():
    from evidence.pages import pages
    from evidence.protocol import FULL

    committed()
    for file, text in pages(FULL, RESULTS).items():
        assert file.read_text() == text, f"{file.name} is not what `experiments/evidence/run.py --pages` writes"


def test_advice_says_where_training_did_not_help():
    from evidence.pages import advice

    own = pd.Series({"bm25": 0.6, "mnrl": 0.5, "untrained": 0.3})
    best = "``recipes.mnrl()`` (.200)"
    as_it_is = f"leave the encoder as it is (.250); the best of the recipes is {best}"
    little = f"training changes little there: {best} is the best of the recipes, untrained .203"
    for start, told in ((0.25, as_it_is), (0.203, little), (0.1, f"{best}, untrained .100")):
        lines = advice(own, pd.Series({"bm25": 0.5, "mnrl": 0.2, "untrained": start}), own)
        assert f"not trained on: {told}. BM25 has .500 there." in lines[1]
        assert "BM25 (.600) is better" in lines[2]


def test_advice_says_which_recipe_is_ahead_on_documents_that_were_not_trained_on():
    from evidence.pages import advice

    own, away = pd.Series({"mnrl-ance": 0.7, "mnrl": 0.6, "bm25": 0.5}), pd.Series({"bm25": 0.5, "mnrl": 0.4})
    ahead = pd.Series({"bm25": 0.9, "mnrl": 0.65, "mnrl-ance": 0.5})
    assert (
        "no training query asks for: ``recipes.mnrl()`` (.650). ``recipes.ance()`` (.500) is behind there."
        in (advice(own, away, ahead)[1])
    )
    for near in (0.653, 0.649, 0.7):
        assert "behind there" not in " ".join(advice(own, away, ahead.replace(0.5, near)))


def test_the_study_goes_on_without_a_teacher_that_knows_nothing(tmp_path, monkeypatch, capsys):
    from evidence.cells import Study
    from evidence.protocol import SMALL
    from evidence.run import work
    from evidence.teacher import TeacherError

    def run(study, cell):
        if cell.method == "margin-mse":
            raise TeacherError("it knows nothing")
        cell.file(study.runs).parent.mkdir(parents=True, exist_ok=True)
        cell.file(study.runs).touch()

    monkeypatch.setattr(Study, "run", run)
    monkeypatch.setattr("gc.freeze", lambda: None)
    methods = ["mnrl", "margin-mse", "distill-kl"]
    work(SimpleNamespace(data=tmp_path, runs=tmp_path, methods=methods, minutes=None), SMALL)
    made = {file.stem for file in tmp_path.rglob("*.parquet")}
    assert made == {"mnrl-1", "mnrl-2", "mnrl-3", "distill-kl-1", "distill-kl-2", "distill-kl-3"}
    assert capsys.readouterr().out.count("it knows nothing") == 1


def test_cells_come_back_from_what_is_committed(tmp_path):
    """Nothing that is committed is made anew, and what comes back is what was committed."""
    from evidence.protocol import FULL
    from evidence.tables import collect, unpack

    # One collection of each encoder: all of them are four times as many cells.
    names = {file.stem.rpartition("-")[2]: file for file in committed()}
    (tmp_path / "few").mkdir()
    for file in names.values():
        for part in (file, file.with_suffix(".json")):
            shutil.copy(part, tmp_path / "few")
    unpack(FULL, tmp_path / "few", tmp_path / "runs")
    assert len(list((tmp_path / "runs" / "cells").rglob("*.parquet")))
    collect(FULL, tmp_path / "runs", tmp_path / "results")
    for file in names.values():
        again = pq.read_table(tmp_path / "results" / file.name).to_pandas()
        pd.testing.assert_frame_equal(again, pq.read_table(file).to_pandas())
        assert (tmp_path / "results" / f"{file.stem}.json").read_text() == file.with_suffix(".json").read_text()


def test_other_results_beside_the_cells_are_not_taken_for_cells(tmp_path):
    from evidence.protocol import FULL
    from evidence.tables import load, unpack

    first, *_ = committed()
    for file in (first, first.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    (tmp_path / "efficiency.json").write_text("{}")
    pd.DataFrame({"value": [1.0]}).to_parquet(tmp_path / "refresh.parquet")
    assert len(load(tmp_path, "static")) == 1
    unpack(FULL, tmp_path, tmp_path / "runs")
    assert {file.parts[-3] for file in (tmp_path / "runs" / "cells").rglob("*.parquet")} == {
        first.stem.removesuffix("-static")
    }


def test_the_claims_are_older_than_the_results():
    files = committed()

    def first_commit(path):
        told = subprocess.run(
            ["git", "log", "--format=%ct", "--", str(path)], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
        return int(told[-1]) if told else None

    claims = first_commit("experiments/evidence/claims.toml")
    if claims is None:
        pytest.skip("there is no history here")
    assert all(claims < when for file in files if (when := first_commit(file.relative_to(ROOT))) is not None)


def test_intervals_cover_the_truth_and_no_effect_is_no_effect():
    """Differences of known size, with seeds and clusters that matter: the interval holds it about 95 times of 100."""
    import numpy as np

    from evidence.inference import resampled

    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        seeds, groups, each = 5, 30, 4
        effect = 0.02 + rng.normal(0, 0.01, (1, seeds)) + np.repeat(rng.normal(0, 0.05, (groups, 1)), each, axis=0)
        noise = rng.normal(0, 0.1, (groups * each, seeds))
        index = pd.MultiIndex.from_arrays(
            [np.repeat(np.arange(groups), each), np.arange(groups * each)], names=["cluster", "qid"]
        )
        than = pd.DataFrame(0.5, index=index, columns=range(1, seeds + 1))
        mean, sample = resampled(than + effect + noise, than, 500, f"trained {trial}", f"measured {trial}")
        assert mean == pytest.approx((effect + noise).mean())
        covered += np.quantile(sample, 0.025) < 0.02 < np.quantile(sample, 0.975)
    assert covered >= 52

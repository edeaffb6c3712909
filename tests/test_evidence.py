"""The study runs at toy size, goes on after kill -9, and its pages say what the committed cells say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    assert again[again.index("What each") :] == printed[printed.index("What each") :], f"{time.monotonic() - started}"


def committed():
    files = sorted(RESULTS.glob("*.parquet"))
    if not files:
        pytest.skip("no cells are committed yet")
    return files


def test_the_pages_say_what_the_cells_say():
    """Three cells of each table, computed anew with nothing but pandas."""
    from evidence.pages import NAMES

    files = committed()
    page = (RESULTS / "results.rst").read_text()
    found = 0
    for file in files:
        frame = pq.read_table(file).to_pandas()
        trained_on, encoder = frame["trained_on"].iloc[0], file.stem.removeprefix(frame["trained_on"].iloc[0] + "-")
        section = page[page.index({"static": "With a static tower from nothing",
                                   "static-minilm": "With a static tower from MiniLM",
                                   "minilm": "With all-MiniLM"}[encoder]) :]  # fmt: skip
        table = section[: section.index("nDCG@10 of queries found by documents")]
        header = re.findall(r"\* - method\n((?:     - .*\n)+)", table)[0]
        column = [line.strip("- \n") for line in header.splitlines() if line.strip()].index(trained_on)
        own = frame[(frame["collection"] == trained_on) & (frame["measure"] == "nDCG@10")]
        for method in [m for m in ("bm25", "untrained", "mnrl") if (own["method"] == m).any()]:
            mine = own[own["method"] == method]
            expected = pd.Series([part["value"].mean() for _, part in mine.groupby("seed")]).mean()
            row = re.search(rf"\* - {re.escape(NAMES[method])}\n((?:     -.*\n)+)", table).group(1).splitlines()
            printed = float(row[column].strip("- ").split(" ")[0])
            assert printed == pytest.approx(expected, abs=0.00051)
            found += 1
    assert found >= len(files)


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
    for _ in range(60):
        seeds, groups, each = 5, 30, 4
        effect = 0.02 + rng.normal(0, 0.01, (1, seeds)) + np.repeat(rng.normal(0, 0.05, (groups, 1)), each, axis=0)
        noise = rng.normal(0, 0.1, (groups * each, seeds))
        index = pd.MultiIndex.from_arrays(
            [np.repeat(np.arange(groups), each), np.arange(groups * each)], names=["cluster", "qid"]
        )
        than = pd.DataFrame(0.5, index=index, columns=range(1, seeds + 1))
        mean, sample = resampled(than + effect + noise, than, 500, np.random.default_rng(1))
        assert mean == pytest.approx((effect + noise).mean())
        covered += np.quantile(sample, 0.025) < 0.02 < np.quantile(sample, 0.975)
    assert covered >= 52

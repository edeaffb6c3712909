"""A run that version 0.1 wrote opens, answers as it did, and is gone on with."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round

DATA = Path(__file__).with_name("data")
sys.path.append(str(DATA))
import make_run  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(DATA / "run_of_version_0_1.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_loads_and_answers_as_it_did(folder):
    dance = DanceRetriever.load(folder / "run")
    found = (dance % 3)(make_run.TOPICS.tail(5))
    expected = pd.read_csv(folder / "results.csv")
    pd.testing.assert_frame_equal(found[["qid", "docno"]], expected[["qid", "docno"]])
    assert found["score"].tolist() == pytest.approx(expected["score"].tolist(), abs=1e-6)
    assert dance.history["name"].tolist()[-1] == "mnrl-dual" and dance.history["steps"].tolist()[-1] == 2


def test_a_fit_goes_on_with_it_instead_of_training_again(folder):
    trained = folder / "run" / "rounds" / "01" / "encoder" / "model.safetensors"
    before = trained.read_bytes(), trained.stat().st_mtime_ns
    encoder, corpus = DualEncoder.load(folder / "run" / "rounds" / "00" / "encoder"), Corpus(folder / "corpus")
    # Version 0.1's mnrl_dual(batch_size=8), spelled out: defaults may change.
    loss_options = dict(temperature=0.05, dual=True, dual_weight=1.0, document_weight=1.0)
    recipe = [Round(loss_options=loss_options, query_negatives="dense", batch_size=8, name="mnrl-dual")]
    dance = DanceRetriever(encoder, corpus, folder / "run", recipe=recipe, **make_run.OPTIONS)
    with pytest.warns(UserWarning, match="the untrained encoder stays"):  # of which version 0.1 knew nothing
        make_run.fit(dance)
    assert (trained.read_bytes(), trained.stat().st_mtime_ns) == before
    assert dance.history["name"].tolist() == ["untrained", "mnrl-dual"]

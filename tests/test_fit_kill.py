"""A fit under kill -9, for real: a short run of the script that does it at length; and what checkpoints promise."""

from __future__ import annotations

import pickle

import pytest

import kill_fit
from pt_dance.storage.folders import write_json
from pt_dance.training import checkpoints


@pytest.mark.timeout(1800)  # each child imports everything anew, and a busy machine has little time for it
def test_killed_at_a_random_moment_and_between_operations_on_the_disk():
    options = ["--kills", "1", "--seed", "5", "--topics", "24", "--keep", "best"]
    summary = kill_fit.main([*options, "--first", "130", "--boundaries", "200"])
    at_operations = summary["at operations on the disk"]
    assert summary["kills"] == 1 and at_operations["kills"] == 2


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of checkpoints with a published one."""
    write(tmp_path, 5)
    return checkpoints.newest(tmp_path)


def write(folder, step):
    written = folder / checkpoints.BUILDING / f"checkpoint-{step}"
    (written / "0_StaticEmbedding").mkdir(parents=True)
    (written / "0_StaticEmbedding" / "model.safetensors").write_bytes(b"weights")
    (written / "trainer_state.json").write_text("{}")
    checkpoints.publish(written, folder, {"loss_sum": 0.1 + step})


def test_the_newest_checkpoint_takes_the_place_of_older_ones(checkpoint, tmp_path):
    assert checkpoint.name == "checkpoint-5" and checkpoints.check(checkpoint) == {"loss_sum": 5.1}
    write(tmp_path, 12)
    assert checkpoints.newest(tmp_path).name == "checkpoint-12" and not checkpoint.exists()
    assert checkpoints.newest(tmp_path / "nowhere") is None


def test_what_was_not_finished_is_no_checkpoint(checkpoint, tmp_path):
    half = tmp_path / checkpoints.BUILDING / "checkpoint-9"
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    assert checkpoints.newest(tmp_path) == checkpoint


def cut(folder):
    (folder / "0_StaticEmbedding" / "model.safetensors").write_bytes(b"weight")


def change(folder):
    (folder / "trainer_state.json").write_text("[]")


def put_pickle(folder):
    (folder / "optimizer.pt").write_bytes(pickle.dumps({"state": {}}))


def lose(folder):
    (folder / "trainer_state.json").unlink()


def cut_list(folder):
    (folder / checkpoints.LIST).write_text('{"files": {')


def lose_list(folder):
    (folder / checkpoints.LIST).unlink()


def empty_list(folder):
    write_json(folder / checkpoints.LIST, {"files": [], "about": {}})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut, "model.safetensors"),
        (change, "trainer_state.json"),
        (put_pickle, "optimizer.pt"),
        (lose, "trainer_state.json"),
        (cut_list, "files.json"),
        (lose_list, "files.json"),
        (empty_list, "files.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint, damage, named):
    damage(checkpoint)
    with pytest.raises(ValueError, match=f"{named}.*damaged|damaged.*{named}") as caught:
        checkpoints.check(checkpoint)
    assert "\n" not in str(caught.value) and "remove the checkpoint" in str(caught.value)

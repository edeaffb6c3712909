"""Indexing under kill -9, for real: a short run of the script that does it at length."""

from __future__ import annotations

import pytest

import kill_indexing


@pytest.mark.timeout(1800)  # each child imports everything anew, and a busy machine has little time for it
def test_killed_between_operations_on_the_disk():
    options = ["--kills", "0", "--seed", "3", "--documents", "600", "--shard", "60", "--first", "47"]
    summary = kill_indexing.main([*options, "--boundaries", "100"])
    # One of each, where the finished index is about to take its place; --boundaries 1 goes through all operations.
    assert summary["kills at operations"] == {"create": 1, "overwrite": 1, "append": 1}
    assert summary["resumed"] >= 1

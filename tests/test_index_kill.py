"""Indexing under kill -9, for real: a short run of the script that does it at length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "benchmarks" / "kill_indexing.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes can be forked on POSIX systems only")
def test_killed_at_random_moments_and_between_operations_on_the_disk():
    options = ["--kills", "6", "--seed", "3", "--documents", "600", "--shard", "60", "--boundaries", "14"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["kills"] >= 6 and summary["boundaries"]["kills"] >= 8
    assert summary["resumed"] >= 1

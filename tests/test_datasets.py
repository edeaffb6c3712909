"""The data sets behind pt.get_dataset("dance:...")."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution, entry_points
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest

from pt_dance import DenseIndex
from pt_dance.datasets import BeirFolder, DanceDatasetProvider, PyDocs
from pt_dance.datasets._docstrings import STANDARD_LIBRARY, Docstring, module_files, read_docstrings, split_docstring
from pt_dance.datasets.pydocs import PACKAGES, _cached, make_collection
from pt_dance.index import joined
from pt_dance.index.files import FORMATS
from pt_dance.storage.folders import publish_folder
from small_collection import standard_library

DOCUMENTS = [
    {"_id": "d1", "title": "Bees", "text": "Bees make honey.", "year": 1990},
    {"_id": 2, "title": None, "text": ""},
    {"_id": "NA", "text": "Café “au lait”\u2028next line"},
]
QUERIES = [{"_id": "q1", "text": "who makes honey?"}, {"_id": 2, "text": "coffee/milk"}, {"_id": "null", "text": "x"}]
HEADER = "query-id\tcorpus-id\tscore\n"


def jsonl(records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


@pytest.fixture
def beir(tmp_path) -> Path:
    folder = tmp_path / "small"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_bytes(jsonl(DOCUMENTS))
    (folder / "queries.jsonl").write_bytes(jsonl(QUERIES))
    (folder / "qrels" / "train.tsv").write_text(HEADER + "q1\td1\t1\nq1\tNA\t0\n2\tNA\t2\n")
    (folder / "qrels" / "test.tsv").write_text(HEADER + "null\t2\t1\n")
    return folder


# Folders in BEIR layout


def test_folder_is_read_as_written(beir):
    dataset = pt.get_dataset(f"dance:{beir}")
    assert list(dataset.get_corpus_iter(verbose=False)) == [
        {"docno": "d1", "title": "Bees", "text": "Bees make honey.", "year": 1990},
        {"docno": "2", "title": "", "text": ""},
        {"docno": "NA", "title": "", "text": "Café “au lait”\u2028next line"},
    ]
    assert dataset.get_topics().to_dict("list") == {
        "qid": ["q1", "2", "null"],
        "query": ["who makes honey?", "coffee/milk", "x"],
    }
    topics, qrels = dataset.get_topicsqrels("train")
    assert topics["qid"].tolist() == ["q1", "2"]
    assert list(qrels.columns) == ["qid", "docno", "label"]
    assert qrels.values.tolist() == [["q1", "d1", 1], ["q1", "NA", 0], ["2", "NA", 2]]
    assert qrels["label"].dtype == "int64"
    assert dataset.get_qrels("test").values.tolist() == [["null", "2", 1]]
    assert dataset.splits == ["train", "test"]
    assert dataset.info_url() is None


def test_frames_without_rows_keep_columns_and_types(beir):
    (beir / "qrels" / "dev.tsv").write_text(HEADER)
    topics, qrels = BeirFolder(beir).get_topicsqrels("dev")
    full_topics, full_qrels = BeirFolder(beir).get_topicsqrels("train")
    assert len(topics) == len(qrels) == 0
    assert topics.dtypes.to_dict() == full_topics.dtypes.to_dict()
    assert qrels.dtypes.to_dict() == full_qrels.dtypes.to_dict()


def test_compressed_and_plain_files_are_the_same(beir, tmp_path):
    plain = BeirFolder(beir)
    packed = tmp_path / "packed"
    (packed / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (packed / f"{name}.gz").write_bytes(gzip.compress((beir / name).read_bytes()))
    (packed / "qrels" / "train.tsv").write_bytes((beir / "qrels" / "train.tsv").read_bytes())
    packed = BeirFolder(packed)
    assert list(packed.get_corpus_iter(verbose=False)) == list(plain.get_corpus_iter(verbose=False))
    pd.testing.assert_frame_equal(packed.get_topics("train"), plain.get_topics("train"))
    # One split only: which one is meant need not be said.
    pd.testing.assert_frame_equal(packed.get_qrels(), plain.get_qrels("train"))


def test_the_corpus_is_streamed(beir):
    (beir / "corpus.jsonl").write_bytes(jsonl(DOCUMENTS[:2]) + b"{broken\n")
    documents = BeirFolder(beir).get_corpus_iter(verbose=False)
    assert [next(documents)["docno"], next(documents)["docno"]] == ["d1", "2"]
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 3: not valid JSON"):
        next(documents)


def test_windows_line_ends_and_blank_lines(beir):
    for path in (beir / "corpus.jsonl", beir / "queries.jsonl", beir / "qrels" / "train.tsv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    dataset = BeirFolder(beir)
    assert [doc["docno"] for doc in dataset.get_corpus_iter(verbose=False)] == ["d1", "2", "NA"]
    assert dataset.get_qrels("train").values.tolist() == [["q1", "d1", 1], ["q1", "NA", 0], ["2", "NA", 2]]
    assert dataset.get_topics("train")["qid"].tolist() == ["q1", "2"]


def test_byte_order_marks_and_whole_numbers_with_a_point(beir):
    for path in (beir / "corpus.jsonl", beir / "queries.jsonl", beir / "qrels" / "train.tsv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    path = beir / "qrels" / "train.tsv"
    path.write_bytes(path.read_bytes().replace(b"\t1\n", b"\t1.0\r\n").replace(b"\t2\n", b"\t2.000\n"))
    dataset = BeirFolder(beir)
    qrels = dataset.get_qrels("train")
    assert qrels.values.tolist() == [["q1", "d1", 1], ["q1", "NA", 0], ["2", "NA", 2]]
    assert qrels["label"].dtype == "int64"
    assert [doc["docno"] for doc in dataset.get_corpus_iter(verbose=False)] == ["d1", "2", "NA"]
    assert dataset.get_topics("train")["qid"].tolist() == ["q1", "2"]


@pytest.mark.parametrize("packed", [False, True])
def test_documents_from_and_to_a_place(beir, packed):
    lines = (beir / "corpus.jsonl").read_bytes().replace(b"\n", b"\n\n", 1)
    if packed:
        (beir / "corpus.jsonl").unlink()
        (beir / "corpus.jsonl.gz").write_bytes(gzip.compress(lines))
    dataset, docnos = BeirFolder(beir), ["d1", "2", "NA"]
    for start, count in ((0, None), (1, None), (0, 2), (1, 1), (2, 9), (0, 0), (3, None), (np.int64(1), np.int32(2))):
        found = [d["docno"] for d in dataset.get_corpus_iter(verbose=False, start=start, count=count)]
        assert found == docnos[start:][:count]
    for options in ({"start": -1}, {"count": 1.5}, {"count": "2"}):
        with pytest.raises(ValueError, match="must be a whole number"):
            dataset.get_corpus_iter(verbose=False, **options)


def test_texts_are_loaded_by_docno(beir, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    frame = pd.DataFrame({"qid": ["1", "1"], "docno": ["NA", "d1"], "text": "old"})
    dataset = BeirFolder(beir)
    loaded = pt.text.get_text(dataset, "text")(frame)
    assert loaded["text"].tolist() == ["Café “au lait”\u2028next line", "Bees make honey."] and list(loaded) == list(
        frame
    )
    both = dataset.text_loader()(frame)
    assert both["title"].tolist() == ["", "Bees"] and both["text"].tolist() == loaded["text"].tolist()
    with pytest.raises(ValueError, match="'year' must name fields of the documents: they have 'title', 'text'"):
        dataset.text_loader("year")
    with pytest.raises(KeyError, match="'9' is not in the corpus"):
        dataset.text_loader()(pd.DataFrame({"docno": ["9"]}))
    # Kept as long as the content is the same, whatever its folder's state.
    kept = {path.stat().st_ino for path in (tmp_path / "home").rglob("corpus.arrow")}
    assert len(kept) == 1
    BeirFolder(beir).text_loader()
    assert {path.stat().st_ino for path in (tmp_path / "home").rglob("corpus.arrow")} == kept
    for path in (tmp_path / "home").rglob("corpus.arrow"):
        path.write_bytes(b"cut")
    assert BeirFolder(beir).text_loader()(frame)["text"].tolist() == loaded["text"].tolist()
    (beir / "corpus.jsonl").write_bytes(jsonl([dict(DOCUMENTS[0], text="Other."), *DOCUMENTS[1:]]))
    assert BeirFolder(beir).text_loader("text")(frame)["text"].tolist()[1] == "Other."


def test_a_folder_is_found_after_the_process_went_elsewhere(beir, monkeypatch):
    monkeypatch.chdir(beir.parent)
    monkeypatch.setenv("HOME", str(beir.parent))
    datasets = [
        BeirFolder("small"),
        BeirFolder("~/small"),
        pt.get_dataset("dance:small"),
        pt.get_dataset("dance:~/small"),
    ]
    monkeypatch.chdir("/")
    for dataset in datasets:
        assert dataset.folder == beir and len(dataset.get_qrels("train")) == 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", b'{"_id": "a", "text": "b"}\n\xff\n', r"corpus\.jsonl, line 2: not valid JSON"),
        ("corpus.jsonl", b"[1]\n", r"corpus\.jsonl, line 1: expected an object .* found list"),
        ("corpus.jsonl", b'{"id": "a", "text": "b"}\n', r"corpus\.jsonl, line 1: '_id' must be .* found None"),
        ("corpus.jsonl", b'{"_id": true, "text": "b"}\n', r"line 1: '_id' must be .* found True"),
        ("corpus.jsonl", b'{"_id": "", "text": "b"}\n', r"line 1: '_id' must be .* found ''"),
        ("corpus.jsonl", b'{"_id": "a"}\n', r"line 1: 'text' of 'a' must be a string, found nothing"),
        ("corpus.jsonl", b'{"_id": "a", "text": null}\n', r"line 1: 'text' of 'a' must be a string, found None"),
        ("corpus.jsonl", b'{"_id": "a", "title": 3, "text": "b"}\n', r"line 1: 'title' of 'a' must be .* found 3"),
        ("queries.jsonl", b'{"_id": "a", "text": "b"}\n{"_id": "a", "text": "c"}\n', r"line 2: the query 'a' occurs"),
        ("queries.jsonl", b'{"_id": "q1", "text": "b"}\n', r"train\.tsv judges the query '2' not to be found in"),
        ("queries.jsonl", b'{"_id": "a", "text": ["b"]}\n', r"queries\.jsonl, line 1: 'text' of 'a' must be a string"),
        ("qrels/train.tsv", b"", r"train\.tsv is empty"),
        ("qrels/train.tsv", b"q1\td1\t1\n", r"train\.tsv, line 1: expected the header 'query-id corpus-id score'"),
        ("qrels/train.tsv", HEADER.encode() + b"q1 d1 1\n", r"train\.tsv, line 2: expected three values"),
        ("qrels/train.tsv", HEADER.encode() + b"q1\td1\t0.5\n", r"line 2: the score must be a whole number, not '0.5'"),
        ("qrels/train.tsv", HEADER.encode() + b"\td1\t1\n", r"line 2: expected three values"),
        ("qrels/train.tsv", HEADER.encode() + b"q\xff\td1\t1\n", r"line 2: not valid UTF-8"),
        ("qrels/train.tsv", HEADER.encode() + b"q1\td1\t1\nq1\td1\t0\n", r"line 3: .*'q1'.*'d1' are judged twice"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(beir, file, content, message):
    (beir / file).write_bytes(content)
    dataset = BeirFolder(beir)
    with pytest.raises(ValueError, match=message):
        list(dataset.get_corpus_iter(verbose=False))
        dataset.get_topics("train")


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:40] + b"\0" * 20 + data[60:]])
def test_a_damaged_archive_is_named(beir, damage):
    text = jsonl({"_id": str(number), "text": f"text {number * 7919}"} for number in range(200))
    (beir / "corpus.jsonl").unlink()
    (beir / "corpus.jsonl.gz").write_bytes(damage(gzip.compress(text)))
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz(: broken after line \d+|, line \d+: not valid JSON)"):
        list(BeirFolder(beir).get_corpus_iter(verbose=False))


def test_missing_files_and_splits(beir, tmp_path):
    dataset = BeirFolder(beir)
    with pytest.raises(ValueError, match=r"no split 'dev'; available: 'train', 'test'"):
        dataset.get_topics("dev")
    with pytest.raises(ValueError, match=r"no split '\.\./qrels/train'; available"):
        dataset.get_qrels("../qrels/train")
    with pytest.raises(ValueError, match=r"several splits, .* one of 'train', 'test'"):
        dataset.get_qrels()
    with pytest.raises(FileNotFoundError, match=r"neither corpus\.jsonl nor corpus\.jsonl\.gz"):
        BeirFolder(beir / "qrels")
    with pytest.raises(FileNotFoundError, match=r"no data set 'dance:nowhere/at/all'.*'pydocs' or the path"):
        pt.get_dataset("dance:nowhere/at/all")
    (beir / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither queries\.jsonl nor queries\.jsonl\.gz"):
        dataset.get_topics()
    for path in (beir / "qrels").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no judgements: no file qrels/<split>\.tsv"):
        dataset.get_qrels("train")


@pytest.mark.parametrize("name", ["medquad", "wikiqa", "cranfield", "squad-dev", "msmarco-dl19-pool"])
def test_counts_of_real_collections(shared_data, name):
    folder = shared_data(name)
    dataset = pt.get_dataset(f"dance:{folder}")
    provenance = (folder / "PROVENANCE.md").read_text()
    documents = re.search(r"documents: (\d+) ", provenance)[1]
    docnos = [doc["docno"] for doc in dataset.get_corpus_iter(verbose=False)]
    assert len(docnos) == len(set(docnos)) == int(documents)
    assert len(dataset.get_topics()) == int(re.search(r"queries: (\d+) ", provenance)[1])
    splits = re.findall(r"split `(\w+)`: (\d+) queries with judgments.*?, (\d+) qrels, relevance (\{.*?\})", provenance)
    assert sorted(dataset.splits) == sorted(split for split, *_ in splits)
    seen: set[str] = set()
    for split, queries, rows, labels in splits:
        topics, qrels = dataset.get_topicsqrels(split)
        assert (len(topics), len(qrels)) == (int(queries), int(rows))
        assert dict(Counter(qrels["label"])) == ast.literal_eval(labels)
        assert set(qrels["docno"]) <= set(docnos)
        assert all(type(value) is str for value in (*topics["qid"], *topics["query"], *qrels["qid"], *qrels["docno"]))
        assert not seen & set(topics["qid"])
        seen |= set(topics["qid"])


# Docstrings


@pytest.mark.parametrize(
    ("text", "summary", "body"),
    [
        ("Sort a list in place.\n\nThe sort is {w}.", "Sort a list in place.", "The sort is {w}."),
        ("Sort a list in place. The sort\nis {w}.", "Sort a list in place.", "The sort is {w}."),
        ("Sort a list in\nplace without end\n\n    {w}\n\n    end", "Sort a list in place without end", "{w} end"),
        ("Sort lists, e.g. Of numbers.\n\n{w}", "Sort lists, e.g. Of numbers.", "{w}"),
        ("Sort \x00a list\ud800 in place.\n\n{w}", "Sort a list in place.", "{w}"),
    ],
)
def test_a_docstring_is_its_summary_and_its_body(text, summary, body):
    words = "stable " * 19 + "stable"
    assert split_docstring(text.format(w=words)) == (summary, body.format(w=words))


@pytest.mark.parametrize(
    "text",
    [
        "Sort a list in place.",
        "Sort it now.\n\n{w}",
        "Sort a list in place.\n\nToo short a body.",
        "sort(key=None, reverse=False) -> list of things\n\n{w}",
        "Args: the list that is sorted\n\n{w}",
        ">>> sort([3, 1, 2]) and some more words\n\n{w}",
        "{w} {w} {w}.\n\n{w}",
        "Sort a list in place.\n\n{w} Sort a list in place. {w}",
    ],
)
def test_what_is_no_summary_with_a_body_is_left_out(text):
    assert split_docstring(text.format(w="stable " * 19 + "stable")) is None


def test_copies_are_one_document_and_equal_summaries_one_query():
    def body(word):
        return f"{word} " * 25

    documents, queries, qrels = make_collection(
        [
            Docstring("a.f", f"Fit the model to data.\n\n{body('first')}"),
            Docstring("b.f", f"fit the Model to data\n\n{body('second')}"),
            Docstring("c.f", f"Fit the model to data.\n\n{body('first')}"),
            Docstring("c.g", f"Forget all the data again.\n\n{body('third')}"),
        ]
    )
    assert [doc["_id"] for doc in documents] == ["a.f", "b.f", "c.g"]
    assert [(query["_id"], query["text"]) for query in queries] == [
        ("a.f", "Fit the model to data."),
        ("c.g", "Forget all the data again."),
    ]
    assert qrels == [("a.f", "a.f"), ("a.f", "b.f"), ("c.g", "c.g")]


def test_public_definitions_are_read(tmp_path):
    source = '''
        """Module."""
        import sys
        if sys:
            def f():
                """First."""
                def inner():
                    """Inner."""
        try:
            pass
        except ImportError:
            async def g():
                """Handler."""
        def f():
            """Second."""
        def _private():
            """Private."""
        class C:
            """Class."""
            def __init__(self):
                """Initialize."""
            class D:
                def m(self):
                    """Method."""
        r = "\\d"
    '''
    path = tmp_path / "m.py"
    path.write_text(textwrap.dedent(source))
    assert read_docstrings("p.m", path) == [
        ("p.m", "Module."),
        ("p.m.f", "First."),
        ("p.m.g", "Handler."),
        ("p.m.C", "Class."),
        ("p.m.C.D.m", "Method."),
    ]


def _write_package(folder: Path, name: str, text: str) -> None:
    """A package that leaves a trace when any of it is run."""
    (folder / name / "_internal").mkdir(parents=True, exist_ok=True)
    (folder / name / "tests").mkdir(exist_ok=True)
    trace = "\nimport pathlib; pathlib.Path(__file__).with_suffix('.was_run').touch(); raise SystemExit(3)\n"
    for number, file in enumerate(("__init__", "useful", "_internal/hidden", "tests/test_it", "template", "my-script")):
        words = " ".join(f"{text}{chr(97 + number)}{chr(97 + i)}" for i in range(25))
        content = f'"""Describe the file {file.replace("/", " ")} in words.\n\n{words}\n"""{trace}'
        (folder / name / f"{file}.py").write_text(content + ("{{ not python" if file == "template" else ""))


IMPORTED_NOTHING = """
import json, sys
from pathlib import Path
from pt_dance.datasets.pydocs import PACKAGES, _cached
before = set(sys.modules)
packages = {"networkx": None, "some_module": None, "not_installed_at_all": None}
folder = _cached(packages, Path(sys.argv[1]), verbose=False)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([folder.name, sorted(new & {"networkx", "some_module", "torch", "numpy"})]))
"""


def test_sources_are_read_but_never_imported(tmp_path):
    packages = tmp_path / "packages"
    # One of the names is a package that really is installed: what shadows it on the path must not be run either.
    _write_package(packages, "networkx", "word")
    (packages / "some_module.py").write_text((packages / "networkx" / "useful.py").read_text().replace("word", "term"))

    def run():
        done = subprocess.run(
            [sys.executable, "-c", IMPORTED_NOTHING, str(tmp_path / "home")],
            env={**os.environ, "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return json.loads(done.stdout)

    name, imported = run()
    assert imported == []
    assert list(packages.rglob("*.was_run")) == []
    folder = tmp_path / "home" / name
    about = json.loads((folder / "about.json").read_text())
    assert about["unreadable"] == ["networkx.template"]
    docnos = [doc["docno"] for doc in BeirFolder(folder).get_corpus_iter(verbose=False)]
    assert docnos == ["networkx", "networkx.useful", "some_module"]

    # Kept as long as the sources stay the same, and made again in another folder when one changes.
    written = (folder / "about.json").stat().st_mtime_ns
    assert run()[0] == name
    assert (folder / "about.json").stat().st_mtime_ns == written
    (packages / "some_module.py").write_text('"""Nothing of any use."""')
    other = run()[0]
    assert other != name
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == sorted([name, other])


def test_two_processes_make_one_collection(tmp_path, monkeypatch):
    def publish_second(building, final):
        shutil.copytree(building, final)  # another process finished the same collection just now
        return publish_folder(building, final)

    monkeypatch.setattr("pt_dance.datasets.pydocs.publish_folder", publish_second)
    folder = _cached({"pyterrier": None}, tmp_path, verbose=False)
    assert list(tmp_path.iterdir()) == [folder]
    assert len(list(BeirFolder(folder).get_corpus_iter(verbose=False))) > 50


def test_two_threads_make_one_collection(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: _cached({"pyterrier": None}, tmp_path, verbose=False), range(2)))
    assert folders[0] == folders[1]
    assert list(tmp_path.iterdir()) == [folders[0]]


@pytest.mark.parametrize("damaged", ["corpus.jsonl", "qrels/train.tsv", "about.json"])
def test_a_collection_that_is_not_as_it_was_written_is_made_again(tmp_path, damaged):
    folder = _cached({"pyterrier": None}, tmp_path, verbose=False)
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content.replace(b"e", b"f", 1))
    if damaged == "about.json":
        (folder / damaged).unlink()
    assert _cached({"pyterrier": None}, tmp_path, verbose=False) == folder
    assert (folder / damaged).read_bytes() == content and list(tmp_path.iterdir()) == [folder]
    kept = (folder / damaged).stat().st_ino
    _cached({"pyterrier": None}, tmp_path, verbose=False)
    assert (folder / damaged).stat().st_ino == kept


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("pt_dance.datasets.pydocs.read_docstrings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _cached({"pyterrier": None}, tmp_path, verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_the_same_sources_give_the_same_bytes(tmp_path):
    folders = [_cached({"pyterrier": None}, tmp_path / name, verbose=False) for name in "ab"]
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.*"))
    assert {str(path) for path in files} >= {"corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "about.json"}
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


@pytest.fixture(
    scope="module",
    params=[(STANDARD_LIBRARY, "pyterrier"), pytest.param(tuple(PACKAGES), marks=pytest.mark.collections)],
    ids=["of two packages", "whole"],
)
def pydocs(request):
    """The collection of docstrings, kept below PyTerrier's home like for any other user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pt_dance.datasets.pydocs.PACKAGES", {n: PACKAGES.get(n, n) for n in request.param})
        dataset = pt.get_dataset("dance:pydocs", verbose=False)
        assert dataset.folder.is_dir()
    return dataset


def test_the_collection_of_docstrings(pydocs, request):
    assert isinstance(pydocs, PyDocs)
    whole = "whole" in request.node.name
    documents = {doc["docno"]: doc for doc in pydocs.get_corpus_iter(verbose=False)}
    about = json.loads((pydocs.folder / "about.json").read_text())
    assert list(about["versions"]) == (list(PACKAGES) if whole else [STANDARD_LIBRARY, "pyterrier"])
    assert about["documents"] == len(documents) > (8_000 if whole else 1_500)
    assert sum(len(docno) > 20 for docno in documents) > 1_000
    named = {"numpy", "torch", "sklearn", "argparse"} if whole else {"pyterrier", "argparse"}
    assert named <= {docno.split(".")[0] for docno in documents}
    assert all(doc["title"] == docno and len(doc["text"].split()) > 5 for docno, doc in documents.items())

    topics = pydocs.get_topics()
    parts = {split: pydocs.get_topicsqrels(split) for split in pydocs.splits}
    assert list(parts) == ["train", "dev", "test"]
    assert sum(len(queries) for queries, _ in parts.values()) == len(topics) == about["queries"]
    assert set().union(*(queries["qid"] for queries, _ in parts.values())) == set(topics["qid"])
    texts = [text for queries, _ in parts.values() for text in queries["query"].str.casefold().str.rstrip(".!? ")]
    assert len(set(texts)) == len(texts)  # no query is in two splits, under whatever qid
    share = {split: len(queries) / len(topics) for split, (queries, _) in parts.items()}
    assert share == pytest.approx({"train": 0.8, "dev": 0.1, "test": 0.1}, abs=0.03)

    qrels = pd.concat([qrels for _, qrels in parts.values()])
    assert sorted(qrels["docno"]) == sorted(documents)  # every document answers exactly one query
    merged = qrels.merge(topics, on="qid")
    assert len(merged) == len(qrels)
    assert not any(
        query.rstrip(".") in documents[docno]["text"]
        for query, docno, qid in zip(merged["query"], merged["docno"], merged["qid"], strict=True)
        if docno == qid
    )


def test_what_pyterrier_lists_of_the_data_set(pydocs):
    assert list(DanceDatasetProvider().list_dataset_names()) == ["pydocs"]
    assert pydocs._describe_component("topics") == ["train", "dev", "test"]
    assert pydocs._describe_component("corpus") is True
    assert (pydocs.get_corpus_lang(), pydocs.get_topics_lang()) == ("en", "en")
    assert pydocs.info_url().startswith("https://")
    with pytest.raises(ValueError, match=r"PyDocs\(\) has no split 'validation'; available: 'train', 'dev', 'test'"):
        pydocs.get_topics("validation")


def test_standard_library_without_its_tests_and_tools():
    names = {module for module, _ in module_files(STANDARD_LIBRARY)}
    assert {"argparse", "json", "json.decoder", "collections"} <= names
    assert not {name.split(".")[0] for name in names} & {"test", "idlelib", "ensurepip", "numpy", "pip"}
    assert module_files("surely_not_installed") == []


def test_the_small_collection_of_the_tests_is_a_collection():
    documents, topics, qrels = standard_library()
    assert len(documents) >= 100
    assert len(topics) >= 100
    assert set(qrels["docno"]) == set(documents["docno"])
    assert set(qrels["qid"]) == set(topics["qid"])


@pytest.mark.parametrize(
    "name",
    [
        "pyterrier.artifact/bi_encoder.sentence_transformers",
        "pyterrier.artifact/corpus.arrow",
        "pyterrier.artifact/corpus.passages",
        "pyterrier.artifact/dense_index.flex_f16",
        "pyterrier.artifact/dense_index.flex_shards",
        "pyterrier.artifact/dense_retriever.dance",
        "pyterrier.dataset_provider/dance",
    ],
)
def test_entry_points_load(name):
    group, name = name.split("/")
    (entry,) = {point for point in entry_points(group=group) if point.name == name}
    loaded = entry.load()
    assert loaded.__module__.startswith("pt_dance")
    if group == "pyterrier.artifact":
        # PyTerrier calls what it loads with the path alone: a class, or a class's own way to open a path
        loaded = getattr(loaded, "__self__", loaded)
        formats = [*FORMATS.values(), joined.FORMAT] if loaded is DenseIndex else [loaded.ARTIFACT_FORMAT]
        assert name in [f"{loaded.ARTIFACT_TYPE}.{form}" for form in formats]
        assert issubclass(loaded, pt.Artifact)


def test_no_entry_point_of_ours_is_untested():
    ours = {f"{point.group}/{point.name}" for point in distribution("pt_dance").entry_points}
    parameters = test_entry_points_load.pytestmark[0].args[1]
    # pyterrier_dr has an entry of the same name; test_flex.py sees that ours opens our folders
    assert ours - {"pyterrier.artifact/dense_index.flex"} == set(parameters)

"""A corpus of Parquet and JSONL files: the one that an iterable of the documents gives, however many processes read."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_dance import Corpus
from pt_dance.corpus import files, records
from pt_dance.storage.digests import add_columns, add_texts, new_digest

WORDS = ["tide", "mer", "été", "海", "x" * 40, "🌊"]


def documents(start: int, count: int) -> list[dict]:
    rng = np.random.default_rng(start)
    texts = (" ".join(rng.choice(WORDS, size=rng.integers(0, 30))) for _ in range(count))
    found = [{"docno": f"d{start + i}", "title": f"Title {i}", "text": text} for i, text in enumerate(texts)]
    found[3]["title"] = None
    return found


def write_lines(path, records):
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(raw, compresslevel=1) if path.suffix == ".gz" else raw)
    return path


def write_parquet(path, records, **options):
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path


@pytest.fixture
def shards(tmp_path):
    """Return files of all kinds and the documents in them, in the files' order."""
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = [documents(start, 700) for start in range(0, 4200, 700)]
    for number, document in enumerate(parts[3]):
        document["docno"] = str(10_000 + number)
    del parts[5][1]["title"]
    paths = [
        write_parquet(folder / "z.parquet", parts[0], row_group_size=300),
        write_lines(folder / "b.jsonl.gz", parts[1]),
        write_lines(folder / "none.jsonl", []),
        write_lines(folder / "a.jsonl", parts[2]),
        # BEIR's name, and numbers
        write_parquet(
            folder / "i.parquet", [{"_id": int(d["docno"]), "title": d["title"], "text": d["text"]} for d in parts[3]]
        ),
        write_parquet(folder / "w.parquet", [{**d, "url": "u", "day": pd.Timestamp("2020-01-01")} for d in parts[4]]),
        folder / "last.jsonl",
    ]
    lines = [json.dumps({"_id": d.pop("docno"), **d}, ensure_ascii=False) for d in [dict(d) for d in parts[5]]]
    # Blank lines, other line ends and none at the end, as people's files have them.
    paths[-1].write_bytes("\r\n".join(["", *lines[:300], "  ", *lines[300:]]).encode())
    return paths, [document for part in parts for document in part]


@pytest.mark.parametrize("workers", [1, 2])
def test_files_give_the_corpus_of_their_documents(tmp_path, shards, monkeypatch, workers):
    paths, expected = shards
    monkeypatch.setattr(files, "_CHUNK_BYTES", 50_000)  # several chunks a file
    monkeypatch.setattr(files, "_CHUNK_ROWS", 256)
    one = Corpus.build(expected, tmp_path / "one", verbose=False)
    many = Corpus.build(list(map(str, paths)), tmp_path / "many", workers=workers, verbose=False)
    assert many == one and len(many) == 4200
    for name in ("corpus.arrow", "docnos.hash"):
        assert (many.path / name).read_bytes() == (one.path / name).read_bytes()
    assert json.loads((many.path / "pt_meta.json").read_text()) == json.loads((one.path / "pt_meta.json").read_text())
    docnos = [d["docno"] for d in expected][::-7]
    assert many.rows([*docnos, "nowhere"]).tolist() == [*range(4199, -1, -7), -1]
    assert many.texts(["10699"]) == one.texts(["10699"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one", "shards"]
    assert not multiprocessing.active_children()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text(max_size=30), max_size=9), max_size=9), st.integers(1, 60), st.integers(1, 7))
def test_blocks_are_cut_as_those_of_a_stream(parts, characters, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_BLOCK_CHARACTERS", characters)
        patch.setattr(records, "_BLOCK_DOCUMENTS", count)
        parts = [[(f"{i}-{j}", text) for j, text in enumerate(part)] for i, part in enumerate(parts)]
        whole = list(records.blocks_of((row for part in parts for row in part), ["docno", "text"]))
        again = list(records.cut_anew(records.block_of(part, ["docno", "text"]) for part in parts))
    assert [block.to_pydict() for block in again] == [block.to_pydict() for block in whole]


@given(st.lists(st.tuples(st.text(), st.text()), max_size=9))
def test_columns_feed_a_digest_as_their_texts_do(rows):
    one, many = new_digest(), new_digest()
    for row in rows:
        add_texts(one, row)
    columns = {name: pa.array([row[i] for row in rows], pa.large_string()) for i, name in enumerate("ab")}
    block = pa.record_batch(columns)
    for part in (block.slice(0, 2), block.slice(2)):
        add_columns(many, part.columns)
    assert many.hexdigest() == one.hexdigest()


def test_what_is_there_is_used_if_it_is_the_same(tmp_path, shards):
    paths, expected = shards
    corpus = Corpus.build(paths, tmp_path / "corpus", verbose=False)
    before = (corpus.path / "corpus.arrow").stat()
    for source, workers in ((paths, 1), (paths, 2), (expected, 1), (corpus, 1)):
        assert Corpus.build(source, corpus.path, workers=workers, verbose=False) == corpus
    after = (corpus.path / "corpus.arrow").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other = [*paths[1:], paths[0]]
    with pytest.raises(FileExistsError, match=r"its document number 0, docno 'd0', is another one"):
        Corpus.build(other, corpus.path, workers=2, verbose=False)
    with pytest.raises(FileExistsError, match=r"it has 4,200 documents and 3,500 were given"):
        Corpus.build(paths[:-1], corpus.path, verbose=False)
    assert Corpus(corpus.path) == corpus
    replaced = Corpus.build(other, corpus.path, workers=2, overwrite=True, verbose=False)
    assert replaced == Corpus(corpus.path) != corpus and replaced.docno([0]).tolist() == ["d700"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "shards"]


GOOD = [json.dumps({"docno": f"g{i}", "text": "good"}) for i in range(50)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, id="workers")])
def test_a_broken_line_is_named(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 300)
    paths = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    paths[0].write_text("\n".join(GOOD))
    paths[1].write_text("\n".join(["", *GOOD[:30], '{"docno": "b", "text"', *GOOD[30:]]).replace("g", "h"))
    with pytest.raises(ValueError, match=rf"^{paths[1]}, line 32: not valid JSON \(.*\); correct this line$"):
        Corpus.build(paths, tmp_path / "corpus", workers=workers, verbose=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        (b"[1]", ValueError, r"line 51: expected an object"),
        (b'{"docno": "b"}', ValueError, r"line 51: document 'b' has only \['docno'\] and no 'text'"),
        (b'{"docno": "b", "text": null}', ValueError, "line 51: document 'b' has None as its 'text'"),
        (b'{"docno": "b", "text": 7}', TypeError, "line 51: document 'b' has a int as its 'text'"),
        (b'{"text": "a"}', TypeError, "line 51: the document has the docno None"),
        (b'{"docno": true, "text": "a"}', TypeError, "line 51: the document has the docno True"),
        (b'{"docno": "", "text": "a"}', ValueError, "line 51: the document has an empty docno"),
        (b'{"docno": "b", "text": "\\ud800"}', ValueError, "line 51: document 'b' holds a lone surrogate"),
        (b'{"docno": "b", "text": "\xff"}', ValueError, "line 51: not valid JSON"),
        (b"[" * 100_000, ValueError, "line 51: not valid JSON"),
    ],
)
def test_an_invalid_document_is_named(tmp_path, line, error, says):
    path = tmp_path / "0.jsonl"
    path.write_bytes("\n".join(GOOD).encode() + b"\n" + line)
    with pytest.raises(error, match=rf"^{path}, {says}"):
        Corpus.build([path], tmp_path / "corpus", verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["0.jsonl"]


def test_an_invalid_document_in_parquet_is_named(tmp_path):
    rows = [{"docno": f"d{i}", "text": "a"} for i in range(2500)]
    rows[2100]["text"] = None
    path = write_parquet(tmp_path / "0.parquet", rows, row_group_size=900)
    with pytest.raises(ValueError, match=rf"^{path}, row 2100: document 'd2100' has None as its 'text'"):
        Corpus.build([path], tmp_path / "corpus", verbose=False)
    for columns, lacks in (({"docno": ["1"], "body": ["a"]}, "'text'"), ({"text": ["a"]}, r"'docno' \(or '_id'\)")):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=rf"^{path} has only the columns \[.*\] and no {lacks}: choose other"):
            Corpus.build([path], tmp_path / "corpus", verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["0.parquet"]


def test_cut_files_are_named(tmp_path):
    rows = [{"docno": f"d{i}", "text": f"{i**9}" * 20} for i in range(2000)]
    whole = {
        "a.jsonl.gz": write_lines(tmp_path / "a.jsonl.gz", rows).read_bytes(),
        "a.parquet": write_parquet(tmp_path / "a.parquet", rows).read_bytes(),
    }
    for name, raw in whole.items():
        path = tmp_path / name
        damaged = raw[:200] + bytes(len(raw) // 2) + raw[200 + len(raw) // 2 :]
        for content in (raw[: len(raw) // 2], b"", damaged):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"^{path}: .*broken after [^\n]* fetch (the file|it) again$"):
                Corpus.build([path], tmp_path / "corpus", verbose=False)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="the source has no documents"):
        Corpus.build([tmp_path / "empty.jsonl"], tmp_path / "corpus", verbose=False)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_docno_in_two_files_is_refused_with_their_names(tmp_path, workers):
    first = write_lines(tmp_path / "1.jsonl", [{"docno": f"a{i}", "text": "x"} for i in range(1500)])
    none = write_lines(tmp_path / "2.jsonl", [])
    middle = write_parquet(tmp_path / "3.parquet", [{"docno": f"b{i}", "text": "x"} for i in range(1500)])
    last = write_lines(tmp_path / "4.jsonl.gz", [{"docno": d, "text": "x"} for d in ("c1", "b7", "c2")])
    paths = [first, none, middle, last]
    with pytest.raises(ValueError, match=rf"^docno 'b7' occurs more than once in {middle} and {last}: every document"):
        Corpus.build(paths, tmp_path / "corpus", workers=workers, verbose=False)
    write_lines(last, [{"docno": d, "text": "x"} for d in ("c1", "c2", "c1")])
    with pytest.raises(ValueError, match=rf"^docno 'c1' occurs more than once in {last}: every document"):
        Corpus.build(paths, tmp_path / "corpus", workers=workers, verbose=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)


def test_bad_arguments(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"docno": "1", "text": "a"}])
    for source, workers, error, says in (
        ([path, tmp_path / "b.jsonl"], 1, FileNotFoundError, "b.jsonl is not there, or is no file"),
        ([path, tmp_path], 1, ValueError, r"its name must end in .parquet, .jsonl or .jsonl.gz"),
        ([path, tmp_path / "c.csv"], 1, ValueError, "c.csv is no file of documents"),
        ([path, str(path)], 1, ValueError, "a.jsonl is given twice: name each file once"),
        ([path, "\0.jsonl"], 1, ValueError, "holds a null character"),
        (path, 1, TypeError, "files of documents come as a list of paths, .* not as a PosixPath"),
        (str(tmp_path), 1, TypeError, "files of documents come as a list of paths, .* not as a str"),
        (tmp_path.glob("*.jsonl"), 1, TypeError, r"is a PosixPath: .*; Corpus.build\(\) takes a list of paths, too"),
        ([path], 0, ValueError, "workers=0 must be a whole number of at least 1"),
        ([{"docno": "1", "text": "a"}], 2, ValueError, "workers=2 are for a list of Parquet or JSONL files"),
    ):
        with pytest.raises(error, match=says):
            Corpus.build(source, tmp_path / "corpus", workers=workers, verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def run(tmp_path, script, *arguments):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    command = [sys.executable, str(path), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_no_corpus_and_no_process(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"docno": f"d{i}", "text": f"text {i}"} for i in range(5000)])
    script = """
        import sys, time
        from pt_dance import Corpus
        from pt_dance.corpus import files

        def chunks(path, fields, read=files._chunks):
            files._CHUNK_BYTES = 10_000
            for number, chunk in enumerate(read(path, fields)):
                yield chunk
                if number == 15:
                    print("half", flush=True)
                    time.sleep(600)

        if __name__ == "__main__":
            files._chunks = chunks
            Corpus.build([sys.argv[1]], sys.argv[2], workers=2, verbose=False)
        """
    with run(tmp_path, script, path, tmp_path / "corpus") as process:
        try:
            assert process.stdout.readline() == "half\n", process.stderr.read()
            others = psutil.Process(process.pid).children(recursive=True)
            assert len(others) >= 2
            assert any((tmp_path / ".corpus.building").iterdir()), "nothing was written yet"
        finally:
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(others, timeout=60)
    assert not [other for other in others if other.is_running() and other.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(FileNotFoundError, match="no corpus at"):
        Corpus(tmp_path / "corpus")
    corpus = Corpus.build([path], tmp_path / "corpus", workers=2, verbose=False)
    assert corpus.rows(["d0", "d4999"]).tolist() == [0, 4999] and len(corpus) == 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "corpus", "script.py"]


def test_a_killed_worker_ends_the_build_in_one_sentence(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"docno": f"d{i}", "text": f"text {i}"} for i in range(5000)])
    monkeypatch.setattr(files, "_CHUNK_BYTES", 10_000)

    def chunks(path, fields, read=files._chunks):
        for number, chunk in enumerate(read(path, fields)):
            if number == 10:
                for worker in multiprocessing.active_children():  # one alone might be quick enough to do the rest
                    worker.kill()
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(files, "_chunks", chunks)
        with pytest.raises(RuntimeError, match=r"^a worker that reads documents was killed, or could not start: "):
            Corpus.build([path], tmp_path / "corpus", workers=2, verbose=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"] and not multiprocessing.active_children()
    assert len(Corpus.build([path], tmp_path / "corpus", workers=2, verbose=False)) == 5000


def test_a_script_that_starts_itself_again_is_told_so(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"docno": "1", "text": "a"}])
    script = """
        import sys
        from pt_dance import Corpus
        Corpus.build([sys.argv[1]], sys.argv[2], workers=2, verbose=False)
        """
    with run(tmp_path, script, path, tmp_path / "corpus") as process:
        said = process.communicate()[1]
    assert process.returncode == 1
    assert said.rstrip().splitlines()[-1].startswith("RuntimeError: a worker that reads documents was killed, or could")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "script.py"]


def test_memory_does_not_grow_with_the_files(tmp_path):
    texts = np.random.default_rng(0).integers(0, 10, (20_000, 4000), dtype=np.uint8) + ord("0")
    rows = [{"docno": f"d{i}", "text": row.tobytes().decode()} for i, row in enumerate(texts)]
    # All rows of the file are one group.
    large = [
        write_parquet(tmp_path / "large.parquet", rows, use_dictionary=False),
        write_lines(tmp_path / "large.jsonl", ({**row, "docno": f"e{i}"} for i, row in enumerate(rows))),
    ]
    small = [write_parquet(tmp_path / "small.parquet", rows[:2000]), write_lines(tmp_path / "b.jsonl", [])]
    script = """
        import sys
        from pathlib import Path
        from pt_dance import Corpus
        if __name__ == "__main__":
            for number, paths in enumerate((sys.argv[2:4], sys.argv[4:6])):
                Corpus.build(paths, f"{sys.argv[1]}/{number}", fields=["text"], workers=2, verbose=False)
                # Of this program alone: what getrusage says begins with the one that started it.
                peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
                print(int(peak.split()[1]) // 1024)
        """
    with run(tmp_path, script, tmp_path, *small, *large) as process:
        out, said = process.communicate()
    before, after = map(int, out.split() or pytest.fail(said))
    # 160 MB of text
    assert after - before < 90

"""What is sorted through files, or told apart there, is what memory alone would give."""

import numpy as np
import pyarrow as pa
import pytest
from npids import Lookup

from pt_dance.corpus import docnos, sorting
from pt_dance.corpus.docnos import DocnoColumn, DocnoRows, write_npids


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sorting, "BLOCK", 64)
    monkeypatch.setattr(docnos, "BLOCK", 64)


@pytest.mark.parametrize("count", [1, 64, 65, 1000, 5000])
@pytest.mark.parametrize("most", [2**64 - 1, 50, 2**63])
def test_numbers_are_sorted_stably_in_blocks(count, most):
    numbers = np.random.default_rng(count).integers(0, most, count, dtype=np.uint64, endpoint=True)
    ordered, rows = np.empty_like(numbers), np.empty(count, dtype=np.uint32)
    sorting.sort_numbers(numbers, ordered, rows)
    expected = np.argsort(numbers, kind="stable")
    assert (rows == expected).all() and (ordered == numbers[expected]).all()


@pytest.mark.parametrize("count", [1, 64, 65, 3000])
def test_strings_are_ranked_in_blocks(count, tmp_path):
    rng = np.random.default_rng(count)
    strings = [f"{'doc' if number % 3 else 'é𝄞'}{number}\n" for number in rng.permutation(count)]
    ranks = np.empty(count, dtype=np.uint32)
    sorting.rank_strings(pa.array(strings, type=pa.large_string()), ranks, tmp_path)
    assert [strings[row] for row in np.argsort(ranks)] == sorted(strings)
    assert sorted(ranks.tolist()) == list(range(count)) and not any(tmp_path.iterdir())


def test_numbers_seen_before_are_told_in_blocks(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 2000, 3000, dtype=np.uint64)
    seen, before, expected, found = sorting.SeenNumbers(tmp_path), set(), [], []
    for start in range(0, len(numbers), 37):
        block = numbers[start : start + 37]
        found += [start + place for place in seen.add(block)]
        for position, number in enumerate(block.tolist(), start):
            expected += [position] * (number in before)
            before.add(number)
    assert found == expected and expected and len(seen) == 3000
    assert (seen.all() == numbers).all() and not any(tmp_path.iterdir())


def test_the_hash_lookup_of_many_docnos_is_the_one_of_npids(tmp_path, monkeypatch):
    names = [f"d{number}" for number in np.random.default_rng(3).permutation(1000)]
    write_npids(tmp_path / "blocks", iter(names))
    monkeypatch.setattr(docnos, "BLOCK", 1 << 20)
    write_npids(tmp_path / "whole", iter(names))
    assert (tmp_path / "blocks").stat().st_size == (tmp_path / "whole").stat().st_size
    with Lookup(tmp_path / "blocks") as blocks, Lookup(tmp_path / "whole") as whole:
        assert (blocks.inv.codec.hash_offsets == whole.inv.codec.hash_offsets).all()
        assert blocks.inv.lookup(np.array(names)).tolist() == list(range(1000))
        assert blocks.inv.lookup(np.array(["d1000"])).tolist() == [-1]


def test_docnos_of_a_file_with_damaged_offsets_are_refused(tmp_path):
    names = [f"d{number}" for number in range(500)]
    (tmp_path / "docnos.txt").write_text("".join(f"{name}\n" for name in names))
    offsets = DocnoColumn.write_offsets(tmp_path / "docnos.txt", 500, tmp_path / "offsets")
    lines = np.memmap(tmp_path / "docnos.txt", dtype=np.uint8, mode="r")
    column = DocnoColumn(lines, 500, tmp_path / "docnos.txt", offsets)
    assert list(column) == names and column.at([3, 499]) == ["d3", "d499"]
    rows = DocnoRows.of(column, column.at)
    assert rows(["d499", "x"]).tolist() == [499, -1]
    for bad in (2**40, -5, int(offsets[200]) + 1):
        damaged = np.array(offsets)
        damaged[200] = bad
        broken = DocnoColumn(lines, 500, tmp_path / "docnos.txt", damaged)
        assert broken.at([5]) == ["d5"]
        for read in (lambda: broken.at([199]), lambda: list(broken), broken.ranks):  # noqa: B023
            with pytest.raises(ValueError, match="does not hold 500 docnos: the index is damaged; index again"):
                read()
    with pytest.raises(ValueError, match="does not hold 499 docnos"):
        DocnoColumn.write_offsets(tmp_path / "docnos.txt", 499, tmp_path / "other")

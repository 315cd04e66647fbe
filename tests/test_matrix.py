"""Every row of the fault matrix (`matrix.py`): a few trials of each here, a night's worth in `make soak`."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matrix
import pytest
from matrix import BY_NUMBER, MATRIX, ROOT, Result, Row, run_trials

ROWS_WITH_TRIALS = [row for row in MATRIX if row.trial is not None]
PER_CASE = {1: 100, 2: 100, 7: 5000, 22: 20_000, 23: 20_000}  # trials of a soak's test: some minutes
SEEDS_OF_SOAK = 1000  # that of its first test; the next has the next one


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=matrix.fast_folder()) as name:
        yield Path(name)


@pytest.mark.parametrize("number", [row.number for row in ROWS_WITH_TRIALS if row.share])
def test_a_share_of_each_row(nursery, folder, number):
    row = BY_NUMBER[number]
    result = run_trials(row, nursery, folder, row.share, seed=0)
    assert result.failures == [] and result.trials >= row.share


def cases(row: Row) -> list[tuple[int, int, int]]:
    """(row, trials, seed) of the soak's tests."""
    size = PER_CASE.get(row.number, row.soak_count)
    return [(row.number, size, SEEDS_OF_SOAK + part) for part in range(-(-row.soak_count // size))]


@pytest.mark.soak
@pytest.mark.parametrize(("number", "count", "seed"), [case for row in ROWS_WITH_TRIALS for case in cases(row)])
def test_rows_at_length(nursery, folder, number, count, seed):
    assert run_trials(BY_NUMBER[number], nursery, folder, count, seed).failures == []


def test_the_table_is_whole():
    """Rows are numbered as they come, each has trials or tests, and the tests that it names are there."""
    assert [row.number for row in MATRIX] == list(range(1, len(MATRIX) + 1))
    for row in MATRIX:
        assert row.trial is not None or row.tests
        for name in (*row.tests, *row.soak_tests):
            file, function = name.partition("[")[0].split("::")
            tree = ast.parse((ROOT / file).read_text())
            assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], name


def test_reports_add_up(tmp_path):
    one = Result(3, [], 0.5, 1.0, [], matrix.Counter(a=2, b=1), [1])
    two = Result(5, ["a problem"], None, 2.0, ["no root"], matrix.Counter(b=5), [2])
    files = []
    for result in (one, two):
        files.append(str(tmp_path / f"{len(files)}.json"))
        Path(files[-1]).write_text(matrix.json.dumps(matrix.as_json({4: result})))
    (total,) = matrix.merged(files).values()
    assert (total.trials, total.failures, total.slowest, total.seconds) == (8, ["a problem"], 0.5, 3.0)
    assert total.seeds == [1, 2] and total.kinds == {"a": 2, "b": 6} and total.skipped == ["no root"]
    assert one.bound == 1.0 and total.bound is None and Result(300).bound == 0.01
    text = matrix.report({4: total})
    assert "a problem" in text and "skipped: no root" in text

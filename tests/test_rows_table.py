"""The table of `rows.py`: every row names tests, and the tests exist."""

import ast
from pathlib import Path

import pytest
from rows import COLLECTED, ROWS

HERE = Path(__file__).parent
CASES = [(f"{part}: {row}", test) for part, rows in ROWS.items() for row, tests in rows.items() for test in tests]


def functions(file: Path) -> set[str]:
    return {
        node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    }


def missing(test: str, collected: set[str]) -> bool:
    """Whether a test is not there; its parameters are looked at where its file takes part in this run."""
    file, _, name = test.partition("::")
    if not (HERE / file).is_file() or name.partition("[")[0] not in functions(HERE / file):
        return True
    of_file = {other for other in collected if other.startswith(f"{file}::")}
    return bool(of_file) and test not in of_file


def test_every_row_has_its_tests(pytestconfig):
    whole = not any("::" in argument for argument in pytestconfig.args)
    collected = pytestconfig.stash[COLLECTED] if whole else set()
    assert [(row, test) for row, test in CASES if missing(test, collected)] == []
    assert all(tests for rows in ROWS.values() for tests in rows.values())


@pytest.mark.parametrize(
    ("test", "collected"),
    [
        ("test_nowhere.py::test_a", set()),
        ("test_rows_table.py::test_nothing", set()),
        ("test_rows_table.py::test_every_row_has_its_tests[x]", {"test_rows_table.py::test_every_row_has_its_tests"}),
    ],
    ids=["file", "function", "parameters"],
)
def test_a_missing_test_is_noticed(test, collected):
    assert missing(test, collected)

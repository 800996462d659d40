"""The table of docs/reliability.md names tests that exist, and says of every target what holds it or why none does."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.faults.targets.page import PAGE, TARGETS, page

ROOT = Path(__file__).parent.parent.parent


@cache
def defined_in(file):
    """The names of the test functions of a file, which is not imported; none where there is no such file."""
    path = ROOT / file
    body = ast.parse(path.read_text()).body if path.is_file() else ()
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_there_are_fifty_in_their_order():
    assert [target.number for target in TARGETS] == list(range(1, 51))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.number))
def test_a_target_has_tests_that_exist_or_a_reason_why_not(target):
    assert target.tests or target.why_not
    assert len(set(target.tests)) == len(target.tests)
    for name in target.tests:
        file, _, function = name.partition("::")
        assert function in defined_in(file), f"there is no test {name}"


def test_every_bomb_is_in_the_table():
    file = "tests/faults/test_bombs.py"
    named = {test.partition("::")[2] for target in TARGETS for test in target.tests if test.startswith(file)}
    assert named == defined_in(file)


def test_the_page_has_the_table_of_the_data():
    text = PAGE.read_text()
    assert text == page(text), "run `python -m tests.faults.targets --write`"

"""The table of properties says what is there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.resilience.off import ROOT, edited, failed_without
from tests.resilience.properties import PROPERTIES, Property

QUICK = {13, 17, 18}
"""Whose tests need seconds without their protection."""


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    found = {it.name for it in tree.body if isinstance(it, ast.FunctionDef | ast.AsyncFunctionDef)}
    for kind in (it for it in tree.body if isinstance(it, ast.ClassDef)):
        found |= {
            f"{kind.name}::{it.name}"
            for it in kind.body
            if isinstance(it, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return found


def numbered(it: Property) -> str:
    return str(it.number)


def test_there_are_eighteen() -> None:
    assert [it.number for it in PROPERTIES] == list(range(1, 19))


@pytest.mark.parametrize("it", PROPERTIES, ids=numbered)
def test_its_tests_and_its_switch_are_there(it: Property) -> None:
    for test in (*it.tests, it.switch.test):
        file, _, name = test.partition("::")
        assert Path(ROOT / file).is_file(), test
        assert not name or name in names_in(file), test
    assert edited(it.switch)
    if it.long:
        target = it.long.split()[1]
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(), it.long


@pytest.mark.parametrize("it", [it for it in PROPERTIES if it.number in QUICK], ids=numbered)
def test_without_its_protection_its_test_fails(it: Property) -> None:
    failed, said = failed_without(it)
    assert failed, said

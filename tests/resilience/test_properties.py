"""The table of properties says what is there."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.resilience import off
from tests.resilience.off import ROOT, Ran, edited, problem, tried
from tests.resilience.properties import PROPERTIES, Property, Switch

QUICK = {13, 17, 18}
"""Whose first tests need seconds without their protection."""

PASSED = Ran(0, "..\n2 passed in 1.20s")
FAILED = Ran(1, "F.\n1 failed, 1 passed in 1.20s")


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
def test_its_tests_and_its_switches_are_there(it: Property) -> None:
    assert it.switches
    for test in (*it.tests, *(switch.test for switch in it.switches)):
        file, _, name = test.partition("::")
        assert Path(ROOT / file).is_file(), test
        assert not name or name in names_in(file), test
    for switch in it.switches:
        assert edited(switch) != (ROOT / "r3mes_vllm" / switch.file).read_text()
    if it.long:
        target = it.long.split()[1]
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(), it.long


@pytest.mark.parametrize("it", [it for it in PROPERTIES if it.number in QUICK], ids=numbered)
def test_without_its_protection_its_test_fails(it: Property) -> None:
    wrong, said = tried(it.switches[0])
    assert not wrong, said


@pytest.mark.parametrize(
    ("with_it", "without", "found"),
    [
        (PASSED, FAILED, ""),
        (PASSED, PASSED, "DOES NOT FAIL"),
        (FAILED, FAILED, "DOES NOT PASS AS IT IS"),
        (FAILED, None, "DOES NOT PASS AS IT IS"),
        (Ran(0, "2 skipped in 0.1s"), FAILED, "DOES NOT PASS AS IT IS"),
        (Ran(5, "no tests ran in 0.1s"), FAILED, "DOES NOT PASS AS IT IS"),
        (PASSED, Ran(0, "2 skipped in 0.1s"), "DID NOT RUN"),
        (PASSED, Ran(1, "1 error in 0.1s"), "DID NOT RUN"),
        (PASSED, Ran(2, "1 error in 0.1s"), "DID NOT RUN"),
        (PASSED, Ran(2, "1 failed in 900s\nKeyboardInterrupt"), "DID NOT RUN"),
    ],
)
def test_a_test_shows_something_only_if_it_passes_as_it_is(
    with_it: Ran, without: Ran | None, found: str
) -> None:
    assert problem(with_it, without) == found


SWITCH = Switch("a.py", "safe", "unsafe", "tests/test_a.py")


@pytest.mark.parametrize(
    ("runs", "status", "said"),
    [
        ([PASSED, FAILED], 0, "fails, as it must"),
        ([PASSED, PASSED], 1, "DOES NOT FAIL"),
        ([FAILED], 1, "DOES NOT PASS AS IT IS"),
    ],
)
def test_the_status_is_1_where_one_shows_nothing(
    runs: list[Ran],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(off, "PROPERTIES", (Property(1, "it is safe", (), (SWITCH,)),))
    monkeypatch.setattr(off, "_run", lambda *_: runs.pop(0))
    monkeypatch.setattr("sys.argv", ["off", "1"])
    off._run_as_it_is.cache_clear()
    try:
        assert off.main() == status
    finally:
        off._run_as_it_is.cache_clear()
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "safe safe"])
def test_what_is_not_there_once_is_no_switch(tmp_path: Path, text: str) -> None:
    (tmp_path / "r3mes_vllm").mkdir()
    (tmp_path / "r3mes_vllm" / "a.py").write_text(text)
    with pytest.raises(ValueError, match=r"a\.py has"):
        edited(SWITCH, tmp_path)


def test_what_is_no_program_is_no_switch(tmp_path: Path) -> None:
    (tmp_path / "r3mes_vllm").mkdir()
    (tmp_path / "r3mes_vllm" / "a.py").write_text("safe = (")
    with pytest.raises(SyntaxError):
        edited(SWITCH, tmp_path)

"""What `make churn` is judged by; its short form is in `tests/node/test_hosting.py`."""

from pathlib import Path

import pytest

from tests.engine import churn

FLAT = [700.0, 800.0, 801.0, 800.5, 801.0, 800.7, 800.9, 801.0]


@pytest.mark.parametrize(
    ("mib", "said"),
    [
        (FLAT, ""),
        ([it - 2 * number for number, it in enumerate(FLAT)], ""),
        ([it + 2 * number for number, it in enumerate(FLAT)], "memory grows by 2."),
        (FLAT[:6], "too few cycles"),
        ([], "too few cycles"),
    ],
)
def test_memory_that_grows_is_a_failure_and_so_is_nothing_seen(
    mib: list[float],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(folder: Path, cycles: int) -> list[float]:
        return mib

    monkeypatch.setattr(churn, "measure", measure)
    monkeypatch.setattr("sys.argv", ["churn"])
    assert churn.main() == int(bool(said))
    assert said in capsys.readouterr().err

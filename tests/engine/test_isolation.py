"""Each request gets what it gets alone; `make isolation` is the long form (hazard 1)."""

import json
import subprocess
import sys

import pytest
from vllm.platforms import current_platform

from tests.engine import isolation

SEED = 20


def trial(*arguments: str, status: int = 0) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.engine.isolation", "--seed", str(SEED), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == status, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.gpu
def test_in_every_mix_each_request_gets_what_it_gets_alone() -> None:
    found = trial("--requests", "300")
    assert found["wrong"] == 0
    assert found["identical"] > 0.9 * found["requests"], found


@pytest.mark.control
@pytest.mark.skipif(not current_platform.is_cpu(), reason="a fault of vLLM's CPU build")
def test_stock_vllm_mixes_them_up() -> None:
    """The twin; when vLLM mends it, this fails."""
    assert trial("--requests", "300", "--stock", status=1)["wrong"] > 10


GOOD = {"requests": 100, "identical": 98, "ties": 2, "wrong": 0, "beside others": 99}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"identical": 97, "wrong": 1}, "another model's"),
        ({"requests": 99}, "99 answers, of 100"),
        ({"identical": 0}, "not each answer was compared"),
        ({"identical": 80, "ties": 20}, "too many for ties"),
        ({"beside others": 50}, "only 50 were computed beside"),
    ],
)
def test_a_run_is_good_only_if_it_has_shown_something(
    changed: dict[str, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = GOOD | changed
    problems = isolation.problems(found, 100)
    assert bool(problems) == bool(said)
    assert said in " ".join(problems)
    monkeypatch.setattr(isolation, "tried", lambda *_, **__: found)
    monkeypatch.setattr("sys.argv", ["isolation", "--requests", "100", "--seed", "7"])
    assert isolation.main() == int(bool(said))
    assert "seed 7" in capsys.readouterr().err


def test_no_requests_show_nothing() -> None:
    assert isolation.problems(dict.fromkeys(GOOD, 0), 0)

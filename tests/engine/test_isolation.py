"""Each request gets what it gets alone; `make isolation` is the long form (hazard 1)."""

import json
import subprocess
import sys

import pytest
from vllm.platforms import current_platform

SEED = 20


def trial(*arguments: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.engine.isolation", "--seed", str(SEED), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
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
    assert trial("--requests", "100", "--stock")["wrong"] > 10

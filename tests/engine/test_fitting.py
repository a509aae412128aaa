"""An adapter is of the model's own layers, whatever family the model is of."""

import json
import subprocess
import sys

import pytest

from tests.engine.fitted import FAMILIES, MISFITS

Said = dict[str, dict[str, str | None]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    folder = tmp_path_factory.mktemp("families")
    command = [sys.executable, "-m", "tests.engine.fitted", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-5000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_of_all_layers_fits(said: Said, family: str) -> None:
    assert said[family]["good"] is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", MISFITS)
def test_one_of_another_model_does_not(said: Said, family: str, how: str) -> None:
    words = "the model has no layer" if how == "elsewhere" else "; the model's maps "
    assert words in (said[family][how] or "")

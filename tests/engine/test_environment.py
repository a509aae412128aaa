"""What is set for vLLM before it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r3mes_vllm.engine import environment

SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment, with neither the interpreter's folder nor CUDA in it."""
    found = {"PATH": f"{tmp_path}/bin", "CUDA_HOME": f"{tmp_path}/cuda"}
    monkeypatch.setattr(os, "environ", found)
    return found


def prepare() -> None:
    environment.prepare(local_model=False, verbose=True)


def nvcc(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").touch(mode=0o755)


KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
GROWS = """
import torch
from tests.engine.heap import used
weights, before = torch.randn(64, 64).bfloat16(), used()
for rows in range(1, 1001):
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weights)
print(used() - before)
"""


def test_batch_sizes_leave_less_behind(prepared: dict[str, str]) -> None:
    prepare()
    found = []
    for env in (prepared, *(prepared | {name: "1024"} for name in KEPT)):
        done = subprocess.run(
            [sys.executable, "-c", GROWS], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout))
    ours, *with_one_larger = found
    if max(with_one_larger) < 50_000_000:
        pytest.skip("this processor multiplies bf16 without oneDNN")
    assert ours < 0.8 * min(with_one_larger)


def test_the_programs_of_this_environment_are_found(prepared: dict[str, str]) -> None:
    before = prepared["PATH"]
    prepare()
    prepare()
    assert prepared["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}{before}"


def test_without_nvcc_nothing_is_left_to_be_compiled_by_it(prepared: dict[str, str]) -> None:
    prepare()
    assert prepared[SAMPLER] == "0"


def test_an_operator_who_wants_it_keeps_it(prepared: dict[str, str]) -> None:
    prepared[SAMPLER] = "1"
    prepare()
    assert prepared[SAMPLER] == "1"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", None])
def test_with_nvcc_vllm_decides(
    prepared: dict[str, str], tmp_path: Path, variable: str | None
) -> None:
    del prepared["CUDA_HOME"]
    if variable:
        prepared[variable] = f"{tmp_path}/toolkit"
    nvcc(tmp_path / "toolkit" if variable else tmp_path)
    prepare()
    assert SAMPLER not in prepared

"""Loading an adapter leaves the others' streams alone (hazards 7 and 7b), and nothing behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import tiny
from tests.engine.staged import BROKEN, GOOD, LACKING, MISFITS, SLOW_S


def _spoil(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no config":
        (folder / "adapter_config.json").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "missing":
        shutil.rmtree(folder)
    else:  # vLLM reads it without complaint
        tensors = tiny.tensors(seed=9)
        layer = f"base_model.model.model.layers.{tiny.LAYERS - 1}"
        name = f"{layer}.mlp.down_proj.lora_A.weight"
        if how == "too wide":
            tensors[name] = tensors[name].repeat(2, axis=1)
        elif how == "too narrow":
            tensors[name] = np.ascontiguousarray(tensors[name][:, ::2])
        else:
            for side in "AB":
                old = f"{layer}.self_attn.k_proj.lora_{side}.weight"
                tensors[old.replace(layer, "base_model.model.model.layers.99")] = tensors.pop(old)
        save_file(tensors, weights)


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("staged")
    for number in range(GOOD):
        tiny.make_adapter(folder / str(number), seed=number)
    for how in BROKEN:
        _spoil(tiny.make_adapter(folder / how, seed=9), how)
    command = [sys.executable, "-m", "tests.engine.staged", str(tiny_model), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines, run.stderr[-5000:]
    return dict(json.loads(lines[-1]))


def test_the_adapters_differ(seen: dict[str, Any]) -> None:
    answers = [seen["base"], *seen["plain"]]
    assert all(answers.count(answer) == 1 for answer in answers)


def test_a_staged_adapter_answers_as_a_plainly_loaded_one(seen: dict[str, Any]) -> None:
    assert seen["staged"]["answer"] == seen["plain"][0]


def test_it_is_in_a_slot_before_it_is_asked_for(seen: dict[str, Any]) -> None:
    staged = seen["staged"]
    assert staged["resident"] == [staged["id"]]
    assert staged["resident after"] == []


def test_removal_frees_it(seen: dict[str, Any]) -> None:
    before, loaded, after = seen["staged"]["watch"]
    assert loaded["models"] == before["models"] + 1
    assert loaded["packs"] > before["packs"]
    assert after == before
    assert seen["end"]["models"] == before["models"]
    assert seen["end"]["loads"] == 0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "the tensors end at"),
        ("too wide", "the model's maps"),
        ("too narrow", "the model's maps"),
        ("of no layer", "the model has no layer 'model.layers.99."),
    ],
)
def test_a_broken_one_is_refused_and_leaves_nothing(
    seen: dict[str, Any], how: str, words: str
) -> None:
    kind, text = seen["broken"][how]["error"]
    assert kind == "AdapterRefused"
    assert words in text
    assert how in text
    before, after = seen["broken"][how]["watch"]
    assert after == before


def test_what_is_no_fault_of_the_adapter_is_not_held_against_it(seen: dict[str, Any]) -> None:
    kind, text = seen["no memory"]["error"]
    assert (kind, "MemoryError" in text) == ("AdapterNotReady", True)
    before, after = seen["no memory"]["watch"]
    assert after == before


@pytest.mark.parametrize("how", LACKING)
def test_nor_are_files_that_a_worker_does_not_find(seen: dict[str, Any], how: str) -> None:
    """Another machine than the node's may not have its cache."""
    kind, text = seen["broken"][how]["error"]
    assert kind == "AdapterNotReady"
    assert "--cache-dir" in text
    assert f"/{how};" in text
    before, after = seen["broken"][how]["watch"]
    assert after == before


def test_several_at_once(seen: dict[str, Any]) -> None:
    assert seen["at once"] == seen["plain"][:4]


def test_slots_that_requests_use_stay_theirs(seen: dict[str, Any]) -> None:
    full = seen["full"]
    assert len(full["before"]) == 2
    assert full["after"] == full["before"]
    assert full["cached"]
    assert full["answer"] == seen["plain"][2]


@pytest.mark.parametrize("how", MISFITS)
def test_while_no_slot_is_free_too(seen: dict[str, Any], how: str) -> None:
    """vLLM would find out when a slot is free, in a step, and end, or serve something else."""
    kind, text = seen["full"]["misfits"][how]["error"]
    assert (kind, "the model" in text) == ("AdapterRefused", True)


def test_a_request_takes_the_slot_of_one_half_placed(seen: dict[str, Any]) -> None:
    half, then, end = seen["displaced"]["watch"]
    id_ = seen["displaced"]["id"]
    assert -id_ in half["slots"]
    assert id_ not in half["cached"]
    assert all(slot > 0 for slot in then["slots"])
    assert id_ in end["slots"]
    assert seen["displaced"]["answers"] == seen["plain"][3:]


def test_a_cancelled_load_leaves_nothing(seen: dict[str, Any]) -> None:
    assert seen["cancelled"]["cancelled"]
    before, after = seen["cancelled"]["watch"]
    assert after == before


def test_a_load_that_takes_too_long_leaves_nothing(seen: dict[str, Any]) -> None:
    kind, text = seen["timed out"]["error"]
    assert kind == "EngineError"
    assert "within" in text
    before, after = seen["timed out"]["watch"]
    assert after == before


def test_a_slow_disk_does_not_stop_a_stream(seen: dict[str, Any]) -> None:
    assert seen["gap staged"] < SLOW_S / 2


def test_without_staging_it_does(seen: dict[str, Any]) -> None:
    assert seen["gap plain"] > SLOW_S * 0.9

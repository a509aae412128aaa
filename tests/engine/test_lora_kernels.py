"""Settings of vLLM's kernels as files: one is found for every shape, and all that is tried fits."""

from pathlib import Path

import pytest
import torch
from vllm.lora.ops.triton_ops import utils

from benchmarks import lora_kernels
from benchmarks.lora_kernels import EXPAND, SHRINK, Kernel


@pytest.mark.parametrize("kind", [SHRINK, EXPAND])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_vllm_finds_a_setting_for_every_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, slices: int
) -> None:
    settings = {it: next(it.candidates()) for it in lora_kernels.kernels()}
    lora_kernels.write(tmp_path, "Some_Card_X1", settings)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card-X1")
    for cached in (utils.get_lora_op_configs, utils.load_lora_op_config):
        cached.cache_clear()
    for slots in (1, 8, 20, 128):
        for tokens in (1, 8, 64, 1000, 10_000):
            for hidden, rank in ((4096, 16), (896, 8), (20_000, 256)):
                found = utils.get_lora_op_configs(
                    kind, slots + 1, tokens, hidden, rank, slices, kind == EXPAND or None
                )
                assert found["block_m"] == (16 if tokens <= 128 else 32)
    exact = Kernel(kind, 4096, (4096,), 8, 64, 16)
    found = utils.get_lora_op_configs(kind, 9, 64, 4096, 16, 1, kind == EXPAND or None)
    assert found == settings[exact]
    for cached in (utils.get_lora_op_configs, utils.load_lora_op_config):
        cached.cache_clear()


def test_no_candidate_splits_more_than_there_is() -> None:
    for it in lora_kernels.kernels():
        candidates = list(it.candidates())
        assert candidates
        for setting in candidates:
            assert (setting["block_k"] or 0) * (setting.get("split_k") or 1) <= max(
                it.inputs, it.rank
            )

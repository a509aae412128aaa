"""Rows of the base model stay the base model's when every slot is taken (hazard 1)."""

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from r3mes_vllm.engine.cpu_lora import MaskedPunicaWrapper

SLOTS, RANK, INPUTS, OUTPUTS = 2, 4, 16, 8
IDS = [7, 9]  # the adapters in slot 0 and 1


def added_by_lora(
    wrapper_class: type[PunicaWrapperCPU], rows: list[int], *, prefill: bool
) -> torch.Tensor:
    """What the adapters add to each row; `rows` are adapter ids, 0 for the base model."""
    torch.manual_seed(0)
    wrapper = wrapper_class(64, 64, "cpu")
    mapping = LoRAMapping(tuple(rows), tuple(rows), is_prefill=prefill)
    wrapper.update_metadata(mapping, IDS, SLOTS, vocab_size=32)
    a = torch.randn(SLOTS, 1, RANK, INPUTS)
    b = torch.randn(SLOTS, 1, OUTPUTS, RANK)
    x = torch.randn(len(rows), INPUTS)
    y = torch.zeros(len(rows), OUTPUTS)
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (OUTPUTS,))
    expected = torch.stack(
        [
            torch.zeros(OUTPUTS) if not row else b[IDS.index(row), 0] @ a[IDS.index(row), 0] @ x[i]
            for i, row in enumerate(rows)
        ]
    )
    return (y - expected).abs().max()


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("rows", [[0, 7, 9, 0], [7, 9, 0], [0], [0, 0, 9], [7, 7, 9]])
def test_every_row_gets_its_own_adapter_and_the_base_none(rows: list[int], prefill: bool) -> None:
    assert added_by_lora(MaskedPunicaWrapper, rows, prefill=prefill) < 1e-4


def test_stock_vllm_gives_base_rows_the_last_slots_adapter() -> None:
    """The fault that the mask is for; when vLLM mends it, this fails and the mask can go."""
    assert added_by_lora(PunicaWrapperCPU, [0, 7, 9, 0], prefill=False) > 0.1


def test_an_infinite_adapter_beside_it_leaves_the_base_row_alone() -> None:
    wrapper = MaskedPunicaWrapper(64, 64, "cpu")
    wrapper.update_metadata(
        LoRAMapping((0, 9), (0, 9), is_prefill=False), IDS, SLOTS, vocab_size=32
    )
    a = torch.full((SLOTS, 1, RANK, INPUTS), float("inf"))
    y = torch.zeros(2, OUTPUTS)
    wrapper.add_lora_linear(
        y, torch.ones(2, INPUTS), (a,), (torch.ones(SLOTS, 1, OUTPUTS, RANK),), 1.0, (OUTPUTS,)
    )
    assert y[0].eq(0).all()

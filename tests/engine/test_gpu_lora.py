"""What is added to a layer's product on a GPU, computed here without one, one after the other."""

from typing import Any

import pytest
import torch

from r3mes_vllm.engine import gpu_lora

INPUTS, RANK, OUTPUTS = 16, 4, (6, 2)


class Layer:
    """A layer of vLLM's with one adapter in all rows; vLLM's own needs a model and a GPU."""

    def __init__(self, *, adapters: bool) -> None:
        torch.manual_seed(0)
        self.base_layer = torch.randn(sum(OUTPUTS), INPUTS)
        self.lora_a_stacked = tuple(torch.randn(1, 1, RANK, INPUTS) for _ in OUTPUTS)
        self.lora_b_stacked = tuple(torch.randn(1, 1, outputs, RANK) for outputs in OUTPUTS)
        self.output_slices = OUTPUTS
        self.punica_wrapper = self.token_mapping_meta = self
        self.no_lora_flag_cpu = torch.tensor([not adapters])
        self._events, self._lora_stream = [None, None], None
        self.done: list[str] = []

    def _get_quant_method(self) -> "Layer":
        return self

    def apply(self, weight: torch.Tensor, x: torch.Tensor, bias: Any) -> torch.Tensor:
        self.done.append("base")
        return x @ weight.t()

    def add_shrink(self, y: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        self.done.append("a")
        for part, weight in zip(y, a, strict=True):
            part.copy_(x @ weight[0, 0].t() * scale)

    def add_expand(
        self, y: torch.Tensor, x: torch.Tensor, b: Any, slices: Any, *, add_inputs: bool
    ) -> None:
        self.done.append("b")
        assert add_inputs
        y += torch.cat([part @ weight[0, 0].t() for part, weight in zip(x, b, strict=True)], dim=1)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        added = [
            x @ a[0, 0].t() @ b[0, 0].t()
            for a, b in zip(self.lora_a_stacked, self.lora_b_stacked, strict=True)
        ]
        return x @ self.base_layer.t() + torch.cat(added, dim=-1)


@pytest.mark.parametrize("shape", [(5, INPUTS), (1, 5, INPUTS)])
def test_the_base_product_and_the_adapters_are_added(shape: tuple[int, ...]) -> None:
    layer, x = Layer(adapters=True), torch.randn(shape)
    y = gpu_lora.apply(layer, x)
    assert y.shape == (*shape[:-1], sum(OUTPUTS))
    assert torch.allclose(y, layer.expected(x), atol=1e-4)
    assert layer.done[-1] == "b"


def test_a_batch_of_the_base_model_pays_for_nothing_else() -> None:
    layer, x = Layer(adapters=False), torch.randn(5, INPUTS)
    assert torch.equal(gpu_lora.apply(layer, x), x @ layer.base_layer.t())
    assert layer.done == ["base"]

"""vLLM's LoRA arithmetic on the CPU, with the rows of the base model left alone.

A row of the base model has slot index -1, and stock vLLM 0.32 reads `weights[-1]` for it: when
every slot is taken, that row gets the last slot's adapter
(`vllm/lora/ops/torch_ops/lora_ops.py`).
"""

from typing import Any

import torch
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class MaskedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y[i] = x @ A[i] * scale`, zero in rows of the base model; `y[i]` is (tokens, rank)."""
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        base_rows = self.token_lora_indices < 0
        if base_rows.any():
            for part in y:
                # not a multiplication: 0 * inf of a bad adapter would be NaN
                part.view(-1, part.shape[-1])[base_rows] = 0

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        base_rows = (self.token_lora_indices < 0).unsqueeze(-1)
        x = x.masked_fill(base_rows, 0)
        super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        if buffer is None:
            rank = lora_b_stacked.size(-1)
            buffer = torch.zeros((x.size(0), rank), dtype=torch.float32, device=x.device)
        bgmv_shrink(x, lora_a_stacked, buffer, self.sampler_indices, scale)
        buffer[self.sampler_indices < 0] = 0
        bgmv_expand(buffer, lora_b_stacked, y, self.sampler_indices, add_inputs=True)

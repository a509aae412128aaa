"""An adapter's first product beside the base model's, on an NVIDIA GPU whose operator wants it.

Stock vLLM computes a layer's base product, zeroes a buffer, multiplies by A, then by B: a step of
small kernels that wait for each other. A's product needs nothing of the base product, so a second
stream computes it meanwhile; B's is added after both. What is computed, and in which order, is
stock's.

`VLLM_LORA_ENABLE_DUAL_STREAM=1` asks for it. By itself vLLM has B's product on the second stream
too, which must be zeroed before and added to the base product afterwards, in every layer, also
where no request has an adapter.
"""

import os
from typing import Any

import torch
from vllm import envs


def bound() -> None:
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        # B's kernel follows two others; started early, it could only wait for one of them.
        os.environ.setdefault("VLLM_LORA_DISABLE_PDL", "1")
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

        BaseLinearLayerWithLoRA._apply_async_impl = apply


def apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's outputs, (tokens, outputs) or (1, tokens, outputs)."""
    from vllm.utils.multi_stream_utils import maybe_execute_in_parallel

    def base() -> torch.Tensor:
        product: torch.Tensor = self._get_quant_method().apply(self.base_layer, x, bias)
        return product

    wrapper = self.punica_wrapper
    if wrapper.token_mapping_meta.no_lora_flag_cpu.item():
        return base()
    rows = x.flatten(0, 1) if x.ndim == 3 else x
    rank = self.lora_b_stacked[0].size(-1)
    shrunk = torch.empty(
        (len(self.output_slices), rows.size(0), rank), dtype=torch.float32, device=x.device
    )
    output: torch.Tensor
    output, _ = maybe_execute_in_parallel(
        base,
        lambda: wrapper.add_shrink(shrunk, rows, self.lora_a_stacked, 1.0),
        *self._events,
        self._lora_stream,
    )
    flat = output.flatten(0, 1) if output.ndim == 3 else output
    wrapper.add_expand(flat, shrunk, self.lora_b_stacked, self.output_slices, add_inputs=True)
    return output

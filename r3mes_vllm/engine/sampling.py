"""No token outside the vocabulary, whatever the logits are.

Where all logits of a row are NaN, vLLM's sampler for GPUs names a token past the last one. Looking
that up in the next step trips an assertion on the device, and the engine dies with everybody's
requests before anyone is told whose logits they were. With this the row's NaNs are counted, the
canary is told, and only that row is lost.
"""

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.sampler import Sampler

_stock_sample = Sampler.sample


def bound() -> None:
    """In the engine's process, where there is a GPU."""
    Sampler.sample = _sample


def _sample(
    self: Any, logits: torch.Tensor, *rest: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, (rows), and the logits that they were drawn from, (rows, vocabulary)."""
    sampled, processed = _stock_sample(self, logits, *rest, **named)
    return sampled.clamp_(0, logits.shape[-1] - 1), processed

"""A row of NaN logits draws a token of the vocabulary: vLLM's own sampler for GPUs names one past
it, and the next step kills the engine (seen on an H200)."""

from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.sample.sampler import Sampler

from r3mes_vllm.engine import sampling

ROWS, WORDS = 3, 258


@pytest.mark.parametrize(("drawn", "given"), [(WORDS, WORDS - 1), (-1, 0), (7, 7)])
def test_no_token_is_past_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, drawn: int, given: int
) -> None:
    tokens = torch.tensor([1, drawn, 2])

    def stock(self: Any, logits: torch.Tensor, *rest: Any, **named: Any) -> Any:
        assert (rest, named) == (("rest",), {"return_logprobs": True})
        return tokens, logits

    monkeypatch.setattr(sampling, "_stock_sample", stock)
    logits = torch.zeros(ROWS, WORDS)
    sampled, processed = sampling._sample(None, logits, "rest", return_logprobs=True)
    assert sampled.tolist() == [1, given, 2]
    assert sampled is tokens  # the next step reads what the sampler wrote
    assert processed is logits


def test_it_takes_the_place_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "sample", sampling._stock_sample)
    sampling.bound()
    sampling.bound()
    assert Sampler.sample is sampling._sample
    assert sampling._stock_sample is not sampling._sample

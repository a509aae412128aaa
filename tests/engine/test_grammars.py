"""A form that takes seconds for each token ends its request."""

import time
from typing import Any

import pytest
import torch
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from r3mes_vllm.engine import grammars


class Matcher:
    """xgrammar's, as slow as it is told to be."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        time.sleep(self._seconds)

    def accept_token(self, token: int) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_one_that_is_too_slow_is_ended_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, seconds: float, bounded: bool
) -> None:
    for name, stock in (
        ("fill_bitmask", grammars._stock_fill),
        ("accept_tokens", grammars._stock_accept),
    ):
        monkeypatch.setattr(XgrammarGrammar, name, stock)
    monkeypatch.setattr(grammars, "MOST_S", 0.02)
    if bounded:
        grammars.bound()
    matcher: Any = Matcher(seconds)
    grammar = XgrammarGrammar(vocab_size=8, matcher=matcher, ctx=None)
    grammar.fill_bitmask(torch.zeros(1, 1, dtype=torch.int32), 0)
    assert grammar.accept_tokens("r", [1]) is not (bounded and seconds > 0)

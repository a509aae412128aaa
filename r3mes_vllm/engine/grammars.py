"""A form for an answer that takes too long to keep to ends its own request, not everybody's step.

Which tokens may come next is worked out between two steps, for all requests alike: with `(.?){500}`
that takes seconds, for each token, in which no stream goes on.
"""

import time
from typing import Any

from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

MOST_S = 0.25
"""For the tokens that may come next, of one request; usually it is a tenth of a millisecond."""

_stock_fill = XgrammarGrammar.fill_bitmask
_stock_accept = XgrammarGrammar.accept_tokens


def bound() -> None:
    """In the engine's process."""
    XgrammarGrammar.fill_bitmask = _fill
    XgrammarGrammar.accept_tokens = _accept


def _fill(self: Any, *arguments: Any) -> None:
    began = time.perf_counter()
    _stock_fill(self, *arguments)
    self.too_slow = getattr(self, "too_slow", False) or time.perf_counter() - began > MOST_S


def _accept(self: Any, *arguments: Any) -> bool:
    """vLLM ends a request as failed whose token is not accepted."""
    return not getattr(self, "too_slow", False) and bool(_stock_accept(self, *arguments))

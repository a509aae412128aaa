"""Numbers of rows that oneDNN has its products for.

It compiles each product for its number of rows: 250 KB and a few milliseconds for each matrix of a
layer. A batch has any number of tokens, so an engine would compile for as long as it lives, and the
heap would grow by the room between what goes and what comes. Filled up with zeros to the next of a
few numbers, the products are soon all there, and stay.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops

STEPS, LORA_STEPS = 8, 2
"""Between a power of two and the next: one row in twenty-five is added, of an adapter's products,
which are narrow, one in six."""
KEPT = 128
"""By each product: more than there are up to 65,536 rows."""

_stock_create = ops.create_onednn_mm
_stock_multiply = ops.onednn_mm


def bound() -> None:
    """Have vLLM multiply so."""
    ops.create_onednn_mm = _create
    ops.onednn_mm = _multiply


def rounded(rows: int, steps: int = STEPS) -> int:
    """`rows` or a little more, one of `steps` numbers between two powers of two."""
    step = 1 << max((rows - 1).bit_length() - steps.bit_length(), 0)
    return -(-rows // step) * step


def filled_up(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`x`, (at most `rows`, columns), with rows of zeros after its own."""
    if len(x) == rows:
        return x
    wide = x.new_empty(rows, x.shape[1])
    wide[: len(x)] = x
    wide[len(x) :] = 0
    return wide


def _create(weight: torch.Tensor, kept: int = KEPT) -> Any:
    return _stock_create(weight, max(kept, KEPT))


def _multiply(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if torch.compiler.is_compiling():  # the number of rows is not known then
        traced: torch.Tensor = _stock_multiply(handler, x, bias)
        return traced
    flat = x.reshape(-1, handler.k)
    rows = len(flat)
    flat = filled_up(flat, rounded(rows))
    into = x.new_empty(len(flat), handler.n)
    torch.ops._C.onednn_mm(into, flat, bias, handler.handler_tensor)
    return into[:rows].view(*x.shape[:-1], handler.n)

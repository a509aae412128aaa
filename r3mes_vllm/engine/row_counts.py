"""Numbers of rows that oneDNN has its products for.

It compiles each product for its number of rows: half a MB and a millisecond or more for each
matrix of a layer. A batch has any number of tokens, so an engine would compile for as long as it
lives, and the heap would grow by the room between what goes and what comes. In parts of so many
rows at most, filled up with zeros to the next of a few numbers, the products stay; the base
model's are made at the start.
"""

from itertools import takewhile
from typing import Any

import torch
from vllm import _custom_ops as ops

STEPS, LORA_STEPS = 8, 1
"""Between a power of two and the next: of the base model one row in twenty-five is added, of an
adapter's products, which are narrow, a third."""
MOST, LORA_MOST = 512, 128
"""Rows of one product at most; to read the weights once for each costs one part in forty."""
KEPT = 128
"""By each product: more than there are numbers of rows."""
_WORK = 10**10
"""Multiplications up to which a product is made before it is asked for: not those of a vocabulary
for more rows than draw a token."""

_made = set[tuple[int, int, torch.dtype, bool]]()
"""Shapes of matrices that were multiplied with."""

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
    if (shape := (handler.k, handler.n, x.dtype, bias is not None)) not in _made:
        _made.add(shape)
        _make(handler, x, bias)
    flat = x.reshape(-1, handler.k)
    return _product(handler, flat, bias).view(*x.shape[:-1], handler.n)


def _make(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """oneDNN gives a product to all matrices of one shape, of all layers."""
    counts = sorted({rounded(rows) for rows in range(1, MOST + 1)})
    for rows in takewhile(lambda it: it * handler.k * handler.n <= _WORK, counts):
        _product(handler, x.new_zeros(rows, handler.k), bias)


def _product(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = len(x)
    whole = rows // MOST * MOST
    into = x.new_empty(whole + rounded(rows - whole), handler.n)
    for begin in range(0, rows, MOST):
        part = x if rows <= MOST else x[begin : begin + MOST]
        count = rounded(len(part))
        torch.ops._C.onednn_mm(
            into[begin : begin + count], filled_up(part, count), bias, handler.handler_tensor
        )
    return into[:rows]

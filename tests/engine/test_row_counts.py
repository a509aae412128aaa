"""The engine's products are of few numbers of rows, and as exact."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import _custom_ops as ops

from r3mes_vllm.engine import row_counts
from r3mes_vllm.engine.row_counts import KEPT, LORA_STEPS, MOST, STEPS, rounded

GROWS = """
import sys
import torch
from vllm import _custom_ops as ops
from r3mes_vllm.engine import plugin
from tests.engine.heap import used
if sys.argv[1] == "ours":
    plugin.register()
bf16 = torch.cpu._is_avx512_bf16_supported()
weights = torch.randn(64, 64).to(torch.bfloat16 if bf16 else torch.float32)
handler = ops.create_onednn_mm(weights.t(), 32)
def multiplied(rows):
    ops.onednn_mm(handler, torch.ones(rows, 64, dtype=weights.dtype), None)
def grown(most):
    before = used()
    for rows in range(1, most):
        multiplied(rows)
    return used() - before
multiplied(1)
print("bytes", grown(257), grown(1001))
"""


def grown_by(whose: str) -> tuple[int, int]:
    """Bytes, after the first product: with batches of up to 256 rows, and then of up to 1,000."""
    told = subprocess.check_output([sys.executable, "-c", GROWS, whose], text=True)
    usual, large = map(int, told.split()[-2:])
    return usual, large


def test_batch_sizes_leave_few_products_behind() -> None:
    (usual, large), (stock_usual, stock_large) = grown_by("ours"), grown_by("vllm")
    assert usual < 0.02 * stock_usual, "those of the usual batches were made at the start"
    assert large < 0.02 * stock_large, "the others are taken in parts"


@given(st.integers(0, 1 << 16), st.sampled_from([(STEPS, 1.125), (LORA_STEPS, 2.0)]))
def test_few_rows_are_added(rows: int, allowed: tuple[int, float]) -> None:
    steps, most = allowed
    assert rows <= rounded(rows, steps) <= most * rows
    assert rounded(rounded(rows, steps), steps) == rounded(rows, steps)


def test_a_handler_keeps_all() -> None:
    assert len({rounded(rows) for rows in range(1, MOST + 1)}) <= KEPT


@pytest.mark.parametrize("shape", [(1,), (9,), (17,), (129,), (512,), (1101,), (3, 7), (0,)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_as_it_was(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 16), torch.randn(*shape, 16)
    bias = torch.randn(24) if biased else None
    handler = row_counts._create(weight.t(), 1)
    told = row_counts._multiply(handler, x, bias)
    assert told.is_contiguous()
    assert torch.allclose(told, torch.nn.functional.linear(x, weight, bias), atol=1e-5)


def test_what_is_traced_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(row_counts, "_stock_multiply", lambda *arguments: "vllm's")
    told: object = row_counts._multiply(None, torch.ones(9, 16), None)
    assert told == "vllm's"


def test_vllm_multiplies_by_what_is_bound() -> None:
    """By these names; when vLLM takes others, this fails."""
    from vllm.model_executor.layers import utils

    for name in ("create_onednn_mm", "onednn_mm"):
        assert hasattr(ops, name)
        assert name in utils.dispatch_cpu_unquantized_gemm.__code__.co_names or any(
            name in getattr(it, "co_names", ())
            for it in utils.dispatch_cpu_unquantized_gemm.__code__.co_consts
        )

"""Each row gets its own adapter, those of the base model none (hazards 1 and 2)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from r3mes_vllm.engine import cpu_lora, cpu_packs
from r3mes_vllm.engine.cpu_lora import CpuPunicaWrapper

SLOTS, RANK, INPUTS, OUTPUTS = 2, 4, 16, 8
IDS = [7, 9]  # the adapters in slot 0 and 1


def added_by_lora(
    wrapper_class: type[PunicaWrapperCPU], rows: list[int], *, prefill: bool
) -> torch.Tensor:
    """What the adapters add to each row; `rows` are adapter ids, 0 for the base model."""
    torch.manual_seed(0)
    wrapper = wrapper_class(64, 64, "cpu")
    mapping = LoRAMapping(tuple(rows), tuple(rows), is_prefill=prefill)
    wrapper.update_metadata(mapping, IDS, SLOTS, vocab_size=32)
    a = torch.randn(SLOTS, 1, RANK, INPUTS)
    b = torch.randn(SLOTS, 1, OUTPUTS, RANK)
    x = torch.randn(len(rows), INPUTS)
    y = torch.zeros(len(rows), OUTPUTS)
    wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (OUTPUTS,))
    expected = torch.stack(
        [
            torch.zeros(OUTPUTS) if not row else b[IDS.index(row), 0] @ a[IDS.index(row), 0] @ x[i]
            for i, row in enumerate(rows)
        ]
    )
    return (y - expected).abs().max()


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("rows", [[0, 7, 9, 0], [7, 9, 0], [0], [0, 0, 9], [7, 7, 9]])
def test_every_row_gets_its_own_adapter_and_the_base_none(rows: list[int], prefill: bool) -> None:
    assert added_by_lora(CpuPunicaWrapper, rows, prefill=prefill) < 1e-4


def test_stock_vllm_gives_base_rows_the_last_slots_adapter() -> None:
    """The fault that the mask is for; when vLLM mends it, this fails and the mask can go."""
    assert added_by_lora(PunicaWrapperCPU, [0, 7, 9, 0], prefill=False) > 0.1


def test_an_infinite_adapter_beside_it_leaves_the_base_row_alone() -> None:
    wrapper = CpuPunicaWrapper(64, 64, "cpu")
    wrapper.update_metadata(
        LoRAMapping((0, 9), (0, 9), is_prefill=False), list[int | None](IDS), SLOTS, vocab_size=32
    )
    a = torch.full((SLOTS, 1, RANK, INPUTS), float("inf"))
    y = torch.zeros(2, OUTPUTS)
    wrapper.add_lora_linear(
        y, torch.ones(2, INPUTS), (a,), (torch.ones(SLOTS, 1, OUTPUTS, RANK),), 1.0, (OUTPUTS,)
    )
    assert y[0].eq(0).all()


class Layer:
    """Stacked weights of a layer of three slices, as vLLM keeps them, and what they should give."""

    outputs = (24, 8, 8)
    inputs, slots, rank = 32, 4, 8

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.a = tuple(
            torch.zeros(self.slots, 1, self.rank, self.inputs, dtype=torch.bfloat16)
            for _ in self.outputs
        )
        self.b = tuple(
            torch.zeros(self.slots, 1, outputs, self.rank, dtype=torch.bfloat16)
            for outputs in self.outputs
        )

    def place(
        self, slot: int, ranks: tuple[int, ...], random: torch.Generator | None = None
    ) -> None:
        """Another adapter, of the given rank in each slice; 0 leaves the slice alone."""
        random = random or self._random
        with torch.inference_mode():
            for a, b, rank in zip(self.a, self.b, ranks, strict=True):
                a[slot] = 0
                b[slot] = 0
                a[slot, 0, :rank] = torch.randn(rank, self.inputs, generator=random)
                b[slot, 0, :, :rank] = torch.randn(b.shape[2], rank, generator=random)

    def rows(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.inputs, generator=self._random).bfloat16()

    def expected(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """In float64; -1 is the base model."""
        y = torch.zeros(len(x), sum(self.outputs), dtype=torch.float64)
        for row, slot in enumerate(slots):
            if slot >= 0:
                parts = [
                    b[slot, 0].double() @ (a[slot, 0].double() @ x[row].double())
                    for a, b in zip(self.a, self.b, strict=True)
                ]
                y[row] = torch.cat(parts)
        return y

    def differ(self, wrapper: CpuPunicaWrapper, slots: list[int]) -> bool:
        """Whether some row is further from float64 than the rounding of bf16 explains."""
        ids: list[int | None] = [slot + 10 for slot in range(self.slots)]
        rows = tuple(slot + 10 if slot >= 0 else 0 for slot in slots)
        wrapper.update_metadata(LoRAMapping(rows, rows, is_prefill=True), ids, self.slots, 32)
        x, y = self.rows(len(slots)), torch.zeros(len(slots), sum(self.outputs)).bfloat16()
        with torch.inference_mode():
            wrapper.add_lora_linear(y, x, self.a, self.b, 1.0, self.outputs)
        expected = self.expected(x, slots)
        largest = expected.abs().amax(dim=1, keepdim=True)
        return bool(((y.double() - expected).abs() > largest * 2**-6).any())


ROWS = st.lists(
    st.tuples(st.integers(-1, Layer.slots - 1), st.integers(1, 40)), min_size=1, max_size=8
)


@dataclass(eq=False)
class Adapter:
    """What vLLM keeps in main memory."""

    seed: int

    def into(self, layer: Layer, slot: int) -> None:
        ranks = (8, 4, 0) if self.seed % 2 else (3, 8, 8)
        layer.place(slot, ranks, torch.Generator().manual_seed(self.seed))


def _staged(wrapper: CpuPunicaWrapper, layer: Layer, slot: int, adapter: Adapter) -> None:
    """Between steps, as staging does."""
    wrapper.place(slot, adapter, layer.a, layer.b, layer.outputs, lambda: adapter.into(layer, slot))


def _activated(wrapper: CpuPunicaWrapper, layer: Layer, slot: int, adapter: Adapter) -> None:
    """In a step, as vLLM does with one that it has in main memory."""
    with wrapper.placing(slot, adapter):
        adapter.into(layer, slot)


def _unseen(wrapper: CpuPunicaWrapper, layer: Layer, slot: int, adapter: Adapter) -> None:
    """By someone of whom nothing is known."""
    layer.place(slot, (5, 8, 2))


PLACEMENTS = st.tuples(
    st.sampled_from([_staged, _activated, _unseen]), st.integers(0, 3), st.integers(0, 5)
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.lists(PLACEMENTS, max_size=4), ROWS), max_size=8))
def test_every_mix_equals_float64_also_as_adapters_come_and_go_and_come_back(
    steps: list[tuple[list[tuple[Any, int, int]], list[tuple[int, int]]]],
) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(512, 64, "cpu")
    adapters = [Adapter(seed) for seed in range(6)]
    for placed, runs in steps:
        for way, slot, number in placed:
            way(wrapper, layer, slot, adapters[number])
        assert not layer.differ(wrapper, [slot for slot, length in runs for _ in range(length)])


def test_long_runs_and_many_columns_equal_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(2048, 64, "cpu")
    for slot in range(layer.slots):
        layer.place(slot, (8, 4, 0))
    slots = [0] * 200 + [1, -1, 2] * 5 + [-1] * 200 + [3] * 150 + [2]
    assert not layer.differ(wrapper, slots)
    monkeypatch.setattr(cpu_packs, "_ZEROS", 0)
    assert not layer.differ(CpuPunicaWrapper(2048, 64, "cpu"), slots)


def test_an_adapters_products_are_of_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(2048, 64, "cpu")
    for slot in range(layer.slots):
        layer.place(slot, (8, 8, 8))
    real, seen = cpu_packs.Product.__call__, set()

    def watched(self: Any, x: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.add(len(x))
        return real(self, x, *others)

    monkeypatch.setattr(cpu_packs.Product, "__call__", watched)
    for count in (1, 2, 3, 5, 9, 30, 63, 100, 127, 128, 129, 200, 255, 300, 1000):
        assert not layer.differ(wrapper, [0] * count)
        third = count // 3
        assert not layer.differ(wrapper, [0] * third + [1] * third + [-1] * third + [2])
    assert len(seen) <= 8


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_with_and_without_the_processors_bf16_it_equals_float64(
    monkeypatch: pytest.MonkeyPatch, computed_in: torch.dtype
) -> None:
    monkeypatch.setattr(cpu_packs, "computed_in", lambda dtype: computed_in)
    layer, wrapper = Layer(0), CpuPunicaWrapper(512, 64, "cpu")
    for slot in range(layer.slots):
        layer.place(slot, (8, 4, 2))
    assert not layer.differ(wrapper, [0] * 200 + [1, -1, 2] * 5)


def test_without_the_mask_a_row_gets_others_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    layer.place(0, (8, 8, 8))
    assert not layer.differ(wrapper, [0, -1])
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda self, mask, value: self)
    assert layer.differ(CpuPunicaWrapper(64, 64, "cpu"), [0, -1])


def test_an_adapter_that_takes_a_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    layer.place(0, (8, 8, 8))
    assert not layer.differ(wrapper, [0, -1])
    layer.place(0, (8, 8, 8))
    assert not layer.differ(wrapper, [0, -1])
    layer.place(0, (8, 8, 8))
    monkeypatch.setattr(cpu_packs, "version", lambda tensor: 0)
    stale = CpuPunicaWrapper(64, 64, "cpu")
    assert not layer.differ(stale, [0, -1])
    layer.place(0, (8, 8, 8))
    assert layer.differ(stale, [0, -1])


@pytest.mark.parametrize("watching", [True, False])
def test_an_adapter_is_noticed_that_takes_the_place_of_its_namesake(
    monkeypatch: pytest.MonkeyPatch, watching: bool
) -> None:
    """Loaded again under the same id: vLLM's mapping stays the same, and is not told again."""
    if not watching:
        monkeypatch.setattr(cpu_packs, "version", lambda tensor: 0)
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    layer.place(0, (8, 8, 8))
    assert not layer.differ(wrapper, [0, -1])
    monkeypatch.setattr(wrapper, "update_metadata", lambda *arguments, **named: None)
    assert not layer.differ(wrapper, [0, -1])
    layer.place(0, (8, 8, 8))
    assert layer.differ(wrapper, [0, -1]) is not watching


def test_an_embedding_that_no_adapter_changes_costs_nothing_until_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrapper = CpuPunicaWrapper(64, 64, "cpu")
    mapping = LoRAMapping((7, 0), (7, 0), is_prefill=False)
    wrapper.update_metadata(mapping, list[int | None](IDS), SLOTS, vocab_size=32)
    b, x, y = torch.zeros(SLOTS, 1, OUTPUTS, RANK), torch.ones(2, RANK), torch.zeros(2, OUTPUTS)
    real = PunicaWrapperCPU.add_lora_embedding
    asked: list[torch.Tensor] = []

    def watched(self: PunicaWrapperCPU, y: torch.Tensor, *others: Any, **named: Any) -> None:
        asked.append(y)
        real(self, y, *others, **named)

    monkeypatch.setattr(PunicaWrapperCPU, "add_lora_embedding", watched)
    wrapper.add_lora_embedding(y, x, b)
    assert not asked
    assert y.eq(0).all()
    b[0] = 1
    wrapper.add_lora_embedding(y, x, b)
    assert len(asked) == 1
    assert y[0].eq(RANK).all()
    assert y[1].eq(0).all()


def _place(wrapper: CpuPunicaWrapper, layer: Layer, slot: int) -> None:
    """One that nobody keeps."""
    _staged(wrapper, layer, slot, Adapter(2 * slot + 1))


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The slots of whatever is laid out."""
    seen: list[tuple[int, ...]] = []
    real = cpu_packs._packed

    def watched(a: Any, b: Any, slots: tuple[int, ...], *others: Any) -> Any:
        seen.append(slots)
        return real(a, b, slots, *others)

    monkeypatch.setattr(cpu_packs, "_packed", watched)
    return seen


@pytest.mark.parametrize("place", [_staged, _activated])
def test_an_adapter_that_comes_back_is_not_laid_out_anew(
    packed: list[tuple[int, ...]], place: Any
) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    hot, cold = Adapter(1), Adapter(2)
    _place(wrapper, layer, 1)  # vLLM's layers are known from the first step or placement
    packed.clear()
    for adapter, slot in ((hot, 0), (cold, 0), (hot, 3), (cold, 2), (hot, 0)):
        place(wrapper, layer, slot, adapter)
        assert not layer.differ(wrapper, [slot] * 3)
    assert packed == [(0,), (0,)]


def test_no_more_is_kept_of_adapters_that_left_than_there_are_slots(
    packed: list[tuple[int, ...]],
) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    adapters = [Adapter(seed) for seed in range(2 * Layer.slots + 1)]
    for adapter in adapters:
        _staged(wrapper, layer, 0, adapter)
    (of_layer,) = wrapper._layers.values()
    assert len(of_layer._kept) == 2 * Layer.slots
    packed.clear()
    _staged(wrapper, layer, 1, adapters[1])
    assert packed == []
    _staged(wrapper, layer, 1, adapters[0])
    assert packed == [(1,)]
    del adapter, adapters  # vLLM has no room for them in main memory
    assert len(of_layer._kept) == 0


def test_a_slot_that_was_written_to_unseen_has_nothing_of_its_last_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, wrapper, adapter = Layer(0), CpuPunicaWrapper(64, 64, "cpu"), Adapter(1)
    _staged(wrapper, layer, 0, adapter)
    _unseen(wrapper, layer, 0, adapter)
    _staged(wrapper, layer, 1, Adapter(2))
    assert not layer.differ(wrapper, [0])
    monkeypatch.setattr(cpu_packs, "version", lambda tensor: 0)
    stale = CpuPunicaWrapper(64, 64, "cpu")
    _staged(stale, layer, 0, adapter)
    _unseen(stale, layer, 0, adapter)
    assert layer.differ(stale, [0])


def test_placing_an_adapter_lays_out_nothing_else_anew(packed: list[tuple[int, ...]]) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    _place(wrapper, layer, 0)
    _place(wrapper, layer, 1)
    assert not layer.differ(wrapper, [0, 1, -1])
    assert packed == [(0,), (1,), (0, 1)]
    _place(wrapper, layer, 2)
    assert not layer.differ(wrapper, [0, 1, -1])
    assert not layer.differ(wrapper, [2, -1])
    assert packed == [(0,), (1,), (0, 1), (2,)]
    _place(wrapper, layer, 1)
    assert not layer.differ(wrapper, [0, 1, -1])
    assert packed[4:] == [(1,), (0, 1)]


def test_an_adapter_of_large_rank_is_not_laid_out_beside_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    _place(wrapper, layer, 0)
    _place(wrapper, layer, 1)
    monkeypatch.setattr(cpu_lora, "_WIDE", 8)
    _place(wrapper, layer, 2)
    assert not layer.differ(wrapper, [0, 1, 2, -1, 2, 1])
    (of_layer,) = wrapper._layers.values()
    assert all(2 not in slots for slots in of_layer._packs if len(slots) > 1)


def test_an_adapter_that_left_its_slot_is_freed() -> None:
    layer, wrapper = Layer(0), CpuPunicaWrapper(64, 64, "cpu")
    _place(wrapper, layer, 0)
    mapping = LoRAMapping((0,), (0,), is_prefill=False)
    wrapper.update_metadata(mapping, [7, None, None, None], Layer.slots, vocab_size=32)
    (of_layer,) = wrapper._layers.values()
    assert of_layer._packs
    wrapper.update_metadata(mapping, [None] * Layer.slots, Layer.slots, vocab_size=32)
    assert not of_layer._packs


@pytest.mark.parametrize("rows", [[0, 7, 9, 0], [9, 7], [0]])
def test_logits_get_their_own_adapter_and_those_of_the_base_none(rows: list[int]) -> None:
    torch.manual_seed(0)
    wrapper = CpuPunicaWrapper(64, 64, "cpu")
    mapping = LoRAMapping(tuple(rows), tuple(rows), is_prefill=False)
    wrapper.update_metadata(mapping, list[int | None](IDS), SLOTS, vocab_size=OUTPUTS)
    a, b = torch.randn(SLOTS, 1, RANK, INPUTS), torch.randn(SLOTS, 1, OUTPUTS, RANK)
    x, y = torch.randn(len(rows), INPUTS), torch.zeros(len(rows), OUTPUTS + 3)
    wrapper.add_lora_logits(y, x, a, b, 1.0)
    for row, id_ in enumerate(rows):
        slot = IDS.index(id_) if id_ else 0
        expected = b[slot, 0] @ a[slot, 0] @ x[row] * bool(id_)
        assert torch.allclose(y[row, :OUTPUTS], expected, atol=1e-4)
    assert y[:, OUTPUTS:].eq(0).all()

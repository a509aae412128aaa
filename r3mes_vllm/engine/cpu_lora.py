"""vLLM's LoRA arithmetic on the CPU: every row its own adapter's, none for the base model's.

Stock vLLM 0.32 gathers an adapter's weights anew for every token, and takes slot -1 of a row of
the base model for the last slot (`vllm/lora/ops/torch_ops/lora_ops.py`). Here the weights of the
adapters in the batch are laid side by side, once for as long as they stay in their slots: one
product with all their A, zeros where a row is not that adapter's, one product with all their B.
A long run of rows of one adapter, a prefill, has its products to itself, and so has an adapter of
large rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from weakref import ReferenceType, ref

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from r3mes_vllm.engine import cpu_packs
from r3mes_vllm.engine.cpu_packs import MIXED_PACKS, Layer, Layout, Task
from r3mes_vllm.engine.row_counts import LORA_MOST

_LONG_RUN = 128
"""Rows from which an adapter has products of its own."""

_WIDE = 256
"""Columns from which an adapter in the batch has products of its own, however few its rows: to lay
it out beside others each time that they meet would stop a step."""

_SCRATCH = 1 << 20
"""Elements up to which what a product gives has its place from the start."""

_stock_activate = LoRAModelManager.activate_adapter


def _activate(self: Any, lora_id: int) -> bool:
    """Place an adapter that is in main memory into a slot: what is laid out of others stays, and
    what was laid out of it is found again."""
    slots = self.lora_index_to_id
    adapter = self._registered_adapters.get(lora_id)
    with ExitStack() as written:
        if lora_id not in self._active_adapters and adapter is not None and None in slots:
            for wrapper in self.punica_wrapper_mapping.values():
                if isinstance(wrapper, CpuPunicaWrapper):
                    written.enter_context(wrapper.placing(slots.index(None), adapter))
        placed: bool = _stock_activate(self, lora_id)
    return placed


@dataclass
class _Segment:
    """Rows `start` to `end` of a batch, with all slots that they may need."""

    start: int
    end: int
    slots: tuple[int, ...]
    mixed: bool
    """Whether a row may belong to less than all of `slots`."""
    masks: dict[Layout, torch.Tensor] = field(default_factory=dict)


class CpuPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._layers: dict[int, Layer] = {}
        self._tasks: dict[int, tuple[int, torch.Size, list[Task]]] = {}
        """Of the layers, at the last mapping, with what they depend on beside it."""
        self._blank: dict[int, tuple[int, bool]] = {}
        """Whether all B of an embedding are zero, at a version of them."""
        self._segments: list[_Segment] = []
        self._sampled: list[int] = []
        """Slots of the rows that logits are computed for."""
        self._together: list[tuple[int, ...]] = []
        """Sets of slots that are packed together, the last used at the end."""
        self._wide: set[int] = set()
        self._kept: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._filled: set[int] = set()
        """Slots with an adapter, at the last step."""
        self._recent: dict[int, ReferenceType[object]] = {}
        """Adapters by their identity, the last that was placed at the end."""
        LoRAModelManager.activate_adapter = _activate

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of = {id_: slot for slot, id_ in enumerate(lora_index_to_id) if id_ is not None}
        filled = set(slot_of.values())
        if gone := self._filled - filled:
            self.free(gone)
        self._filled = filled
        self._tasks.clear()
        self._segments = self._segmented(mapping.index_mapping, slot_of)
        self._sampled = sorted({slot_of[id_] for id_ in mapping.prompt_mapping if id_ > 0})

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """`y[row, slice] += x[row] @ A[slot of row, slice] @ B[slot of row, slice] * scale`.

        `x` is (rows, inputs), `y` (rows, outputs) of all slices one after the other.
        """
        if not self._segments:
            return
        if x.dim() != 2:
            x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        first = lora_a_stacked[0]
        known = self._tasks.get(id(first))
        # Each placement writes to all tensors; to look at every one would take longer.
        if known is None or known[0] != cpu_packs.version(first) or known[1] != x.shape:
            layer = self._layer(lora_a_stacked, lora_b_stacked)
            known = cpu_packs.version(first), x.shape, self._planned(layer, len(x), output_slices)
            self._tasks[id(first)] = known
        for task in known[2]:
            task(y, x, scale)

    def _planned(self, layer: Layer, rows: int, output_slices: Sequence[int]) -> list[Task]:
        tasks = []
        for segment in self._segments:
            pack = layer.pack(segment.slots, output_slices)
            if pack.a is None:
                continue
            dtype, widest = pack.a.dtype, max(pack.a.outputs, pack.b[0][4].outputs)
            mask = self._mask(segment, pack.layout) if segment.mixed else None
            for start in range(segment.start, segment.end, LORA_MOST):
                end = min(start + LORA_MOST, segment.end)
                scratch = cpu_packs.filled(end - start) * widest <= _SCRATCH
                tasks.append(
                    Task(
                        None if end - start == rows else slice(start, end),
                        end - start,
                        pack.a,
                        None if mask is None else mask[start - segment.start : end - segment.start],
                        pack.b,
                        self._scratch(dtype) if scratch else None,
                    )
                )
        return tasks

    def _scratch(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self._kept.get(dtype)
        if kept is None:
            with torch.inference_mode(False):
                kept = torch.empty(_SCRATCH, dtype=dtype), torch.empty(_SCRATCH, dtype=dtype)
            self._kept[dtype] = kept
        return kept

    def place(
        self,
        slot: int,
        adapter: object,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: Sequence[int],
        write: Callable[[], None],
    ) -> None:
        """Let `write` fill `slot` of a layer with `adapter` and lay it out now, not in the first
        step with it."""
        layer = self._layer(lora_a_stacked, lora_b_stacked)
        with layer.rewriting(slot, adapter):
            write()
        self._keep(adapter, len(lora_a_stacked[0]))
        layout = layer.pack((slot,), output_slices).layout
        self._filled.add(slot)
        if sum(rank for part in layout for _, rank in part) >= _WIDE:
            self._wide.add(slot)

    def free(self, slots: set[int]) -> None:
        """Drop what is laid out of adapters that have left these slots."""
        self._filled -= slots
        self._wide -= slots
        self._tasks.clear()
        for layer in self._layers.values():
            layer.forget(slots)

    @contextmanager
    def placing(self, slot: int, adapter: object) -> Iterator[None]:
        """Meanwhile vLLM fills `slot` of all layers with `adapter`."""
        layers = list(self._layers.values())
        with ExitStack() as written:
            for layer in layers:
                written.enter_context(layer.rewriting(slot, adapter))
            yield
        if layers:
            self._keep(adapter, len(layers[0].a[0]))

    def _keep(self, adapter: object, slots: int) -> None:
        """What is laid out of it when it leaves its slot; of as many as there are slots, beside
        those that are in one."""
        self._recent.pop(id(adapter), None)
        self._recent[id(adapter)] = ref(adapter)
        while len(self._recent) > 2 * slots:
            oldest = self._recent.pop(next(iter(self._recent)))()
            if oldest is not None:
                for layer in self._layers.values():
                    layer.drop(oldest)

    def _layer(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> Layer:
        layer = self._layers.get(id(a[0]))
        if layer is None:
            layer = self._layers[id(a[0])] = Layer(a, b)
        return layer

    def _segmented(self, ids: Sequence[int], slot_of: dict[int, int]) -> list[_Segment]:
        """Long runs of one adapter, and what lies between them together."""
        segments: list[_Segment] = []
        among: set[int] = set()
        start = at = 0

        def end_mixed() -> None:
            used = among - {0}
            if used:
                alone = len(among) == 1
                slots = tuple(sorted(slot_of[id_] for id_ in used))
                packed = slots if alone else self._packed_together(slots)
                segments.append(_Segment(start, at, packed, mixed=not alone))
            among.clear()

        for id_, run in groupby(ids):
            length = sum(1 for _ in run)
            if length >= _LONG_RUN or (id_ and slot_of[id_] in self._wide):
                end_mixed()
                if id_:
                    segments.append(_Segment(at, at + length, (slot_of[id_],), mixed=False))
                start = at + length
            else:
                among.add(id_)
            at += length
        end_mixed()
        return segments

    def _packed_together(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """A set of slots around these that has a pack perhaps, if it is not much larger."""
        wanted = set(slots)
        fitting = (it for it in reversed(self._together) if wanted <= set(it))
        found = next((it for it in fitting if len(it) <= len(slots) + 2), slots)
        if found in self._together:
            self._together.remove(found)
        self._together = [*self._together[1 - MIXED_PACKS :], found]
        return found

    def _mask(self, segment: _Segment, layout: Layout) -> torch.Tensor:
        """(rows, columns), true where the column is not of the row's adapter."""
        mask = segment.masks.get(layout)
        if mask is None:
            owners = [slot for part in layout for slot, rank in part for _ in range(rank)]
            rows = self.token_lora_indices[segment.start : segment.end]
            mask = rows.unsqueeze(1) != torch.tensor(owners, dtype=rows.dtype)
            segment.masks[layout] = mask
        return mask

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y[i] = x @ A[i] * scale`, zero in rows of the base model; `y[i]` is (tokens, rank).

        Of adapters that are split over several processes (`--fully-sharded-loras`).
        """
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        base_rows = self.token_lora_indices < 0
        if base_rows.any():
            for part in y:
                part.view(-1, part.shape[-1])[base_rows] = 0

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if not self._segments or self._is_blank(lora_b_stacked):
            return
        base_rows = (self.token_lora_indices < 0).unsqueeze(-1)
        x = x.masked_fill(base_rows, 0)
        super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    def _is_blank(self, b_stacked: torch.Tensor) -> bool:
        """Whether no adapter changes the embedding, as most don't."""
        version, blank = self._blank.get(id(b_stacked), (-1, False))
        if version != cpu_packs.version(b_stacked):
            blank = not b_stacked.any()
            self._blank[id(b_stacked)] = cpu_packs.version(b_stacked), blank
        return blank

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
        for slot in self._sampled:
            layer = self._layer((lora_a_stacked,), (lora_b_stacked,))
            pack = layer.pack((slot,), lora_b_stacked.shape[2:3])
            if pack.a is not None:
                rows = self.sampler_indices == slot
                ((_, _, _, _, b),) = pack.b
                y[rows, : b.outputs] += (b(pack.a(x[rows])) * scale).to(y.dtype)

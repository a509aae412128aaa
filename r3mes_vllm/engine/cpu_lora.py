"""vLLM's LoRA arithmetic on the CPU: every row its own adapter's, none for the base model's.

Stock vLLM 0.32 gathers an adapter's weights anew for every token, and takes slot -1 of a row of
the base model for the last slot (`vllm/lora/ops/torch_ops/lora_ops.py`). Here the weights of the
adapters in the batch are laid side by side, once for as long as they stay in their slots: one
product with all their A, zeros where a row is not that adapter's, one product with all their B.
A long run of rows of one adapter, a prefill, has its products to itself, and so has an adapter of
large rank.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_LONG_RUN = 128
"""Rows from which an adapter has products of its own."""

_ONE_PRODUCT = 1024
"""Columns up to which one product with a block-diagonal B is used, not one for each slice."""

_WIDE = 256
"""Columns from which an adapter in the batch has products of its own, however few its rows: to lay
it out beside others each time that they meet would stop a step."""

_MIXED_PACKS = 3
"""Kept of a layer, beside those of single slots."""

_ROW_COUNTS = 32
"""For which oneDNN keeps a plan, of each product; vLLM's number."""

_Layout = tuple[tuple[tuple[int, int], ...], ...]
"""Of each slice, the slots in the order of their columns, and how many each has."""


@dataclass
class _Segment:
    """Rows `start` to `end` of a batch, with all slots that they may need."""

    start: int
    end: int
    slots: tuple[int, ...]
    mixed: bool
    """Whether a row may belong to less than all of `slots`."""
    masks: dict[_Layout, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pack:
    """The weights of one layer for some slots, side by side; None where they are all zero."""

    versions: tuple[int, ...]
    layout: _Layout
    a: "_Product | None"
    """From inputs to the columns of all slices."""
    b: tuple[tuple[int, int, int, int, "_Product"], ...]
    """From column, to column, from output, to output."""


class _Product:
    """`x @ weight.t()`, `weight` laid out by oneDNN as for vLLM's own layers where it can be.

    On a processor without instructions for the type it is in float32, whatever `x` is.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = _computed_in(weight.dtype)
        weight = weight.to(self._dtype)
        self.outputs = weight.shape[0]
        self._handler = None
        if ops._supports_onednn:
            with suppress(RuntimeError):  # not for this type on this processor
                self._handler = ops.create_onednn_mm(weight.t(), _ROW_COUNTS)
                self._multiply = torch.ops._C.onednn_mm.default
        if self._handler is None:
            self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self._dtype)
        if self._handler is None:
            return torch.nn.functional.linear(x, self._weight)
        # not ops.onednn_mm: its checks take as long as the product of a few rows
        product = x.new_empty(x.shape[0], self.outputs)
        self._multiply(product, x, None, self._handler.handler_tensor)
        return product


class _Layer:
    def __init__(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
        """Raises RuntimeError for tensors of inference mode, whose changes would go unnoticed."""
        self.a, self.b = a, b
        self._written = (*a, *b)
        self._versions()
        self._packs: dict[tuple[int, ...], _Pack] = {}

    def pack(self, slots: tuple[int, ...], offsets: Sequence[int]) -> _Pack:
        versions = self._versions()
        pack = self._packs.get(slots)
        if pack is None or pack.versions != versions:
            self._packs.pop(slots, None)
            mixed = [kept for kept in self._packs if len(kept) > 1]
            if len(slots) > 1 and len(mixed) >= _MIXED_PACKS:
                del self._packs[mixed[0]]
            pack = self._packs[slots] = _packed(self.a, self.b, slots, offsets, versions)
        return pack

    def rewrite(self, slot: int, write: Callable[[], None]) -> None:
        """Let `write` change what is in `slot`, and nothing else; packs of others stay valid."""
        before = self._versions()
        write()
        after = self._versions()
        self._packs = {
            slots: replace(pack, versions=after)
            for slots, pack in self._packs.items()
            if slot not in slots and pack.versions == before
        }

    def forget(self, gone: set[int]) -> None:
        """Free the packs of these slots."""
        self._packs = {slots: it for slots, it in self._packs.items() if not gone & set(slots)}

    def _versions(self) -> tuple[int, ...]:
        """How often vLLM wrote to each of the tensors: an adapter was placed."""
        return tuple([part._version for part in self._written])


class CpuPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._layers: dict[int, _Layer] = {}
        self._segments: list[_Segment] = []
        self._sampled: list[int] = []
        """Slots of the rows that logits are computed for."""
        self._together: list[tuple[int, ...]] = []
        """Sets of slots that are packed together, the last used at the end."""
        self._wide: set[int] = set()
        self._filled: set[int] = set()
        """Slots with an adapter, at the last step."""

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
        layer = self._layer(lora_a_stacked, lora_b_stacked)
        for segment in self._segments:
            pack = layer.pack(segment.slots, output_slices)
            if pack.a is None:
                continue
            here = slice(segment.start, segment.end)
            rows = y.view(-1, y.shape[-1])[here]
            hidden = pack.a(x.view(-1, x.shape[-1])[here])
            if segment.mixed:
                # not a multiplication: 0 * inf of a bad adapter would be NaN
                hidden.masked_fill_(self._mask(segment, pack.layout), 0)
            if len(pack.b) == 1:
                ((_, _, begin, end, b),) = pack.b
                rows[:, begin:end].add_(b(hidden), alpha=scale)
                continue
            for first, last, begin, end, b in pack.b:
                rows[:, begin:end].add_(b(hidden[:, first:last]), alpha=scale)

    def place(
        self,
        slot: int,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: Sequence[int],
        write: Callable[[], None],
    ) -> None:
        """Let `write` fill `slot` of a layer and lay it out now, not in the first step with it."""
        layer = self._layer(lora_a_stacked, lora_b_stacked)
        layer.rewrite(slot, write)
        layout = layer.pack((slot,), output_slices).layout
        self._filled.add(slot)
        if sum(rank for part in layout for _, rank in part) >= _WIDE:
            self._wide.add(slot)

    def free(self, slots: set[int]) -> None:
        """Drop what is laid out of adapters that have left these slots."""
        self._filled -= slots
        self._wide -= slots
        for layer in self._layers.values():
            layer.forget(slots)

    def _layer(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> _Layer:
        layer = self._layers.get(id(a[0]))
        if layer is None:
            layer = self._layers[id(a[0])] = _Layer(a, b)
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
        self._together = [*self._together[1 - _MIXED_PACKS :], found]
        return found

    def _mask(self, segment: _Segment, layout: _Layout) -> torch.Tensor:
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
        if not self._segments:
            return
        base_rows = (self.token_lora_indices < 0).unsqueeze(-1)
        x = x.masked_fill(base_rows, 0)
        super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

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


def _packed(
    a_stacked: tuple[torch.Tensor, ...],
    b_stacked: tuple[torch.Tensor, ...],
    slots: tuple[int, ...],
    output_slices: Sequence[int],
    versions: tuple[int, ...],
) -> _Pack:
    layout, a_parts, b_parts = [], [], []
    placed = []
    column = output = 0
    for a, b, outputs in zip(a_stacked, b_stacked, output_slices, strict=True):
        ranks = [(slot, rank) for slot in slots if (rank := _rank(b[slot, 0]))]
        layout.append(tuple(ranks))
        a_parts += [a[slot, 0, :rank] for slot, rank in ranks]
        columns = sum(rank for _, rank in ranks)
        if columns:
            part = torch.cat([b[slot, 0, :, :rank] for slot, rank in ranks], dim=1)
            placed.append((column, column + columns, output, output + outputs))
            b_parts.append(part)
        column, output = column + columns, output + outputs
    if not b_parts:
        return _Pack(versions, tuple(layout), None, ())
    if len(b_parts) > 1 and column <= _ONE_PRODUCT:
        begin, end = placed[0][2], placed[-1][3]
        whole = b_parts[0].new_zeros(end - begin, column)
        for (first, last, from_, to), part in zip(placed, b_parts, strict=True):
            whole[from_ - begin : to - begin, first:last] = part
        placed, b_parts = [(0, column, begin, end)], [whole]
    return _Pack(
        versions,
        tuple(layout),
        _Product(torch.cat(a_parts)),
        tuple((*place, _Product(part)) for place, part in zip(placed, b_parts, strict=True)),
    )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """float32 where the processor would only imitate `dtype`, which takes up to ten times as long
    as converting and multiplying."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


def _rank(b: torch.Tensor) -> int:
    """How many of the columns of B (outputs, largest rank) are in use."""
    # a tenth of the time of b.any(dim=0)
    used = ((b.amax(dim=0) != 0) | (b.amin(dim=0) != 0)).nonzero()
    return int(used[-1]) + 1 if len(used) else 0

"""The weights of the adapters in their slots as the CPU multiplies with them: laid side by side,
once for as long as they stay there. Those of one adapter are kept when it leaves, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from vllm import _custom_ops as ops

from r3mes_vllm.engine import row_counts

_ZEROS = 160_000
"""Elements in a block-diagonal B, beside those of the adapters, up to which one product with it
takes less time than one for each slice."""

MIXED_PACKS = 3
"""Kept of a layer, beside those of single slots."""

Layout = tuple[tuple[tuple[int, int], ...], ...]
"""Of each slice, the slots in the order of their columns, and how many each has."""


def filled(rows: int) -> int:
    """The rows that an adapter's products are made for."""
    return row_counts.rounded(rows, row_counts.LORA_STEPS)


@dataclass(frozen=True)
class Pack:
    """The weights of one layer for some slots, side by side; None where they are all zero."""

    versions: tuple[int, ...]
    layout: Layout
    a: "Product | None"
    """From inputs to the columns of all slices."""
    b: tuple[tuple[int, int, int, int, "Product"], ...]
    """From column, to column, from output, to output."""


class Product:
    """`x @ weight.t()`, `weight` laid out by oneDNN as for vLLM's own layers where it can be.

    On a processor without instructions for the type it is in float32, whatever `x` is.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.dtype = computed_in(weight.dtype)
        weight = weight.to(self.dtype)
        self.outputs = weight.shape[0]
        self._handler = None
        if ops._supports_onednn:
            with suppress(RuntimeError):  # not for this type on this processor
                self._handler = ops.create_onednn_mm(weight.t(), row_counts.KEPT)
                self._multiply = torch.ops._C.onednn_mm.default
        if self._handler is None:
            self._weight = weight

    def __call__(self, x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """`into`, if it is given, is (rows, outputs) of the type that `x` is multiplied in."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self._handler is None:
            return torch.nn.functional.linear(x, self._weight)
        # not ops.onednn_mm: its checks take as long as the product of a few rows
        if into is None:
            into = x.new_empty(x.shape[0], self.outputs)
        self._multiply(into, x, None, self._handler.handler_tensor)
        return into


class Task:
    """What a segment needs of one layer, with all decided that does not change with its rows."""

    def __init__(
        self,
        rows: slice | None,
        count: int,
        a: Product,
        mask: torch.Tensor | None,
        b: tuple[tuple[int, int, int, int, Product], ...],
        scratch: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """`rows` None: all, there are `count`; `scratch`: for a product with A, and one with B, of
        the `filled` rows."""
        self._rows, self._count, self._a, self._mask, self._b = rows, count, a, mask, b
        self._filled = filled(count)
        self._hidden = self._product = None
        if scratch:
            hidden, product = scratch
            self._hidden = hidden[: self._filled * a.outputs].view(self._filled, a.outputs)
            if len(b) == 1:
                outputs = b[0][4].outputs
                self._product = product[: self._filled * outputs].view(self._filled, outputs)

    def __call__(self, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        if self._rows is not None:
            y, x = y[self._rows], x[self._rows]
        hidden = self._a(row_counts.filled_up(x, self._filled), self._hidden)
        if self._mask is not None:
            # not a multiplication: 0 * inf of a bad adapter would be NaN
            self._own(hidden).masked_fill_(self._mask, 0)
        if len(self._b) == 1:
            ((_, _, begin, end, b),) = self._b
            if end - begin != y.shape[1]:
                y = y[:, begin:end]
            y.add_(self._own(b(hidden, self._product)), alpha=scale)
            return
        for first, last, begin, end, b in self._b:
            y[:, begin:end].add_(self._own(b(hidden[:, first:last])), alpha=scale)

    def _own(self, product: torch.Tensor) -> torch.Tensor:
        return product if self._filled == self._count else product[: self._count]


class Layer:
    def __init__(self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
        """Raises RuntimeError for tensors of inference mode, whose changes would go unnoticed."""
        self.a, self.b = a, b
        self._written = (*a, *b)
        self._versions()
        self._packs: dict[tuple[int, ...], Pack] = {}
        self._owners: dict[int, tuple[ReferenceType[object], tuple[int, ...]]] = {}
        """Of slots, the adapter that is in it, at which versions."""
        self._kept = WeakKeyDictionary[object, Pack]()
        """Of single adapters, whatever slot they were in."""

    def pack(self, slots: tuple[int, ...], offsets: Sequence[int]) -> Pack:
        versions = self._versions()
        pack = self._packs.get(slots)
        if pack is None or pack.versions != versions:
            self._packs.pop(slots, None)
            mixed = [kept for kept in self._packs if len(kept) > 1]
            if len(slots) > 1 and len(mixed) >= MIXED_PACKS:
                del self._packs[mixed[0]]
            pack = self._packs[slots] = self._made(slots, offsets, versions)
        return pack

    def _made(
        self, slots: tuple[int, ...], offsets: Sequence[int], versions: tuple[int, ...]
    ) -> Pack:
        owner, at = self._owners.get(slots[0], (None, None))
        adapter = owner() if owner and len(slots) == 1 and at == versions else None
        if adapter is None:
            return _packed(self.a, self.b, slots, offsets, versions)
        if kept := self._kept.get(adapter):
            layout = tuple(tuple((slots[0], rank) for _, rank in part) for part in kept.layout)
            return replace(kept, versions=versions, layout=layout)
        pack = self._kept[adapter] = _packed(self.a, self.b, slots, offsets, versions)
        return pack

    @contextmanager
    def rewriting(self, slot: int, adapter: object) -> Iterator[None]:
        """Meanwhile `adapter` is written into `slot` and nothing else anywhere: what is known of
        others stays valid."""
        before = self._versions()
        yield
        after = self._versions()
        self._packs = {
            slots: replace(pack, versions=after)
            for slots, pack in self._packs.items()
            if slot not in slots and pack.versions == before
        }
        self._owners = {
            other: (owner, after)
            for other, (owner, versions) in self._owners.items()
            if other != slot and versions == before
        }
        self._owners[slot] = ref(adapter), after

    def drop(self, adapter: object) -> None:
        """Keep nothing of an adapter for when it comes back."""
        self._kept.pop(adapter, None)

    def forget(self, gone: set[int]) -> None:
        """Free the packs of these slots, which their adapters have left."""
        self._packs = {slots: it for slots, it in self._packs.items() if not gone & set(slots)}
        self._owners = {slot: it for slot, it in self._owners.items() if slot not in gone}

    def _versions(self) -> tuple[int, ...]:
        return tuple(map(version, self._written))


def version(tensor: torch.Tensor) -> int:
    """How often vLLM wrote to it: an adapter was placed."""
    return tensor._version


def _packed(
    a_stacked: tuple[torch.Tensor, ...],
    b_stacked: tuple[torch.Tensor, ...],
    slots: tuple[int, ...],
    output_slices: Sequence[int],
    versions: tuple[int, ...],
) -> Pack:
    layout, a_parts, b_parts = [], [], []
    placed = []
    column = output = 0
    for a, b, outputs in zip(a_stacked, b_stacked, output_slices, strict=True):
        ranks = [(slot, rank) for slot in slots if (rank := _rank(a[slot, 0]))]
        layout.append(tuple(ranks))
        a_parts += [a[slot, 0, :rank] for slot, rank in ranks]
        columns = sum(rank for _, rank in ranks)
        if columns:
            part = torch.cat([b[slot, 0, :, :rank] for slot, rank in ranks], dim=1)
            placed.append((column, column + columns, output, output + outputs))
            b_parts.append(part)
        column, output = column + columns, output + outputs
    if not b_parts:
        return Pack(versions, tuple(layout), None, ())
    begin, end = placed[0][2], placed[-1][3]
    zeros = (end - begin) * column - sum(part.numel() for part in b_parts)
    if len(b_parts) > 1 and zeros <= _ZEROS:
        whole = b_parts[0].new_zeros(end - begin, column)
        for (first, last, from_, to), part in zip(placed, b_parts, strict=True):
            whole[from_ - begin : to - begin, first:last] = part
        placed, b_parts = [(0, column, begin, end)], [whole]
    return Pack(
        versions,
        tuple(layout),
        Product(torch.cat(a_parts)),
        tuple((*place, Product(part)) for place, part in zip(placed, b_parts, strict=True)),
    )


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """float32 where the processor would only imitate `dtype`, which takes up to ten times as long
    as converting and multiplying."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


def _rank(a: torch.Tensor) -> int:
    """How many of the rows of A (largest rank, inputs) are in use."""
    if a[-1].any():
        return len(a)
    used = ((a.amax(dim=1) != 0) | (a.amin(dim=1) != 0)).nonzero()
    return int(used[-1]) + 1 if len(used) else 0

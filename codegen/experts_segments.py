"""Assignments of tokens to experts, sorted by expert, and products of each expert's rows with its weights.

A `Bank` holds one matrix, or one bias, of each expert: a tensor whose first dimension counts experts, or a list.
There are three ways to multiply:

Sliced      a CPU: one product a segment, of slices
Grouped     elsewhere: torch's grouped product, for dtypes and strides that it takes
Masked      elsewhere, for all others: every row with every expert, without asking the device how many rows an expert has
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch.nn import functional as F

from effcompile.ops.experts import ExpertsSpec

Bank: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"

_ALIGNMENT = 16
"""Bytes to which torch's grouped product wants rows and columns aligned."""


@dataclass(frozen=True)
class Assignments:
    """The N = T k assignments, sorted by expert; those that are dropped stand last, and on a CPU are left out.

    Attributes:
        order: [kept], which assignment t k + s a row is.
        token: [kept], the token of each row.
        row: [T, k], the row of each assignment; `kept` if it is dropped.
        expert: [kept], the expert of each row; E if it is dropped.
        ends: [E], int32: one past the last row of each expert.
        bounds: the first row of each expert and one past the last of the last one; only known on a CPU.
        kept: how many rows there are.
    """

    order: torch.Tensor
    token: torch.Tensor
    row: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    bounds: tuple[int, ...] | None
    kept: int

    @property
    def all_kept(self) -> bool:
        """Whether it is known that no assignment is dropped."""
        return self.bounds is not None and self.kept == self.row.numel()


def assign(ids: torch.Tensor, experts: int) -> Assignments:
    """Sort the assignments [T, k]; what is not in 0..experts-1 is dropped."""
    return _assign_on_host(ids, experts) if ids.device.type == "cpu" else assign_on_device(ids, experts)


def _assign_on_host(ids: torch.Tensor, experts: int) -> Assignments:
    expert, order = ids.reshape(-1).to(torch.int64).sort(stable=True)  # negative ids first
    starts = torch.searchsorted(expert, torch.arange(experts + 1), out_int32=True)
    first, *_ = bounds = starts.tolist()
    kept = bounds[-1] - first
    if kept < order.shape[0]:
        expert, order, starts, bounds = (
            expert[first : bounds[-1]],
            order[first : bounds[-1]],
            starts - first,
            [x - first for x in bounds],
        )
    row = torch.full(ids.shape, kept)
    row.view(-1)[order] = torch.arange(kept)
    return Assignments(order, order // ids.shape[1], row, expert, starts[1:], tuple(bounds), kept)


def assign_on_device(ids: torch.Tensor, experts: int) -> Assignments:
    """`assign` without asking the device for the counts."""
    flat, n = ids.reshape(-1).to(torch.int64), ids.numel()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    expert, order = flat.sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(n, device=order.device)
    row = torch.where(flat < experts, row, n).view(ids.shape)
    return Assignments(order, order // ids.shape[1], row, expert, ends, None, n)


def banks(tensors: Sequence[torch.Tensor], parts: int, spec: ExpertsSpec) -> list[Bank]:
    """What an operand holds: `parts` banks, of which an expert's matrices are the columns side by side."""
    if spec.is_stacked:
        return list(tensors)
    experts = len(tensors) // parts
    return [tensors[part * experts : (part + 1) * experts] for part in range(parts)]


def transposed(bank: Bank) -> Bank:
    """The same matrices, transposed."""
    return bank.mT if isinstance(bank, torch.Tensor) else [x.mT for x in bank]


class Segments(Protocol):
    """How rows [N, ...], sorted by expert, meet the matrices of their experts."""

    def product(self, rows: torch.Tensor, bank: Bank, bias: Bank | None, out: torch.Tensor, *, add: bool = False) -> None:
        """out[n] = rows[n] @ bank[e] + bias[e] for the expert e of each row, or `add` the product, without a bias, to `out`.

        Rows that are dropped may hold anything.
        """

    def outer(self, a: torch.Tensor, b: torch.Tensor, out: Bank) -> None:
        """out[e] = sum of a[n]^T b[n] over e's rows."""

    def sums(self, rows: torch.Tensor, out: Bank) -> None:
        """out[e] = sum of rows[n] over e's rows."""


def segments(assigned: Assignments, *operands: Bank) -> Segments:
    """The way to multiply where these operands are."""
    if assigned.bounds is not None:
        return Sliced(assigned.bounds)
    if all(_can_group(bank) for bank in operands):
        return Grouped(assigned)
    return Masked(assigned)


def _can_group(bank: Bank) -> bool:
    if not isinstance(bank, torch.Tensor):
        return all(_is_aligned(x.dtype, x.shape[-2:]) for x in bank)  # a stack of them is contiguous
    steps = sorted(bank.stride())
    sizes = (*bank.shape[-2:], *steps[1:])
    return steps[0] == 1 and bank.stride(0) > 1 and _is_aligned(bank.dtype, sizes) and bank.data_ptr() % _ALIGNMENT == 0


def _is_aligned(dtype: torch.dtype, sizes: Sequence[int]) -> bool:
    return dtype == torch.bfloat16 and all(n * dtype.itemsize % _ALIGNMENT == 0 for n in sizes)


class Sliced:
    """One product of each segment that has rows; empty ones cost nothing."""

    def __init__(self, bounds: Sequence[int]):
        counts = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        self.busy = [e for e, count in enumerate(counts) if count]
        self.idle = [e for e, count in enumerate(counts) if not count]
        self.counts = [count for count in counts if count]

    def of_busy(self, bank: Bank) -> Sequence[torch.Tensor]:
        """What each expert that has rows holds."""
        if isinstance(bank, torch.Tensor) and len(self.busy) > len(self.idle):
            bank = bank.unbind(0)  # one call instead of one for each expert
        return [bank[e] for e in self.busy]

    def product(self, rows: torch.Tensor, bank: Bank, bias: Bank | None, out: torch.Tensor, *, add: bool = False) -> None:
        parts = zip(rows.split(self.counts), self.of_busy(bank), out.split(self.counts), strict=True)
        if bias is not None:
            for (a, b, own), added in zip(parts, self.of_busy(bias), strict=True):
                torch.addmm(added.to(own.dtype), a, b, out=own)
        else:
            for a, b, own in parts:
                torch.addmm(own, a, b, out=own) if add else torch.mm(a, b, out=own)

    def outer(self, a: torch.Tensor, b: torch.Tensor, out: Bank) -> None:
        self.clear(out)
        for left, right, own in zip(a.split(self.counts), b.split(self.counts), self.of_busy(out), strict=True):
            if own.is_contiguous():
                torch.mm(left.mT, right, out=own)
            else:
                torch.mm(right.mT, left, out=own.mT)

    def sums(self, rows: torch.Tensor, out: Bank) -> None:
        self.clear(out)
        for part, own in zip(rows.split(self.counts), self.of_busy(out), strict=True):
            own.copy_(part.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)))

    def clear(self, out: Bank) -> None:
        """Zeros for the experts that have no rows."""
        for e in self.idle:
            out[e].zero_()


class Grouped:
    """torch's grouped product: the device alone knows where segments end. Lists of matrices are stacked, which copies them."""

    def __init__(self, assigned: Assignments):
        self.assigned = assigned

    def product(self, rows: torch.Tensor, bank: Bank, bias: Bank | None, out: torch.Tensor, *, add: bool = False) -> None:
        value = F.grouped_mm(rows.contiguous(), stacked(bank), offs=self.assigned.ends)
        if bias is not None:
            value = value + rows_of(bias, self.assigned).to(value.dtype)
        out.copy_(out + value if add else value)

    def outer(self, a: torch.Tensor, b: torch.Tensor, out: Bank) -> None:
        busy = torch.diff(self.assigned.ends, prepend=self.assigned.ends.new_zeros(1)) > 0
        found = F.grouped_mm(a.contiguous().mT, b.contiguous(), offs=self.assigned.ends)
        store(torch.where(busy[:, None, None], found, 0.0), out)

    def sums(self, rows: torch.Tensor, out: Bank) -> None:
        Masked(self.assigned).sums(rows, out)


class Masked:
    """Every row with every expert, of which what belongs together is taken."""

    def __init__(self, assigned: Assignments):
        self.assigned = assigned

    def of(self, e: int) -> torch.Tensor:
        """[N, 1], whether a row is expert e's."""
        return (self.assigned.expert == e)[:, None]

    def product(self, rows: torch.Tensor, bank: Bank, bias: Bank | None, out: torch.Tensor, *, add: bool = False) -> None:
        value = torch.zeros_like(out)
        for e in range(len(bank)):
            own = rows @ bank[e] if bias is None else torch.addmm(bias[e].to(rows.dtype), rows, bank[e])
            value = torch.where(self.of(e), own, value)
        out.copy_(out + value if add else value)

    def outer(self, a: torch.Tensor, b: torch.Tensor, out: Bank) -> None:
        for e in range(len(out)):
            mine = self.of(e)
            out[e].copy_(torch.where(mine, a, 0.0).mT @ torch.where(mine, b, 0.0))

    def sums(self, rows: torch.Tensor, out: Bank) -> None:
        for e in range(len(out)):
            out[e].copy_(torch.where(self.of(e), rows, 0.0).sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)))


def stacked(bank: Bank) -> torch.Tensor:
    """The bank as one tensor."""
    return bank if isinstance(bank, torch.Tensor) else torch.stack(list(bank))


def rows_of(bank: Bank, assigned: Assignments) -> torch.Tensor:
    """[kept, ...], what the bank holds for each row's expert; anything for rows that are dropped."""
    return stacked(bank)[assigned.expert.clamp(max=len(bank) - 1)]


def store(values: torch.Tensor, out: Bank) -> None:
    """Copy what each expert has to its place."""
    for e in range(len(out)):
        out[e].copy_(values[e])

"""The decays of a delta rule, and the products of steps inside a chunk that they weigh.

With G the sum of the chunk's log decays up to a step and E the same up to where a step erases (G, or without its own decay):

    reads_ij = sum_c q_ic w_jc exp(G_ic - G_jc), j <= i          erasures_ij = sum_c a_ic w_jc exp(E_ic - G_jc), j < i

One decay for a head is a factor of each pair; decays of rows go through the levels of `recurrence_keys`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec

from . import recurrence_keys as keys
from .recurrence_blocks import LOG2_E, between
from .recurrence_keys import matmul
from .recurrence_keys_backward import backward_level

_MILD_FORWARD, _MILD_BACKWARD = 60.0, 8.0


@dataclass(frozen=True, kw_only=True)
class Decays:
    """The decays of one block; 1 stands for a dimension along which they do not differ.

    Attributes:
        reads, erasures: the two kinds of pairs.
        read: exp(G), [m|1, B|1, H|1, C, Dk|1].
        erase: exp(E), of the same shape.
        write: exp(G_C - G), of the same shape.
        whole: exp(G_C), [m|1, B|1, H|1, Dk|1, 1].
    """

    reads: HeadPairs | KeyPairs
    erasures: HeadPairs | KeyPairs
    read: torch.Tensor
    erase: torch.Tensor
    write: torch.Tensor
    whole: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class HeadPairs:
    """Pairs with one decay for a head: `factors` [m|1, B|1, H|1, C, C] are zero where there is no pair.

    `inclusive`: whether a row's own decay is in it.
    """

    factors: torch.Tensor
    inclusive: bool

    def products(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """[m, B, H, C, C]."""
        return matmul(rows, columns.mT).mul_(self.factors)

    def backward(
        self, d_products: torch.Tensor, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor,
        d_rows: torch.Tensor, d_columns: torch.Tensor, d_logs: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Add what the pairs give to d_rows, d_columns and d_logs."""
        weighted = d_products * self.factors
        d_rows.add_(matmul(weighted, columns))
        d_columns.add_(matmul(weighted.mT, rows))
        if d_logs is not None:
            d_logs.add_(between(d_products * products, inclusive=self.inclusive))


@dataclass(frozen=True, kw_only=True)
class KeyPairs:
    """Pairs with a decay for each row of the state; those of a step with itself if `diagonal`, which have none."""

    decays: keys.Decays
    inclusive: bool
    diagonal: bool

    def products(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """[m, B, H, C, C]."""
        own = (rows * columns).sum(-1) if self.diagonal else rows.new_zeros(rows.shape[:-1])
        return keys.scores_of(rows, columns, self.decays, own)

    def backward(
        self, d_products: torch.Tensor, products: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor,
        d_rows: torch.Tensor, d_columns: torch.Tensor, d_logs: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Add what the pairs give to d_rows, d_columns and d_logs."""
        assert d_logs is not None
        for level in self.decays.levels:
            backward_level(level, d_products, rows, columns, d_rows, d_columns, d_logs, self.inclusive)
        if self.diagonal:
            weight = d_products.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            d_rows.addcmul_(weight, columns)
            d_columns.addcmul_(weight, rows)


def decays_of(logs: torch.Tensor, spec: RecurrenceSpec, dtype: torch.dtype, *, for_gradients: bool = False) -> Decays:
    """From log decays [m|1, B|1, H|1, C, Dk|1] in float64."""
    decayed = spec.delta == "decayed"
    if logs.shape[-1] == 1:
        return _head_decays(logs, decayed, dtype)
    mild = _MILD_BACKWARD if for_gradients else _MILD_FORWARD
    after = keys.decays_of(logs, "after", dtype, mild=mild)
    at_erasure = after if decayed else keys.decays_of(logs, "before", dtype, mild=mild)
    return Decays(
        reads=KeyPairs(decays=after, inclusive=True, diagonal=True),
        erasures=KeyPairs(decays=at_erasure, inclusive=decayed, diagonal=False),
        read=after.read,
        erase=at_erasure.read,
        write=after.write,
        whole=after.whole,
    )


def _head_decays(logs: torch.Tensor, decayed: bool, dtype: torch.dtype) -> Decays:
    logs = logs * LOG2_E
    total = logs.cumsum(-2)
    at_erasure = total if decayed else total - logs
    reads = _factors(total, total, 1, dtype)
    erasures = reads.tril(-1) if decayed else _factors(at_erasure, total, 0, dtype)
    last = total[..., -1:, :]
    return Decays(
        reads=HeadPairs(factors=reads, inclusive=True),
        erasures=HeadPairs(factors=erasures, inclusive=decayed),
        read=total.exp2().to(dtype),
        erase=at_erasure.exp2().to(dtype),
        write=(last - total).exp2_().to(dtype),
        whole=last.exp2().to(dtype),
    )


def _factors(rows: torch.Tensor, columns: torch.Tensor, first_zero: int, dtype: torch.dtype) -> torch.Tensor:
    above = torch.ones(rows.shape[-2], rows.shape[-2], dtype=torch.bool, device=rows.device).triu(first_zero)
    return (rows - columns.mT).masked_fill_(above, -torch.inf).exp2_().to(dtype)

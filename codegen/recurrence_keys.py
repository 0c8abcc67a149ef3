"""Recurrences with a decay for each row of the state, chunk by chunk.

With G [C, Dk] the sum of the chunk's log decays up to a step and S the state at its start:

    O = A V + (q * exp G) S       A_ij = sum_c q_ic k_jc exp(G_ic - G_jc), j <= i       S' = exp(G_C) S + (k * exp(G_C - G))^T V

exp(G_i - G_j) is no product of a factor of i and one of j that both are representable, unless the decay between them is mild. So a
chunk is halved again and again. The pairs of a later half's i and an earlier half's j part at the border r between them:
exp(G_i - r) exp(r - G_j), neither above 1, is exact. Blocks in which all decays together are mild are not halved: one product,
with r in the middle, does them.

A state that is read before its update has G_i - g_i for G_i and j < i, and the bonus on the diagonal. The gradient of a log decay
is the sum over all pairs of steps that it lies between; a pair that was parted at r lies on both its sides, so sums inside the
halves suffice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from .recurrence_blocks import (
    LOG2_E,
    Block,
    blocks,
    chunk_length,
    load,
    load_logs,
    load_with_column,
    store,
)

Tensors = Mapping[str, torch.Tensor]

_ELEMENTS = 1 << 17
"""Of a block's largest tensor: some of them, and float64 sums, stay in a core's cache."""
_MILD = 60.0
"""Halvings by the decays of one block of steps: their inverse, times the same, is far from overflow in float32."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """Pairs of rows and columns of A that one product computes, in blocks along its diagonal.

    Attributes:
        size: steps of a block.
        halves: whether rows are the later half of a block and columns the earlier; else both are the whole block, and j < i.
        rows: factor of q, [m|1, B|1, H|1, blocks, rows, Dk].
        columns: factor of k, of the same shape.
    """

    size: int
    halves: bool
    rows: torch.Tensor
    columns: torch.Tensor

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """A view of [m, B, H, C, D] as [m, B, H, blocks, rows, D]."""
        parts = x.unflatten(3, (-1, self.size))
        return parts[..., self.size // 2 :, :] if self.halves else parts

    def of_columns(self, x: torch.Tensor) -> torch.Tensor:
        """As `of_rows`."""
        parts = x.unflatten(3, (-1, self.size))
        return parts[..., : self.size // 2, :] if self.halves else parts

    def of_pairs(self, x: torch.Tensor) -> torch.Tensor:
        """A view of [m, B, H, C, C] as [m, B, H, blocks, rows, columns]."""
        along = (
            x.unflatten(4, (-1, self.size)).unflatten(3, (-1, self.size)).diagonal(dim1=3, dim2=5)
        )  # [m, B, H, size, size, blocks]
        parts = along.movedim(-1, 3)
        return parts[..., self.size // 2 :, : self.size // 2] if self.halves else parts


@dataclass(frozen=True, kw_only=True)
class Decays:
    """The decays of one block; 1 stands for a dimension along which they do not differ.

    Attributes:
        levels: the pairs j < i, each in one of them.
        read: exp(G), or exp(G - g), [m|1, B|1, H|1, C, Dk].
        write: exp(G_C - G), of the same shape.
        whole: exp(G_C) [m|1, B|1, H|1, Dk, 1].
    """

    levels: tuple[Level, ...]
    read: torch.Tensor
    write: torch.Tensor
    whole: torch.Tensor


def decays_of(logs: torch.Tensor, read: str, dtype: torch.dtype, *, mild: float) -> Decays:
    """From log decays [m|1, B|1, H|1, C, Dk] in float64; a product computes pairs between which are at most `mild` halvings."""
    logs = logs * LOG2_E
    total = logs.cumsum(-2)
    before = total if read == "after" else total - logs
    last = total[..., -1:, :]
    return Decays(
        levels=tuple(_levels(total, before, _mild_size(logs, mild), dtype)),
        read=before.exp2().to(dtype),
        write=(last - total).exp2_().to(dtype),
        whole=last.exp2().to(dtype).mT,
    )


def _mild_size(logs: torch.Tensor, mild: float) -> int:
    """The largest power of two such that the decays of any block of so many steps together are at most `mild` halvings."""
    size, sums = 1, logs.abs()
    while sums.shape[-2] > 1:
        sums = sums.unflatten(-2, (-1, 2)).sum(-2)
        if not float(sums.amax()) <= mild:
            break
        size *= 2
    return size


def _levels(total: torch.Tensor, before: torch.Tensor, mild: int, dtype: torch.dtype) -> Iterator[Level]:
    length, size = total.shape[-2], max(mild, 2)
    while size <= length:
        halves = size > mild
        inclusive, exclusive = total.unflatten(-2, (-1, size)), before.unflatten(-2, (-1, size))
        border = inclusive[..., size // 2 - 1 : size // 2, :]
        rows, columns = (exclusive[..., size // 2 :, :], inclusive[..., : size // 2, :]) if halves else (exclusive, inclusive)
        yield Level(
            size=size,
            halves=halves,
            rows=(rows - border).exp2_().to(dtype),
            columns=(border - columns).exp2_().to(dtype),
        )
        size *= 2


class Plan:
    """Sizes, and what of the operands every block needs. Shared heads of q and k are repeated."""

    def __init__(self, v: torch.Tensor, x: Tensors, logs: torch.Tensor, spec: RecurrenceSpec) -> None:
        self.v, self.logs, self.spec = v, logs, spec
        self.b, self.h, self.t, _ = v.shape
        self.heads = x["k"].shape[1]
        self.q, self.k = (
            x[name].repeat_interleave(self.h // self.heads, dim=1) if self.heads != self.h else x[name] for name in "qk"
        )
        self.dk = self.k.shape[3]
        self.bonus = x["bonus"].expand(self.b, self.h, self.t, self.dk) if "bonus" in x else None
        self.width = v.shape[3] + spec.normaliser
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        length = chunk_length(self.dk, self.width)
        elements = self.b * self.h * length * max(self.dk, self.width)
        self.blocks = list(blocks(self.t, length, max(1, _ELEMENTS // max(1, elements)), power_of_two=True))

    def decays(self, block: Block, *, mild: float = _MILD) -> Decays:
        """Those of a block."""
        return decays_of(load_logs(self.logs, block), self.spec.read, self.dtype, mild=mild)

    def values(self, block: Block) -> torch.Tensor:
        """v, with the normaliser's ones, [m, B, H, C, W]."""
        return load_with_column(self.v, 1.0, block, self.dtype) if self.spec.normaliser else load(self.v, block, self.dtype)

    def states(self, chunks: int) -> torch.Tensor:
        """Room for the states at the borders of so many chunks, [m + 1, B, H, Dk, W]."""
        return self.v.new_empty((chunks + 1, self.b, self.h, self.dk, self.width), dtype=self.dtype)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[..., X, Y] @ [..., Y, Z] as one batch."""
    found = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return found.view(*a.shape[:-1], b.shape[-1])


def forward(
    v: torch.Tensor, x: Tensors, logs: torch.Tensor, spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the normaliser and the last state.

    Args:
        x: the operands by name.
        logs: log decays [B|1, H|1, T|1, Dk], below a bound at which their sum over a chunk would overflow.
    """
    plan = Plan(v, x, logs, spec)
    out = empty_output(v, spec, layout)
    normaliser = v.new_empty(v.shape[:3] if spec.normaliser else (0,), dtype=plan.dtype)
    final = v.new_zeros((plan.b, plan.h, plan.dk, plan.width), dtype=plan.dtype)
    if "initial" in x:
        final.copy_(x["initial"])
    for block in plan.blocks:
        q, k, values, decays = (
            load(plan.q, block, plan.dtype),
            load(plan.k, block, plan.dtype),
            plan.values(block),
            plan.decays(block),
        )
        states = plan.states(block.chunks)
        states[0] = final
        advance(states, k, values, decays)
        final.copy_(states[-1])
        found = matmul(scores_of(q, k, decays, diagonal_of(q, k, plan, block)), values)
        found += matmul(q * decays.read, states[:-1])
        store(found[..., : v.shape[3]], out, block)
        if spec.normaliser:
            store(found[..., v.shape[3] :], normaliser.unsqueeze(-1), block)
    return out, normaliser, final


def advance(states: torch.Tensor, k: torch.Tensor, values: torch.Tensor, decays: Decays) -> None:
    """Fill states[1:] from states[0]."""
    length, (dk, width) = k.shape[3], states.shape[-2:]
    written = (k * decays.write).view(-1, length, dk)
    torch.bmm(written.mT, values.view(-1, length, width), out=states[1:].view(-1, dk, width))
    chain(states, decays, reverse=False)


def chain(states: torch.Tensor, decays: Decays, *, reverse: bool) -> None:
    """Add to each state, in place, the decayed one before it (in reverse, after it)."""
    order = -1 if reverse else 1
    ordered = states.unbind(0)[::order]
    factors = decays.whole.expand(len(ordered) - 1, *decays.whole.shape[1:]).unbind(0)[::order]
    for entering, state, factor in zip(ordered, ordered[1:], factors, strict=False):
        state.addcmul_(entering, factor)


def diagonal_of(q: torch.Tensor, k: torch.Tensor, plan: Plan, block: Block) -> torch.Tensor:
    """A_ii: [m, B, H, C]."""
    if plan.spec.read == "after":
        return (q * k).sum(-1)
    if plan.bonus is None:
        return q.new_zeros(q.shape[:-1])
    return (load(plan.bonus, block, plan.dtype).mul_(q).mul_(k)).sum(-1)


def scores_of(q: torch.Tensor, k: torch.Tensor, decays: Decays, diagonal: torch.Tensor) -> torch.Tensor:
    """A: [m, B, H, C, C]."""
    scores = q.new_zeros((*q.shape[:4], q.shape[3]))
    for level in decays.levels:
        found = matmul(level.of_rows(q) * level.rows, (level.of_columns(k) * level.columns).mT)
        level.of_pairs(scores).copy_(found if level.halves else found.tril_(-1))
    scores.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return scores

"""Gradients of `recurrence_keys`, chunk by chunk from the last to the first.

With S the state at a chunk's start and dS' the gradient of that at its end:

    dA = dO V^T       dV = A^T dO + (k * exp(G_C - G)) dS'        dS = exp(G_C) dS' + (q * exp G)^T dO
    dq = dO S^T * exp G + its share of dA                         dk = V dS'^T * exp(G_C - G) + its share of dA

where the shares come level by level, as A was made. The log decay of step t stands in the pairs (i, j) of A with j < t <= i, in
all reads of S from t on, in all writes into S' before t, and in S itself on its way to S'. Its gradient adds these up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec

from .recurrence_blocks import Block, earlier_sum, later_sum, load, load_with_column, store
from .recurrence_keys import Level, Plan, advance, chain, diagonal_of, matmul, scores_of

Tensors = Mapping[str, torch.Tensor]

_MILD = 8.0
"""Halvings in a block that is not halved: its gradient of a log decay is a difference of sums, which must not be far larger than
it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Room for gradients, in the dtype of the computation: [B, H, T, D] each."""

    v: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    logs: torch.Tensor
    bonus: torch.Tensor | None


def backward(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, logs: torch.Tensor, spec: RecurrenceSpec,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The gradients of v, q, k, `logs` [B, H, T, Dk], bonus [B, H, T, Dk] and initial, by name, in the dtype of the computation."""
    plan = Plan(v, x, logs, spec)
    keys = (plan.b, plan.h, plan.t, plan.dk)
    new = lambda shape: v.new_empty(shape, dtype=plan.dtype)  # noqa: E731
    found = Found(v=new(v.shape), q=new(keys), k=new(keys), logs=new(keys), bonus=None if plan.bonus is None else new(keys))
    later = v.new_zeros((plan.b, plan.h, plan.dk, plan.width), dtype=plan.dtype)
    if grad_final is not None:
        later.copy_(grad_final)
    whole = v.new_zeros(()).expand(v.shape) if grad is None else grad
    for block, states in zip(reversed(plan.blocks), reversed(_borders(plan, x.get("initial"))), strict=True):
        if spec.normaliser:
            d_out = load_with_column(whole, 0.0 if grad_normaliser is None else grad_normaliser, block, plan.dtype)
        else:
            d_out = load(whole, block, plan.dtype)
        later = _backward_block(d_out, later, states, plan, block, found)
    shared = lambda g: g if plan.heads == plan.h else g.unflatten(1, (plan.heads, -1)).sum(2)  # noqa: E731
    named = {"v": found.v, "q": shared(found.q), "k": shared(found.k), "logs": found.logs}
    bonus = {} if found.bonus is None else {"bonus": found.bonus}
    return named | bonus | ({"initial": later.clone()} if "initial" in x else {})


def _borders(plan: Plan, initial: torch.Tensor | None) -> list[torch.Tensor]:
    """The states at the borders of each block's chunks, [m + 1, B, H, Dk, W]."""
    borders: list[torch.Tensor] = []
    for block in plan.blocks:
        states = plan.states(block.chunks)
        states[0] = borders[-1][-1] if borders else 0.0 if initial is None else initial
        advance(states, load(plan.k, block, plan.dtype), plan.values(block), plan.decays(block))
        borders.append(states)
    return borders


def _backward_block(
    d_out: torch.Tensor, later: torch.Tensor, states: torch.Tensor, plan: Plan, block: Block, found: Found
) -> torch.Tensor:
    """Write one block's gradients; returns that of the state at its start."""
    q, k, values = load(plan.q, block, plan.dtype), load(plan.k, block, plan.dtype), plan.values(block)
    decays = plan.decays(block, mild=_MILD)
    d_states = torch.empty_like(states)
    d_states[:-1] = matmul((q * decays.read).mT, d_out)
    d_states[-1] = later
    chain(d_states, decays, reverse=True)
    starts, ends = states[:-1], d_states[1:]
    dv = matmul(scores_of(q, k, decays, diagonal_of(q, k, plan, block)).mT, d_out).add_(matmul(k * decays.write, ends))
    store(dv[..., : plan.v.shape[3]], found.v, block)
    dq, dk = matmul(d_out, starts.mT).mul_(decays.read), matmul(values, ends.mT).mul_(decays.write)
    through = (ends * starts).sum(-1, keepdim=True).mul_(decays.whole)  # [m, B, H, Dk, 1]
    inclusive = plan.spec.read == "after"
    d_logs = later_sum(q * dq, inclusive=inclusive).add_(earlier_sum(k * dk)).add_(through.mT)
    d_scores = matmul(d_out, values.mT)
    for level in decays.levels:
        backward_level(level, d_scores, q, k, dq, dk, d_logs, inclusive)
    weight = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    if inclusive:
        dq.addcmul_(weight, k)
        dk.addcmul_(weight, q)
    elif plan.bonus is not None and found.bonus is not None:
        bonus = load(plan.bonus, block, plan.dtype) * weight
        dq.addcmul_(bonus, k)
        dk.addcmul_(bonus, q)
        store((q * k).mul_(weight), found.bonus, block)
    for gradient, target in ((dq, found.q), (dk, found.k), (d_logs, found.logs)):
        store(gradient, target, block)
    return d_states[0]


def backward_level(
    level: Level, d_scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, d_logs: torch.Tensor, inclusive: bool,
) -> None:  # fmt: skip
    """Add what the pairs of one level give to dq, dk and d_logs."""
    rows, columns, pairs = level.of_rows(q), level.of_columns(k), level.of_pairs(d_scores)
    pairs = pairs.contiguous() if level.halves else pairs.tril(-1)
    d_rows = matmul(pairs, columns * level.columns).mul_(level.rows)
    d_columns = matmul(pairs.mT, rows * level.rows).mul_(level.columns)
    level.of_rows(dq).add_(d_rows)
    level.of_columns(dk).add_(d_columns)
    d_rows.mul_(rows)
    d_columns.mul_(columns)
    if level.halves:
        level.of_rows(d_logs).add_(later_sum(d_rows, inclusive=inclusive))
        level.of_columns(d_logs).add_(earlier_sum(d_columns))
        return
    # The pairs that t lies between are those of a row from t on, less those of a column from t on.
    between = later_sum(d_rows - d_columns, inclusive=True)
    level.of_rows(d_logs).add_(between if inclusive else between.sub_(d_rows))

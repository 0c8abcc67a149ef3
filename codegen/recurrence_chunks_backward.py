"""Gradients of `recurrence_chunks`, chunk by chunk from the last to the first.

With M = (q k^T) * D, S the state at a chunk's start and dS' the gradient of that at its end:

    dM = dO V^T       dV = M^T dO + exp(G_C - G) (k dS')          dS = exp(G_C) dS' + q^T (exp(G) dO)
    dq = (dM * D) k + exp(G) (dO S^T)                             dk = (dM * D)^T q + exp(G_C - G) (V dS'^T)

The log decay of step t stands in the pairs (i, j) of M with j < t <= i, in all reads of S from t on, in all writes into S' before
t, and in S itself on its way to S'. Its gradient adds these up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec

from .recurrence_blocks import Block, between, earlier_sum, later_sum, load, load_with_column, store
from .recurrence_chunks import Decays, Loaded, Plan, advance, chain, scores_of, weighted, with_bonus

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Room for gradients, in the dtype of the computation: [B, H or Hk, T, D] each."""

    v: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    logs: torch.Tensor | None
    bonus: torch.Tensor | None

    @classmethod
    def of(cls, plan: Plan) -> Found:
        new = lambda *shape: plan.v.new_empty(shape, dtype=plan.dtype)  # noqa: E731
        return cls(
            v=new(*plan.v.shape),
            q=new(*plan.q.shape),
            k=new(*plan.k.shape),
            logs=None if plan.logs is None else new(*plan.v.shape[:3], 1),
            bonus=None if plan.bonus is None else new(plan.b, plan.h, plan.t, plan.dk),
        )

    def named(self) -> dict[str, torch.Tensor]:
        """Those that there are."""
        fields = {"v": self.v, "q": self.q, "k": self.k, "logs": self.logs, "bonus": self.bonus}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


@dataclass(frozen=True, kw_only=True)
class Borders:
    """The states at the borders of a block's chunks and their gradients, [m + 1, B, Hk, Dk, g, W]."""

    states: torch.Tensor
    d_states: torch.Tensor


def backward(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, logs: torch.Tensor | None, spec: RecurrenceSpec,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The gradients of v, q, k, `logs` [B, H, T, 1], bonus [B, H, T, Dk] and initial, by name, in the dtype of the computation."""
    plan = Plan(v, x, logs, spec)
    found, borders = Found.of(plan), _borders(plan, x.get("initial"))
    later = v.new_zeros((plan.b, plan.heads, plan.dk, plan.group, plan.width), dtype=plan.dtype)
    if grad_final is not None:
        later.copy_(plan.split(grad_final))
    whole = v.new_zeros(()).expand(v.shape) if grad is None else grad
    for block, states in zip(reversed(plan.blocks), reversed(borders), strict=True):
        if spec.normaliser:
            d_out = load_with_column(whole, 0.0 if grad_normaliser is None else grad_normaliser, block, plan.dtype)
        else:
            d_out = load(whole, block, plan.dtype)
        later = _backward_block(d_out.unflatten(2, (plan.heads, plan.group)), later, states, plan, block, found)
    initial = {"initial": later.transpose(2, 3).flatten(1, 2)} if "initial" in x else {}
    return found.named() | initial


def _borders(plan: Plan, initial: torch.Tensor | None) -> list[torch.Tensor]:
    """The states at the borders of each block's chunks, [m + 1, B, Hk, Dk, g, W]."""
    borders: list[torch.Tensor] = []
    for block in plan.blocks:
        states = plan.states(block.chunks)
        states[0] = borders[-1][-1] if borders else 0.0 if initial is None else plan.split(initial)
        advance(states, load(plan.k, block, plan.dtype), plan.values(block), plan.decays(block), plan)
        borders.append(states)
    return borders


def _backward_block(
    d_out: torch.Tensor, later: torch.Tensor, states: torch.Tensor, plan: Plan, block: Block, found: Found
) -> torch.Tensor:
    """Write one block's gradients; returns that of the state at its start."""
    x = plan.loaded(block)
    read_grad = plan.joined(d_out if x.decays is None else d_out * x.decays.read)  # exp(G) dO
    written = plan.joined(x.values if x.decays is None else x.values * x.decays.write)  # exp(G_C - G) V
    borders = Borders(states=states, d_states=torch.empty_like(states))
    torch.bmm(plan.matrices(x.q).mT, read_grad, out=plan.columns(borders.d_states[:-1]))
    borders.d_states[-1] = later
    chain(borders.d_states, x.decays, reverse=True)
    d_pairs, scores = _d_pairs(d_out, x, plan), scores_of(x, plan)
    from_states = torch.bmm(read_grad, plan.columns(states[:-1]).mT)  # [m B Hk, C, Dk]
    _queries_and_keys(d_pairs, from_states, written, borders, x, plan, block, found)
    to_ends = plan.parted(torch.bmm(plan.matrices(x.k), plan.columns(borders.d_states[1:])))  # k dS'
    if x.decays is not None and found.logs is not None:
        reads = _reads(from_states, read_grad, borders, x, plan)
        writes = (plan.parted(written) * to_ends).sum(-1, keepdim=True)
        inclusive = plan.offset == 1
        d_logs = between(d_pairs.mul_(scores), inclusive=inclusive) + later_sum(reads, inclusive=inclusive) + earlier_sum(writes)
        store((d_logs + _through(borders, x.decays)).flatten(2, 3), found.logs, block)
        to_ends = to_ends * x.decays.write
    dv = weighted(with_bonus(scores, x, plan).mT, d_out, plan).add_(to_ends)
    store(dv[..., : found.v.shape[3]].flatten(2, 3), found.v, block)
    return borders.d_states[0]


def _d_pairs(d_out: torch.Tensor, x: Loaded, plan: Plan) -> torch.Tensor:
    """dO V^T: [m, B, Hk, g, C, C]; where the heads of a group have equal scores, their sum [m, B, Hk, 1, C, C]."""
    side_by_side = (lambda t: plan.matrices(t)) if plan.per_head else plan.joined
    found = torch.bmm(side_by_side(d_out), side_by_side(x.values).mT)
    return found.view(*x.q.shape[:3], -1, *found.shape[1:])


def _queries_and_keys(
    d_pairs: torch.Tensor, from_states: torch.Tensor, written: torch.Tensor,
    borders: Borders, x: Loaded, plan: Plan, block: Block, found: Found,
) -> None:  # fmt: skip
    """dq, dk and that of the bonus."""
    d_products = d_pairs.tril(plan.offset - 1) if x.decays is None else d_pairs * x.decays.pairs
    d_products = plan.matrices(d_products.sum(3))
    dq = torch.baddbmm(from_states, d_products, plan.matrices(x.k)).view(x.q.shape)
    dk = torch.bmm(written, plan.columns(borders.d_states[1:]).mT).baddbmm_(d_products.mT, plan.matrices(x.q)).view(x.k.shape)
    if x.bonus is not None and found.bonus is not None:
        weight = d_pairs.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        shared = (weight * x.bonus).sum(3)
        dq.addcmul_(shared, x.k)
        dk.addcmul_(shared, x.q)
        store((weight * (x.q * x.k).unsqueeze(3)).flatten(2, 3), found.bonus, block)
    store(dq, found.q, block)
    store(dk, found.k, block)


def _reads(from_states: torch.Tensor, read_grad: torch.Tensor, borders: Borders, x: Loaded, plan: Plan) -> torch.Tensor:
    """What each step read of the chunk's first state, times its gradient: [m, B, Hk, g, C, 1]."""
    if plan.group == 1:
        return (from_states * plan.matrices(x.q)).sum(-1).view(*x.q.shape[:3], 1, -1, 1)
    read = torch.bmm(plan.matrices(x.q), plan.columns(borders.states[:-1]))
    return (plan.parted(read_grad) * plan.parted(read)).sum(-1, keepdim=True)


def _through(borders: Borders, decays: Decays) -> torch.Tensor:
    """What of each chunk's first state reached its last, times its gradient: [m, B, Hk, g, 1, 1]."""
    return ((borders.d_states[1:] * borders.states[:-1]).sum((3, 5), keepdim=True) * decays.whole).transpose(3, 4)

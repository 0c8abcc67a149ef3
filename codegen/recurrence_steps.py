"""Recurrences of matrix states step by step: any decay, in particular one for each element.

A block of steps at a time, so that its states [t, B, H, Dk, Dv] stay in a core's cache and memory never holds those of all steps:
decays and writes k v^T of the block are two operations, each step is one, and what q reads is one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output, state_shape

from .recurrence_scan import factors_of, scan_

Tensors = Mapping[str, torch.Tensor]

_STATES = 1 << 18
"""Elements of a block's states; a few such tensors stay in a core's cache."""


@dataclass(kw_only=True)
class Steps:
    """The operands, time first, and how they are cut into blocks."""

    v: torch.Tensor
    x: Tensors
    spec: RecurrenceSpec

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.v.dtype, torch.float32)
        self.shape = state_shape(self.v, self.x, self.spec)
        self.steps = self.v.shape[2]
        size = max(1, _STATES // max(1, math.prod(self.shape)))
        self.spans = [slice(first, min(first + size, self.steps)) for first in range(0, self.steps, size)]
        whole = {"v": self.v, **{name: tensor for name, tensor in self.x.items() if name != "initial"}}
        self.time = {name: time_first(tensor, self.shape[1]) for name, tensor in whole.items()}

    def part(self, name: str, span: slice) -> torch.Tensor:
        """An operand's steps, [t|1, ...], contiguous and in the dtype of the computation."""
        tensor = self.time[name]
        return (tensor if tensor.shape[0] == 1 else tensor[span]).to(self.dtype).contiguous()

    def values(self, span: slice) -> torch.Tensor:
        """v, with the normaliser's ones: [t, B, H, W]."""
        values = self.part("v", span)
        return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1) if self.spec.normaliser else values

    def factors(self, span: slice) -> torch.Tensor:
        """The decays, [t|1, B|1, H|1, Dk|1, W|1]."""
        if "gate" not in self.x:
            return self.v.new_ones((1, 1, 1, 1, 1), dtype=self.dtype)
        return factors_of(self.part("gate", span), self.part("rate", span) if "rate" in self.x else None)

    def start(self) -> torch.Tensor:
        """The state before the first step, a new tensor."""
        state = self.v.new_zeros(self.shape, dtype=self.dtype)
        return state.copy_(self.x["initial"]) if "initial" in self.x else state

    def advance(self, entry: torch.Tensor, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The states before, between and after the steps, [t + 1, B, H, Dk, W], and the decays."""
        states = self.room(span)
        states[0] = entry
        torch.mul(self.part("k", span).unsqueeze(-1), self.values(span).unsqueeze(-2), out=states[1:])
        factors = self.factors(span)
        scan_(states[1:], factors, states[0])
        return states, factors

    def room(self, span: slice) -> torch.Tensor:
        """For the states of `advance`, or their gradients."""
        return self.v.new_empty((span.stop - span.start + 1, *self.shape), dtype=self.dtype)

    def seen(self, states: torch.Tensor) -> torch.Tensor:
        """Those of `advance` that are read."""
        return states[1:] if self.spec.read == "after" else states[:-1]


def time_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, H, T, ...] as [T, B, H, ...], a view if its columns are neighbours; shared heads are repeated."""
    if x.shape[1] not in (1, heads):
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    steps = x.movedim(2, 0)
    return steps if steps.stride(-1) == 1 else steps.contiguous()


def forward(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the normaliser and the last state."""
    plan = Steps(v=v, x=x, spec=spec)
    out = empty_output(v, spec, layout)
    normaliser = v.new_empty(v.shape[:3] if spec.normaliser else (0,), dtype=plan.dtype)
    targets, final = out.movedim(2, 0), plan.start()
    for span in plan.spans:
        states, _ = plan.advance(final, span)
        final.copy_(states[-1])
        found = _read(states, span, plan)
        targets[span] = found[..., : v.shape[3]]
        if spec.normaliser:
            normaliser.movedim(2, 0)[span] = found[..., -1]
    return out, normaliser, final


def _read(states: torch.Tensor, span: slice, plan: Steps) -> torch.Tensor:
    """What q reads in each step, [t, B, H, W]."""
    seen = plan.seen(states)
    q = plan.part("q", span).expand(*seen.shape[:3], -1)
    found = _product(q.unsqueeze(-2), seen).squeeze(-2)
    if "bonus" in plan.x:
        weight = (q * plan.part("bonus", span) * plan.part("k", span)).sum(-1, keepdim=True)
        found.addcmul_(weight, plan.values(span))
    return found


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for [t, B, H, ., .]."""
    found = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return found.view(*b.shape[:3], *found.shape[-2:])


# -------------------------------------------------------------------- gradients


class Sum:
    """The gradient of an operand that may be the same for many steps, heads or elements of the state.

    Args:
        like: the operand, [B, H, T, ...], with dimensions of size 1.
        shared: the heads of q or k, which groups of heads share.
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype, *, shared: int | None = None) -> None:
        self.whole = torch.zeros(like.shape, dtype=dtype, device=like.device)
        self.target, self.shared = self.whole.movedim(2, 0), shared

    def add(self, part: torch.Tensor, span: slice) -> None:
        """Take the gradient [t, B, H, ...] of the steps of `span`."""
        if self.shared is not None:
            part = part.unflatten(2, (self.shared, -1)).sum(3)
        self._at(span).add_(part.sum_to_size((min(part.shape[0], self.target.shape[0]), *self.target.shape[1:])))

    def add_product(self, a: torch.Tensor, b: torch.Tensor, span: slice) -> None:
        """Take the gradient a * b: where it is summed over few rows or steps, without forming it."""
        at = self._at(span)
        full = torch.broadcast_shapes(a.shape, b.shape)
        summed = [dim for dim in range(5) if at.shape[dim] != full[dim]]
        if len(summed) != 1:
            self.add(a * b, span)
            return
        total = torch.zeros_like(at.select(summed[0], 0))
        for x, y in zip(a.expand(full).unbind(summed[0]), b.expand(full).unbind(summed[0]), strict=True):
            total.addcmul_(x, y)
        at.select(summed[0], 0).add_(total)

    def _at(self, span: slice) -> torch.Tensor:
        return self.target if self.target.shape[0] == 1 else self.target[span]


def backward(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, spec: RecurrenceSpec,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The gradients of v and of the operands, by name, in the dtype of the computation."""
    plan = Steps(v=v, x=x, spec=spec)
    sums = {"v": Sum(v, plan.dtype)}
    sums |= {n: Sum(t, plan.dtype, shared=t.shape[1] if n in "qk" else None) for n, t in x.items() if n != "initial"}
    later = v.new_zeros(plan.shape, dtype=plan.dtype)
    if grad_final is not None:
        later.copy_(grad_final)
    for span, entry in zip(reversed(plan.spans), reversed(_entries(plan)), strict=True):
        states, factors = plan.advance(entry, span)
        d_out = _output_gradients(grad, grad_normaliser, span, plan)
        d_states = _own_gradients(d_out, later, span, plan)
        scan_(d_states[:-1], factors, d_states[-1], reverse=True)
        later = d_states[0].clone()
        _distribute(states, d_states[1:], factors, d_out, span, plan, sums)
    return {name: total.whole for name, total in sums.items()} | ({"initial": later} if "initial" in x else {})


def _entries(plan: Steps) -> list[torch.Tensor]:
    """The state at the start of each block."""
    entries = [plan.start()] if plan.spans else []
    for span in plan.spans[:-1]:
        entries.append(plan.advance(entries[-1], span)[0][-1].clone())
    return entries


def _output_gradients(grad: torch.Tensor | None, normaliser: torch.Tensor | None, span: slice, plan: Steps) -> torch.Tensor:
    """Those of what is read, [t, B, H, W]."""
    b, h, _, d = plan.v.shape
    whole = plan.v.new_zeros((span.stop - span.start, b, h, d + plan.spec.normaliser), dtype=plan.dtype)
    if grad is not None:
        whole[..., :d] = grad.movedim(2, 0)[span]
    if normaliser is not None:
        whole[..., -1] = normaliser.movedim(2, 0)[span]
    return whole


def _own_gradients(d_out: torch.Tensor, later: torch.Tensor, span: slice, plan: Steps) -> torch.Tensor:
    """What each state receives from its own reading; the last one that of all later steps too."""
    d_states = plan.room(span)
    torch.mul(plan.part("q", span).unsqueeze(-1), d_out.unsqueeze(-2), out=plan.seen(d_states))
    if plan.spec.read == "after":
        d_states[0] = 0
        d_states[-1] += later
    else:
        d_states[-1] = later
    return d_states


def _distribute(
    states: torch.Tensor,
    after: torch.Tensor,
    factors: torch.Tensor,
    d_out: torch.Tensor,
    span: slice,
    plan: Steps,
    sums: dict[str, Sum],
) -> None:
    """From the gradients `after` of the states after each step, which are used up, to those of the operands."""
    q, k, values = plan.part("q", span), plan.part("k", span), plan.values(span)
    dv = _product(k.expand(*after.shape[:3], -1).unsqueeze(-2), after).squeeze(-2)
    products = plan.seen(states) * d_out.unsqueeze(-2)
    dq = products.sum(-1)  # sums in pairs, as a product of matrices may not
    dk = torch.mul(after, values.unsqueeze(-2), out=products).sum(-1)
    if "bonus" in plan.x:
        bonus, weight = plan.part("bonus", span), (d_out * values).sum(-1, keepdim=True)
        dv.addcmul_((q * bonus * k).sum(-1, keepdim=True), d_out)
        dq.addcmul_(weight * bonus, k)
        dk.addcmul_(weight * bonus, q)
        sums["bonus"].add(weight * q * k, span)
    sums["q"].add(dq, span)
    sums["k"].add(dk, span)
    sums["v"].add(dv[..., : plan.v.shape[3]], span)
    if "gate" not in plan.x:
        return
    change = after.mul_(states[:-1]).mul_(factors)  # of the log decays
    if "rate" not in plan.x:
        sums["gate"].add(change, span)
        return
    sums["gate"].add_product(change, plan.part("rate", span), span)
    sums["rate"].add_product(change, plan.part("gate", span), span)

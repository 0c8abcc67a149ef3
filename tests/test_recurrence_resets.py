"""Documents packed into one sequence: recurrences whose state starts anew within it, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from .vocabulary import assert_all_rewritten, assert_refused, assert_within_contract

B, H, T, D, V = 2, 2, 16, 4, 5
STARTS = ((0, 5, 6, 11), (0, 9))
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(*, grad: bool = True) -> list[Tensor]:
    """q, k [B, H, T, D], v [B, H, T, V], log-decays [B, H, T], and starts of documents [B, T]."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in ((B, H, T, D), (B, H, T, D), (B, H, T, V), (B, H, T))]
    start = torch.zeros(B, T, dtype=torch.bool)
    for b, own in enumerate(STARTS):
        start[b, list(own)] = True
    q, k, v, g = (x.requires_grad_(grad) for x in (*made[:3], F.logsigmoid(made[3])))
    return [q, k, v, g, start]


def in_a_loop(step: Callable[[Tensor, Tensor, Tensor], Tensor], prepare: Callable[[Tensor, Tensor], Tensor] | None = None) -> Form:
    """`step(state, decay, start)` is what a step keeps; decay [B, H, 1, 1], start [B, 1, 1, 1]."""

    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> Tensor:
        decay = g.exp() if prepare is None else prepare(g, start)
        state, out = q.new_zeros(B, H, D, V), []
        for t in range(T):
            kept = step(state, decay[:, :, t, None, None], start[:, t, None, None, None])
            state = kept + k[:, :, t, :, None] * v[:, :, t, None, :]
            out.append((q[:, :, t, None, :] @ state).squeeze(-2))
        return torch.stack(out, 2)

    return f


def position_ids(start: Tensor) -> Tensor:
    i = torch.arange(T)
    return i - torch.where(start, i, 0).cummax(-1).values


def segment_sums(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> Tensor:
    gate = g.masked_fill(start[:, None], -math.inf)
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    sums = gate[..., None].expand(B, H, T, T).masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    return (q @ k.mT * sums.masked_fill(~lower, -math.inf).exp()) @ v


FORMS: dict[str, Form] = {
    "where": in_a_loop(lambda s, a, start: torch.where(start, 0.0, a * s)),
    "masked_fill": in_a_loop(lambda s, a, start: a * s.masked_fill(start, 0.0)),
    "1 - start": in_a_loop(lambda s, a, start: a * (1 - start.to(s.dtype)) * s),
    "position ids": in_a_loop(lambda s, a, _: a * s, lambda g, start: g.exp() * (position_ids(start) != 0)[:, None]),
    "gate of -inf": in_a_loop(lambda s, a, _: a * s, lambda g, start: g.masked_fill(start[:, None], -math.inf).exp()),
    "segment sums": segment_sums,
}


@pytest.mark.parametrize("name", FORMS)
def test_state_starts_anew(name: str) -> None:
    compiled = assert_within_contract(FORMS[name], *inputs())
    assert_all_rewritten(compiled, "recurrence", operands=("q", "k", "gate"), decay="head")


def test_documents_do_not_see_each_other() -> None:
    q, k, v, g, start = inputs(grad=False)
    compiled = assert_within_contract(FORMS["where"], q, k, v, g, start, grad=False)
    before = compiled(q, k, v, g, start)
    changed = v.clone()
    changed[0, :, :5] += 100.0
    after = compiled(q, k, changed, g, start)
    assert torch.equal(before[0, :, 5:], after[0, :, 5:]) and not torch.equal(before[0, :, :5], after[0, :, :5])


def test_scan_starts_anew() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> Tensor:
        def step(state: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v, g, start = x
            kept = torch.where(start[:, None, None, None], 0.0, g.exp()[:, :, None, None] * state)
            state = kept + k[..., :, None] * v[..., None, :]
            return state, (q[..., None] * state).sum(-2)

        steps = (*(x.movedim(2, 0) for x in (q, k, v, g)), start.movedim(1, 0))
        return scan(step, q.new_zeros(B, H, D, V), steps)[1].movedim(0, 2)

    compiled = assert_within_contract(f, *inputs(grad=False), grad=False)
    assert_all_rewritten(compiled, "recurrence", decay="head")


@pytest.mark.parametrize("causal_first", [True, False])
def test_equal_documents_may_stand_apart(causal_first: bool) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor, document: Tensor) -> Tensor:
        total = g.cumsum(-1)
        lower = torch.ones(T, T, dtype=torch.bool).tril()
        same = document[:, None, :, None] == document[:, None, None, :]
        differences = total[..., :, None] - total[..., None, :]
        if causal_first:
            weights = differences.masked_fill(~lower, -math.inf).exp() * same
        else:
            weights = torch.where(lower & same, differences, -math.inf).exp()
        return (q @ k.mT * weights) @ v

    *operands, start = inputs()
    document = start.long().cumsum(-1) % 2  # the third document has the number of the first
    assert_within_contract(f, *operands, document)
    assert_refused(f, *operands, document, why="not known to stand side by side", step="mask", family="recurrence")

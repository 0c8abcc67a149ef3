"""Gated slot attention: a recurrence whose softmax weights read a second one, from a loop and from a scan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from .vocabulary import Compiled, assert_all_rewritten, assert_within_contract

B, H, T, D, V, SLOTS = 2, 2, 12, 4, 5, 6
States = tuple[Tensor, Tensor]


def inputs(*, grad: bool) -> list[Tensor]:
    """q, k [B, H, T, D], v [B, H, T, V], what is written to slots and their log-decays [B, H, T, SLOTS]."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(B, H, T, n, generator=generator) for n in (D, D, V, SLOTS, SLOTS)]
    return [x.requires_grad_(grad) for x in (*made[:4], F.logsigmoid(made[4]))]


def step(states: States, x: tuple[Tensor, ...]) -> tuple[States, Tensor]:
    keys, values = states
    q, k, v, s, g = x
    decay = g.exp()
    keys = decay[..., None, :] * keys + k[..., :, None] * s[..., None, :]
    weights = (q[..., :, None] * keys).sum(-2).softmax(-1)
    values = decay[..., :, None] * values + s[..., :, None] * v[..., None, :]
    return (keys, values), (weights[..., :, None] * values).sum(-2)


def empty(x: Tensor) -> States:
    return x.new_zeros(B, H, D, SLOTS), x.new_zeros(B, H, SLOTS, V)


def assert_two_passes(compiled: Compiled) -> None:
    assert_all_rewritten(compiled, "recurrence")
    assert [d.spec["decay"] for d in compiled.decisions("recurrence")] == ["value", "key"]


def test_loop() -> None:
    def f(*x: Tensor) -> Tensor:
        states, out = empty(x[0]), []
        for t in range(T):
            states, o = step(states, tuple(y[:, :, t] for y in x))
            out.append(o)
        return torch.stack(out, 2)

    assert_two_passes(assert_within_contract(f, *inputs(grad=True)))


def test_scan() -> None:
    def f(*x: Tensor) -> Tensor:
        return scan(step, empty(x[0]), tuple(y.movedim(2, 0) for y in x))[1].movedim(0, 2)

    assert_two_passes(assert_within_contract(f, *inputs(grad=False), grad=False))

"""x_t = x_t + a_t * x_{t-1} along the first dimension, in place, with plain ATen; and the factors a.

One operation a step is best for many lanes. For few lanes what a call costs prevails: the steps are cut into blocks of equal
length, and each operation does one step of all blocks. From zero, a block yields its last state E and the product P of its
factors; x = E + P * (x before) runs over the blocks alone, and a second pass over all blocks at once replays them from their true
entries.
"""

from __future__ import annotations

import math

import torch

from .recurrence_blocks import LOG2_E

_FEW_LANES = 3072
_MANY_STEPS = 48


_MILD = 8.0
"""A log decay whose rounding, after multiplication by log2(e), is within that of the exponential."""


def factors_of(gate: torch.Tensor, rate: torch.Tensor | None = None) -> torch.Tensor:
    """exp(gate * rate), a new tensor.

    exp2 in float32 is the fastest exponential, but its argument's rounding grows with the argument: it serves mild decays, and a
    product, which has been rounded already.
    """
    if rate is not None:
        return (gate * (rate * LOG2_E)).exp2_()
    if gate.dtype == torch.float32 and gate.numel() and max(abs(float(bound)) for bound in gate.aminmax()) < _MILD:
        return (gate * LOG2_E).exp2_()
    return (gate.double() * LOG2_E).exp2_().to(gate.dtype)


def scan_(x: torch.Tensor, factors: torch.Tensor, entering: torch.Tensor, *, reverse: bool = False) -> None:
    """Turn increments into states.

    Args:
        x: [T, ...], overwritten.
        factors: [T, ...], broadcasts to `x`.
        entering: [...], the state before the first step; in reverse, that after the last.
        reverse: x_t = x_t + a_t * x_{t+1}.
    """
    steps = x.shape[0]
    lanes = math.prod(x.shape[1:])
    whole = 0
    if steps >= _MANY_STEPS and lanes <= _FEW_LANES:
        length = max(8, math.isqrt(steps // 3))
        whole = steps - steps % length
        split = slice(0, whole) if not reverse else slice(steps - whole, steps)
        if not _replay(x[split], factors.expand(steps, *factors.shape[1:])[split], entering, length, reverse):
            whole = 0
    if whole == steps:
        return
    rest = slice(whole, steps) if not reverse else slice(0, steps - whole)
    if whole:
        entering = x[whole - 1] if not reverse else x[steps - whole]
    pairs = list(zip(x[rest].unbind(0), factors.expand(steps, *factors.shape[1:])[rest].unbind(0), strict=True))
    for state, factor in reversed(pairs) if reverse else pairs:
        state.addcmul_(factor, entering)
        entering = state


def _replay(x: torch.Tensor, factors: torch.Tensor, entering: torch.Tensor, length: int, reverse: bool) -> bool:
    """All blocks at once; False, with `x` untouched, where a product of factors is not finite: 0 * inf would be NaN."""
    order = -1 if reverse else 1
    steps = [step.unbind(1) for step in (x.unflatten(0, (-1, length)), factors.unflatten(0, (-1, length)))]
    pairs = list(zip(*steps, strict=True))[::order]
    (first, first_factor), rest = pairs[0], pairs[1:]
    ends, products = first.clone(), first_factor.clone()
    for step, factor in rest:
        torch.addcmul(step, factor, ends, out=ends)
        products.mul_(factor)
    if not products.isfinite().all():
        return False
    before = torch.empty_like(ends)  # the state that enters each block
    entries, borders = before.unbind(0)[::order], list(zip(ends.unbind(0), products.unbind(0), strict=True))[::order]
    for entry, (end, product) in zip(entries, borders, strict=True):
        entry.copy_(entering)
        entering = end.addcmul_(product, entering)
    for step, factor in pairs:
        step.addcmul_(factor, before)
        before = step
    return True

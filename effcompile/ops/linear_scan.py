"""The spellings to which loops, scans and closed forms are brought.

    linear_scan    h_t = coefficient_t * h_{t-1} + offset_t, element by element, along the first dimension
    contract       einsum of two tensors, kept whole

`passes.recurrence` reads every source in them. They have no kernels of their own: a graph that holds one is on its way to
`effcompile::recurrence` and einsum, or back to what it was.
"""

from __future__ import annotations

import torch

from .attention import LIBRARY

LIBRARY.define("linear_scan(Tensor? coefficient, Tensor offset, Tensor? initial) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def linear_scan(coefficient: torch.Tensor | None, offset: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    """All states.

    Args:
        coefficient: broadcastable to [T, *shape], the first dimension T or 1; ones if not given.
        offset: [T, *shape].
        initial: broadcastable to [*shape], the state before the first step; zeros if not given.

    Returns:
        [T, *shape], contiguous, in the dtype of `offset`.
    """
    factors = None if coefficient is None else torch.broadcast_to(coefficient, offset.shape)
    state = torch.zeros_like(offset[0]) if initial is None else initial
    states = torch.empty_like(offset, memory_format=torch.contiguous_format)
    for t in range(offset.shape[0]):
        state = offset[t] + (state if factors is None else factors[t] * state)
        states[t] = state
    return states


@torch.library.register_fake("effcompile::linear_scan", lib=LIBRARY)
def _fake(coefficient: torch.Tensor | None, offset: torch.Tensor, initial: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(offset, memory_format=torch.contiguous_format)


LIBRARY.impl("linear_scan", linear_scan, "CompositeExplicitAutograd")

LIBRARY.define("contract(str equation, Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def contract(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`einsum(equation, a, b)`, which tracing below autograd would take apart into views and a batched product."""
    return torch.einsum(equation, a, b).clone()


@torch.library.register_fake("effcompile::contract", lib=LIBRARY)
def _fake_contract(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.einsum(equation, a, b).clone()


LIBRARY.impl("contract", contract, "CompositeExplicitAutograd")

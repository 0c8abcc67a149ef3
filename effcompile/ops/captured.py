"""Gradients of captured tensors, from those at the places where an expression loads them.

    score = s + table[bucket[i, j], h]      d table[n, h] = sum of d score[b, h, i, j] over all b, i, j with bucket[i, j] = n

What one load gets is a tensor [B, H, TQ, TK], of size 1 in dimensions that are summed already.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
from torch import Tensor

from ..evaluate import Evaluator
from ..terms import Load, Term, derivative, integer_symbol

DIMS = tuple(integer_symbol(name) for name in ("b", "h", "i", "j"))


def loads_that_learn(term: Term, learned: Iterable[str]) -> tuple[Load, ...]:
    """The loads from tensors in `learned` on which a term depends other than by a condition, in the order of its tree."""
    names = set(learned)
    found = dict.fromkeys(part for part in sympy.postorder_traversal(term) if type(part) is Load and part.tensor in names)
    return tuple(load for load in found if slope(term, load) != 0)


def slope(term: Term, load: Load) -> Term:
    """The derivative of a term by one of its loads."""
    element = sympy.Dummy("element", real=True)
    return derivative(term.xreplace({load: element}), element).xreplace({element: load})


def gradient(captured: Tensor, places: Iterable[tuple[Load, Tensor]], evaluator: Evaluator) -> Tensor:
    """The gradient of `captured`, of its shape and dtype, from that of each place where it is loaded; summed in float32.

    Elements that several positions load are added up in a fixed order on a GPU.
    """
    total: Tensor | None = None
    for load, values in places:
        total = _added(total, captured, load, values.float(), evaluator)
    return torch.zeros_like(captured) if total is None else total.to(captured.dtype)


def _added(total: Tensor | None, captured: Tensor, load: Load, values: Tensor, evaluator: Evaluator) -> Tensor:
    """`total[load.indices] += values`."""
    summed = [d for d, symbol in enumerate(DIMS) if values.shape[d] != 1 and not load.has(symbol)]
    values = values.sum(summed, keepdim=True) if summed else values
    kept = _kept(load)
    others = [d for d in range(4) if d not in kept.values()]
    values = values.permute(*others, *kept.values())
    if len(kept) == len(load.indices):
        values = values[(0,) * len(others)]
        if total is None and values.shape == captured.shape:
            return values
    total = torch.zeros_like(captured, dtype=torch.float32) if total is None else total
    gathered = [p for p in range(captured.ndim) if p not in kept]
    window = total.permute(*gathered, *kept) if captured.ndim else total
    for position, extent in enumerate(values.shape[values.ndim - len(kept) :], start=len(gathered)):
        window = window.narrow(position, 0, extent)
    if not gathered:
        window.add_(values)
        return total
    shape = values.shape[: len(others)]
    indices = [evaluator.tensor(load.indices[p], torch.int64) for p in gathered]
    window.index_put_(tuple(_without(index, kept, others).expand(shape) for index in indices), values, accumulate=True)
    return total


def _kept(load: Load) -> dict[int, int]:
    """Dimensions of the tensor that one of b, h, i, j indexes alone, on which no other index depends: to that symbol's position."""
    kept = {}
    for position, index in enumerate(load.indices):
        rest = [other for p, other in enumerate(load.indices) if p != position]
        if index in DIMS and not any(other.has(index) for other in rest):
            kept[position] = DIMS.index(index)
    return kept


def _without(index: Tensor, kept: dict[int, int], others: list[int]) -> Tensor:
    """An index that broadcasts to [B, H, TQ, TK] without the dimensions that it does not depend on."""
    whole = index.reshape((1,) * (4 - index.ndim) + tuple(index.shape))
    return whole.permute(*others, *kept.values())[(..., *(0 for _ in kept))]

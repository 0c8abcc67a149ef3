"""A tensor read at an index over symbols, as views that give it the dimensions of those symbols, in their order.

x[t // S, t % S, r] over (t, r)  ->  flatten(x)          W[e, c, r] over (e, r, c)  ->  transpose(W)
w[k t + s]          over (t, s)  ->  unflatten(w)        W[e, c + f, r]             ->  a slice of it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.ir import Operand
from effcompile.terms import FloorDiv, Modulo, Term
from effcompile.viewmaps import Index, shape_of

aten = torch.ops.aten

_MOST_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Symbols and how far each runs: the dimensions of an operand."""

    symbols: tuple[Term, ...]
    extents: tuple[Term, ...]

    def of(self, symbol: Term) -> Term:
        return self.extents[self.symbols.index(symbol)]


@dataclass(frozen=True)
class _Digit:
    """A dimension that is read at `symbol // stride`, up to `size`."""

    symbol: Term
    stride: Term
    size: Term


def as_view(node: Node, index: Index, axes: Axes, dtype: torch.dtype) -> Operand | None:
    """`node[index]` with a dimension for each symbol, of size 1 where it does not depend on it; None if no view is that."""
    views: list[tuple[Any, tuple[Any, ...]]] = []
    digits: list[_Digit] = []
    for term, size in zip(index, shape_of(node), strict=True):
        if term.is_Integer:
            views.append((aten.select.int, (len(digits), int(term))))
            continue
        found = _split(term, size, axes, len(digits), views)
        if found is None:
            return None
        digits += found
    groups = [_in_order([x for x in digits if x.symbol == s], n) for s, n in zip(axes.symbols, axes.extents, strict=True)]
    if any(group is None for group in groups) or sum(len(g or ()) for g in groups) != len(digits):
        return None
    order = [digits.index(x) for group in groups for x in group or ()]
    if order != sorted(order):
        views.append((aten.permute.default, (order,)))
    shape = []
    for position, group in enumerate(groups):
        assert group is not None
        if not group:
            views.append((aten.unsqueeze.default, (position,)))
        if len(group) > 1:
            views.append((aten.flatten.using_ints, (position, position + len(group) - 1)))
        shape.append(axes.extents[position] if group else sympy.S.One)
    return Operand(base=node, views=tuple(views), shape=tuple(shape), dtype=dtype)


def _split(term: Term, size: Term, axes: Axes, dim: int, views: list[Any]) -> list[_Digit] | None:
    """What a dimension is read at, digit by digit; views that slice it or take it apart are added."""
    digit = _digit(term, size, axes)
    if digit is not None:
        return [digit]
    start, rest = term.as_coeff_Add()
    step, symbol = rest.as_coeff_Mul()
    if symbol in axes.symbols:
        return (
            _sliced(int(start), int(step), symbol, size, axes, dim, views) if start.is_Integer and start >= 0 and step > 0 else None
        )
    return _unflattened(term, size, axes, dim, views)


def _sliced(
    start: int, step: int, symbol: Term, size: Term, axes: Axes, dim: int, views: list[Any]
) -> list[_Digit] | None:  # fmt: skip
    count = axes.of(symbol)
    if not (count.is_Integer and size.is_Integer):
        return None
    end = start + step * (int(count) - 1) + 1
    if end > size:
        return None
    views.append((aten.slice.Tensor, (dim, start, end, step)))
    return [_Digit(symbol, sympy.S.One, count)]


def _unflattened(term: Term, size: Term, axes: Axes, dim: int, views: list[Any]) -> list[_Digit] | None:
    """`n x + y` with y < n."""
    used = [s for s in axes.symbols if term.has(s)]
    for high, low in permutations(used, 2) if len(used) == 2 else ():
        n, m = axes.of(low), axes.of(high)
        if sympy.expand(term - high * n - low) == 0 and sympy.expand(n * m - size) == 0:
            if not (n.is_Integer or m.is_Integer):
                return None
            views.append((aten.unflatten.int, (dim, [-1 if not x.is_Integer else int(x) for x in (m, n)])))
            return [_Digit(high, sympy.S.One, m), _Digit(low, sympy.S.One, n)]
    return None


def _digit(term: Term, size: Term, axes: Axes) -> _Digit | None:
    stride: Term = sympy.S.One
    inner = term.args[0] if isinstance(term, Modulo) and sympy.expand(term.args[1] - size) == 0 else term
    if isinstance(inner, FloorDiv):
        inner, stride = inner.args
    if inner not in axes.symbols:
        return None
    whole = not isinstance(term, Modulo) and stride == 1
    return None if whole and sympy.expand(axes.of(inner) - size) != 0 else _Digit(inner, stride, size)


def _in_order(digits: Sequence[_Digit], extent: Term) -> list[_Digit] | None:
    """The digits from the highest to the lowest, if they are all of a symbol's; None if they are not."""
    if not digits:
        return []
    for order in permutations(digits) if len(digits) <= _MOST_DIGITS else ():
        stride: Term = sympy.S.One
        right = True
        for x in reversed(order):
            right = right and sympy.expand(x.stride - stride) == 0
            stride = stride * x.size
        if right and sympy.expand(stride - extent) == 0:
            return list(order)
    return None

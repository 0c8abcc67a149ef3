"""Finds the tensor behind an operand: backwards through views, expansions, casts and constant factors, to the last node whose
dimensions are the operation's own.

    K = reshape(expand(unsqueeze(k)))  read at (b, h, j, d)   is   k  read at (b, h // group, j, d)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .expr import Interpreter
from .ir import Operand
from .pattern import CASTS
from .ranges import Ranges
from .terms import FloorDiv, Term, number
from .viewmaps import Index, shape_of, view_source

aten = torch.ops.aten

_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """An operand's tensor: `factor * node[index]`, with each dimension of `node` indexed by one role, or by a number."""

    node: Node
    index: Index
    factor: Term
    group: int


def trace(
    node: Node, index: Index, ranges: Ranges, head: Term, roles: tuple[Term, ...], stop: Callable[[Node], bool]
) -> list[Traced]:
    """All nodes back from an operand that could be passed instead of it, the nearest first.

    Args:
        index: index into `node`, over the symbols in `roles`.
        head: the symbol of the head, which may occur as `head // group`.
        stop: nodes not to look beyond (a grad-mode border).
    """
    found: list[Traced] = []
    factor: Term = sympy.S.One
    while True:
        group = simple_group(index, head, roles)
        if group is not None:
            found.append(Traced(node=node, index=index, factor=factor, group=group))
        if stop(node):
            return found
        step = _step(node, index, ranges)
        if step is None:
            return found
        node, index = step[0], step[1]
        factor = factor * step[2]


def _step(node: Node, index: Index, ranges: Ranges) -> tuple[Node, Index, Term] | None:
    """One step back: the input, the index into it, and the constant factor between."""
    viewed = view_source(node, index, ranges)
    if viewed is not None:
        return (*viewed, sympy.S.One)
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target in CASTS:
        before = source.meta["val"].dtype
        after = node.meta["val"].dtype
        exact = before.is_floating_point and torch.promote_types(before, after) is after
        return (source, index, sympy.S.One) if exact else None
    if node.target is aten.cat.default:
        return None
    if node.target in _FACTORS:
        return _scaled(node, index)
    return None


def _scaled(node: Node, index: Index) -> tuple[Node, Index, Term] | None:
    source = node.args[0]
    if node.target is aten.neg.default:
        return source, index, sympy.S.NegativeOne
    other = _number(node.args[1])
    if other is None and node.target is aten.mul.Tensor:
        source, other = node.args[1], _number(source)
    if other is None or other == 0 or not other.is_finite or not isinstance(source, Node) or shape_of(node) != shape_of(source):
        return None
    return source, index, (other if node.target in _FACTORS[:2] else 1 / other)


def _number(value: Any) -> Term | None:
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor) and all(n == 1 for n in shape_of(value)):
        term = Interpreter(Ranges({})).element(value, (sympy.S.Zero,) * value.meta["val"].dim())
        return term if term.is_number else None
    return None


def simple_group(index: Index, head: Term, roles: tuple[Term, ...]) -> int | None:
    """The size of the head groups if each index is one role, used once, or a number; None if any is something else."""
    seen: list[Term] = []
    group = 1
    for term in index:
        if term.is_Integer:
            continue
        if isinstance(term, FloorDiv) and term.args[0] == head and term.args[1].is_Integer:
            group, term = int(term.args[1]), head
        if term not in roles or term in seen:
            return None
        seen.append(term)
    return group


def as_operand(
    traced: Traced, roles: tuple[Term, ...], shape: Index, dtype: torch.dtype, concrete: Callable[[Term], Any]
) -> Operand:
    """The views that bring a traced tensor into the order of `roles`, with dimensions of size 1 where it has none.

    Args:
        shape: extents of the roles; a missing first role (the batch) is expanded to its extent.
        concrete: turns an extent into an argument of a node.
    """
    views: list[tuple[Any, tuple[Any, ...]]] = []
    rank = len(traced.index)
    kept = []
    for dim, term in enumerate(traced.index):
        role = term.args[0] if isinstance(term, FloorDiv) else term
        if role in roles:
            kept.append((roles.index(role), dim))
    unit = [dim for dim in range(rank) if dim not in {d for _, d in kept}]
    for dim in reversed(unit):
        views.append((aten.select.int, (dim, int(traced.index[dim]))))
    dims = [d for _, d in kept]
    compact = {d: sum(e < d for e in dims) for d in dims}
    order = [compact[d] for _, d in sorted(kept)]
    if order != sorted(order):
        views.append((aten.permute.default, (order,)))
    present = {role for role, _ in kept}
    for position in range(len(roles)):
        if position not in present:
            views.append((aten.unsqueeze.default, (position,)))
    source_shape = shape_of(traced.node)
    own = dict((role, source_shape[dim]) for role, dim in kept)
    extents = tuple(own.get(position, sympy.S.One) for position in range(len(roles)))
    if 0 not in present and shape[0] != 1:
        views.append((aten.expand.default, ([concrete(shape[0]), -1, -1, -1],)))
        extents = (shape[0], *extents[1:])
    return Operand(base=traced.node, views=tuple(views), shape=extents, dtype=dtype)

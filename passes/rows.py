"""Rows of weights that are divided by their sums: the division goes behind the contraction with the values.

    (w / n) @ v        ->  (w @ v) / n               n any function of the rows of w, one number a row
    sum(detach(w), j)  ->  detach(sum(w, j))

so that the sums are a result of their own, beside w @ v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effcompile.builder import Builder, is_pure
from effcompile.contraction import Contraction
from effcompile.pattern import CASTS, GraphView, describe
from effcompile.rules import wrap_dim
from effcompile.viewmaps import shape_of

from .specify import Stop

aten = torch.ops.aten

_SAME = CASTS | {aten.clone.default, aten.contiguous.default, aten.alias.default}


@dataclass(frozen=True, kw_only=True)
class Division:
    """`node` is `weights / divisor`, which the contraction takes through `casts` (the last first)."""

    node: Node
    weights: Node
    divisor: Node
    casts: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class RowSum:
    """`node` sums the weights over the keys, as `detached` if no gradient passes."""

    node: Node
    weights: Node
    detached: bool


def division_of(operand: Node, dim: int) -> Division | None:
    """The division by one number a row that weights end with; `dim` is that of the keys."""
    casts, node = [], operand
    while node.target in _SAME and isinstance(node.args[0], Node):
        casts.append(node)
        node = node.args[0]
    if node.target is not aten.div.Tensor or not all(isinstance(x, Node) for x in node.args):
        return None
    weights, divisor = node.args
    assert isinstance(weights, Node) and isinstance(divisor, Node)
    by_row = len(shape_of(divisor)) == len(shape_of(weights)) and shape_of(divisor)[dim] == 1
    return Division(node=node, weights=weights, divisor=divisor, casts=tuple(casts)) if by_row else None


def row_sums(weights: Node, dim: int) -> list[RowSum]:
    """The sums of weights over the keys, along the dimension `dim`."""
    while weights.target in _SAME and isinstance(weights.args[0], Node):
        weights = weights.args[0]
    return list(_sums_after(weights, weights, dim, False))


def _sums_after(node: Node, weights: Node, dim: int, detached: bool) -> Iterator[RowSum]:
    for user in node.users:
        if user.target is aten.sum.dim_IntList and user.args[0] is node:
            rank = len(shape_of(node))
            if [wrap_dim(d, rank) for d in user.args[1]] == [dim] and user.users:  # type: ignore[union-attr, arg-type, call-overload]
                yield RowSum(node=user, weights=weights, detached=detached)
        elif user.target in _SAME or user.target is aten.detach.default:
            yield from _sums_after(user, weights, dim, detached or user.target is aten.detach.default)


def moved_behind(division: Division, values: Contraction, side: int, view: GraphView) -> Node:
    """Contract the undivided weights, and divide the result; returns the new contraction."""
    anchor = values.node
    builder = Builder(anchor.graph, anchor)
    operand = division.weights
    for cast in reversed(division.casts):
        operand = builder.call(cast.target, operand, *cast.args[1:], **cast.kwargs)
    contraction = builder.call(anchor.target, *_with(anchor.args, values.operands[side], operand), **anchor.kwargs)
    letters = values.letters[side]
    order = [letters.index(letter if letter in letters else values.summed) for letter in values.out]
    divisor = division.divisor
    if order != list(range(len(order))):
        divisor = builder.call(aten.permute.default, divisor, order)
    result = builder.call(aten.div.Tensor, contraction, divisor)
    if result.meta["val"].dtype != anchor.meta["val"].dtype:
        result = builder.call(aten._to_copy.default, result, dtype=anchor.meta["val"].dtype)
    _settle(builder, anchor, view)
    anchor.replace_all_uses_with(result)
    return contraction


def undetached(row_sum: RowSum, view: GraphView) -> Node:
    """The sum of the weights themselves, the gradient cut behind it."""
    if not row_sum.detached:
        return row_sum.node
    old = row_sum.node
    builder = Builder(old.graph, old)
    new = builder.call(old.target, row_sum.weights, *old.args[1:], **old.kwargs)
    if new.meta["val"].dtype != old.meta["val"].dtype:
        new = builder.call(aten._to_copy.default, new, dtype=old.meta["val"].dtype)
    cut = builder.call(aten.detach.default, new)
    _settle(builder, old, view)
    old.replace_all_uses_with(cut)
    return new


def check_movable(sums: list[Node], anchor: Node, view: GraphView) -> None:
    """What is computed from the sums before the contraction must be such that it can be computed after it.

    Raises:
        Stop: it has an effect, or runs in another mode.
    """
    for node in _between(sums, anchor):
        if node is not anchor and (not is_pure(node) or view.regions.get(node) != view.regions.get(anchor)):
            raise Stop("rows", f"{describe(node)} stands between the sums of the weights and the contraction", node)


def postpone(sums: list[Node], output: Node, view: GraphView) -> None:
    """Move what is computed from the sums, and the sums, behind `output`: one operation will give both."""
    cursor = output
    for node in _between(sums, output):
        cursor.append(node)
        cursor = node
    view.__dict__.pop("order", None)


def _between(sums: list[Node], output: Node) -> list[Node]:
    """The sums and what depends on them, as far as it stands before `output`, in order."""
    wanted, found = set(sums), list[Node]()
    for node in output.graph.nodes:
        if node is output:
            return found
        if node in wanted or any(x in wanted for x in node.all_input_nodes):
            wanted.add(node)
            found.append(node)
    return found


def _with(args: tuple[Any, ...], old: Node, new: Node) -> tuple[Any, ...]:
    """Arguments with one node for another, in a list of operands too."""
    swapped = []
    for arg in args:
        inner = isinstance(arg, (list, tuple))
        swapped.append([new if x is old else x for x in arg] if inner else new if arg is old else arg)
    return tuple(swapped)


def _settle(builder: Builder, like: Node, view: GraphView) -> None:
    """New nodes run in the modes of the node that they stand beside."""
    for node in builder.added:
        view.regions[node] = view.regions[like]

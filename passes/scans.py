"""Writes recurrences that were found as `linear_scan`, at the place and in the form of what they replace.

h_t = c_t * h_{t-1} + o_t    ->    permute(linear_scan(c, o, initial)),  the steps along the scan's first dimension
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from effcompile._torch import OpOverload
from effcompile.builder import Builder, is_pure
from effcompile.ir import Rejected
from effcompile.ops import linear_scan as linear_scan
from effcompile.viewmaps import size_term

from .exact import ENTER_LANE, LEAVE_LANE, name_of
from .exact_operations import OPERATIONS
from .first_order import Factor, Product
from .prefixes import Recurrence
from .tentative import Stop, Substitution, substitutions

aten = torch.ops.aten

_FUNCTORCH = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions")


def written(
    recurrences: Sequence[Recurrence], what: str, blocks: Sequence[tuple[Node, ...]], step: str
) -> tuple[list[Substitution], list[Rejected]]:
    """Scans in place of recurrences, not yet applied, and why others cannot be written so."""
    return substitutions(((r.node, partial(_substitution, r, what, blocks)) for r in recurrences), step)


def _substitution(
    recurrence: Recurrence, what: str, blocks: Sequence[tuple[Node, ...]], builder: Builder
) -> Substitution:  # fmt: skip
    node = recurrence.node
    scan = _scan(builder, recurrence)
    result = _as_before(builder, recurrence, scan)
    regions = regions_before(recurrence.interior, node, blocks)
    return Substitution(what=what, anchor=node, pairs=((node, result),), scans=(scan,), regions=regions)


def regions_before(
    interior: frozenset[Node], node: Node, blocks: Sequence[tuple[Node, ...]]
) -> tuple[tuple[Node, ...], ...]:  # fmt: skip
    """The functorch regions through which a result has come, and others before it, if they do nothing else than compute.

    Those that something else uses stay where they are when a substitution is committed.
    """
    order = {other: place for place, other in enumerate(node.graph.nodes)}
    before = (block for block in blocks if order[block[0]] < order[node] or not interior.isdisjoint(block))
    return tuple(block for block in before if all(_is_pure_there(inner) for inner in block))


def _is_pure_there(node: Node) -> bool:
    """Whether a node of a region does nothing outside of it."""
    if isinstance(node.target, OpOverload):
        return is_pure(node)
    name = name_of(node)
    return is_pure(node) or name in OPERATIONS or name in (*_FUNCTORCH, ENTER_LANE, LEAVE_LANE)


# -------------------------------------------------------------------- the scan


def scan_of(builder: Builder, coefficient: Node | None, offset: Node, initial: Node | None) -> Node:
    """`linear_scan` of [T, ...] operands."""
    return builder.call(torch.ops.effcompile.linear_scan.default, coefficient, offset, initial)


def one(builder: Builder, like: Node) -> Node:
    """A first state of one for operands like this."""
    value = like.meta["val"]
    return builder.call(aten.full.default, [1] * (value.dim() - 1), 1, dtype=value.dtype, device=value.device)


def _scan(builder: Builder, recurrence: Recurrence) -> Node:
    operands, value = recurrence.operands, recurrence.node.meta["val"]
    order = [recurrence.dim, *(d for d in range(value.dim()) if d != recurrence.dim)]
    coefficient = None
    if operands.coefficient is not None:
        coefficient = _product(builder, recurrence, (operands.coefficient,), order, rounded=False)
    if operands.offset is None:
        sizes = [_size(builder, recurrence, d) for d in order]
        offset = builder.call(aten.full.default, sizes, 0, dtype=value.dtype, device=value.device)
    else:
        offset = _expanded(builder, recurrence, _product(builder, recurrence, operands.offset, order), order)
    initial = None if operands.initial is None else _initial(builder, recurrence, operands.initial, order)
    if operands.reverse:
        offset = builder.call(aten.flip.default, offset, [0])
        if coefficient is not None and not _is_one(coefficient.meta["val"].shape[0]):
            coefficient = builder.call(aten.flip.default, coefficient, [0])
    return scan_of(builder, coefficient, offset, initial)


def _initial(builder: Builder, recurrence: Recurrence, factors: Product, order: Sequence[int]) -> Node:
    """The first state, without the dimension of the steps."""
    return _product(builder, recurrence, factors, order[1:])


def _product(
    builder: Builder, recurrence: Recurrence, factors: Product, order: Sequence[int], *, rounded: bool = True
) -> Node:  # fmt: skip
    """exp(sum of exponents) * product / divisors, over the result's dimensions in `order`.

    Exponentials are taken in float32 at least: of a small exponent, half precision would leave 1. If not `rounded`, they stay so.
    """
    own = recurrence.node.meta["val"].dtype
    exponential = any(factor.form in ("exponential", "reciprocal exponential") for factor in factors)
    dtype = torch.promote_types(own, torch.float32) if exponential else own
    result: Node | None = None
    exponent: Node | None = None
    divisors: list[Node] = []
    for factor in factors:
        source, plain = _without_logarithm(factor)
        operand = _aligned(builder, source, recurrence.dims[factor.node], order)
        if operand.meta["val"].dtype != dtype:
            operand = builder.call(aten._to_copy.default, operand, dtype=dtype)
        reciprocal = factor.form.startswith("reciprocal")
        if factor.form.endswith("exponential") and not plain:
            exponent = _added(builder, exponent, operand, reciprocal)
        elif reciprocal:
            divisors.append(operand)
        else:
            result = operand if result is None else builder.call(aten.mul.Tensor, result, operand)
    if exponent is not None:
        power = builder.call(aten.exp.default, exponent)
        result = power if result is None else builder.call(aten.mul.Tensor, result, power)
    if result is None:
        value = recurrence.node.meta["val"]
        result = builder.call(aten.full.default, [1] * len(order), 1, dtype=dtype, device=value.device)
    for divisor in divisors:
        result = builder.call(aten.div.Tensor, result, divisor)
    return builder.call(aten._to_copy.default, result, dtype=own) if rounded and dtype != own else result


def _without_logarithm(factor: Factor) -> tuple[Node, bool]:
    """The node to take, and whether it is the factor by itself, as x is exp(log(x))."""
    if factor.form.endswith("exponential") and name_of(factor.node) == "log":
        return factor.node.all_input_nodes[0], True
    return factor.node, False


def _added(builder: Builder, left: Node | None, right: Node, negative: bool) -> Node:
    if left is None:
        return builder.call(aten.neg.default, right) if negative else right
    return builder.call(aten.sub.Tensor if negative else aten.add.Tensor, left, right)


# -------------------------------------------------------------------- shapes


def _aligned(builder: Builder, node: Node, dims: Sequence[int | None], order: Sequence[int]) -> Node:
    """An operand whose dimensions are the result's `dims`, with the result's in `order`: of length 1 where it has none."""
    kept = [k for k, d in enumerate(dims) if d in order]
    gone = [k for k, d in enumerate(dims) if d not in order]
    for k in reversed(gone):
        node = builder.call(aten.select.int, node, k, 0)
    places = [dims[k] for k in kept]
    turn = [places.index(d) for d in order if d in places]
    if turn != sorted(turn):
        node = builder.call(aten.permute.default, node, turn)
    for k, d in enumerate(order):
        if d not in places:
            node = builder.call(aten.unsqueeze.default, node, k)
    return node


def _expanded(builder: Builder, recurrence: Recurrence, node: Node, order: Sequence[int]) -> Node:
    """An operand with all of the result's elements."""
    wanted = recurrence.node.meta["val"].shape
    if all(size_term(n) == size_term(wanted[d]) for n, d in zip(node.meta["val"].shape, order, strict=True)):
        return node
    return builder.call(aten.expand.default, node, [_size(builder, recurrence, d) for d in order])


def _size(builder: Builder, recurrence: Recurrence, dim: int) -> Any:
    """A size of the result, from what enters it."""
    size = recurrence.node.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    for node, dims in recurrence.dims.items():
        if dim in dims:
            return builder.call(aten.sym_size.int, node, dims.index(dim))
    raise Stop("the recurrence's result has a symbolic size that no operand has")


def _as_before(builder: Builder, recurrence: Recurrence, scan: Node) -> Node:
    """The states with the dimensions, direction and memory order of what they replace."""
    rank, dim = recurrence.node.meta["val"].dim(), recurrence.dim
    if recurrence.operands.reverse:
        scan = builder.call(aten.flip.default, scan, [0])
    if dim:
        order = [*range(1, dim + 1), 0, *range(dim + 1, rank)]
        scan = builder.call(aten.permute.default, scan, order)
    return in_memory_order(builder, scan, recurrence.node)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def in_memory_order(builder: Builder, result: Node, wanted: Node) -> Node:
    """The result with dimensions in memory in the order of `wanted`'s, without gaps; copied if it is not so already."""
    new, old = result.meta["val"], wanted.meta["val"]
    if _same_strides(new, old.stride()):
        return result
    if not all(isinstance(n, int) for n in (*old.shape, *old.stride())):
        if not old.is_contiguous():
            raise Stop("the recurrence's result has symbolic strides")
        return builder.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    order = sorted(range(old.dim()), key=lambda k: -old.stride(k))
    strides = [math.prod(old.shape[d] for d in order[order.index(k) + 1 :]) for k in range(old.dim())]
    if _same_strides(new, strides):
        return result
    turned = order != sorted(order)
    result = builder.call(aten.permute.default, result, order) if turned else result
    result = builder.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, result, [order.index(k) for k in range(len(order))]) if turned else result


def _same_strides(value: torch.Tensor, strides: Sequence[Any]) -> bool:
    """Of the dimensions in which there is more than one element."""
    triples = zip(value.shape, value.stride(), strides, strict=True)
    return all(_is_one(n) or size_term(s) == size_term(t) for n, s, t in triples)

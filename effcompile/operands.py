"""Finds the tensor behind an operand: backwards through views, expansions, casts and constant factors, to the last node whose
dimensions are the operation's own.

    K = reshape(expand(unsqueeze(k)))  read at (b, h, j, d)   is   k  read at (b, h // group, j, d)
    Q = reshape(permute(q))            read at (b, h, i, d)   is   q  read at (b, i, h // 4, h % 4, d)
    V = latent[..., :512]              read at (b, h, j, d)   is   latent  read at (b, j, d), d < 512
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .expr import Interpreter
from .ir import Operand
from .pattern import CASTS
from .ranges import Ranges
from .terms import FloorDiv, Modulo, Term, number
from .viewmaps import Index, shape_of, view_source

aten = torch.ops.aten

_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default)
_HEAD = 1  # position of the head among the roles

View = tuple[Any, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The index symbols of an operand [batch, head, position, depth], and how far each runs."""

    symbols: tuple[Term, ...]
    extents: tuple[Term, ...]

    def within(self, node: Node, index: Index) -> Roles:
        """The same roles, each that indexes a dimension of `node` by itself with that dimension's extent."""
        own = {term: size for term, size in zip(index, shape_of(node), strict=True)}
        return replace(self, extents=tuple(own.get(s, n) for s, n in zip(self.symbols, self.extents, strict=True)))

    @property
    def head(self) -> Term:
        return self.symbols[_HEAD]

    @property
    def heads(self) -> Term:
        return self.extents[_HEAD]


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor, read at `start + step * x` with `x < count`.

    `role` is the position of x among the roles. The head may come apart into digits: x is `head // stride % count`.
    A dimension read at a number alone has no role.
    """

    role: int | None
    start: Term
    step: int
    count: Term
    stride: int = 1

    def is_whole(self, size: Term) -> bool:
        """Whether all of a dimension of this size is read, in order."""
        return bool(self.start == 0 and self.step == 1 and self.count == size)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """An operand's tensor: `factor * node[index]`, with `axes` the index dimension by dimension.

    `group` consecutive heads share an element. Of each group, `copies` copies are to be made, for groups that much smaller.
    """

    node: Node
    index: Index
    factor: Term
    group: int
    axes: tuple[Axis, ...]
    roles: Roles
    copies: int = 1

    @property
    def has_heads(self) -> bool:
        return any(axis.role == _HEAD for axis in self.axes)


def trace(
    node: Node, index: Index, ranges: Ranges, roles: Roles, stop: Callable[[Node], bool], is_value: Callable[[Term], bool]
) -> list[Traced]:
    """All nodes back from an operand that could be passed instead of it, the nearest first.

    Args:
        index: index into `node`, over the symbols of `roles`.
        stop: nodes not to look beyond (a grad-mode border).
        is_value: whether a size can be an argument of a view.
    """
    found: list[Traced] = []
    factor: Term = sympy.S.One
    while True:
        axes = _axes(node, index, roles, is_value)
        group = None if axes is None else _group(axes, roles)
        if axes is not None and group is not None:
            found.append(Traced(node=node, index=index, factor=factor, group=group, axes=axes, roles=roles))
        if stop(node):
            return found
        step = one_step(node, index, ranges)
        if step is None:
            return found
        node, index = step[0], step[1]
        factor = factor * step[2]


def regrouped(traced: Traced, group: int) -> Traced:
    """The same operand with its groups copied out until they are of `group` heads, which divides their size."""
    own = traced.group if traced.has_heads else int(traced.roles.heads)
    return replace(traced, group=group, copies=own // group)


def one_step(node: Node, index: Index, ranges: Ranges) -> tuple[Node, Index, Term] | None:
    """One step back through a view, a cast or a constant factor: the input, the index into it, and the factor."""
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


# -------------------------------------------------------------------- an index, dimension by dimension


def _axes(node: Node, index: Index, roles: Roles, is_value: Callable[[Term], bool]) -> tuple[Axis, ...] | None:
    """How each dimension is read; None if one is read in another way, or as a slice that no view can take."""
    axes = []
    for term, size in zip(index, shape_of(node), strict=True):
        axis = _axis(term, roles)
        if axis is None or not (axis.is_whole(size) or _can_slice(axis, is_value)):
            return None
        axes.append(axis)
    used = [axis.role for axis in axes if axis.role not in (None, _HEAD)]
    return tuple(axes) if len(set(used)) == len(used) else None


def _axis(term: Term, roles: Roles) -> Axis | None:
    if term.is_Integer:
        return Axis(None, term, 1, sympy.S.One)
    start, rest = term.as_coeff_Add()
    step, rest = rest.as_coeff_Mul()
    if not (start.is_Integer and start >= 0 and step.is_Integer and step > 0):
        return None
    if rest in roles.symbols and rest != roles.head:
        role = roles.symbols.index(rest)
        strided = role == len(roles.symbols) - 1 and step != 1  # kernels read the depth in order
        return None if strided else Axis(role, start, int(step), roles.extents[role])
    digit = _digit(rest, roles)
    return None if digit is None else Axis(_HEAD, start, int(step), digit[1], digit[0])


def _digit(term: Term, roles: Roles) -> tuple[int, Term] | None:
    """`(stride, count)` of `head // stride % count`."""
    if term == roles.head:
        return 1, roles.heads
    if not isinstance(term, (FloorDiv, Modulo)) or not term.args[1].is_Integer:
        return None
    inner, n = _digit(term.args[0], roles), int(term.args[1])
    if inner is None or (inner[1].is_Integer and inner[1] % n):
        return None
    if isinstance(term, FloorDiv):
        return inner[0] * n, inner[1] / n
    return (inner[0], sympy.Integer(n)) if inner[1].is_Integer else None


def _can_slice(axis: Axis, is_value: Callable[[Term], bool]) -> bool:
    if axis.role is None or axis.count.is_Integer:
        return True
    return bool(axis.start == 0 and axis.step == 1 and is_value(axis.count))


def _group(axes: tuple[Axis, ...], roles: Roles) -> int | None:
    """How many consecutive heads share an element, if the digits of the head that are read are its highest ones; else None."""
    above: Term = roles.heads
    for axis in _digits(axes):
        if axis.stride * axis.count != above:
            return None
        above = sympy.Integer(axis.stride)
    return int(above) if _digits(axes) else 1


def _digits(axes: tuple[Axis, ...]) -> list[Axis]:
    return sorted((axis for axis in axes if axis.role == _HEAD), key=lambda axis: -axis.stride)


# -------------------------------------------------------------------- as views


def as_operand(traced: Traced, dtype: torch.dtype, concrete: Callable[[Term], Any]) -> Operand:
    """The views that bring a traced tensor into the order of its roles, with dimensions of size 1 where it has none.

    A missing batch is expanded to its extent. `concrete` turns an extent into an argument of a node.
    """
    roles, axes = traced.roles, list(enumerate(traced.axes))
    views = _slices(traced, concrete)
    views += [(aten.select.int, (dim, int(axis.start))) for dim, axis in reversed(axes) if axis.role is None]
    kept = [axis for _, axis in axes if axis.role is not None]
    order = sorted(range(len(kept)), key=lambda dim: (kept[dim].role, -kept[dim].stride))
    if order != list(range(len(kept))):
        views.append((aten.permute.default, (order,)))
    digits = _digits(traced.axes)
    if len(digits) > 1:
        first = sum(axis.role == 0 for axis in kept)
        views.append((aten.flatten.using_ints, (first, first + len(digits) - 1)))
    present = {axis.role for axis in kept}
    extents = list(roles.extents)
    for position in range(len(extents)):
        if position not in present:
            views.append((aten.unsqueeze.default, (position,)))
            extents[position] = sympy.S.One
    if 0 not in present and roles.extents[0] != 1:
        views.append((aten.expand.default, ([concrete(roles.extents[0]), -1, -1, -1],)))
        extents[0] = roles.extents[0]
    if digits:
        extents[_HEAD] = sympy.Mul(*(axis.count for axis in digits))
    if traced.copies > 1:
        views += _copied_out(traced.copies, len(extents))
        extents[_HEAD] = extents[_HEAD] * traced.copies
    return Operand(base=traced.node, views=tuple(views), shape=tuple(extents), dtype=dtype)


def _slices(traced: Traced, concrete: Callable[[Term], Any]) -> list[View]:
    found: list[View] = []
    for dim, (axis, size) in enumerate(zip(traced.axes, shape_of(traced.node), strict=True)):
        if axis.role is None or axis.is_whole(size):
            continue
        end = axis.start + axis.step * (axis.count - 1) + 1
        found.append((aten.slice.Tensor, (dim, int(axis.start), concrete(end), axis.step)))
    return found


def _copied_out(copies: int, rank: int) -> list[View]:
    """Each head `copies` times: [b, h, ...] -> [b, h * copies, ...]."""
    return [
        (aten.unsqueeze.default, (_HEAD + 1,)),
        (aten.expand.default, ([copies if dim == _HEAD + 1 else -1 for dim in range(rank + 1)],)),
        (aten.flatten.using_ints, (_HEAD, _HEAD + 1)),
    ]

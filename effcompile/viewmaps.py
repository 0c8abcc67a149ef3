"""Index maps of views: from an index into a view's result to an index into its input.

transpose(x)[i, j] = x[j, i]        expand(x)[i, j] = x[0, j]        reshape(x)[k] = x[k // n, k % n]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node

from ._torch import size_hint
from .ranges import Ranges, recombine
from .terms import FloorDiv as FloorDivTerm
from .terms import Term, integer_symbol

aten = torch.ops.aten

Index = tuple[Term, ...]


def size_term(size: Any) -> Term:
    """A size, an int or a SymInt, as a term over integer symbols named as the graph's.

    A symbol that may be negative, 0 or 1 (an integer argument, a size that depends on data) is one of which nothing is known.
    """
    if isinstance(size, int):
        return sympy.Integer(size)
    return _own_symbols(size.node.expr, getattr(size.node.shape_env, "var_to_range", {}))


def _own_symbols(expression: sympy.Expr, bounds: Mapping[Any, Any]) -> Term:
    if expression.is_Symbol:
        least = bounds[expression].lower if expression in bounds else 2
        return integer_symbol(expression.name) if least >= 2 else sympy.Symbol(expression.name, integer=True)
    if expression.is_Integer:
        return sympy.Integer(int(expression))
    if type(expression).__name__ in ("FloorDiv", "CleanDiv"):
        return FloorDivTerm(*(_own_symbols(a, bounds) for a in expression.args))
    if expression.is_Add or expression.is_Mul:
        return expression.func(*(_own_symbols(a, bounds) for a in expression.args))
    return sympy.Symbol(f"size({expression})", integer=True)


def hints_of(node: Node, fallback: int) -> dict[str, int]:
    """A symbolic size, or those of a tensor, as they were in the example inputs, by the text of their term."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return {str(size_term(n)): size_hint(n, fallback) for n in sizes if isinstance(n, torch.SymInt)}


def shape_of(node: Node) -> Index:
    """The shape of a node's tensor, as terms."""
    return tuple(size_term(n) for n in node.meta["val"].shape)


def is_float(node: Node) -> bool:
    """Whether a node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def reshape(index: Index, outer: Index, inner: Index, ranges: Ranges) -> Index:
    """Row-major reinterpretation of an index into shape `outer` as one into shape `inner`."""
    result: list[Term] = []
    o = n = 0
    while o < len(outer) or n < len(inner):
        group_o, group_n = [o], [n]
        o, n = _next_group(outer, inner, o, n)
        group_o, group_n = list(range(group_o[0], o)), list(range(group_n[0], n))
        result += _regroup([index[k] for k in group_o], [outer[k] for k in group_o], [inner[k] for k in group_n], ranges)
    return tuple(result)


def _next_group(outer: Index, inner: Index, o: int, n: int) -> tuple[int, int]:
    """The ends of the shortest runs of dimensions from `o` and `n` on with equal products."""
    if o == len(outer):
        return o, len(inner)
    if n == len(inner):
        return len(outer), n
    a, b = outer[o], inner[n]
    o, n = o + 1, n + 1
    while a != b:
        grow_outer = a.is_Integer and b.is_Integer and a < b
        if (grow_outer or n == len(inner)) and o < len(outer):
            a, o = sympy.expand(a * outer[o]), o + 1
        elif n < len(inner):
            b, n = sympy.expand(b * inner[n]), n + 1
        else:
            return len(outer), len(inner)
        if not (a.is_Integer and b.is_Integer) and a != b:
            return len(outer), len(inner)
    return o, n


def _regroup(index: list[Term], outer: list[Term], inner: list[Term], ranges: Ranges) -> list[Term]:
    if len(inner) == 1 and len(outer) == 1:
        return index
    linear: Term = sympy.S.Zero
    for i, n in zip(index, outer, strict=True):
        linear = linear * n + i
    linear = recombine(sympy.expand(linear))
    result: list[Term] = []
    for n in reversed(inner[1:]):
        result.append(sympy.S.Zero if n == 1 else ranges.modulo(linear, n))
        linear = ranges.floordiv(linear, n)
    if inner:
        result.append(sympy.S.Zero if inner[0] == 1 else linear)
    return result[::-1]


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _expand(node: Node, index: Index, ranges: Ranges) -> Index:
    return broadcast(index, shape_of(node.args[0]))


def broadcast(index: Index, shape: Index) -> Index:
    """An index of a broadcast result as one into an operand of `shape`."""
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(sympy.S.Zero if n == 1 else i for i, n in zip(tail, shape, strict=True))


def _transpose(node: Node, index: Index, ranges: Ranges) -> Index:
    result = list(index)
    a, b = (_dim(d, len(index)) for d in node.args[1:3])
    result[a], result[b] = result[b], result[a]
    return tuple(result)


def _swap_last(node: Node, index: Index, ranges: Ranges) -> Index:
    return index if len(index) < 2 else (*index[:-2], index[-1], index[-2])


def _permute(node: Node, index: Index, ranges: Ranges) -> Index:
    result: list[Any] = [None] * len(index)
    for position, dim in enumerate(node.args[1]):
        result[_dim(dim, len(index))] = index[position]
    return tuple(result)


def _unsqueeze(node: Node, index: Index, ranges: Ranges) -> Index:
    dim = _dim(node.args[1], len(index))
    return index[:dim] + index[dim + 1 :]


def _squeeze(node: Node, index: Index, ranges: Ranges) -> Index:
    shape = shape_of(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = {_dim(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    rest = iter(index)
    return tuple(sympy.S.Zero if k in dims and n == 1 else next(rest) for k, n in enumerate(shape))


def _select(node: Node, index: Index, ranges: Ranges) -> Index | None:
    shape = shape_of(node.args[0])
    dim = _dim(node.args[1], len(shape))
    position = from_the_start(argument_term(node.args[2]), shape[dim], ranges)
    return None if position is None else (*index[:dim], position, *index[dim:])


def _slice(node: Node, index: Index, ranges: Ranges) -> Index | None:
    shape = shape_of(node.args[0])
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, len(shape))
    step = argument_term(node.args[4]) if len(node.args) > 4 else sympy.S.One
    first = slice_start(node.args[2] if len(node.args) > 2 else None, shape[dim], ranges)
    return None if first is None else tuple(first + step * i if k == dim else i for k, i in enumerate(index))


def slice_start(start: Any, size: Term, ranges: Ranges) -> Term | None:
    """The first index of a slice of a dimension; one before the beginning is 0. None if its sign is not known."""
    first = from_the_start(sympy.S.Zero if start is None else argument_term(start), size, ranges)
    if first is None or ranges.is_nonnegative(first):
        return first
    return sympy.S.Zero if ranges.is_nonnegative(-first) else None


def from_the_start(position: Term, size: Term, ranges: Ranges) -> Term | None:
    """A position that counts from the end if it is negative, from the start; None if its sign is not known."""
    if ranges.is_nonnegative(position):
        return position
    return position + size if ranges.is_nonnegative(-1 - position) else None


def _split_part(node: Node, index: Index, ranges: Ranges) -> Index | None:
    """`getitem(split(x, sizes, dim), k)`: the part begins where the parts before it end."""
    source, part = node.args
    if source.target is aten.unbind.int:
        dim = _dim(source.args[1] if len(source.args) > 1 else 0, len(index) + 1)
        return (*index[:dim], sympy.Integer(range(len(source.meta["val"]))[part]), *index[dim:])
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes):
        return None
    dim = _dim(source.args[2] if len(source.args) > 2 else 0, len(index))
    start: Term = sympy.S.Zero
    for piece in source.meta["val"][: range(len(source.meta["val"]))[part]]:
        start = start + size_term(piece.shape[dim])
    return tuple(start + i if k == dim else i for k, i in enumerate(index))


def _repeat(node: Node, index: Index, ranges: Ranges) -> Index:
    shape = shape_of(node.args[0])
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(ranges.modulo(i, n) if n != 1 else sympy.S.Zero for i, n in zip(tail, shape, strict=True))


def _repeat_interleave(node: Node, index: Index, ranges: Ranges) -> Index | None:
    repeats = argument_term(node.args[1])
    if len(node.args) < 3 or node.args[2] is None:
        shape = shape_of(node.args[0])
        return reshape((ranges.floordiv(index[0], repeats),), (sympy.expand(sympy.Mul(*shape)),), shape, ranges)
    dim = _dim(node.args[2], len(index))
    return tuple(ranges.floordiv(i, repeats) if k == dim else i for k, i in enumerate(index))


def _flip(node: Node, index: Index, ranges: Ranges) -> Index:
    shape = shape_of(node.args[0])
    dims = {_dim(d, len(index)) for d in node.args[1]}
    return tuple(shape[k] - 1 - i if k in dims else i for k, i in enumerate(index))


def _view(node: Node, index: Index, ranges: Ranges) -> Index:
    return reshape(index, shape_of(node), shape_of(node.args[0]), ranges)


def _same(node: Node, index: Index, ranges: Ranges) -> Index:
    return index


def argument_term(value: Any) -> Term:
    """An integer argument of a node, a number or a SymInt node, as a term."""
    return size_term(value.meta["val"]) if isinstance(value, Node) else size_term(value)


ViewMap = Callable[[Node, Index, Ranges], Index | None]

VIEWS: dict[Any, ViewMap] = {
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default,
         aten.flatten.using_ints, aten.unflatten.int), _view),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _expand),
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    **dict.fromkeys((aten.t.default, aten.mT.default, aten.numpy_T.default, aten.adjoint.default), _swap_last),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.flip.default: _flip,
    **dict.fromkeys(
        (aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
         aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.view_as.default), _same),
}  # fmt: skip


def view_source(node: Node, index: Index, ranges: Ranges) -> tuple[Node, Index] | None:
    """One step through a view: its input and the index into it; None if `node` is no view."""
    if node.op != "call_function" or not isinstance(node.args[0] if node.args else None, Node):
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        mapped = _split_part(node, index, ranges)
        return None if mapped is None else (node.args[0].args[0], mapped)
    rule = VIEWS.get(node.target)
    if rule is None:
        return None
    mapped = rule(node, index, ranges)
    return None if mapped is None else (node.args[0], mapped)

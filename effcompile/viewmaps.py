"""Index maps of views: from an index into a view's result to an index into its input.

    transpose(x)[i, j] = x[j, i]        expand(x)[i, j] = x[0, j]        reshape(x)[k] = x[k // n, k % n]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from .ranges import Ranges
from .terms import Term, integer_symbol
from .terms import FloorDiv as FloorDivTerm

aten = torch.ops.aten

Index = tuple[Term, ...]


def size_term(size: Any) -> Term:
    """A size, an int or a SymInt, as a term over integer symbols named as the graph's."""
    if isinstance(size, int):
        return sympy.Integer(size)
    return _own_symbols(size.node.expr)


def _own_symbols(expression: sympy.Expr) -> Term:
    if expression.is_Symbol:
        return integer_symbol(expression.name)
    if expression.is_Integer:
        return sympy.Integer(int(expression))
    if type(expression).__name__ in ("FloorDiv", "CleanDiv"):
        return FloorDivTerm(*(_own_symbols(a) for a in expression.args))
    if expression.is_Add or expression.is_Mul:
        return expression.func(*(_own_symbols(a) for a in expression.args))
    return integer_symbol(f"size_{abs(hash(str(expression))):x}")


def shape_of(node: Node) -> Index:
    """The shape of a node's tensor, as terms."""
    return tuple(size_term(n) for n in node.meta["val"].shape)


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
    linear = sympy.expand(linear)
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


def _select(node: Node, index: Index, ranges: Ranges) -> Index:
    shape = shape_of(node.args[0])
    dim = _dim(node.args[1], len(shape))
    return (*index[:dim], wrap(argument_term(node.args[2]), shape[dim]), *index[dim:])


def _slice(node: Node, index: Index, ranges: Ranges) -> Index:
    dim, start, step = slice_start(node)
    return tuple(start + step * i if k == dim else i for k, i in enumerate(index))


def slice_start(node: Node) -> tuple[int, Term, Term]:
    """Dimension, first index and step of a `slice.Tensor` node."""
    source = node.args[0]
    size = shape_of(source)
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, len(size))
    start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    step = argument_term(node.args[4]) if len(node.args) > 4 else sympy.S.One
    first = wrap(argument_term(start), size[dim])
    if first.is_Integer and size[dim].is_Integer:
        first = min(first, size[dim])
    return dim, first, step


def _split_part(node: Node, index: Index, ranges: Ranges) -> Index | None:
    """`getitem(split(x, sizes, dim), k)`: the part begins where the parts before it end."""
    source, part = node.args
    if source.target is aten.unbind.int:
        dim = _dim(source.args[1] if len(source.args) > 1 else 0, len(index) + 1)
        return (*index[:dim], sympy.Integer(part), *index[dim:])
    if source.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes):
        return None
    dim = _dim(source.args[2] if len(source.args) > 2 else 0, len(index))
    start: Term = sympy.S.Zero
    for piece in source.meta["val"][:part]:
        start = start + size_term(piece.shape[dim])
    return tuple(start + i if k == dim else i for k, i in enumerate(index))


def _repeat(node: Node, index: Index, ranges: Ranges) -> Index:
    shape = shape_of(node.args[0])
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(ranges.modulo(i, n) if n != 1 else sympy.S.Zero for i, n in zip(tail, shape, strict=True))


def _repeat_interleave(node: Node, index: Index, ranges: Ranges) -> Index | None:
    if len(node.args) < 3 or node.args[2] is None:
        return None
    dim = _dim(node.args[2], len(index))
    repeats = argument_term(node.args[1])
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


def wrap(position: Term, size: Term) -> Term:
    """A position counted from the end if it is negative."""
    return position + size if position.is_Integer and position < 0 else position


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


def sizes_product(shape: Sequence[Term]) -> Term:
    """The number of elements of a shape."""
    return sympy.expand(sympy.Mul(*shape))

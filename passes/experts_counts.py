"""Which expert a row of a grouped product belongs to: the offsets between groups count ids, and rows in the order of those ids.

    offs = cumsum(histc(ids)),  P = sort(ids)[1]    ->    group of row P^-1(n)  =  ids[n]

Rows after the last group are of ids that are no expert's.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.rules import wrap_dim
from effcompile.terms import IntLoad, Term, Where, integer_symbol
from effcompile.viewmaps import Index, reshape, shape_of

from .experts_nodes import argument, is_permutation
from .experts_terms import Group, Inverse, RowInterpreter
from .experts_views import Axes, as_view
from .specify import Stop

aten = torch.ops.aten

_Q = integer_symbol("q")


def resolved(rows: RowInterpreter, term: Term) -> Term:
    """A term with the groups of rows in it replaced by the ids that the rows were sorted by.

    Raises:
        Stop: the offsets do not count those ids.
    """
    return term.xreplace({group: _id_of(rows, group) for group in term.atoms(Group)})


def _id_of(rows: RowInterpreter, group: Term) -> Term:
    offsets, row = rows.loaded[str(group.args[0])], group.args[1]
    if not isinstance(row, Inverse):
        raise Stop("groups", "the rows of a grouped product are not brought back to the order of tokens", offsets)
    permutation = rows.loaded[str(row.args[0])]
    order: Any = permutation.args[0].args[0] if permutation.target not in _SORTS else permutation.args[0]  # type: ignore[union-attr]
    call: Any = permutation if permutation.target in _SORTS else permutation.args[0]
    if argument(call, "descending", False):
        raise Stop("groups", "the rows of a grouped product are in descending order of ids", permutation)
    counted = _counted(rows, offsets)
    same_number = rows.ranges.get(_Q) == (0, shape_of(permutation)[0] - 1)
    rows.ranges.add(_Q, shape_of(permutation)[0])
    sorted_by = rows.element(order, (_Q,))
    if counted is None or not same_number or _as_multiset(rows, counted) != _as_multiset(rows, sorted_by):
        raise Stop("groups", "the offsets of a grouped product do not count the ids that its rows are sorted by", offsets)
    low = rows.ranges.bounds(sorted_by)[0]
    if low is None or not rows.ranges.is_nonnegative_bound(low):
        raise Stop("groups", "the ids that rows are sorted by may be negative, which no group counts", offsets)
    return rows.element(order, (row.args[1],))


def _as_multiset(rows: RowInterpreter, term: Term) -> Term:
    """A term over q with its load replaced by its tensor, if that reads each element of the tensor once, in any order."""
    loads = term.atoms(IntLoad)
    if len(loads) != 1:
        return term
    (load,) = loads
    node = rows.loaded[load.tensor]
    total = sympy.Mul(*shape_of(node))
    whole = as_view(node, load.indices, Axes(symbols=(_Q,), extents=(total,)), node.meta["val"].dtype)
    is_all = whole is not None and rows.ranges.get(_Q) == (0, total - 1)  # q is as many
    return term.xreplace({load: sympy.Symbol(load.tensor)}) if is_all else term


_SORTS = (aten.argsort.default, aten.argsort.stable)


def _counted(rows: RowInterpreter, offsets: Node) -> Term | None:
    """The ids that offsets count, at position q of all of them in any order; None if it is not known that they do."""
    rows.ranges.add(_Q, sympy.S.Zero)
    node = _uncast(offsets)
    if node.target is not aten.cumsum.default or wrap_dim(argument(node, "dim", 0), 1) != 0:
        return None
    counts = _uncast(node.args[0])
    experts = shape_of(offsets)[0]
    if counts.target is aten.histc.default and _bins_are_ids(counts, experts):
        return _values(rows, counts.args[0])
    if counts.target is aten.sum.dim_IntList and not argument(counts, "keepdim", False):
        return _summed(rows, counts, experts)
    if counts.target in (aten.scatter_add.default, aten.index_add.default):
        base, _, positions, values = counts.args[:4]
        ones = rows.element(values, (_Q,)) == 1 and rows.element(base, (_Q,)) == 0  # type: ignore[arg-type]
        return _values(rows, positions) if ones else None
    return None


def _uncast(node: Any) -> Any:
    while node.target in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout):
        node = node.args[0]
    return node


def _bins_are_ids(histogram: Node, experts: Term) -> bool:
    """Whether bin e counts the values e, for all e, and what is E or more is left out."""
    bins, low, high = (argument(histogram, name, default) for name, default in (("bins", 100), ("min", 0), ("max", 0)))
    return bool(experts == bins and bins > 1 and low == 0 and high == bins - 1)


def _values(rows: RowInterpreter, node: Any) -> Term | None:
    """The values of a list at q, without a permutation of them."""
    if len(shape_of(node)) != 1:
        return None
    rows.ranges.add(_Q, shape_of(node)[0])
    term = rows.element(node, (_Q,))
    permuted = {x: _Q for x in term.atoms(IntLoad) if x.indices == (_Q,) and is_permutation(rows.loaded[x.tensor])}
    return term.xreplace(permuted)


def _summed(rows: RowInterpreter, counts: Node, experts: Term) -> Term | None:
    """A sum of `ids == e` over all ids."""
    source: Any = counts.args[0]
    shape = shape_of(source)
    dims = {wrap_dim(d, len(shape)) for d in (argument(counts, "dim", None) or ())}
    kept = [k for k in range(len(shape)) if k not in dims]
    if len(kept) != 1:
        return None
    sizes: Index = tuple(n for k, n in enumerate(shape) if k in dims)
    total = sympy.Mul(*sizes)
    rows.ranges.add(_Q, total)
    at = iter(reshape((_Q,), (total,), sizes, rows.ranges))
    expert = integer_symbol("e")
    rows.ranges.add(expert, experts)
    term = rows.element(source, tuple(next(at) if k in dims else expert for k in range(len(shape))))
    found = _equality(term)
    sides = None if found is None else [a for a in found.args if a != expert]
    return sides[0] if sides is not None and len(sides) == 1 and not sides[0].has(expert) else None


def _equality(term: Term) -> Term | None:
    if isinstance(term, Where) and term.args[1:] == (sympy.S.One, sympy.S.Zero):
        term = term.args[0]
    return term if isinstance(term, sympy.Eq) else None

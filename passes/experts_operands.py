"""From terms over a token and a slot to tensors [T, k]: loads as views or gathers, the rest as operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.ir import Computed, Operand
from effcompile.terms import Load, Sigmoid, Term, Where

from .experts_routes import S, X
from .experts_terms import RowInterpreter, T
from .experts_views import Axes, as_view
from .specify import Stop

aten = torch.ops.aten

_UNARY: dict[type, Any] = {
    Sigmoid: aten.sigmoid.default,
    sympy.exp: aten.exp.default,
    sympy.tanh: aten.tanh.default,
    sympy.Abs: aten.abs.default,
    sympy.log: aten.log.default,
}
_FOLDED: dict[type, tuple[Any, Any]] = {
    sympy.Add: (aten.add.Tensor, aten.add.Tensor),
    sympy.Mul: (aten.mul.Tensor, aten.mul.Tensor),
    sympy.Max: (aten.maximum.default, aten.clamp_min.default),
    sympy.Min: (aten.minimum.default, aten.clamp_max.default),
}


def assignment(
    rows: RowInterpreter, term: Term, ids: Term, axes: Axes, experts: Term, dtype: torch.dtype, what: str, anchor: Node
) -> Operand | Computed:
    """A term over token and slot as a tensor [T, k]; `ids` in it stand for the expert of the slot.

    Args:
        axes: of t and s.

    Raises:
        Stop: it is no such tensor that views, gathers and arithmetic give.
    """
    loads = sorted(_loads_outside(term), key=sympy.default_sort_key)
    parts, gathered = [], []
    for load in loads:
        indices = tuple(X if i == ids else i for i in load.indices)
        by_expert = X in indices and load != ids
        last = (X, experts) if by_expert else (S, axes.of(S))
        node = rows.loaded[load.tensor]
        own = dtype if load == term and not node.meta["val"].dtype.is_floating_point else node.meta["val"].dtype
        here = Axes(symbols=(T, last[0]), extents=(axes.of(T), last[1]))
        part = as_view(node, indices if by_expert else load.indices, here, own)
        if part is None:
            raise Stop("route", f"the {what} cannot be read as a view [tokens, slots] of a tensor", node)
        parts.append(part)
        gathered.append(by_expert)
    whole = all(a == b for a, b in zip(parts[0].shape, axes.extents, strict=True)) if parts else False
    if loads == [term] and not any(gathered) and whole:
        return parts[0]
    if not loads or not whole and not any(gathered) and not any(p.shape == axes.extents for p in parts):
        raise Stop("route", f"the {what} do not differ from one assignment to the next", anchor)
    own_ids = assignment(rows, ids, ids, axes, experts, torch.int64, "ids", anchor) if any(gathered) else None
    return _computed(term, loads, parts, gathered, own_ids, axes, dtype)


def _loads_outside(term: Term) -> set[Any]:
    """The loads of a term that are no indices of another one."""
    if isinstance(term, Load):
        return {term}
    return {x for a in term.args for x in _loads_outside(a)}


def _computed(
    term: Term, loads: Sequence[Load], parts: Sequence[Operand], gathered: Sequence[bool], ids: Operand | Computed | None,
    axes: Axes, dtype: torch.dtype,
) -> Computed:  # fmt: skip
    bases = (*parts, *(() if ids is None else (ids,) if isinstance(ids, Operand) else ids.parts))

    def compute(builder: Any, nodes: Sequence[Node]) -> Node:
        own = None
        if ids is not None:
            rest = nodes[len(parts) :]
            own = rest[0] if isinstance(ids, Operand) else ids.compute(builder, rest)
        values: dict[Term, Any] = {}
        for load, node, by_expert in zip(loads, nodes, gathered, strict=False):
            if by_expert:
                if node.meta["val"].shape[0] == 1 and axes.of(T) != 1:
                    node = builder.call(aten.expand.default, node, [own.meta["val"].shape[0], -1])  # type: ignore[union-attr]
                node = builder.call(aten.gather.default, node, 1, own)
            values[load] = node
        result = _emit(builder, term, values)
        return result if result.meta["val"].dtype == dtype else builder.call(aten._to_copy.default, result, dtype=dtype)

    return Computed(parts=bases, compute=compute, shape=axes.extents, dtype=dtype)


def _emit(builder: Any, term: Term, values: Mapping[Term, Any]) -> Any:
    """The nodes of a term; a number is itself."""
    if term in values:
        return values[term]
    if term.is_number:
        return int(term) if term.is_Integer else float(term)
    if type(term) in _UNARY:
        return builder.call(_UNARY[type(term)], _emit(builder, term.args[0], values))
    if type(term) in _FOLDED:
        return _fold(builder, *_FOLDED[type(term)], [_emit(builder, a, values) for a in term.args])
    if isinstance(term, sympy.Pow):
        return _power(builder, _emit(builder, term.args[0], values), term.args[1])
    raise Stop("route", f"the route's weights hold {type(term).__name__}, of which nothing is made here", None)


def _fold(builder: Any, of_tensors: Any, with_number: Any, operands: list[Any]) -> Any:
    tensors = [x for x in operands if isinstance(x, Node)]
    result = tensors[0]
    for x in tensors[1:]:
        result = builder.call(of_tensors, result, x)
    for x in operands:
        result = result if isinstance(x, Node) else builder.call(with_number, result, x)
    return result


def _power(builder: Any, base: Any, exponent: Term) -> Any:
    if exponent == -1:
        return builder.call(aten.reciprocal.default, base)
    if exponent == sympy.Rational(1, 2):
        return builder.call(aten.sqrt.default, base)
    if not exponent.is_number:
        raise Stop("route", "the route's weights hold a power that is no number", None)
    return builder.call(aten.pow.Tensor_Scalar, base, float(exponent))


def can_emit(term: Term) -> bool:
    """Whether there are operations for all of a term but its loads."""
    if isinstance(term, Load) or term.is_number:
        return True
    known = type(term) in _UNARY or type(term) in _FOLDED or (isinstance(term, sympy.Pow) and term.args[1].is_number)
    return known and not isinstance(term, Where) and all(can_emit(a) for a in term.args)

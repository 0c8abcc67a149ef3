"""ATen operations that are neither pointwise nor views, as terms: constants, choices, concatenations, gathers, cumulative sums.

    arange(a, b, c)[k] = a + c * k      cat([x, y])[k] = x[k] if k < len(x) else y[k - len(x)]      cumsum(full(c))[k] = c * (k + 1)

A rule returns the element of its node at an index, or None if it has none: then the tensor is loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from . import elementwise
from .contraction import BIASED, Dot
from .elementwise import as_condition, as_number
from .faithful import is_exact, is_finite_choice, rounded
from .terms import Load, NanToZero, Term, Where, integer_symbol, number, truth
from .viewmaps import Index, argument_term, from_the_start, is_float, shape_of, slice_start

if TYPE_CHECKING:
    from .expr import Interpreter

aten = torch.ops.aten

Rule = Callable[["Interpreter", Node, Index], "Term | None"]
RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, handler))
        return handler

    return register


def _scalar(value: Any) -> Term | None:
    if isinstance(value, Node):
        return argument_term(value) if isinstance(value.meta.get("val"), (int, torch.SymInt)) else None
    return truth(value) if isinstance(value, bool) else number(value)


def _of_dtype(node: Node, term: Term | None) -> Term | None:
    """A constant as the dtype of `node` holds it."""
    if term is None:
        return None
    dtype = node.meta["val"].dtype
    if dtype is torch.bool:
        return as_condition(term)
    term = as_number(term)
    return term if dtype.is_floating_point or term.is_integer else elementwise.truncate(term)


@_rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    position = 2 if node.target is aten.new_full.default else 1
    return _of_dtype(node, _scalar(node.args[position]))


@_rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _of_dtype(node, sympy.S.One)


@_rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _of_dtype(node, sympy.S.Zero)


@_rule(aten.scalar_tensor.default)
def _scalar_tensor(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _of_dtype(node, _scalar(node.args[0]))


@_rule(aten.eye.default, aten.eye.m)
def _eye(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _of_dtype(node, as_number(interpreter.ranges.compare(sympy.Eq, *index)))


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    start = sympy.S.Zero if node.target is aten.arange.default else _scalar(node.args[0])
    step = _scalar(node.args[2]) if len(node.args) > 2 else sympy.S.One
    return None if start is None or step is None else start + step * index[0]


@_rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
       aten._autocast_to_reduced_precision.default, aten._autocast_to_full_precision.default)  # fmt: skip
def _cast(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    source = node.args[0]
    term = interpreter.element(source, index)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if after is torch.bool:
        return as_condition(term) if is_exact(term) else None
    if before.is_floating_point and not after.is_floating_point:
        return as_number(term) if term.is_integer else None  # rounding decides which integer: leave it to the original
    if before.is_floating_point and torch.promote_types(before, after) is not after and not interpreter.is_sought(term):
        return interpreter.apply(lambda x: rounded(x, after), [term], True) if is_finite_choice(term) else None
    return as_number(term)


@_rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    condition, then, otherwise = (interpreter.argument(a, index) for a in node.args)
    return _choose(interpreter, node, condition, then, otherwise)


def _choose(interpreter: Interpreter, node: Node, condition: Term, then: Term, otherwise: Term) -> Term:
    if node.meta["val"].dtype is torch.bool:
        return interpreter.ranges.where(as_condition(condition), as_condition(then), as_condition(otherwise))
    return interpreter.ranges.where(as_condition(condition), as_number(then), as_number(otherwise))


@_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    term, mask, fill = (interpreter.argument(a, index) for a in node.args)
    return _choose(interpreter, node, mask, fill, term)


@_rule(aten.tril.default, aten.triu.default)
def _triangle(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    diagonal = _scalar(node.args[1]) if len(node.args) > 1 else sympy.S.Zero
    if diagonal is None:
        return None
    relation = sympy.Le if node.target is aten.tril.default else sympy.Ge
    inside = interpreter.ranges.compare(relation, index[-1], index[-2] + diagonal)
    zero = sympy.false if node.meta["val"].dtype is torch.bool else sympy.S.Zero
    return _choose(interpreter, node, inside, interpreter.element(node.args[0], index), zero)


@_rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _divide(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _quotient(interpreter, node, index, node.kwargs.get("rounding_mode"))


@_rule(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _quotient(interpreter, node, index, "floor")


def _quotient(interpreter: Interpreter, node: Node, index: Index, mode: str | None) -> Term | None:
    a, b = (as_number(interpreter.argument(x, index)) for x in node.args[:2])
    if mode is not None and not (a.is_integer and b.is_integer):
        return None
    return interpreter.apply(lambda x, y: elementwise.divide(interpreter.ranges, x, y, mode), [a, b], is_float(node))


@_rule(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    a, b = (as_number(interpreter.argument(x, index)) for x in node.args[:2])
    if not (a.is_integer and b.is_integer):
        return None
    return interpreter.apply(interpreter.ranges.modulo, [a, b])


@_rule(aten.nan_to_num.default)
def _nan_to_num(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    """Scores count as finite. What is loaded may be anything, and is left; probabilities are numbers or NaN."""
    term = interpreter.element(node.args[0], index)
    if not is_float(node):
        return term
    given = {"nan": None, "posinf": None, "neginf": None, **node.kwargs}
    given.update(zip(("nan", "posinf", "neginf"), node.args[1:], strict=False))
    nan = given["nan"] or 0.0
    if term.has(Load):
        return NanToZero(term) if nan == 0 and interpreter.is_sought(term) and not term.has(Dot) else None
    limits = torch.finfo(node.meta["val"].dtype)
    top = limits.max if given["posinf"] is None else given["posinf"]
    bottom = limits.min if given["neginf"] is None else given["neginf"]
    known = {sympy.nan: number(nan), sympy.oo: number(top), -sympy.oo: number(bottom)}
    if isinstance(term, sympy.Add):  # s + where(c, 0, -inf) as where(c, s, -inf)
        term = interpreter.apply(sympy.Add, list(term.args), True)
    result = interpreter.apply(lambda x: known.get(x, x), [term], True)
    return None if result.has(sympy.oo, -sympy.oo) else result


@_rule(aten.dropout.default, aten.native_dropout.default)
def _dropout(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    if node.target is aten.native_dropout.default or (node.args[1] != 0 and node.args[2]):
        return None
    return interpreter.element(node.args[0], index)


@_rule(aten.outer.default)
def _outer(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return sympy.Mul(*(as_number(interpreter.element(vector, (k,))) for vector, k in zip(node.args, index, strict=True)))


@_rule(aten.block_diag.default)
def _block_diag(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    """Inside of a block its element, outside zero."""
    if any(len(shape_of(part)) != 2 for part in node.args[0]):
        return None
    ranges, start = interpreter.ranges, [sympy.S.Zero, sympy.S.Zero]
    result = _of_dtype(node, sympy.S.Zero)
    for part in node.args[0]:
        end = [first + n for first, n in zip(start, shape_of(part), strict=True)]
        low = (ranges.compare(sympy.Ge, k, first) for k, first in zip(index, start, strict=True))
        high = (ranges.compare(sympy.Lt, k, last) for k, last in zip(index, end, strict=True))
        inside = sympy.And(*low, *high)
        if inside is not sympy.false:
            there = tuple(k - first for k, first in zip(index, start, strict=True))
            result = _choose(interpreter, node, inside, interpreter.branch(part, there), result)
        start = end
    return result


@_rule(aten.hstack.default, aten.vstack.default)
def _stacked(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    if any(len(shape_of(part)) < 2 for part in node.args[0]):
        return None
    return _concatenated(interpreter, node, index, 1 if node.target is aten.hstack.default else 0)


@_rule(aten.cat.default)
def _cat(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _concatenated(interpreter, node, index, wrap_dim(node.args[1] if len(node.args) > 1 else 0, len(index)))


def _concatenated(interpreter: Interpreter, node: Node, index: Index, dim: int) -> Term:
    parts = [p for p in node.args[0] if p.meta["val"].dim() == len(index)]
    offset: Term = sympy.S.Zero
    pieces = []
    for part in parts:
        size = shape_of(part)[dim]
        pieces.append((offset, size, part))
        offset = offset + size
    return _pick(interpreter, node, index, dim, pieces)


def _pick(interpreter: Interpreter, node: Node, index: Index, dim: int, pieces: list[tuple[Term, Term, Node]]) -> Term:
    """The element of the piece that `index[dim]` falls into: `Where(k < end, first piece, the rest)`."""
    start, size, part = pieces[0]
    k = index[dim]
    ranges = interpreter.ranges
    inside = sympy.true if len(pieces) == 1 else ranges.compare(sympy.Lt, k, sympy.expand(start + size))
    if inside is sympy.false:
        return _pick(interpreter, node, index, dim, pieces[1:])
    there = tuple(k - start if d == dim else i for d, i in enumerate(index))
    then = interpreter.branch(part, there)
    if inside is sympy.true:
        return then
    return _choose(interpreter, node, inside, then, _pick(interpreter, node, index, dim, pieces[1:]))


@_rule(aten.stack.default)
def _stack(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    dim = wrap_dim(node.args[1] if len(node.args) > 1 else 0, len(index))
    k = index[dim]
    rest = index[:dim] + index[dim + 1 :]
    result = interpreter.element(node.args[0][-1], rest)
    for position, part in reversed(list(enumerate(node.args[0][:-1]))):
        here = interpreter.ranges.compare(sympy.Eq, k, sympy.Integer(position))
        result = _choose(interpreter, node, here, interpreter.element(part, rest), result)
    return result


@_rule(aten.pad.default)
def _pad(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    mode, value = (*node.args[2:], *("constant", None)[len(node.args[2:]) :])  # type: ignore[misc]
    return _pad_with(interpreter, node, index, value) if mode == "constant" else None


@_rule(aten.constant_pad_nd.default)
def _constant_pad(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    return _pad_with(interpreter, node, index, node.args[2] if len(node.args) > 2 else None)


def _pad_with(interpreter: Interpreter, node: Node, index: Index, value: Any) -> Term | None:
    source, pads = node.args[0], node.args[1]
    fill = _of_dtype(node, sympy.S.Zero if value is None else _scalar(value))
    shape = shape_of(source)
    inside: Term = sympy.true
    there = list(index)
    for n in range(len(pads) // 2):
        dim = len(index) - 1 - n
        there[dim] = index[dim] - argument_term(pads[2 * n])
        low = interpreter.ranges.compare(sympy.Ge, there[dim], sympy.S.Zero)
        high = interpreter.ranges.compare(sympy.Lt, there[dim], shape[dim])
        inside = sympy.And(inside, low, high)
    return None if fill is None else _choose(interpreter, node, inside, interpreter.branch(source, tuple(there)), fill)


@_rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    source, positions = node.args
    used = [k for k, p in enumerate(positions) if p is not None]
    if not used or any(positions[k].meta["val"].dtype in (torch.bool, torch.uint8) for k in used):
        return None
    rank = max(positions[k].meta["val"].dim() for k in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    gathered, rest = index[at : at + rank], list(index[:at] + index[at + rank :])
    shape = shape_of(source)
    there: list[Term] = []
    for k in range(len(shape)):
        if k in used:
            there.append(_position(interpreter, positions[k], gathered, shape[k]))
        else:
            there.append(rest.pop(0))
    return interpreter.element(source, tuple(there))


def _position(interpreter: Interpreter, positions: Node, index: Index, size: Term) -> Term:
    """An index read from a tensor of positions; negative ones count from the end."""
    term = interpreter.argument(positions, index)
    known = from_the_start(term, size, interpreter.ranges)
    return Where(term < 0, term + size, term) if known is None else known


_GRIDS = (aten.meshgrid.default, aten.meshgrid.indexing)


def _swaps_first_two(grid: Node) -> bool:
    return "xy" in (*grid.args[1:], *grid.kwargs.values())


@_rule(operator.getitem)
def _subscript(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    """`x[p, q]` with positions that are tensors without dimensions, as a score_mod writes it; one grid of a meshgrid."""
    source, positions = node.args
    if source.target in _GRIDS:
        along = index[::-1] if _swaps_first_two(source) and len(index) == 2 else index
        return (
            None
            if _swaps_first_two(source) and len(index) > 2
            else interpreter.element(source.args[0][positions], (along[positions],))
        )
    positions = positions if isinstance(positions, (tuple, list)) else (positions,)
    if not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if not all(isinstance(p, Node) and isinstance(p.meta.get("val"), torch.Tensor) and p.meta["val"].dim() == 0 for p in positions):
        return None
    shape = shape_of(source)
    there = [_position(interpreter, p, (), size) for p, size in zip(positions, shape, strict=False)]
    return interpreter.element(source, (*there, *index))


@_rule(aten.gather.default)
def _gather(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    source, dim, positions = node.args[:3]
    dim = wrap_dim(dim, len(index))
    at = interpreter.element(positions, index)
    return interpreter.element(source, tuple(at if k == dim else i for k, i in enumerate(index)))


@_rule(aten.index_select.default)
def _index_select(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    source, dim, positions = node.args
    dim = wrap_dim(dim, len(index))
    at = interpreter.element(positions, (index[dim],))
    return interpreter.element(source, tuple(at if k == dim else i for k, i in enumerate(index)))


@_rule(aten.embedding.default)
def _embedding(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    weight, positions = node.args[:2]
    return interpreter.element(weight, (interpreter.element(positions, index[:-1]), index[-1]))


@_rule(aten.diff.default)
def _diff(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    """`y[k] = x[k + 1] - x[k]` of the input with what is prepended; only the first difference, with nothing appended."""
    source, order, dim, prepend, appended = (*node.args, *[None] * 5)[:5]
    dim = wrap_dim(-1 if dim is None else dim, len(index))
    if order not in (None, 1) or appended is not None or not isinstance(source, Node):
        return None
    length = sympy.S.Zero if prepend is None else shape_of(prepend)[dim]

    def at(k: Term) -> Term:
        pieces = [] if prepend is None else [(sympy.S.Zero, length, prepend)]
        pieces.append((length, shape_of(source)[dim], source))
        return _pick(interpreter, node, tuple(k if d == dim else i for d, i in enumerate(index)), dim, pieces)

    if node.meta["val"].dtype is torch.bool or is_float(node):  # infinities do not cancel
        return None
    later, earlier = at(sympy.expand(index[dim] + 1)), at(index[dim])
    return interpreter.apply(lambda a, b: sympy.expand(a - b), [later, earlier])


@_rule(aten.cumsum.default)
def _cumsum(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    """The cumulative sum of a constant c is c * (k + 1); of anything else it is loaded."""
    source = node.args[0]
    dim = wrap_dim(node.args[1], len(index)) if index else 0
    any_position = integer_symbol(f"k{interpreter.nesting}")
    interpreter.ranges.add(any_position, shape_of(source)[dim] if index else sympy.S.One)
    term = as_number(interpreter.element(source, tuple(any_position if d == dim else i for d, i in enumerate(index))))
    return term * (index[dim] + 1 if index else 1) if term.is_number else None


@_rule(aten.slice_scatter.default)
def _slice_scatter(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    target, source = node.args[:2]
    dim = wrap_dim(node.args[2] if len(node.args) > 2 else 0, len(index))
    start = slice_start(node.args[3] if len(node.args) > 3 else None, shape_of(node)[dim], interpreter.ranges)
    if start is None or (len(node.args) > 5 and node.args[5] != 1):
        return None
    size = shape_of(source)[dim]
    ranges, k = interpreter.ranges, index[dim]
    inside = sympy.And(ranges.compare(sympy.Ge, k, start), ranges.compare(sympy.Lt, k, start + size))
    if inside is sympy.false:
        return interpreter.element(target, index)
    then = interpreter.branch(source, tuple(k - start if d == dim else i for d, i in enumerate(index)))
    return then if inside is sympy.true else _choose(interpreter, node, inside, then, interpreter.element(target, index))


def wrap_dim(dim: int, rank: int) -> int:
    """A dimension counted from the end if it is negative."""
    return dim + rank if dim < 0 else dim


@_rule(*BIASED)
def _biased(interpreter: Interpreter, node: Node, index: Index) -> Term | None:
    """`beta * bias + alpha * Dot`."""
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    interpreter.loaded[node.name] = node
    product = number(alpha) * Dot(sympy.Symbol(node.name), *index)
    if beta == 0:
        return product
    return number(beta) * as_number(interpreter.argument(node.args[0], index)) + product

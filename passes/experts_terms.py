"""Elements of routed tensors: index expressions in which rows are chosen by ids, sorted by them, and brought back.

    sort(ids)[0][m]                = ids[P(m)],  P = sort(ids)[1]           out[P] = y:  out[n] = y[P^-1(n)],  P(P^-1(n)) = n
    scatter(f, 1, ids, v)[t, e]    = where(any_s ids[t,s] == e, sum_s where(ids[t,s] == e, v[t,s], 0), f[t,e])
    one_hot(ids)[t, s, e]          = where(ids[t,s] == e, 1, 0)
    grouped_mm(x, W, offs)[m, c]   = sum_r x[m, r] W[group of m, r, c]

The interpreter goes back from an element to the tensors that the layer was given, and no further: a tensor that is read at a token,
at a token and its slot, or at a token and an expert is one, unless it is made from ids (as dense weights are) or from products.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import And, BooleanFunction, Not, Or
from torch.fx import Node

from effcompile import elementwise
from effcompile.contraction import Dot, contraction_of
from effcompile.expr import Interpreter
from effcompile.ranges import Bound, Ranges
from effcompile.rules import wrap_dim
from effcompile.terms import IntLoad, Sigmoid, Term, Where, integer_symbol, number
from effcompile.viewmaps import Index, broadcast, is_float, shape_of, view_source

from .experts_nodes import LINEAR, REDUCTIONS, Facts, argument, bound_of, is_grouped, is_permutation, is_pointwise

aten = torch.ops.aten

T, Z, C, F, R = (integer_symbol(name) for name in ("t", "z", "c", "f", "r"))
FEATURES = frozenset({C, F, R})


class Inverse(sympy.Function):
    """`Inverse(P, n)`: where the permutation P holds n."""

    is_integer = True
    is_nonnegative = True


class Place(sympy.Function):
    """`Place(mask, n, ...)`: in which row of `nonzero(mask)` the element [n, ...] of the mask stands, if it is not zero."""

    is_integer = True
    is_nonnegative = True


class Group(sympy.Function):
    """`Group(offsets, m)`: how many of the offsets are at most m."""

    is_integer = True
    is_nonnegative = True


class SlotSum(sympy.Function):
    """`SlotSum(z, x)`: the sum of x over the slots z of a token."""

    is_real = True


class SlotAny(BooleanFunction):
    """`SlotAny(z, x)`: whether x holds for any slot z of a token."""


class RowRanges(Ranges):
    """Ranges that also know the bounds of what integer tensors hold, by the name of the tensor."""

    def __init__(self, bounds: Mapping[sympy.Symbol, tuple[Term, Term]], loads: dict[str, tuple[Bound, Bound]]):
        super().__init__(bounds)
        self.loads = loads

    def _find(self, term: Term) -> tuple[Bound, Bound]:
        if isinstance(term, IntLoad):
            return self.loads.get(term.tensor, (None, None))
        if isinstance(term, (Inverse, Group)):
            return sympy.S.Zero, None
        if isinstance(term, Place):
            return self.loads.get(f"place in {term.args[0]}", (sympy.S.Zero, None))
        return super()._find(term)

    def given(self, condition: Term) -> RowRanges:
        return RowRanges(super().given(condition)._bounds, self.loads)

    def holding(self, tensor: str, low: Bound, high: Bound) -> RowRanges:
        """These ranges, with what a tensor holds."""
        return RowRanges(self._bounds, {**self.loads, tensor: (low, high)})

    def choosing(self, mask: Node, count: Term) -> None:
        """Note how many elements a mask chooses."""
        self.loads[f"place in {mask.name}"] = (sympy.S.Zero, count - 1)

    def pruned(self, term: Term) -> Term:
        """A maximum or minimum without the arguments that another one bounds."""
        if not isinstance(term, (sympy.Max, sympy.Min)) or not all(a.is_integer for a in term.args):
            return term
        sign = 1 if isinstance(term, sympy.Max) else -1
        kept = list(term.args)
        for part in term.args:
            if any(x is not part and self.is_nonnegative(sympy.expand(sign * (x - part))) for x in kept):
                kept.remove(part)
        return term.func(*kept)


def slot_of(size: Term) -> sympy.Symbol:
    """The bound symbol of sums over that many slots."""
    return integer_symbol(f"slot_{size}")


class RowInterpreter(Interpreter):
    """Evaluates elements of the nodes of a layer of experts."""

    ranges: RowRanges

    def __init__(self, ranges: RowRanges, facts: Facts, is_opaque: Callable[[Node], bool] = lambda node: False):
        super().__init__(ranges, is_opaque)
        self.facts = facts

    def load(self, node: Node, index: Index) -> Term:
        if is_permutation(node) and len(index) == 1 and isinstance(index[0], Inverse) and str(index[0].args[0]) == node.name:
            return index[0].args[1]
        size = bound_of(node)
        if size is not None:
            self.ranges.loads.setdefault(node.name, (sympy.S.Zero, size - 1))
        return super().load(node, index)

    def _evaluate(self, node: Node, index: Index) -> Term:
        if node.op != "call_function" or self.is_opaque(node):
            return super()._evaluate(node, index)
        viewed = view_source(node, index, self.ranges)
        if viewed is not None:
            return self.element(*viewed)
        rule = ROW_RULES.get(node.target) or (_grouped if is_grouped(node) else None)
        if rule is not None:
            found = rule(self, node, index)
            return self.load(node, index) if found is None else found
        if contraction_of(node) is not None:
            return self._contracted(node, index) or self.product(node, index)
        if is_float(node) and not self.goes_on(node, index):
            return self.load(node, index)
        return self.ranges.pruned(super()._evaluate(node, index))

    def product(self, node: Node, index: Index) -> Term:
        """An element of a product, by itself."""
        self.loaded[node.name] = node
        return Dot(sympy.Symbol(node.name), *index)

    def _contracted(self, node: Node, index: Index) -> Term | None:
        """A contraction over the slots of a token, of what depends on whether a slot's id is the expert."""
        if features_of(index) or not self.facts.is_made_of_ids(node):
            return None
        found = contraction_of(node)
        assert found is not None
        size = found.size(found.summed)
        slot = slot_of(size)
        self.ranges.add(slot, size)
        sides = (self.element(found.operands[k], found.operand_index(k, index, slot)) for k in (0, 1))
        return over_slots(sympy.Mul(*(elementwise.as_number(x) for x in sides)), slot, "sum")

    def goes_on(self, node: Node, index: Index) -> bool:
        """Whether to look through a node rather than read from it: see the module."""
        if node.target in CONSTANTS:
            return True
        features = features_of(index)
        if not features:
            return not is_plain(index) or (is_pointwise(node) and self.facts.is_made_of_ids(node))
        if features != {R}:
            of_token = len(features) > 1 and any(term.has(T) for term in index)  # as a matrix is only where it was copied for each
            return node.target in MOVING or of_token or (len(features) == 1 and self.facts.holds_product(node))
        return not is_token(index) or (is_pointwise(node) and any(self._weighs(x, index) for x in node.all_input_nodes))

    def _weighs(self, operand: Node, index: Index) -> bool:
        """Whether an operand is one number for each row, made from ids."""
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            return False
        own = broadcast(index, shape_of(operand))
        return not any(term.has(R) for term in own) and self.facts.is_made_of_ids(operand)


CONSTANTS = frozenset({
    aten.full.default, aten.full_like.default, aten.new_full.default, aten.zeros.default, aten.zeros_like.default,
    aten.new_zeros.default, aten.ones.default, aten.ones_like.default, aten.new_ones.default, aten.scalar_tensor.default,
})  # fmt: skip
MOVING = frozenset({
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_select.default, aten.embedding.default, aten.gather.default,
})  # fmt: skip


def features_of(index: Index) -> set[Any]:
    """The index symbols of channels in an index."""
    return {symbol for term in index for symbol in term.free_symbols} & FEATURES


def is_plain(index: Index) -> bool:
    """Whether an index is a polynomial of index symbols, in which nothing is looked up."""
    return not any(term.has(IntLoad, Inverse, Group, Place) for term in index)


def is_token(index: Index) -> bool:
    """Whether an index says which token, but neither slot nor expert."""
    return is_plain(index) and not any(term.has(Z) for term in index)


# -------------------------------------------------------------------- what sorts, and what is put back


Rule = Callable[[RowInterpreter, Node, Index], "Term | None"]
ROW_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(handler: Rule) -> Rule:
        ROW_RULES.update(dict.fromkeys(targets, handler))
        return handler

    return register


@_rule(operator.getitem)
def _part(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """The sorted values are the values, where the order has them; the order of a permutation is its inverse."""
    source, part = node.args
    if not (isinstance(source, Node) and source.target in (aten.sort.default, aten.sort.stable)):
        return None
    if part == 1:
        return _order(rows, node, index, source)
    order = next((user for user in source.users if user.target is operator.getitem and user.args[1] == 1), None)
    if is_float(node) or order is None:
        return None
    dim = wrap_dim(argument(source, "dim", -1), len(index))
    position = rows.element(order, index)
    return rows.element(source.args[0], tuple(position if k == dim else i for k, i in enumerate(index)))  # type: ignore[arg-type]


@_rule(aten.argsort.default, aten.argsort.stable)
def _argsort(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    return _order(rows, node, index, node)


def _order(rows: RowInterpreter, node: Node, index: Index, sort: Node) -> Term | None:
    permutation = _permutation_behind(sort.args[0])
    if permutation is None or argument(sort, "descending", False):
        return None
    rows.loaded[permutation.name] = permutation
    return _inverse(permutation, index[0])


def _inverse(permutation: Node, n: Term) -> Term:
    if isinstance(n, IntLoad) and n.tensor == permutation.name:
        return n.indices[0]
    return Inverse(sympy.Symbol(permutation.name), n)


def _permutation_behind(node: Any) -> Node | None:
    """The permutation that a node is, through copies and casts of integers."""
    while isinstance(node, Node) and not is_permutation(node):
        if node.target not in _COPYING or is_float(node):
            return None
        node = node.args[0]
    return node if isinstance(node, Node) else None


_COPYING = (aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default, aten.detach.default)


@_rule(aten.index_put.default)
def _put(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """`out[P] = y` for a permutation P of all rows."""
    base, positions, values = node.args[:3]
    if argument(node, "accumulate", False) or len(positions) != 1:  # type: ignore[arg-type]
        return None
    return _put_back(rows, base, positions[0], values, index)  # type: ignore[index]


@_rule(aten.index_copy.default)
def _copied(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    base, dim, positions, values = node.args
    return None if wrap_dim(dim, len(index)) else _put_back(rows, base, positions, values, index)  # type: ignore[arg-type]


def _put_back(rows: RowInterpreter, base: Any, positions: Any, values: Any, index: Index) -> Term | None:
    permutation = _permutation_behind(positions)
    if permutation is None or shape_of(base)[0] != shape_of(permutation)[0]:
        return None
    rows.loaded[permutation.name] = permutation
    return rows.argument(values, (_inverse(permutation, index[0]), *index[1:]))


# -------------------------------------------------------------------- what a mask chooses


@_rule(aten.nonzero.default)
def _nonzero(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    at = _place_in(node.args[0], index[0])
    return None if at is None or not index[1].is_Integer else at[int(index[1])]


@_rule(aten.index.Tensor)
def _indexed(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """`x[mask]`, or as any index says."""
    source, positions = node.args
    mask = positions[0] if len(positions) == 1 else None  # type: ignore[arg-type, index]
    if not isinstance(mask, Node) or mask.meta["val"].dtype is not torch.bool:
        through = rows.goes_on(node, index) or not is_float(node)
        return rows.ranges.pruned(Interpreter._evaluate(rows, node, index)) if through else None
    at = _place_in(mask, index[0])
    return None if at is None else rows.element(source, (*at, *index[1:]))  # type: ignore[arg-type]


def _place_in(mask: Any, row: Term) -> Index | None:
    """Where in a mask the element stands that a row of what it chose is of."""
    return row.args[1:] if isinstance(row, Place) and str(row.args[0]) == mask.name else None


# -------------------------------------------------------------------- what ids make


@_rule(aten.one_hot.default)
def _one_hot(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    return elementwise.as_number(rows.ranges.compare(sympy.Eq, rows.element(node.args[0], index[:-1]), index[-1]))  # type: ignore[arg-type]


@_rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def _scatter(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """What lands on an element comes from the slots whose id it has. If several land, any of them may be what is left."""
    base, dim, positions, values = node.args[:4]
    dim = wrap_dim(dim, len(index))  # type: ignore[arg-type]
    along = _permutation_of_rows(rows, positions, dim, base)  # type: ignore[arg-type]
    if along is not None and isinstance(values, Node) and node.target is aten.scatter.src:
        return rows.element(values, (_inverse(along, index[0]), *index[1:]))
    if features_of(index) or not _same_but(dim, base, positions):  # type: ignore[arg-type]
        return None
    size = shape_of(positions)[dim]  # type: ignore[arg-type]
    slot = slot_of(size) if size != 1 else sympy.S.Zero
    at = tuple(slot if k == dim else i for k, i in enumerate(index))
    if size != 1:
        rows.ranges.add(slot, size)
    here = rows.ranges.compare(sympy.Eq, rows.element(positions, at), index[dim])  # type: ignore[arg-type]
    value = rows.argument(values, at) if isinstance(values, Node) else number(values)  # type: ignore[arg-type]
    landed = elementwise.as_number(value)
    if size != 1:
        landed = SlotSum(slot, Where(here, landed, sympy.S.Zero)) if isinstance(values, Node) else landed
        here = SlotAny(slot, here)
    before = rows.element(base, index)  # type: ignore[arg-type]
    if node.meta["val"].dtype is torch.bool:
        after = elementwise.as_condition(landed)
        return Or(And(here, after), And(Not(here), elementwise.as_condition(before)))
    if node.target is aten.scatter_add.default:
        landed = landed + before
    return Where(here, landed, elementwise.as_number(before))


def _permutation_of_rows(rows: RowInterpreter, positions: Node, dim: int, base: Node) -> Node | None:
    """The permutation by which whole rows are put back."""
    shape = shape_of(positions)
    if dim != 0 or shape != shape_of(base):
        return None
    symbols = tuple(integer_symbol(f"x{k}") for k in range(len(shape)))
    for symbol, size in zip(symbols, shape, strict=True):
        rows.ranges.add(symbol, size)
    term = rows.element(positions, symbols)
    named = isinstance(term, IntLoad) and term.indices == symbols[:1]
    found = rows.loaded.get(term.tensor) if named else None  # type: ignore[attr-defined]
    return found if found is not None and is_permutation(found) else None


def _same_but(dim: int, base: Node, positions: Node) -> bool:
    shapes = zip(shape_of(base), shape_of(positions), strict=True)
    return all(k == dim or a == b for k, (a, b) in enumerate(shapes))


@_rule(*REDUCTIONS)
def _reduced(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """A sum, or `any`, over the slots of a token, of what depends on whether a slot's id is the expert."""
    source = node.args[0]
    if features_of(index) or not rows.facts.is_made_of_ids(source):  # type: ignore[arg-type]
        return None
    shape = shape_of(source)  # type: ignore[arg-type]
    dims = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if dims is None or len(dims) != 1:  # type: ignore[arg-type]
        return None
    dim = wrap_dim(dims[0], len(shape))  # type: ignore[index]
    keepdim = argument(node, "keepdim", False)
    rest = [i for k, i in enumerate(index) if not (keepdim and k == dim)]
    size = shape[dim]
    slot = slot_of(size) if size != 1 else sympy.S.Zero
    if size != 1:
        rows.ranges.add(slot, size)
    inner = rows.element(source, (*rest[:dim], slot, *rest[dim:]))  # type: ignore[arg-type]
    if size == 1:
        return inner if REDUCTIONS[node.target] == "any" else elementwise.as_number(inner)
    return over_slots(inner, slot, REDUCTIONS[node.target])


def over_slots(inner: Term, slot: sympy.Symbol, kind: str) -> Term | None:
    """The sum, maximum or disjunction over slots of what is zero where the slot's id is another; None if it is not."""
    own = [x for x in inner.atoms(sympy.Eq) if any(a.has(IntLoad) and a.has(slot) for a in x.args)]
    if not own:
        return None
    others = inner.xreplace(dict.fromkeys(own, sympy.false))
    if kind == "sum":
        return SlotSum(slot, elementwise.as_number(inner)) if others in (0, sympy.false) else None
    condition = elementwise.as_condition(inner)
    if others not in (0, sympy.false) or (kind == "max" and elementwise.as_number(condition) != elementwise.as_number(inner)):
        return None
    return SlotAny(slot, condition) if kind == "any" else elementwise.as_number(SlotAny(slot, condition))


@_rule(aten.softmax.int, aten._softmax.default)
def _softmax(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """Zero where the logit is -inf."""
    source = node.args[0]
    if features_of(index) or not rows.facts.is_made_of_ids(source):  # type: ignore[arg-type]
        return None
    logit = rows.element(source, index)  # type: ignore[arg-type]
    if not isinstance(logit, Where) or -sympy.oo not in logit.args[1:]:
        return None
    weight = rows.load(node, index)
    then, otherwise = (sympy.S.Zero if a == -sympy.oo else weight for a in logit.args[1:])
    return Where(logit.args[0], then, otherwise)


# -------------------------------------------------------------------- products, casts, activations


@_rule(*LINEAR)
def _linear(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """With its bias, which belongs to the expert as its matrix does."""
    return rows.product(node, index)


def _grouped(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    bias = argument(node, "bias", None)
    return rows.product(node, index) if bias is None else None


@_rule(aten.baddbmm.default, aten.addmm.default)
def _biased(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    beta, alpha = (number(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    product = alpha * rows.product(node, index)
    return product if beta == 0 else product + beta * rows.argument(node.args[0], index)


@_rule(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
       aten._autocast_to_reduced_precision.default, aten._autocast_to_full_precision.default)  # fmt: skip
def _cast(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    """Between floating-point dtypes a cast rounds at most, which the operation does at its own places."""
    source = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if before.is_floating_point and after.is_floating_point and before != after and not rows.goes_on(node, index):
        return None
    if before.is_floating_point and after is torch.bool:
        term = rows.element(source, index)  # type: ignore[arg-type]
        return elementwise.as_condition(term) if isinstance(term, Where) else None
    if before.is_floating_point and not after.is_floating_point:
        term = rows.element(source, index)  # type: ignore[arg-type]
        return elementwise.as_number(term) if term.is_integer else None
    return elementwise.as_number(rows.element(source, index)) if after is not torch.bool else rows.element(source, index)  # type: ignore[arg-type]


@_rule(aten.gelu.default)
def _gelu(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    if not rows.goes_on(node, index):
        return None
    x = rows.element(node.args[0], index)  # type: ignore[arg-type]
    if argument(node, "approximate", "none") == "tanh":
        return x / 2 * (1 + sympy.tanh(sympy.Float(math.sqrt(2 / math.pi)) * (x + sympy.Float(0.044715) * x**3)))
    return x / 2 * (1 + sympy.erf(sympy.Float(math.sqrt(0.5)) * x))


@_rule(aten.leaky_relu.default)
def _leaky_relu(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    if not rows.goes_on(node, index):
        return None
    x = rows.element(node.args[0], index)  # type: ignore[arg-type]
    return Where(x > 0, x, number(argument(node, "negative_slope", 0.01)) * x)


@_rule(aten.glu.default)
def _glu(rows: RowInterpreter, node: Node, index: Index) -> Term | None:
    source = node.args[0]
    dim = wrap_dim(argument(node, "dim", -1), len(index))
    half = shape_of(node)[dim]
    other = rows.element(source, tuple(i + half if k == dim else i for k, i in enumerate(index)))  # type: ignore[arg-type]
    return rows.element(source, index) * Sigmoid(other)  # type: ignore[arg-type]

"""From a sum over experts or slots to its parts: which products, of what, and what stands around them.

    out[t, c] = sum_z a (sum_f A[f] D[e, f, c] + b[c]),   A[f] = act(sum_r X[r] U[e, r, f] + ..., ...)

`a`, `b`, A and X are terms over the token t and z, which counts the slots of a token or all experts; or there is no z, and the sum
is spelled out, one expert after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import is_tensor_node
from effcompile.contraction import Dot, contraction_of
from effcompile.elementwise import as_number
from effcompile.pattern import describe
from effcompile.rules import wrap_dim
from effcompile.terms import FloorDiv, IntLoad, Load, Modulo, Term, Where
from effcompile.viewmaps import Index, reshape, shape_of

from .experts_chosen import chosen_summands
from .experts_nodes import LINEAR, argument, bound_of, is_grouped, is_permutation
from .experts_terms import C, F, Group, Inverse, R, RowInterpreter, T, Z, features_of
from .specify import Stop

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Side:
    """An operand of a product, at the index that an element of the product has it."""

    node: Node
    index: Index


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A product of rows with a matrix of the expert: `rows` is the element of its rows, `matrix` that of its matrix.

    `column` is the symbol of the product's columns, and `bias` the element of what a Linear adds.
    """

    term: Dot
    node: Node
    rows: Term
    matrix: Load
    bias: Term | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One summand: `scale * down + added`; `up` are the projections in the rows of `down`."""

    scale: Term
    added: Term
    down: Projection
    up: tuple[Projection, ...]


# -------------------------------------------------------------------- what is added up


@dataclass(frozen=True, kw_only=True)
class Total:
    """The summands of a result [rows..., c]; `count` is how many values z has, None where the sum is spelled out.

    `rest` are nodes that are added too, which no expert has to do with.
    """

    summands: tuple[Term, ...]
    count: Term | None
    rest: tuple[Node, ...] = ()


def total_of(rows: RowInterpreter, anchor: Node) -> Total:
    """What an anchor adds up.

    Raises:
        Stop: it adds up over something else than slots or experts.
    """
    shape = shape_of(anchor)
    if len(shape) < 2:
        raise Stop("anchor", "the sum has no rows", anchor)
    tokens = sympy.Mul(*shape[:-1])
    rows.ranges.add(T, tokens)
    rows.ranges.add(C, shape[-1])
    at = reshape((T,), (tokens,), shape[:-1], rows.ranges)
    if anchor.target is aten.sum.dim_IntList:
        return _summed(rows, anchor, at)
    if anchor.target in _ACCUMULATES:
        return _accumulated(rows, anchor, at)
    if contraction_of(anchor) is not None:
        return _contracted(rows, anchor, at)
    return _spelled_out(rows, anchor, at)


_ACCUMULATES = (aten.index_add.default, aten.scatter_add.default, aten.index_put.default)


def _spelled_out(rows: RowInterpreter, anchor: Node, at: Index) -> Total:
    """What a chain of additions adds up, one by one."""
    summands: list[Term] = []
    rest = []
    for leaf in _leaves(anchor):
        term = rows.element(leaf, (*at, C)) if rows.facts.is_made_of_ids(leaf) or not rows.facts.holds_product(leaf) else None
        if term is not None and (term == 0 or term.has(Dot)):
            summands += sympy.Add.make_args(as_number(term)) if term != 0 else ()
        else:
            rest.append(leaf)
    return Total(summands=tuple(summands), count=None, rest=tuple(rest))


def _leaves(anchor: Node) -> list[Node]:
    """What is added up by additions of tensors of one shape and dtype that nothing else needs."""
    found, stack = [], [anchor]
    while stack:
        node = stack.pop()
        own = node is anchor or len(node.users) == 1
        if node.target is aten.add.Tensor and not node.kwargs and own and all(_is_alike(x, anchor) for x in node.args):
            stack += node.args[::-1]  # type: ignore[arg-type]
        else:
            found.append(node)
    return found


def _is_alike(x: Any, anchor: Node) -> bool:
    if not is_tensor_node(x) or shape_of(x) != shape_of(anchor):
        return False
    return bool(x.meta["val"].dtype == anchor.meta["val"].dtype)


def _summed(rows: RowInterpreter, anchor: Node, at: Index) -> Total:
    source: Any = anchor.args[0]
    dims = [wrap_dim(d, len(shape_of(source))) for d in (anchor.args[1] or ())]  # type: ignore[union-attr]
    if len(dims) != 1 or argument(anchor, "keepdim", False) or dims[0] == len(shape_of(source)) - 1:
        raise Stop("anchor", "the sum is not over one dimension before the channels", anchor)
    count = shape_of(source)[dims[0]]

    def summand(z: Term) -> Term:
        index = (*at, C)
        return rows.element(source, (*index[: dims[0]], z, *index[dims[0] :]))

    return _over(rows, count, summand)


def _contracted(rows: RowInterpreter, anchor: Node, at: Index) -> Total:
    found = contraction_of(anchor)
    assert found is not None
    last = found.out[-1]
    sides = [k for k in (0, 1) if last in found.letters[k] and last not in found.letters[1 - k]]
    if len(sides) != 1:
        raise Stop("anchor", "the contraction has no channels", anchor)
    weights = 1 - sides[0]
    own = [x for x in found.own(weights) if found.operands[weights].meta["val"].shape[found.letters[weights].index(x)] != 1]
    if own:
        raise Stop("anchor", "the contraction is not of one weight for each slot or expert", anchor)
    index = (*at, C)
    return _over(
        rows,
        found.size(found.summed),
        lambda z: sympy.Mul(*(as_number(rows.element(found.operands[k], found.operand_index(k, index, z))) for k in (0, 1))),
    )


def _over(rows: RowInterpreter, count: Term, summand: Any) -> Total:
    """The summand at z; spelled out where each z is a tensor of its own."""
    rows.ranges.add(Z, count)
    term = as_number(summand(Z if count != 1 else sympy.S.Zero))
    chosen = any(Z in x.free_symbols and not x.has(Load) for x in term.atoms(sympy.core.relational.Relational))
    if not chosen or not count.is_Integer:
        return Total(summands=(term,), count=count)
    parts = [as_number(summand(sympy.Integer(z))) for z in range(int(count))]
    return Total(summands=tuple(x for part in parts for x in sympy.Add.make_args(part)), count=None)


def _accumulated(rows: RowInterpreter, anchor: Node, at: Index) -> Total:
    """`zeros.index_add(0, tokens, y)` where row m of y is one slot of one token: each slot of a token once."""
    chosen = chosen_summands(rows, anchor)
    if chosen is not None:
        summands, start = chosen
        rest = () if rows.element(start, (*at, C)) == 0 else (start,)
        return Total(summands=tuple(x for term in summands for x in sympy.Add.make_args(term)), count=None, rest=rest)
    base, positions, values = _landing(anchor)
    if base is None:
        raise Stop("anchor", "it adds to what is not a row of the result", anchor)
    if rows.element(base, (*at, C)) != 0:
        raise Stop("combine", "the experts' results are added to something else than zeros", anchor)
    if len(at) != 1:
        raise Stop("combine", "the experts' results are added up in more than rows of tokens", anchor)
    m = sympy.Symbol("m", integer=True, nonnegative=True)
    size = shape_of(values)[0]
    rows.ranges.add(m, size)
    token = rows.element(positions, (m, C)[: len(shape_of(positions))])
    where, count = _row_of(rows, token, m, size, shape_of(anchor)[0], anchor)
    rows.ranges.add(Z, count)
    row = where.xreplace({Z: sympy.S.Zero}) if count == 1 else where
    return Total(summands=(as_number(rows.element(values, (row, C))),), count=count)


def _landing(anchor: Node) -> tuple[Any, Any, Any]:
    """`(base, positions, values)` of an accumulation along the first dimension."""
    if anchor.target is aten.index_put.default:
        base, positions, values = anchor.args[:3]
        if not argument(anchor, "accumulate", False) or len(positions) != 1:  # type: ignore[arg-type]
            return None, None, None
        return base, positions[0], values  # type: ignore[index]
    base, dim, positions, values = anchor.args[:4]
    along = dim == 0 and argument(anchor, "alpha", 1) == 1
    return (base, positions, values) if along else (None, None, None)


def _row_of(rows: RowInterpreter, token: Term, m: Term, size: Term, tokens: Term, anchor: Node) -> tuple[Term, Term]:
    """The row of slot z of token t, where row m is of token `token`, and how many slots there are."""
    found = [x for x in token.atoms(IntLoad) if is_permutation(rows.loaded[x.tensor]) and x.indices == (m,)]
    source = found[0] if found else m
    q = sympy.Dummy(integer=True, nonnegative=True)
    shape = token.xreplace({source: q})
    if shape == q:
        position, count = T, sympy.S.One
    elif isinstance(shape, FloorDiv) and shape.args[0] == q and sympy.expand(shape.args[1] * tokens - size) == 0:
        count = shape.args[1]
        position = T * count + Z
    elif isinstance(shape, Modulo) and shape.args[0] == q and shape.args[1] == tokens:
        quotient = size / tokens
        count, position = quotient, T + tokens * Z
    elif any(bound_of(rows.loaded[x.tensor]) == tokens for x in token.atoms(IntLoad)):
        why = "experts choose their tokens (expert choice): a token may have any number of experts, the operation has k"
        raise Stop("combine", why, anchor)
    else:
        raise Stop("combine", "which token a row is added to is not known from its place", anchor)
    return (Inverse(sympy.Symbol(found[0].tensor), position) if found else position), count


# -------------------------------------------------------------------- products


def read(rows: RowInterpreter, summand: Term, anchor: Node) -> Reading:
    """The parts of a summand.

    Raises:
        Stop: it is not linear in one product with a matrix, whose rows are made of other such products.
    """
    products = summand.atoms(Dot)
    if len({x.node_name for x in products}) != 1 or len(products) != 1:
        raise Stop("anchor", "what is added up is no multiple of one projection", anchor)
    term = next(iter(products))
    parts = linear_in(summand, term)
    if parts is None:
        raise Stop("anchor", "what is added up is not linear in a projection", anchor)
    down = projection(rows, term, F, C, anchor)
    inner = sorted(down.rows.atoms(Dot), key=sympy.default_sort_key)
    if not inner:
        raise Stop("anchor", "the projection is not of another one", anchor)
    up = tuple(projection(rows, x, R, F, anchor) for x in inner)
    return Reading(scale=parts[0], added=parts[1], down=down, up=up)


def linear_in(term: Term, x: Term) -> tuple[Term, Term] | None:
    """`(a, b)` with `term = a * x + b`."""
    if term == x:
        return sympy.S.One, sympy.S.Zero
    if not term.has(x):
        return sympy.S.Zero, term
    if isinstance(term, sympy.Add):
        parts = [linear_in(a, x) for a in term.args]
        if any(p is None for p in parts):
            return None
        return sympy.Add(*(p[0] for p in parts)), sympy.Add(*(p[1] for p in parts))  # type: ignore[index]
    if isinstance(term, sympy.Mul):
        inside = [a for a in term.args if a.has(x)]
        part = linear_in(inside[0], x) if len(inside) == 1 else None
        rest = term / inside[0]
        return None if part is None else (part[0] * rest, part[1] * rest)
    if isinstance(term, Where) and not term.args[0].has(x):
        branches = [linear_in(a, x) for a in term.args[1:]]
        if any(p is None for p in branches):
            return None
        return tuple(Where(term.args[0], *(p[k] for p in branches)) for k in (0, 1))  # type: ignore[index, return-value]
    return None


def projection(rows: RowInterpreter, term: Dot, summed: Any, column: Any, anchor: Node) -> Projection:
    """A product as rows times a matrix.

    Raises:
        Stop: neither operand is a matrix whose columns are the product's.
    """
    node = rows.loaded[term.node_name]
    sides = _sides(rows, node, term.index, summed)
    elements = []
    for side in sides:
        found = rows.element(side.node, side.index)
        elements.append(found)
    for k, found in enumerate(elements):
        if isinstance(found, Load) and any(i.has(column) for i in found.indices) and summed in found.indices:
            return Projection(term=term, node=node, rows=elements[1 - k], matrix=found, bias=_bias(rows, node, term))
    raise Stop("anchor", f"{describe(node)} is no product with a matrix of weights", anchor)


def _sides(rows: RowInterpreter, node: Node, index: Index, summed: Any) -> tuple[Side, Side]:
    if is_grouped(node):
        matrix: Any = argument(node, "mat2", None) or node.args[1]
        offsets = next(x for x in (argument(node, "offs", None), *node.args[2:]) if isinstance(x, Node))
        rows.loaded[offsets.name] = offsets
        rows.ranges.add(summed, shape_of(matrix)[1])
        group = Group(sympy.Symbol(offsets.name), index[0])
        return Side(node=node.args[0], index=(index[0], summed)), Side(node=matrix, index=(group, summed, index[1]))  # type: ignore[arg-type]
    if node.target in LINEAR:
        source, matrix = node.args[:2]
        rows.ranges.add(summed, shape_of(matrix)[1])  # type: ignore[arg-type]
        return Side(node=source, index=(*index[:-1], summed)), Side(node=matrix, index=(index[-1], summed))  # type: ignore[arg-type]
    found = contraction_of(node)
    assert found is not None
    rows.ranges.add(summed, found.size(found.summed))
    first, second = (Side(node=found.operands[k], index=found.operand_index(k, index, summed)) for k in (0, 1))
    return first, second


def _bias(rows: RowInterpreter, node: Node, term: Dot) -> Term | None:
    if node.target not in LINEAR or len(node.args) < 3 or node.args[2] is None:
        return None
    return rows.element(node.args[2], (term.index[-1],))  # type: ignore[arg-type]


def columns_of(term: Dot) -> Sequence[Term]:
    """The indices of a product that say which of its columns."""
    return [i for i in term.index if features_of((i,))]

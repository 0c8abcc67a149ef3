"""Maxima of rows, by which the exponents of a decay are kept small, without the matrix of exponents.

    m_i = max over j <= i of (r_i + G_i - G_j + x_j)    =    r_i + G_i + X_i,      X = cummax(x - G),   G = cumsum(g)

    exp(r_i + G_i - G_j + y_j - m_i)    =    decays X_{i-1} - X_i from step to step,   keys times exp(y_j - G_j - X_j)

All of the latter are as small as the maximum makes them: with y = x neither decays nor keys exceed 1, whatever x is. The sums are
taken in float64, one number for a head and position, for they lose digits that differences of exponents do not.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.contraction import Dot
from effcompile.expr import Interpreter
from effcompile.pattern import describe
from effcompile.rewrite import in_layout, materialise
from effcompile.rules import wrap_dim
from effcompile.terms import Load, Term
from effcompile.viewmaps import Index, shape_of, view_source

from .compose import Composer
from .specify import B, D, H, I, J, Stop
from .weighting import Decay, U, decay_of

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RowMaximum:
    """`node` holds the maximum over `J` of `matrix`.

    Attributes:
        load: the term by which it enters an exponent.
        index: the index of each dimension of `node`.
        entry: that of each dimension of `matrix`.
        detached: whether no gradient passes from it.
    """

    load: Load
    node: Node
    index: Index
    matrix: Node
    entry: Index
    detached: bool


def row_maximum(row: Term, weights: Node, interpreter: Interpreter) -> RowMaximum | None:
    """The maximum over all keys that is taken off the exponents of a row of `weights`, if one is."""
    for load in sorted(row.atoms(Load), key=str):
        node, index = interpreter.loaded[load.tensor], load.indices
        while (step := view_source(node, index, interpreter.ranges)) is not None:
            node, index = step
        reduced = _reduced(node)
        if reduced is None:
            continue
        matrix, dim = reduced
        kept = len(shape_of(matrix)) == len(index)
        if sympy.expand(row).coeff(load) != -1 or (row + load).has(load):
            raise Stop("rows", f"the exponents of a row are scaled by {describe(node)} otherwise than by its inverse", node)
        return RowMaximum(
            load=load, node=node, index=index, matrix=matrix, entry=(*index[:dim], J, *index[dim + kept :]),
            detached=_is_detached(node, weights),
        )  # fmt: skip
    return None


def _is_detached(node: Node, weights: Node) -> bool:
    """Whether no gradient passes from weights to what they are computed from."""
    frontier, seen = [weights], {weights}
    while frontier:
        current = frontier.pop()
        if current is node:
            return False
        if current.target is not aten.detach.default:
            new = [x for x in current.all_input_nodes if x not in seen and not x < node]
            seen.update(new)
            frontier += new
    return True


def _reduced(node: Node) -> tuple[Node, int] | None:
    """The matrix that a node is the maximum of along one dimension, and the dimension."""
    source: Any = node
    if node.target is operator.getitem and node.args[1] == 0:
        source = node.args[0]
    if source.target is aten.max.dim and source is not node:
        dim = source.args[1]
    elif source.target is aten.amax.default and len(source.args[1]) == 1:
        dim = source.args[1][0]
    else:
        return None
    return source.args[0], wrap_dim(dim, len(shape_of(source.args[0])))


def without_maximum(decay: Decay, maximum: RowMaximum, dot: Dot, interpreter: Interpreter, composer: Composer) -> Decay:
    """The same weights, of which the maximum is a running one, which then stands in the graph in the maximum's place.

    Raises:
        Stop: it is the maximum of other exponents than those of the decay.
    """
    exponent = interpreter.element(maximum.matrix, maximum.entry)
    of = decay_of(sympy.exp(exponent) * dot, dot, interpreter, sympy.S.Zero, maximum.node)
    same = sympy.expand(of.gate - decay.gate) == 0 and of.read == decay.read == "after"
    if not same or (of.rows, of.keys) != (1, 1) or any(term.has(D) for term in (of.gate, of.key, of.row)):
        raise Stop("rows", f"{describe(maximum.node)} is the maximum of other exponents than those of the decay", maximum.node)
    below, step = _running(of, maximum, composer)
    at = [interpreter.load(node, (B, H, position, sympy.S.Zero)) for node, position in ((below, J), (step, U))]
    key, row = decay.key - of.key + at[0], decay.row + maximum.load - of.row
    return replace(decay, gate=at[1], key=sympy.expand(key), row=sympy.expand(row))


def _running(of: Decay, maximum: RowMaximum, composer: Composer) -> tuple[Node, Node]:
    """x - G - X and X_{i-1} - X_i, [b, h, i, 1]; what used the maximum uses r + G + X."""
    node, view = maximum.node, composer.view
    builder = Builder(node.graph, node)
    try:
        exponents = _Exponents(builder, maximum, composer)
        key, gate, row = exponents.of(of.key, J), exponents.of(of.gate, U), exponents.of(of.row, I)
        total = builder.call(aten.cumsum.default, gate, 2)
        running = builder.call(aten.cummax.default, builder.call(aten.sub.Tensor, key, total), 2)
        running = builder.call(operator.getitem, running, 0)
        whole = builder.call(aten.add.Tensor, builder.call(aten.add.Tensor, total, running), row)
        result = in_layout(builder, whole, node, maximum.index)
        if shape_of(result) != shape_of(node):
            raise Stop("rows", f"the dimensions of {describe(node)} are not those of the rows", node)
        if maximum.detached:
            total, running = (builder.call(aten.detach.default, x) for x in (total, running))
        below = builder.call(aten.sub.Tensor, builder.call(aten.sub.Tensor, key, total), running)
        first, earlier = (builder.call(aten.slice.Tensor, running, 2, 0, end) for end in (1, -1))
        step = builder.call(aten.sub.Tensor, builder.call(aten.cat.default, [first, earlier], 2), running)
        if maximum.detached:  # the decays' own gradient, at a value of zero
            own = builder.call(aten.sub.Tensor, gate, builder.call(aten.detach.default, gate))
            step = builder.call(aten.add.Tensor, step, own)
        below, step = (builder.call(aten._to_copy.default, x, dtype=torch.float32) for x in (below, step))
    except Exception:
        builder.undo()
        raise
    for added in builder.added:
        view.regions[added] = view.regions[node]
    node.replace_all_uses_with(result)
    view.__dict__.pop("order", None)
    return below, step


class _Exponents:
    """Terms as tensors over all positions, and over the batch dimensions that the maximum has."""

    def __init__(self, builder: Builder, maximum: RowMaximum, composer: Composer):
        self.builder, self.composer = builder, composer
        present = {symbol for term in maximum.index for symbol in term.free_symbols} | {I}
        extents = composer.at.extents
        self.sizes = [composer.concrete(extents[str(s)]) if s in present else 1 for s in (B, H, I)]

    def of(self, term: Term, position: sympy.Symbol) -> Node:
        """[b, h, i, 1], float64."""
        node = materialise(self.builder, self.composer.term(term, position))
        node = self.builder.call(aten._to_copy.default, node, dtype=torch.float64)
        return self.builder.call(aten.expand.default, node, [*self.sizes, 1])

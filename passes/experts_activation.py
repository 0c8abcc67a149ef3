"""The activation between the two projections of an expert, as an expression of `gate` and `up`.

silu(H[f]) * H[f + n]        gate in the first half of the columns            gate * up * sigmoid(gate)
silu(H[2 f]) * H[2 f + 1]    gate in the even columns                         the same, interleaved
silu(G[f]) * H[f]            gate and up as products of their own             the same, a pair
relu(H[f]) ** 2              no gate                                          max(0, up) ** 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
from torch.fx import Node

from effcompile.canonical import canonical
from effcompile.contraction import Dot
from effcompile.ranges import Ranges
from effcompile.terms import Load, Term, to_text
from effcompile.viewmaps import shape_of

from .experts_read import Projection
from .experts_terms import F, features_of
from .specify import Stop

GATE, UP = (sympy.Symbol(name, real=True) for name in ("gate", "up"))


@dataclass(frozen=True, kw_only=True)
class Activation:
    """`term` of gate and up; `projections` are their products, one for both or one each, `biases` what is added to each of them.

    `columns` is the column of each projection that f reads, of the first (or only) argument of the activation first.
    """

    term: Term
    projections: tuple[Projection, ...]
    biases: tuple[Load | None, ...]
    gated: bool
    interleaved: bool

    @property
    def is_pair(self) -> bool:
        return len(self.projections) > 1

    @cached_property
    def text(self) -> str:
        return to_text(canonical(self.term, Ranges({}), UP))


def activation_of(inner: Term, up: Sequence[Projection], node: Node) -> Activation:
    """The activation in the rows of the second projection.

    Args:
        inner: element f of those rows; `up` are the projections in it.

    Raises:
        Stop: it is made of more than one element of each of gate and up.
    """
    columns = [_column(x.term, node) for x in up]
    first, second, gated, interleaved = _roles(up, columns, inner, node)
    named = [(up[first], columns[first], GATE if gated else UP)]
    if second is not None:
        named.append((up[second], columns[second], UP))
    biases, substituted = [], {}
    for projection, column, symbol in named:
        bias = _bias_of(projection, column, inner)
        biases.append(bias)
        added = bias is not None and projection.bias is None
        substituted[projection.term] = symbol - bias if added else symbol
    term = _substituted(inner, substituted)
    if term.free_symbols - {GATE, UP} or term.has(Dot, Load):
        raise Stop("activation", "the activation depends on more than one element of the first projection's gate and up", node)
    pair = second is not None and up[first].node is not up[second].node
    kept = named if pair else named[:1]
    if not pair and len(biases) == 2 and not _same_bias(biases, [c for _, c, _ in named]):
        raise Stop("activation", "gate and up have biases that do not lie beside each other as their columns do", node)
    return Activation(
        term=term, projections=tuple(x for x, _, _ in kept), biases=tuple(biases[: len(kept)]), gated=gated, interleaved=interleaved
    )


def _substituted(inner: Term, named: dict[Term, Term]) -> Term:
    """Sums are taken together, so that what is added and subtracted goes."""
    term = inner.xreplace(named)
    return term.replace(lambda x: isinstance(x, sympy.Add), sympy.expand)


def _column(term: Dot, node: Node) -> Term:
    found = [i for i in term.index if features_of((i,))]
    if len(found) != 1 or found[0].free_symbols != {F}:
        raise Stop("activation", "the columns of the first projection are not those of the activation", node)
    return found[0]


def _roles(
    up: Sequence[Projection], columns: Sequence[Term], inner: Term, node: Node
) -> tuple[int, int | None, bool, bool]:  # fmt: skip
    """Which of the elements is the gate and which is up (the first, without a gate), and whether they are interleaved."""
    if len(up) == 1:
        if columns[0] != F:
            raise Stop("activation", "the activation reads a part of the first projection alone", node)
        return 0, None, False, False
    if len(up) != 2:
        raise Stop("activation", f"the activation is of {len(up)} elements of projections, where gate and up are two", node)
    if up[0].node is not up[1].node:
        if any(c != F for c in columns):
            raise Stop("activation", "gate and up are parts of two projections", node)
        first = 1 if _is_linear(inner, up[0].term) and not _is_linear(inner, up[1].term) else 0
        return first, 1 - first, True, False
    width = _width(up[0])
    for first in (0, 1):
        a, b = columns[first], columns[1 - first]
        if a == F and b - F == width / 2:
            return first, 1 - first, True, False
        if a == 2 * F and b == 2 * F + 1:
            return first, 1 - first, True, True
    raise Stop("activation", "gate and up are neither the halves of the first projection nor every other column of it", node)


def _is_linear(inner: Term, product: Term) -> bool:
    x = sympy.Dummy(real=True)
    return not inner.xreplace({product: x}).diff(x).has(x)


def _width(projection: Projection) -> Term:
    position = next(k for k, i in enumerate(projection.term.index) if features_of((i,)))
    return shape_of(projection.node)[position]


def _bias_of(projection: Projection, column: Term, inner: Term) -> Load | None:
    """What is added to a projection's column: an element of a tensor at the same column."""
    if projection.bias is not None:
        return projection.bias if isinstance(projection.bias, Load) else None
    for add in inner.atoms(sympy.Add):
        if projection.term in add.args:
            for load in add.args:
                if isinstance(load, Load) and load.indices and load.indices[-1] == column:
                    return load
    return None


def _same_bias(biases: Sequence[Load | None], columns: Sequence[Term]) -> bool:
    first, second = biases
    if first is None or second is None:
        return first is second
    moved = second.func(second.args[0], *(columns[0] if i == columns[1] else i for i in second.indices))
    return bool(moved == first)

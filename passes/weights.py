"""What becomes of probabilities between the softmax and the values: moved, cast, and set to zero where a key takes no part.

where(mask, p, 0) @ v          nan_to_num(p) @ v          where(mask.any(-1, keepdim=True), p, 0) @ v

All of these say what a row without any key yields: the softmax alone gives NaN or a mean, and so it gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from sympy.logic.boolalg import And, Not
from torch.fx import Node

from effcompile.canonical import canonical
from effcompile.contraction import Contraction
from effcompile.expr import Interpreter
from effcompile.masks import Logit
from effcompile.pattern import GraphView, is_passage
from effcompile.ranges import Ranges
from effcompile.terms import BoolLoad, IsTrue, Load, NanToZero, Term, Where
from effcompile.viewmaps import Index, broadcast, shape_of

from .specify import B, Coordinates, H, I, J, Stop, short

aten = torch.ops.aten

_MASKING = frozenset({
    aten.nan_to_num.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.mul.Tensor, aten.tril.default, aten.triu.default,
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The probability at `index` where all of `kept` hold, else 0.

    Attributes:
        multiplied: whether one of `kept` is a factor, which leaves a NaN as it is.
        repaired: whether a NaN counts as 0.
        dropped: the node that drops some of them.
        interpreter: what read `kept`.
    """

    index: Index
    interpreter: Interpreter
    kept: tuple[Term, ...] = ()
    multiplied: bool = False
    repaired: bool = False
    dropped: Node | None = None

    @property
    def dropout(self) -> float:
        """The share of the weights that are dropped."""
        return 0.0 if self.dropped is None else float(self.dropped.args[1])  # type: ignore[arg-type]

    def apply(self, logit: Logit, ranges: Ranges, values: Node) -> Logit:
        """The logit whose softmax has these weights.

        Raises:
            Stop: keys that take part in the softmax get no weight.
        """
        empty = "zero" if self.repaired and logit.empty == "nan" else logit.empty
        mask, kept = _conjuncts(logit.mask, ranges), set[Term]()
        for condition in self.kept:
            kept |= {_ANY_KEY} if _is_any(condition, mask, ranges, self.interpreter) else _conjuncts(condition, ranges)
        if not kept - {_ANY_KEY} <= mask or not (empty == "impossible" or not kept or kept == mask or _ANY_KEY in kept):
            raise Stop("probabilities", f"the probabilities are masked by what the softmax is not: {short(self.kept[0])}", values)
        if self.multiplied and len(self.kept) > 1 and empty == "nan":
            raise Stop("probabilities", "probabilities that may be NaN are masked by a product and in another way", values)
        if kept and (empty == "mean" or (empty == "nan" and not self.multiplied)):
            empty = "zero"
        return replace(logit, empty=empty)


def is_active_dropout(node: Node) -> bool:
    """Whether a node drops some of what it takes."""
    return node.target is aten.dropout.default and node.args[1] != 0 and bool(node.args[2])


def may_mask(node: Node) -> bool:
    """Whether a node may set probabilities to zero and leave the others as they are."""
    return node.target in _MASKING


def weights_of(anchor: Node, view: GraphView, values: Contraction, side: int, at: Coordinates) -> Weights:
    """What the contraction with the values takes for (b, h, i, j), of the result of the softmax.

    Raises:
        Stop: it is more than a probability, or not over the axis of the softmax.
    """
    drops = drops_between(values.operands[side], anchor)
    interpreter = view.interpreter(at.ranges, anchor, opaque=(anchor, *drops))
    out = tuple(at.index[letter] for letter in values.out)
    element = interpreter.element(values.operands[side], values.operand_index(side, out, J))
    weights = _read(element, anchor, interpreter, drops)
    if weights is None:
        raise Stop("probabilities", f"the probabilities are changed before they meet the values: {short(element)}", values.node)
    dim = int(anchor.args[1]) % anchor.meta["val"].dim()  # type: ignore[call-overload]
    first = sympy.expand(weights.index[dim] - J)
    if first not in (0, 1) or any(J in term.free_symbols for k, term in enumerate(weights.index) if k != dim):
        raise Stop("probabilities", "the contraction with the values is not over the axis of the softmax", values.node)
    known = set().union(*(term.free_symbols for term in weights.index))
    if weights.dropped is not None and any(at.extents[symbol.name] != 1 and symbol not in known for symbol in (B, H, I)):
        raise Stop("dropout", "weights of several rows are dropped alike", weights.dropped)
    return weights


def drops_between(operand: Node, anchor: Node) -> tuple[Node, ...]:
    """The active dropouts among the nodes that lie, one behind the other, between the softmax and the values."""
    found, seen, frontier = list[Node](), {anchor}, [operand]
    while frontier:
        node = frontier.pop()
        if node in seen or not (node is operand or is_passage(node) or may_mask(node)):
            continue
        seen.add(node)
        found += [node] if is_active_dropout(node) else []
        if is_passage(node) or may_mask(node):
            frontier += node.all_input_nodes
    return tuple(found)


def _read(element: Term, anchor: Node, interpreter: Interpreter, drops: tuple[Node, ...] = ()) -> Weights | None:
    dropped = next((x for x in drops if isinstance(element, Load) and element.tensor == x.name), None)
    if dropped is not None:
        inner = _read(interpreter.element(dropped.args[0], element.indices), anchor, interpreter)  # type: ignore[union-attr]
        return None if inner is None else replace(inner, dropped=dropped)
    if isinstance(element, Load):
        return Weights(index=element.indices, interpreter=interpreter) if element.tensor == anchor.name else None
    if isinstance(element, NanToZero):
        inner = _read(element.args[0], anchor, interpreter, drops)
        return None if inner is None else replace(inner, repaired=True)
    if isinstance(element, Where) and sympy.S.Zero in element.args[1:]:
        condition, then, otherwise = element.args
        kept, rest = (Not(condition), otherwise) if then == 0 else (condition, then)
        inner = _read(rest, anchor, interpreter, drops)
        if inner is not None and _is_nan(Not(kept), rest, interpreter):
            return replace(inner, repaired=True)
        return None if inner is None else replace(inner, kept=(*inner.kept, kept))
    if isinstance(element, sympy.Mul) and len(element.args) == 2:
        for factor, rest in (element.args, element.args[::-1]):
            if isinstance(factor, Where) and factor.args[1:] == (1, 0):
                inner = _read(rest, anchor, interpreter, drops)
                return None if inner is None else replace(inner, kept=(*inner.kept, factor.args[0]), multiplied=True)
    return None


def _is_nan(condition: Term, probability: Term, interpreter: Interpreter) -> bool:
    """Whether a condition is read from `isnan(p)` at the probability itself."""
    if not (isinstance(condition, IsTrue) and isinstance(condition.args[0], BoolLoad)):
        return False
    load = condition.args[0]
    node = interpreter.loaded[load.tensor]
    return node.target is aten.isnan.default and interpreter.element(node.args[0], load.indices) == probability  # type: ignore[arg-type]


# -------------------------------------------------------------------- is it the mask of the softmax?

_ANY_KEY = sympy.Symbol("any key")  # stands for the condition that a row has a key


def _conjuncts(mask: Term, ranges: Ranges) -> set[Term]:
    return set(And.make_args(canonical(mask, ranges, J))) - {sympy.true}


def _is_any(condition: Term, mask: set[Term], ranges: Ranges, interpreter: Interpreter) -> bool:
    """Whether a condition is read from `any(m, dim)` with `m` the mask and `dim` that of the keys."""
    if not (isinstance(condition, IsTrue) and isinstance(condition.args[0], BoolLoad)):
        return False
    load = condition.args[0]
    node = interpreter.loaded[load.tensor]
    if node.target is not aten.any.dim or J in load.free_symbols:
        return False
    source, dim = node.args[0], int(node.args[1])  # type: ignore[call-overload]
    assert isinstance(source, Node)
    dim %= len(shape_of(source))
    rest = list(load.indices)
    rest[dim : dim + (len(rest) == len(shape_of(source)))] = [J]
    return _conjuncts(interpreter.element(source, broadcast(tuple(rest), shape_of(source))), ranges) == mask

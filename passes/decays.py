"""The decay of a recurrence as a logarithm: a sum of products, or such a sum times a rate that does not change in time.

    exp(g) -> g     gamma -> log(gamma)     sigmoid(x) -> logsigmoid(x)     a * b -> log a + log b     exp(dt * A) -> dt, times A

A factor of unknown sign has the logarithm of its absolute value; with s_t the product of the signs up to t, s_t S_t decays by
that alone and is written and read by s_t k_t and s_t q_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch.fx import Node

from effcompile.expr import Interpreter
from effcompile.intervals import interval
from effcompile.ir import Computed, Operand
from effcompile.pattern import CASTS
from effcompile.ranges import Ranges
from effcompile.viewmaps import Index

from .constants import values_of
from .factors import Factor, Product, aligned, constant, product
from .specify import Stop

aten = torch.ops.aten

Form = Literal["log", "factor", "signed", "sigmoid"]
_TINY = 1e-38  # the smallest factor whose logarithm is taken
_LEAVES = (aten.exp.default, aten.sigmoid.default)


@dataclass(frozen=True)
class Part:
    """One summand of the log-decay: `scale * product of factors`, or the logarithm of that."""

    form: Form
    scale: Any
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class Decay:
    """log |A| = sum of `gate`, times the product `rate` if there is one. `signed` are the factors of A that may be negative."""

    gate: tuple[Part, ...] = ()
    rate: tuple[Part, ...] = ()
    signed: tuple[Factor, ...] = ()

    def computed(self, operands: Sequence[Operand | Computed], parts: Sequence[Part]) -> Operand | Computed:
        """The operand of the logarithm, from the operands of its parts."""
        if len(operands) == 1 and parts[0].form == "log":
            return operands[0]
        flat = tuple(part for x in operands for part in (x.parts if isinstance(x, Computed) else (x,)))

        def compute(builder: Any, nodes: Sequence[Node]) -> Node:
            supply, total = list(nodes), None
            for operand, part in zip(operands, parts, strict=True):
                count = len(operand.parts) if isinstance(operand, Computed) else 1
                own, supply = supply[:count], supply[count:]
                value = operand.compute(builder, own) if isinstance(operand, Computed) else own[0]
                value = _logarithm(builder, value, part.form)
                total = value if total is None else builder.call(aten.add.Tensor, total, value)
            assert total is not None
            return total

        shape = tuple(next((x.shape[k] for x in operands if x.shape[k] != 1), sympy.S.One) for k in range(5))
        dtype = operands[0].dtype
        for x in operands:
            dtype = torch.promote_types(dtype, x.dtype)
        return Computed(parts=flat, compute=compute, shape=shape, dtype=torch.promote_types(dtype, torch.float32))


def _logarithm(builder: Any, node: Node, form: Form) -> Node:
    if form == "log":
        return node
    if not node.meta["val"].dtype.is_floating_point:
        node = builder.call(aten._to_copy.default, node, dtype=torch.float32)
    if form == "sigmoid":
        return builder.call(aten.log_sigmoid.default, node)
    size = builder.call(aten.abs.default, node) if form == "signed" else node
    return builder.call(aten.log.default, builder.call(aten.clamp_min.default, size, _TINY))


def decay_of(coefficient: Any, symbols: Index, ranges: Ranges, own: set[Any]) -> Decay:
    """The decay that a coefficient [T, ...] amounts to. `own` are the symbols of the state's rows and columns."""
    if coefficient is None:
        return Decay()
    assert isinstance(coefficient, Node)
    factor = aligned(coefficient, symbols)
    found = product(factor, ranges, lambda f: f.node.target not in _LEAVES and not _is_whole(f.node))
    if not found.scale > 0:
        raise Stop("decay", f"the coefficient has the factor {found.scale}, which has no logarithm", coefficient)
    parts = [_part(f, ranges) for f in found.factors]
    if ranges.get(symbols[0]) == (sympy.S.Zero, sympy.S.Zero):  # one step: models expand its decay before they compute it
        parts = [_narrowed(part, own, ranges) for part in parts]
    if found.scale != 1:
        parts.append(Part("log", sympy.Float(math.log(found.scale)), ()))
    if len(parts) == 1 and parts[0].form == "log" and parts[0].factors and len(own) == 2 and own <= parts[0].factors[0].symbols:
        return _with_rate(parts[0].factors[0], symbols[0], ranges, own)
    return Decay(tuple(parts), signed=tuple(f for part in parts if part.form == "signed" for f in part.factors))


def _part(factor: Factor, ranges: Ranges) -> Part:
    if factor.node.target in _LEAVES:
        form: Form = "log" if factor.node.target is aten.exp.default else "sigmoid"
        return Part(form, sympy.S.One, (Factor(factor.node.args[0], factor.index),))  # type: ignore[arg-type]
    proved = is_nonnegative(factor.node) or _is_bounded_below(factor, ranges)
    return Part("factor" if proved else "signed", sympy.S.One, (factor,))


def _narrowed(part: Part, own: set[Any], ranges: Ranges) -> Part:
    """A part read once along the rows or columns that it was only expanded to, whatever was computed of it there."""
    factors = []
    for factor in part.factors:
        spread = own & factor.symbols
        if spread:
            spread -= Interpreter(ranges).element(factor.node, factor.index).free_symbols
        factors.append(Factor(factor.node, tuple(term.xreplace(dict.fromkeys(spread, sympy.S.Zero)) for term in factor.index)))
    return Part(part.form, part.scale, tuple(factors))


def _is_bounded_below(factor: Factor, ranges: Ranges) -> bool:
    """Whether a factor is known to be at least zero, by its elements or its index expression: 1 - 2^(-5-h) is."""
    known = values_of(factor.node)
    if known is not None:
        return bool((known >= 0).all())
    term = Interpreter(ranges).element(factor.node, factor.index)
    bounds = {s: ranges.get(s) for s in term.free_symbols if ranges.get(s) is not None}
    low = interval(term, bounds)[0]  # type: ignore[arg-type]
    return low is not None and bool(low.is_number) and bool(low >= 0)


def _with_rate(factor: Factor, time: Any, ranges: Ranges, own: set[Any]) -> Decay:
    """`exp(dt[t, d] * A[d, n])`: what changes in time, and what does not."""
    taken: Product = product(factor, ranges, lambda f: own <= f.symbols)
    moving = tuple(f for f in taken.factors if time in f.symbols)
    still = tuple(f for f in taken.factors if time not in f.symbols)
    if not moving or not still or any(own <= f.symbols for f in moving):
        return Decay((Part("log", sympy.S.One, (factor,)),))
    return Decay((Part("log", taken.scale, moving),), (Part("log", sympy.S.One, still),))


def _is_whole(node: Node) -> bool:
    """Whether a node is a value of its own: not a product, a view or a cast of another."""
    return constant(node) is None and is_nonnegative(node) and node.target not in (aten.mul.Tensor, *CASTS)


_NONNEGATIVE = frozenset({
    aten.exp.default, aten.sigmoid.default, aten.relu.default, aten.softmax.int, aten.softplus.default, aten.abs.default,
    aten.sqrt.default, aten.square.default, aten.exp2.default,
})  # fmt: skip
_PASSED_ON = frozenset({aten.clone.default, aten.contiguous.default, *CASTS})


def is_nonnegative(node: Any) -> bool:
    """Whether a node is proved to have no element below zero."""
    if not isinstance(node, Node):
        return isinstance(node, (int, float)) and node >= 0
    if node.op != "call_function":
        return bool(node.meta["val"].dtype is torch.bool)
    if node.meta["val"].dtype is torch.bool or node.target in _NONNEGATIVE:
        return True
    value = constant(node)
    if value is not None:
        return bool(value >= 0)
    if node.target in _PASSED_ON:
        return is_nonnegative(node.args[0])
    if node.target in (aten.mul.Tensor, aten.add.Tensor, aten.maximum.default, aten.div.Tensor):
        return not node.kwargs and all(is_nonnegative(x) for x in node.args[:2])
    if node.target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
        return all(is_nonnegative(x) for x in node.args[1:3])
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return is_nonnegative(node.args[0]) and is_nonnegative(node.args[2])
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        return is_nonnegative(node.args[1] if len(node.args) > 1 and node.args[1] is not None else -1.0)
    if node.target is aten.rsub.Scalar:
        return node.args[1] == 1 and len(node.args) == 2 and _is_at_most_one(node.args[0])
    if node.target is aten.sub.Tensor and not node.kwargs:
        one = node.args[0] == 1 or (isinstance(node.args[0], Node) and constant(node.args[0]) == 1)
        return one and _is_at_most_one(node.args[1])
    return False


def _is_at_most_one(node: Any) -> bool:
    while isinstance(node, Node) and node.target in _PASSED_ON:
        node = node.args[0]
    if isinstance(node, Node) and node.meta["val"].dtype is torch.bool:
        return True
    return isinstance(node, Node) and node.target in (aten.sigmoid.default, aten.softmax.int, aten.tanh.default)

"""What pointwise ATen operations mean on terms: overload -> function of the argument terms.

Numbers are terms too. Operations on booleans give conditions; `as_number` and `as_condition` go between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import And, Not, Or, Xor

from .ranges import Ranges
from .terms import BoolLoad, IsTrue, Sigmoid, Term, Where, is_condition

aten = torch.ops.aten

Operation = Callable[..., Term]
_UNSIGNED_ONE = sympy.S.One
_MOST_CHOICES = 3  # in a comparison that is taken apart: the cases multiply


def as_number(term: Term) -> Term:
    """A condition as 0 or 1; numbers unchanged."""
    if not is_condition(term):
        return term
    return Where(term, sympy.S.One, sympy.S.Zero)


def as_condition(term: Term) -> Term:
    """A number as `number != 0`; conditions unchanged."""
    if is_condition(term):
        return term
    if isinstance(term, BoolLoad):
        return IsTrue(term)
    if isinstance(term, Where) and all(a.is_number for a in term.args[1:]):
        then, otherwise = (a != 0 for a in term.args[1:])
        if then != otherwise:
            return term.args[0] if then else Not(term.args[0])
    return sympy.Ne(term, 0)


def truncate(x: Term) -> Term:
    """Rounding towards zero."""
    if x.is_integer:
        return x
    return Where(x >= 0, sympy.floor(x), sympy.ceiling(x))


def _add(a: Term, b: Term, alpha: Term = _UNSIGNED_ONE) -> Term:
    return as_number(a) + as_number(alpha) * as_number(b)


def _sub(a: Term, b: Term, alpha: Term = _UNSIGNED_ONE) -> Term:
    return as_number(a) - as_number(alpha) * as_number(b)


def _clamp(x: Term, low: Term | None = None, high: Term | None = None) -> Term:
    x = x if low is None else sympy.Max(x, low)
    return x if high is None else sympy.Min(x, high)


def _pow(a: Term, b: Term) -> Term:
    return sympy.Pow(as_number(a), as_number(b))


def _silu(x: Term) -> Term:
    return x * Sigmoid(x)


def _relu(x: Term) -> Term:
    return sympy.Max(x, 0)


ARITHMETIC: dict[Any, Operation] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.rsub.Scalar: lambda a, b, alpha=_UNSIGNED_ONE: _sub(b, a, alpha),
    aten.rsub.Tensor: lambda a, b, alpha=_UNSIGNED_ONE: _sub(b, a, alpha),
    aten.mul.Tensor: lambda a, b: as_number(a) * as_number(b),
    aten.mul.Scalar: lambda a, b: as_number(a) * as_number(b),
    aten.div.Tensor: lambda a, b: as_number(a) / as_number(b),
    aten.div.Scalar: lambda a, b: as_number(a) / as_number(b),
    aten.neg.default: lambda a: -as_number(a),
    aten.abs.default: sympy.Abs,
    aten.reciprocal.default: lambda a: 1 / a,
    aten.square.default: lambda a: a**2,
    aten.pow.Tensor_Scalar: _pow,
    aten.pow.Tensor_Tensor: _pow,
    aten.pow.Scalar: _pow,
    aten.exp.default: sympy.exp,
    aten.exp2.default: lambda x: sympy.Pow(2, x),
    aten.log.default: lambda x: -sympy.oo if x == 0 else sympy.log(x),
    aten.log1p.default: lambda x: sympy.log(1 + x),
    aten.log2.default: lambda x: -sympy.oo if x == 0 else sympy.log(x) / sympy.Float(math.log(2)),
    aten.sqrt.default: sympy.sqrt,
    aten.rsqrt.default: lambda x: 1 / sympy.sqrt(x),
    aten.tanh.default: sympy.tanh,
    aten.sigmoid.default: lambda x: Sigmoid(x) if x not in (sympy.oo, -sympy.oo) else sympy.S.One if x > 0 else sympy.S.Zero,
    aten.silu.default: _silu,
    aten.relu.default: _relu,
    aten.erf.default: sympy.erf,
    aten.sin.default: sympy.sin,
    aten.cos.default: sympy.cos,
    aten.floor.default: sympy.floor,
    aten.ceil.default: sympy.ceiling,
    aten.trunc.default: truncate,
    aten.maximum.default: sympy.Max,
    aten.minimum.default: sympy.Min,
    aten.max.other: sympy.Max,
    aten.min.other: sympy.Min,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: lambda x, low: sympy.Max(x, low),
    aten.clamp_max.default: lambda x, high: sympy.Min(x, high),
}

RELATIONS: dict[Any, Any] = {
    getattr(getattr(aten, name), overload): relation
    for name, relation in {
        "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge, "eq": sympy.Eq, "ne": sympy.Ne,
    }.items()
    for overload in ("Tensor", "Scalar")
}  # fmt: skip


def _logical(combine: Callable[..., Term]) -> Operation:
    return lambda *arguments: combine(*(as_condition(a) for a in arguments))


CONDITIONS: dict[Any, Operation] = {
    **{
        op: _logical(And)
        for op in (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor, aten.bitwise_and.Scalar)
    },
    **{op: _logical(Or) for op in (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor, aten.bitwise_or.Scalar)},
    **{op: _logical(Xor) for op in (aten.logical_xor.default, aten.bitwise_xor.Tensor, aten.__xor__.Tensor)},
    **{op: _logical(Not) for op in (aten.logical_not.default, aten.bitwise_not.default)},
}

BITWISE = frozenset(op for op in CONDITIONS if "logical" not in str(op))  # what they say of integers is not about truth
DISCONTINUOUS = frozenset({*RELATIONS, *CONDITIONS, aten.floor.default, aten.ceil.default, aten.trunc.default})


def compare(ranges: Ranges, relation: Any, a: Term, b: Term) -> Term:
    """`relation(a, b)`; of two conditions, `==` and `!=` as logic."""
    if is_condition(a) and is_condition(b) and relation in (sympy.Eq, sympy.Ne):
        different = Xor(a, b)
        return Not(different) if relation is sympy.Eq else different
    a, b = as_number(a), as_number(b)
    choice = _first_choice(a) or _first_choice(b)
    if choice is None or not (_is_choice(a) and _is_choice(b)) or len(a.atoms(Where) | b.atoms(Where)) > _MOST_CHOICES:
        return ranges.compare(relation, a, b)
    either = [compare(ranges, relation, *(x.xreplace({choice: taken}) for x in (a, b))) for taken in choice.args[1:]]
    return ranges.where(choice.args[0], *either)


def _is_choice(term: Term) -> bool:
    """Whether a term is a number or a sum or product of choices among numbers, so that comparing it is logic."""
    if isinstance(term, (sympy.Add, sympy.Mul)):
        return all(_is_choice(a) for a in term.args)
    if isinstance(term, Where):
        return all(_is_choice(a) for a in term.args[1:])
    return bool(term.is_number)


def _first_choice(term: Term) -> Where | None:
    if isinstance(term, Where):
        return term
    return next((found for a in term.args if (found := _first_choice(a)) is not None), None)


def divide(ranges: Ranges, a: Term, b: Term, rounding_mode: str | None) -> Term:
    """`aten.div` with its rounding mode, which is "floor" or "trunc" for integers only."""
    if rounding_mode is None:
        return a / b
    if rounding_mode == "floor" or (ranges.is_nonnegative(a) and ranges.is_nonnegative(b)):
        return ranges.floordiv(a, b)
    return truncate(a / b)

"""Evaluates a term with ATen operations: on tensors (the reference), or into a graph (a lowering).

A tensor-valued term broadcasts over the dimensions of the index tensors in `symbols`; `call` carries out one ATen operation, either
at once or by adding a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import And, Not, Or, Xor

from .errors import ExpressionError
from .terms import BoolLoad, FloorDiv, IsTrue, Load, Modulo, Sigmoid, Term, Where

aten = torch.ops.aten

_UNARY: dict[type, Any] = {
    sympy.tanh: aten.tanh.default,
    sympy.exp: aten.exp.default,
    sympy.log: aten.log.default,
    sympy.Abs: aten.abs.default,
    sympy.erf: aten.erf.default,
    sympy.sin: aten.sin.default,
    sympy.cos: aten.cos.default,
    sympy.floor: aten.floor.default,
    sympy.ceiling: aten.ceil.default,
    Sigmoid: aten.sigmoid.default,
}
_CHAINED: dict[type, tuple[Any, Any]] = {
    sympy.Add: (aten.add.Tensor, lambda a, b: a + b),
    sympy.Mul: (aten.mul.Tensor, lambda a, b: a * b),
    And: (aten.logical_and.default, lambda a, b: a and b),
    Or: (aten.logical_or.default, lambda a, b: a or b),
    Xor: (aten.logical_xor.default, lambda a, b: a != b),
    sympy.Min: (aten.minimum.default, min),
    sympy.Max: (aten.maximum.default, max),
}
_COMPARE: dict[type, tuple[Any, Any, Callable[[Any, Any], bool]]] = {
    sympy.Lt: (aten.lt.Tensor, aten.lt.Scalar, lambda a, b: a < b),
    sympy.Le: (aten.le.Tensor, aten.le.Scalar, lambda a, b: a <= b),
    sympy.Gt: (aten.gt.Tensor, aten.gt.Scalar, lambda a, b: a > b),
    sympy.Ge: (aten.ge.Tensor, aten.ge.Scalar, lambda a, b: a >= b),
    sympy.Eq: (aten.eq.Tensor, aten.eq.Scalar, lambda a, b: a == b),
    sympy.Ne: (aten.ne.Tensor, aten.ne.Scalar, lambda a, b: a != b),
}
_MIRRORED = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge, sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le, sympy.Eq: sympy.Eq, sympy.Ne: sympy.Ne}

Call = Callable[..., Any]


def _now(operation: Any, *arguments: Any, **keywords: Any) -> Any:
    return operation(*arguments, **keywords)


class Evaluator:
    """Evaluates terms; equal subterms once.

    Args:
        symbols: value of each symbol: an index tensor (broadcastable), or an integer.
        captures: the tensor of each load's name.
        dtype: floating-point dtype to compute in.
        device: where constants are made.
        call: carries out one ATen operation.
        is_tensor: tells tensors (or nodes that stand for them) from numbers.
    """

    def __init__(
        self,
        symbols: Mapping[str, Any],
        captures: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        call: Call = _now,
        is_tensor: Callable[[Any], bool] = lambda x: isinstance(x, torch.Tensor),
    ):
        self.symbols, self.captures = symbols, captures
        self.dtype, self.device = dtype, device
        self.call, self.is_tensor = call, is_tensor
        self._memo: dict[Term, Any] = {}

    def evaluate(self, term: Term) -> Any:
        """A tensor, or a Python number or truth value if the term is constant."""
        if term not in self._memo:
            self._memo[term] = self._evaluate(term)
        return self._memo[term]

    def tensor(self, term: Term, dtype: torch.dtype) -> Any:
        """Like `evaluate`, with a constant as a tensor without dimensions."""
        value = self.evaluate(term)
        return value if self.is_tensor(value) else self.call(aten.scalar_tensor.default, value, dtype=dtype, device=self.device)

    def _evaluate(self, term: Term) -> Any:
        kind = type(term)
        if isinstance(term, sympy.Symbol):
            return self.symbols[term.name]
        if term in (sympy.true, sympy.false):
            return term is sympy.true
        if term.is_number:
            return int(term) if term.is_Integer else float(term)
        if isinstance(term, Load):
            return self._load(term)
        if isinstance(term, IsTrue):
            return self._is_true(term)
        if isinstance(term, Where):
            return self._where(term)
        if isinstance(term, Not):
            value = self.evaluate(term.args[0])
            return self.call(aten.logical_not.default, value) if self.is_tensor(value) else not value
        if kind in _CHAINED:
            return self._chain(kind, [self.evaluate(a) for a in term.args])
        if kind in _COMPARE:
            return self._compare(kind, *(self.evaluate(a) for a in term.args))
        if isinstance(term, (FloorDiv, Modulo)):
            return self._integer_division(term)
        if isinstance(term, sympy.Pow):
            return self._power(term)
        if kind in _UNARY:
            return self.call(_UNARY[kind], self._floating(term.args[0]))
        raise ExpressionError(f"Expected a term that ATen can evaluate but got {kind.__name__}={term!r}")

    def _floating(self, term: Term) -> Any:
        return self.tensor(term, self.dtype)

    def _chain(self, kind: type, values: list[Any]) -> Any:
        operation, plain = _CHAINED[kind]
        numbers = [v for v in values if not self.is_tensor(v)]
        tensors = [v for v in values if self.is_tensor(v)]
        result = None
        for value in tensors:
            result = value if result is None else self.call(operation, result, value)
        for value in numbers:
            result = value if result is None else self._mixed(kind, operation, plain, result, value)
        return result

    def _mixed(self, kind: type, operation: Any, plain: Any, value: Any, scalar: Any) -> Any:
        if not self.is_tensor(value):
            return plain(value, scalar)
        if kind in (sympy.Add, sympy.Mul):
            return self.call(operation, value, scalar)
        scalar = self.call(aten.scalar_tensor.default, scalar, dtype=_dtype_of(value), device=self.device)
        return self.call(operation, value, scalar)

    def _compare(self, kind: type, a: Any, b: Any) -> Any:
        tensor, scalar, plain = _COMPARE[kind]
        if self.is_tensor(a):
            return self.call(tensor if self.is_tensor(b) else scalar, a, b)
        if self.is_tensor(b):
            return self.call(_COMPARE[_MIRRORED[kind]][1], b, a)
        return plain(a, b)

    def _where(self, term: Where) -> Any:
        condition, then, otherwise = (self.evaluate(a) for a in term.args)
        if not self.is_tensor(condition):
            return then if condition else otherwise
        wanted = torch.int64 if term.is_integer else self.dtype
        then, otherwise = (
            x if self.is_tensor(x) else self.call(aten.scalar_tensor.default, x, dtype=wanted, device=self.device)
            for x in (then, otherwise)
        )
        return self.call(aten.where.self, condition, then, otherwise)

    def _load(self, term: Load) -> Any:
        source = self.captures[term.tensor]
        indices = [self.tensor(i, torch.int64) for i in term.indices]
        value = self.call(aten.index.Tensor, source, indices) if indices else source
        if isinstance(term, BoolLoad):
            return value
        return self.call(aten._to_copy.default, value, dtype=self.dtype) if type(term) is Load else value

    def _is_true(self, term: IsTrue) -> Any:
        value = self.evaluate(term.args[0])
        return value if isinstance(term.args[0], BoolLoad) else self.call(aten.ne.Scalar, value, 0)

    def _integer_division(self, term: Term) -> Any:
        a, n = (self.evaluate(x) for x in term.args)
        if not self.is_tensor(a):
            return a // n if isinstance(term, FloorDiv) else a % n
        if isinstance(term, FloorDiv):
            return self.call(aten.div.Tensor_mode, a, n, rounding_mode="floor")
        return self.call(aten.remainder.Tensor if self.is_tensor(n) else aten.remainder.Scalar, a, n)

    def _power(self, term: sympy.Pow) -> Any:
        base, exponent = term.args
        if exponent.is_number:
            value = int(exponent) if exponent.is_Integer else float(exponent)
            return self.call(aten.pow.Tensor_Scalar, self._converted(base), value)
        if base.is_number:
            return self.call(aten.pow.Scalar, float(base), self._floating(exponent))
        return self.call(aten.pow.Tensor_Tensor, self._converted(base), self._floating(exponent))

    def _converted(self, term: Term) -> Any:
        """A term in floating point, of which any power exists."""
        value = self._floating(term)
        return value if _dtype_of(value).is_floating_point else self.call(aten._to_copy.default, value, dtype=self.dtype)


def _value_of(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value if isinstance(value, torch.Tensor) else value.meta["val"]
    return tensor


def _dtype_of(value: Any) -> torch.dtype:
    return _value_of(value).dtype

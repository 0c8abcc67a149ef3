"""Index expressions as sympy terms: the functions beside sympy's own, and their one textual form.

A term is built of index symbols (`b`, `h`, `i`, `j`), size symbols (`n0`, `n1`, or a graph's SymInts), `Load`s from tensors and the
functions below. `to_text` writes a term as a Python expression that a person reads; `from_text` reads it back, so that a
specification can be stored as JSON: `from_text(to_text(term)) == term`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

import sympy
from sympy.logic.boolalg import And, Boolean, BooleanFalse, BooleanTrue, Not, Or

from .errors import ExpressionError

Term = sympy.Basic


class Load(sympy.Function):
    """`Load(name, *indices)`: the element of a tensor at integer indices, one for each of its dimensions."""

    is_real = True

    @property
    def tensor(self) -> str:
        return str(self.args[0])

    @property
    def indices(self) -> tuple[Term, ...]:
        return self.args[1:]


class BoolLoad(Load):
    """A `Load` from a boolean tensor, as a number; `IsTrue` makes it a condition."""

    is_integer = True


class IntLoad(Load):
    """A `Load` from an integer tensor."""

    is_integer = True


class FloorDiv(sympy.Function):
    """`a // b` on integers, rounding towards minus infinity."""

    is_integer = True

    @classmethod
    def eval(cls, a: Term, b: Term) -> Term | None:
        if b == 1:
            return a
        if a == 0:
            return sympy.S.Zero
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) // int(b))
        return None


class Modulo(sympy.Function):
    """`a % b` on integers, with the sign of `b`."""

    is_integer = True

    @classmethod
    def eval(cls, a: Term, b: Term) -> Term | None:
        if b == 1 or a == 0:
            return sympy.S.Zero
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) % int(b))
        return None


class Where(sympy.Function):
    """`Where(condition, then, otherwise)`, the elementwise choice."""

    is_real = True

    @classmethod
    def eval(cls, condition: Term, then: Term, otherwise: Term) -> Term | None:
        if condition is sympy.true or then == otherwise:
            return then
        if condition is sympy.false:
            return otherwise
        return None

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[1].is_integer and self.args[2].is_integer else None


class IsTrue(sympy.logic.boolalg.BooleanFunction):
    """`IsTrue(x)`: the condition `x != 0` of a number that stands for a boolean."""

    @classmethod
    def eval(cls, x: Term) -> Term | None:
        if x.is_Integer:
            return sympy.true if x != 0 else sympy.false
        return None


class Sigmoid(sympy.Function):
    """`1 / (1 + exp(-x))`."""

    is_real = True

    def fdiff(self, argindex: int = 1) -> Term:
        s = Sigmoid(self.args[0])
        return s * (1 - s)


FUNCTIONS: dict[str, Callable[..., Term]] = {
    "where": Where,
    "bool": IsTrue,
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "abs": sympy.Abs,
    "min": sympy.Min,
    "max": sympy.Max,
    "sigmoid": Sigmoid,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "erf": sympy.erf,
    "sin": sympy.sin,
    "cos": sympy.cos,
}
_FUNCTION_NAMES: dict[type, str] = {
    Where: "where",
    IsTrue: "bool",
    sympy.tanh: "tanh",
    sympy.exp: "exp",
    sympy.log: "log",
    sympy.Abs: "abs",
    sympy.Min: "min",
    sympy.Max: "max",
    Sigmoid: "sigmoid",
    sympy.floor: "floor",
    sympy.ceiling: "ceil",
    sympy.erf: "erf",
    sympy.sin: "sin",
    sympy.cos: "cos",
}
_LOADS = {"f": Load, "i": IntLoad, "b": BoolLoad}
_RELATIONS: dict[type, str] = {
    sympy.Lt: "<",
    sympy.Le: "<=",
    sympy.Gt: ">",
    sympy.Ge: ">=",
    sympy.Eq: "==",
    sympy.Ne: "!=",
}


def integer_symbol(name: str) -> sympy.Symbol:
    """The symbol of an index or a size: all of them are non-negative integers."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def score_symbol() -> sympy.Symbol:
    """The symbol `s`: one element of a contraction, a real number."""
    return sympy.Symbol("s", real=True)


def to_text(term: Term) -> str:
    """`term` as a Python expression: `//` and `%` on integers, `&`, `|`, `~` on conditions, `tensor[...]` for loads.

    Raises:
        ExpressionError: the term holds a function that has no textual form.
    """
    return _Text().write(term)


class _Text:
    """Writes a term, parenthesised by need. Loads carry their kind as a suffix: `t0_f`, `t0_i`, `t0_b`."""

    def write(self, term: Term) -> str:
        kind = type(term)
        if isinstance(term, Load):
            suffix = next(key for key, load in _LOADS.items() if type(term) is load)
            inner = ", ".join(self.write(index) for index in term.indices)
            return f"{term.tensor}.{suffix}[{inner}]"
        if isinstance(term, (BooleanTrue, BooleanFalse)):
            return str(term)
        if isinstance(term, sympy.Symbol):
            return term.name
        if isinstance(term, sympy.Number):
            return self.number(term)
        if kind in _RELATIONS:
            return f"({self.write(term.args[0])} {_RELATIONS[kind]} {self.write(term.args[1])})"
        if isinstance(term, And):
            return "(" + " & ".join(sorted(self.write(a) for a in term.args)) + ")"
        if isinstance(term, Or):
            return "(" + " | ".join(sorted(self.write(a) for a in term.args)) + ")"
        if isinstance(term, Not):
            return f"(~{self.write(term.args[0])})"
        if isinstance(term, (FloorDiv, Modulo)):
            operator = "//" if isinstance(term, FloorDiv) else "%"
            return f"({self.write(term.args[0])} {operator} {self.write(term.args[1])})"
        if isinstance(term, sympy.Add):
            return "(" + self.sum(term) + ")"
        if isinstance(term, sympy.Mul):
            return "(" + self.product(term) + ")"
        if isinstance(term, sympy.Pow):
            return self.power(term)
        if kind in _FUNCTION_NAMES:
            return f"{_FUNCTION_NAMES[kind]}({', '.join(self.write(a) for a in term.args)})"
        raise ExpressionError(f"Expected a term of index expressions but got {kind.__name__}={term!r}")

    def number(self, term: sympy.Number) -> str:
        if term is sympy.oo:
            return "inf"
        if term is -sympy.oo:
            return "(-inf)"
        if term is sympy.nan:
            return "nan"
        if term.is_Integer:
            return str(int(term)) if term >= 0 else f"({int(term)})"
        if term.is_Rational:
            return f"({term.p} / {term.q})"
        value = float(term)
        return repr(value) if value >= 0 else f"({value!r})"

    def sum(self, term: sympy.Add) -> str:
        parts = [self.write(a) for a in term.as_ordered_terms()]
        return " + ".join(parts)

    def product(self, term: sympy.Mul) -> str:
        if term.args[0] == -1:
            return "-" + self.write(sympy.Mul(*term.args[1:]))
        return " * ".join(self.write(a) for a in term.args)

    def power(self, term: sympy.Pow) -> str:
        base, exponent = term.args
        if exponent == sympy.Rational(1, 2):
            return f"sqrt({self.write(base)})"
        if exponent == -1:
            return f"(1 / {self.write(base)})"
        return f"({self.write(base)} ** {self.write(exponent)})"


def from_text(text: str, *, reals: frozenset[str] = frozenset({"s"})) -> Term:
    """The term that `to_text` wrote. Names in `reals` are real symbols, all others non-negative integers.

    Raises:
        ExpressionError: the text is no index expression.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"Expected an index expression but got text={text!r}: {error}") from error
    return _Reader(text, reals).read(tree)


_BINARY: dict[type, Callable[[Any, Any], Term]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.FloorDiv: FloorDiv,
    ast.Mod: Modulo,
    ast.BitAnd: And,
    ast.BitOr: Or,
}
_COMPARE: dict[type, Callable[[Any, Any], Term]] = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}


class _Reader:
    def __init__(self, text: str, reals: frozenset[str]):
        self.text = text
        self.reals = reals

    def fail(self, node: ast.AST) -> ExpressionError:
        return ExpressionError(f"Expected an index expression but got {ast.unparse(node)!r} in text={self.text!r}")

    def read(self, node: ast.AST) -> Term:
        match node:
            case ast.Constant(value=bool(value)):
                return sympy.true if value else sympy.false
            case ast.Constant(value=int(value)):
                return sympy.Integer(value)
            case ast.Constant(value=float(value)):
                return number(value)
            case ast.Name(id=name):
                return self.name(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.read(operand)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return Not(self.read(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](self.read(left), self.read(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return _COMPARE[type(op)](self.read(left), self.read(right))
            case ast.Call(func=ast.Name(id=name), args=args) if name in FUNCTIONS:
                return FUNCTIONS[name](*(self.read(a) for a in args))
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr=kind), slice=index) if kind in _LOADS:
                indices = index.elts if isinstance(index, ast.Tuple) else [index]
                return _LOADS[kind](sympy.Symbol(name), *(self.read(a) for a in indices))
        raise self.fail(node)

    def name(self, name: str) -> Term:
        if name == "inf":
            return sympy.oo
        if name == "nan":
            return sympy.nan
        return sympy.Symbol(name, real=True) if name in self.reals else integer_symbol(name)


def number(value: bool | int | float) -> Term:
    """A Python number as a term."""
    if isinstance(value, bool):
        return sympy.Integer(int(value))
    if isinstance(value, int):
        return sympy.Integer(value)
    if math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    if math.isnan(value):
        return sympy.nan
    return sympy.Float(value)


def conjuncts(condition: Term) -> tuple[Term, ...]:
    """The parts of a conjunction; one part for any other condition, none for `True`."""
    if condition is sympy.true:
        return ()
    return tuple(condition.args) if isinstance(condition, And) else (condition,)


def is_condition(term: Term) -> bool:
    """Whether a term is a truth value rather than a number."""
    return isinstance(term, Boolean)

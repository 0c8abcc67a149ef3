"""Index expressions as sympy terms: the functions beside sympy's own, and their one textual form.

A term is built of index symbols (`b`, `h`, `i`, `j`), size symbols (`n0`, `n1`, or a graph's SymInts), `Load`s from tensors and the
functions below. `to_text` writes a term as a Python expression that a person reads; `from_text` reads it back, so that a
specification can be stored as JSON: `from_text(to_text(term)) == term`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import sympy.combinatorics  # conditions and products import it at their first use: 40 ms of the first decision
from sympy.logic.boolalg import And, Boolean, BooleanFalse, BooleanTrue, Not, Or

from .errors import ExpressionError

Term: TypeAlias = sympy.Basic

_EXACT_FLOAT32 = 2**24  # below it, every integer is a float32


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

    def _eval_derivative(self, symbol: sympy.Symbol) -> Term:
        return Where(self.args[0], self.args[1].diff(symbol), self.args[2].diff(symbol))

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

    def _eval_evalf(self, prec: int) -> Term:
        return (1 / (1 + sympy.exp(-self.args[0]))).evalf(prec)


class NanToZero(sympy.Function):
    """`x`, or 0 where x is not a number. Recognition removes it: it has no textual form."""

    is_real = True


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
    """`term` as a Python expression: `//` and `%` on integers, `&`, `|`, `~` on conditions, `tensor.f[...]` for loads.

    Raises:
        ExpressionError: the term holds a function that has no textual form.
    """
    return Writer().write(term)


# How tightly Python binds, loosest first.
COMPARE, OR, AND, SUM, PRODUCT, UNARY, POWER, ATOM = range(8)


class Writer:
    """Writes a term as a Python expression, with parentheses only where Python needs them.

    A dialect overrides `load`, `function`, `number`, `floor_div` and `power`; `names` replaces whole subterms by a name.
    """

    def __init__(self, names: Mapping[Term, str] | None = None):
        self.names = dict(names or {})

    def write(self, term: Term, level: int = COMPARE) -> str:
        """The text of `term`, in parentheses if it binds more loosely than `level`."""
        text, own = self.parts(term)
        return f"({text})" if own < level else text

    def parts(self, term: Term) -> tuple[str, int]:
        """Text, and how tightly its outermost operator binds."""
        if term in self.names:
            return self.names[term], ATOM
        if isinstance(term, Load):
            return self.load(term), ATOM
        if isinstance(term, (BooleanTrue, BooleanFalse)):
            return str(term), ATOM
        if isinstance(term, sympy.Symbol):
            return term.name, ATOM
        if isinstance(term, sympy.Number):
            return self.number(term)
        if type(term) in _RELATIONS:
            left, right = (self.write(a, OR) for a in term.args)
            return f"{left} {_RELATIONS[type(term)]} {right}", COMPARE
        if isinstance(term, And):
            return " & ".join(sorted(self.write(a, SUM) for a in term.args)), AND
        if isinstance(term, Or):
            return " | ".join(sorted(self.write(a, AND) for a in term.args)), OR
        if isinstance(term, Not):
            return f"~{self.write(term.args[0], UNARY)}", UNARY
        return self.arithmetic(term)

    def arithmetic(self, term: Term) -> tuple[str, int]:
        if isinstance(term, FloorDiv):
            return self.floor_div(term)
        if isinstance(term, Modulo):
            return self.modulo(term)
        if isinstance(term, sympy.Add):
            return self.sum(term)
        if isinstance(term, sympy.Mul):
            return self.product(term)
        if isinstance(term, sympy.Pow):
            return self.power(term)
        return self.function(term), ATOM

    def load(self, term: Load) -> str:
        suffix = next(key for key, load in _LOADS.items() if type(term) is load)
        return f"{term.tensor}.{suffix}[{', '.join(self.write(index) for index in term.indices) or '()'}]"

    def floor_div(self, term: Term) -> tuple[str, int]:
        return f"{self.write(term.args[0], PRODUCT)} // {self.write(term.args[1], UNARY)}", PRODUCT

    def modulo(self, term: Term) -> tuple[str, int]:
        return f"{self.write(term.args[0], PRODUCT)} % {self.write(term.args[1], UNARY)}", PRODUCT

    def number(self, term: sympy.Number) -> tuple[str, int]:
        if term in (sympy.oo, -sympy.oo, sympy.nan):
            text = {sympy.oo: "inf", -sympy.oo: "-inf", sympy.nan: "nan"}[term]
        elif term.is_Rational and not term.is_Integer:
            return f"{term.p} / {term.q}", PRODUCT
        else:
            text = str(int(term)) if term.is_Integer else repr(float(term))
        return text, UNARY if text.startswith("-") else ATOM

    def sum(self, term: sympy.Add) -> tuple[str, int]:
        first, *rest = _positive_first(term.args)
        text = self.write(first, SUM)
        for part in rest:
            if part.could_extract_minus_sign():
                text += f" - {self.write(-part, PRODUCT)}"
            else:
                text += f" + {self.write(part, PRODUCT)}"
        return text, SUM

    def product(self, term: sympy.Mul) -> tuple[str, int]:
        if term.args[0] == -1:
            return f"-{self.write(sympy.Mul(*term.args[1:]), UNARY)}", UNARY
        over, under = [], []
        for factor in term.args:
            if isinstance(factor, sympy.Pow) and factor.exp.is_number and factor.exp.is_negative:
                under.append(1 / factor)
            elif isinstance(factor, sympy.Rational) and not factor.is_Integer:
                over += [sympy.Integer(factor.p)] if factor.p != 1 else []
                under.append(sympy.Integer(factor.q))
            else:
                over.append(factor)
        text = " * ".join(self.write(f, UNARY if at else PRODUCT) for at, f in enumerate(over)) or "1"
        return " / ".join([text, *(self.write(f, UNARY) for f in under)]), PRODUCT

    def power(self, term: sympy.Pow) -> tuple[str, int]:
        base, exponent = term.args
        if exponent == sympy.Rational(1, 2):
            return f"sqrt({self.write(base)})", ATOM
        if exponent.is_number and exponent.is_negative:
            return f"1 / {self.write(1 / term, UNARY)}", PRODUCT
        return f"{self.write(base, ATOM)} ** {self.write(exponent, ATOM)}", POWER

    def function(self, term: Term) -> str:
        if term is sympy.E:
            return "exp(1)"
        if type(term) not in _FUNCTION_NAMES:
            raise ExpressionError(
                f"Expected a term of index expressions but got {type(term).__name__}={term!r}. Add the function to terms.FUNCTIONS."
            )
        return f"{_FUNCTION_NAMES[type(term)]}({', '.join(self.write(a) for a in term.args)})"


def _positive_first(terms: Sequence[Term]) -> list[Term]:
    """The summands in a fixed order that starts, if it can, without a minus sign."""
    return sorted(terms, key=lambda t: (t.could_extract_minus_sign(), t.is_number, sympy.default_sort_key(t)))


def derivative(term: Term, symbol: sympy.Symbol) -> Term:
    """The derivative by a real symbol, almost everywhere: roundings are flat, kinks take one side.

    Raises:
        ExpressionError: a function in the term has no derivative here.
    """
    flat = term.replace(
        lambda t: isinstance(t, (sympy.floor, sympy.ceiling)) and t.has(symbol), lambda t: t.func(_Frozen(t.args[0]))
    )
    slope = sympy.diff(flat, symbol)
    slope = slope.replace(sympy.Heaviside, lambda x, *_: Where(x > 0, sympy.S.One, sympy.S.Zero))
    slope = slope.replace(sympy.sign, lambda x: Where(x > 0, sympy.S.One, Where(x < 0, -sympy.S.One, sympy.S.Zero)))
    slope = slope.replace(_Frozen, lambda x: x)
    if slope.has(sympy.Derivative, sympy.Subs):
        raise ExpressionError(f"Expected a differentiable term but got term={term!r}. Give its function a derivative.")
    return slope


class _Frozen(sympy.Function):
    """A subterm that counts as constant."""

    is_real = True

    def _eval_derivative(self, symbol: sympy.Symbol) -> Term:
        return sympy.S.Zero


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
    if value.is_integer() and abs(value) < _EXACT_FLOAT32:
        return sympy.Integer(int(value))
    return sympy.Float(value)


def truth(value: bool) -> Term:
    """A Python truth value as a condition."""
    return sympy.true if value else sympy.false


def is_condition(term: Term) -> bool:
    """Whether a term is a truth value rather than a number. (To sympy, a symbol is both.)"""
    return isinstance(term, Boolean) and not isinstance(term, sympy.Symbol)

"""Terms as source: Triton for the kernels, torch for the reference beside them.

    to_triton(term, names)   float32 and integer arithmetic on `tl` blocks that broadcast against one another
    to_torch(term, names)    the same on tensors
    shared(terms)            subterms that several places need, innermost first: computed once, then printed by name

`names` maps subterms (symbols, loads, anything shared) to the Python expressions that stand for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import sympy

from .errors import ExpressionError
from .terms import ATOM, PRODUCT, UNARY, BoolLoad, FloorDiv, IsTrue, Load, Modulo, Sigmoid, Term, Where, Writer, is_condition

Names = Mapping[Term, str]
INDICES = frozenset({"s", "b", "h", "i", "j"})
ELEMENTS = frozenset({"gate", "up"})  # of an activation

TANH = "tanh"  # primitives that a kernel file defines beside its kernels
SIGMOID = "sigmoid"
FLOOR_DIV = "floor_div"
FLOOR_MOD = "floor_mod"

_TRITON: dict[type, str] = {
    sympy.tanh: TANH,
    Sigmoid: SIGMOID,
    sympy.exp: "tl.exp",
    sympy.log: "tl.log",
    sympy.floor: "tl.floor",
    sympy.ceiling: "tl.ceil",
    sympy.erf: "tl.erf",
    sympy.sin: "tl.sin",
    sympy.cos: "tl.cos",
}
_TORCH: dict[type, str] = {
    sympy.tanh: "torch.tanh",
    Sigmoid: "torch.sigmoid",
    sympy.exp: "torch.exp",
    sympy.log: "torch.log",
    sympy.floor: "torch.floor",
    sympy.ceiling: "torch.ceil",
    sympy.erf: "torch.erf",
    sympy.sin: "torch.sin",
    sympy.cos: "torch.cos",
}


def to_triton(term: Term, names: Names | None = None) -> str:
    """`term` as a Triton expression. Every load in it must have a name.

    Raises:
        ExpressionError: a load without a name, or a function that Triton lacks.
    """
    return _Triton(names).write(term)


def to_torch(term: Term, names: Names | None = None) -> str:
    """`term` as a torch expression. A load without a name indexes its tensor: `t0[b, i]`.

    Raises:
        ExpressionError: a function that torch lacks.
    """
    return _Torch(names).write(term)


def shared(terms: Iterable[Term]) -> list[Term]:
    """Subterms that occur more than once, each after those that it contains; loads, names and plain numbers excepted."""
    uses: Counter[Term] = Counter()
    order: dict[Term, None] = {}

    def visit(term: Term) -> None:
        if not term.args or isinstance(term, Load):
            return
        uses[term] += 1
        if uses[term] > 1:
            return
        for part in term.args:
            visit(part)
        order[term] = None

    for term in terms:
        visit(term)
    return [term for term in order if uses[term] > 1 and not _is_trivial(term)]


def _is_trivial(term: Term) -> bool:
    """Whether naming a term costs more than writing it twice: a sign, or a number divided by a number."""
    return bool(term.is_number) or (isinstance(term, sympy.Mul) and term.args[0] == -1 and len(term.args) == 2)


class _Source(Writer):
    """What Triton and torch have in common."""

    library = ""
    functions: dict[type, str] = {}

    def function(self, term: Term) -> str:
        if isinstance(term, (sympy.Min, sympy.Max)):
            return self.extreme(term)
        if isinstance(term, sympy.Abs):
            return f"{self.library}.abs({self.write(term.args[0])})"
        if type(term) not in self.functions:
            raise ExpressionError(
                f"Expected a term that {self.library} can compute but got {type(term).__name__}={term!r}. Add it to printers.py."
            )
        return f"{self.functions[type(term)]}({self.real(term.args[0])})"

    def extreme(self, term: Term) -> str:
        name = "minimum" if isinstance(term, sympy.Min) else "maximum"
        first, *rest = sorted(term.args, key=lambda a: (bool(a.is_number), sympy.default_sort_key(a)))
        text = self.operand(first)
        for other in rest:
            text = f"{self.library}.{name}({text}, {self.operand(other)})"
        return text

    def operand(self, term: Term) -> str:
        return self.write(term)

    def real(self, term: Term) -> str:
        return self.write(term)

    def power(self, term: sympy.Pow) -> tuple[str, int]:
        base, exponent = term.args
        if exponent.is_number and exponent.is_negative:
            return f"1.0 / {self.write(1 / term, UNARY)}", PRODUCT
        if exponent == sympy.Rational(1, 2):
            return f"{self.library}.sqrt({self.real(base)})", ATOM
        if exponent.is_Integer and exponent <= 4:
            return " * ".join([self.write(base, UNARY)] * int(exponent)), PRODUCT
        return f"{self.library}.exp2({self.library}.log2({self.real(base)}) * {self.write(exponent, UNARY)})", ATOM

    def parts(self, term: Term) -> tuple[str, int]:
        if term.is_number and not is_condition(term) and term.is_extended_real and not isinstance(term, sympy.Number):
            return self.number(sympy.Float(float(term)))  # sqrt(2), log(3)
        return super().parts(term)


class _Triton(_Source):
    library = "tl"
    functions = _TRITON

    def load(self, term: Load) -> str:
        raise ExpressionError(f"Expected a name for every load but got none for load={term!r}")

    def number(self, term: sympy.Number) -> tuple[str, int]:
        if term in (sympy.oo, -sympy.oo, sympy.nan):
            return {sympy.oo: 'float("inf")', -sympy.oo: 'float("-inf")', sympy.nan: 'float("nan")'}[term], ATOM
        if term.is_Rational and not term.is_Integer:
            return self.number(sympy.Float(float(term)))
        return super().number(term)

    def real(self, term: Term) -> str:
        return f"tl.cast({self.write(term)}, tl.float32)" if term.is_integer else self.write(term)

    def floor_div(self, term: FloorDiv) -> tuple[str, int]:
        if term.args[0].is_nonnegative:
            return super().floor_div(term)
        return f"{FLOOR_DIV}({self.write(term.args[0])}, {self.write(term.args[1])})", ATOM

    def modulo(self, term: Modulo) -> tuple[str, int]:
        if term.args[0].is_nonnegative:
            return super().modulo(term)
        return f"{FLOOR_MOD}({self.write(term.args[0])}, {self.write(term.args[1])})", ATOM

    def function(self, term: Term) -> str:
        if isinstance(term, Where):
            return f"tl.where({', '.join(self.write(a) for a in term.args)})"
        if isinstance(term, IsTrue):
            return f"({self.write(term.args[0])} != 0)"
        return super().function(term)


class _Torch(_Source):
    library = "torch"
    functions = _TORCH

    def load(self, term: Load) -> str:
        text = f"{term.tensor}[{', '.join(self.write(index) for index in term.indices)}]" if term.indices else term.tensor
        if isinstance(term, BoolLoad):
            return f"{text}.int()"
        return f"{text}.to(s.dtype)" if type(term) is Load else text

    def number(self, term: sympy.Number) -> tuple[str, int]:
        if term in (sympy.oo, -sympy.oo, sympy.nan):
            return {sympy.oo: 'float("inf")', -sympy.oo: 'float("-inf")', sympy.nan: 'float("nan")'}[term], ATOM
        return super().number(term)

    def function(self, term: Term) -> str:
        if isinstance(term, Where):
            return f"torch.where({', '.join(self.write(a) for a in term.args)})"
        if isinstance(term, IsTrue):
            return f"({self.write(term.args[0])} != 0)"
        return super().function(term)

    def operand(self, term: Term) -> str:
        text = self.write(term)
        return f"torch.as_tensor({text})" if self.is_python_number(term) else text

    def real(self, term: Term) -> str:
        text = self.write(term)
        return f"torch.as_tensor({text}, dtype=torch.float64)" if self.is_python_number(term) else text

    @staticmethod
    def is_python_number(term: Term) -> bool:
        """Sizes and literals are Python numbers in the reference; everything else is a tensor."""
        return not term.has(Load) and not any(symbol.name in INDICES | ELEMENTS for symbol in term.free_symbols)

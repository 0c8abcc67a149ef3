"""What is known of the integer symbols of an index expression, and the simplifications that it licenses.

FloorDiv(n*q + r, n) -> q        if 0 <= r < n
Modulo(n*q + r, n)   -> r        if 0 <= r < n
a < b                -> True     if the upper bound of a - b is negative
Where(c, a, b)       -> Where(c, a given c, b given not c)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import sympy
from sympy.logic.boolalg import And, Not, Or

from .terms import BoolLoad, FloorDiv, Modulo, Term, Where, is_condition

Bound: TypeAlias = Term | None
_MIN_DYNAMIC_SIZE = 2  # Dynamo specialises the sizes 0 and 1


class Ranges:
    """Inclusive bounds of index symbols; a bound may mention sizes, which are at least 2."""

    def __init__(self, bounds: Mapping[sympy.Symbol, tuple[Term, Term]]):
        self._bounds = dict(bounds)
        self._cache: dict[Term, tuple[Bound, Bound]] = {}

    def add(self, symbol: sympy.Symbol, size: Term) -> None:
        """`symbol` runs over 0 .. size - 1."""
        if symbol in self._bounds:
            self._cache.clear()
        self._bounds[symbol] = (sympy.S.Zero, size - 1)

    def get(self, symbol: sympy.Symbol) -> tuple[Term, Term] | None:
        """The bounds of an index symbol."""
        return self._bounds.get(symbol)

    # ---------------------------------------------------------------- bounds

    def bounds(self, term: Term) -> tuple[Bound, Bound]:
        """Inclusive lower and upper bound of an integer term, None where unknown. Bounds may mention sizes."""
        found = self._cache.get(term)
        if found is None:
            found = self._cache[term] = self._find(term)
        return found

    def _find(self, term: Term) -> tuple[Bound, Bound]:
        if term.is_Integer:
            return term, term
        if isinstance(term, sympy.Symbol):
            return self._bounds.get(term, (term, term))
        if isinstance(term, sympy.Add):
            return self._sum(term)
        if isinstance(term, sympy.Mul):
            return self._product(term)
        if isinstance(term, BoolLoad):
            return sympy.S.Zero, sympy.S.One
        if isinstance(term, (FloorDiv, Modulo)):
            return self._division(term)
        if isinstance(term, Where):
            return self._hull(term.args[1], term.args[2])
        if isinstance(term, (sympy.Min, sympy.Max)):
            return self._extreme(term)
        if isinstance(term, sympy.Abs):
            return self._absolute(term)
        return None, None

    def _sum(self, term: sympy.Add) -> tuple[Bound, Bound]:
        pairs = [self.bounds(a) for a in term.args]
        lows, highs = [p[0] for p in pairs], [p[1] for p in pairs]
        return (
            None if any(x is None for x in lows) else sympy.Add(*lows),
            None if any(x is None for x in highs) else sympy.Add(*highs),
        )

    def _product(self, term: sympy.Mul) -> tuple[Bound, Bound]:
        factor, rest = term.as_coeff_Mul()
        if rest.is_Mul:
            low, high = self._nonnegative_product(rest)
        else:
            low, high = self.bounds(rest)
        if factor.is_negative:
            low, high = high, low
        return (None if low is None else factor * low), (None if high is None else factor * high)

    def _nonnegative_product(self, term: sympy.Mul) -> tuple[Bound, Bound]:
        pairs = [self.bounds(a) for a in term.args]
        if any(low is None or not self.is_nonnegative_bound(low) for low, _ in pairs):
            return None, None
        low = sympy.Mul(*[p[0] for p in pairs])
        return low, None if any(p[1] is None for p in pairs) else sympy.Mul(*[p[1] for p in pairs])

    def _division(self, term: Term) -> tuple[Bound, Bound]:
        a, n = term.args
        low, high = self.bounds(a)
        if not n.is_positive and not self.is_nonnegative(n - 1):
            return None, None
        if isinstance(term, Modulo):
            return sympy.S.Zero, n - 1
        return (None if low is None else FloorDiv(low, n)), (None if high is None else FloorDiv(high, n))

    def _hull(self, a: Term, b: Term) -> tuple[Bound, Bound]:
        (alow, ahigh), (blow, bhigh) = self.bounds(a), self.bounds(b)
        low = None if alow is None or blow is None else sympy.Min(alow, blow)
        high = None if ahigh is None or bhigh is None else sympy.Max(ahigh, bhigh)
        return low, high

    def _extreme(self, term: Term) -> tuple[Bound, Bound]:
        """A maximum is at least each of its arguments' lower bounds, and at most the largest of their upper bounds."""
        known = [[b for b in side if b is not None] for side in zip(*(self.bounds(a) for a in term.args), strict=True)]
        lows, highs = (None if not side else term.func(*side) for side in known)
        if isinstance(term, sympy.Max):
            return lows, highs if len(known[1]) == len(term.args) else None
        return lows if len(known[0]) == len(term.args) else None, highs

    def _absolute(self, term: sympy.Abs) -> tuple[Bound, Bound]:
        low, high = self.bounds(term.args[0])
        return sympy.S.Zero, None if low is None or high is None else sympy.Max(-low, high)

    # ---------------------------------------------------------------- proofs

    @staticmethod
    def is_nonnegative_bound(bound: Term) -> bool:
        """Whether a bound, a polynomial in sizes, is proved to be at least 0: sizes are at least 2."""
        return _nonnegative_in_sizes(bound)

    def is_nonnegative(self, term: Term) -> bool:
        """Whether `term >= 0` is proved."""
        low = self.bounds(term)[0]
        return low is not None and self.is_nonnegative_bound(low)

    def is_below(self, term: Term, size: Term) -> bool:
        """Whether `0 <= term < size` is proved."""
        return self.is_nonnegative(term) and self.is_nonnegative(size - 1 - term)

    # ---------------------------------------------------------------- integer division

    def floordiv(self, a: Term, n: Term) -> Term:
        """`a // n`, with what is divisible taken out."""
        quotient, rest = self._split(a, n)
        if self.is_below(rest, n):
            return quotient
        return quotient + FloorDiv(rest, n)

    def modulo(self, a: Term, n: Term) -> Term:
        """`a % n`, without what is divisible."""
        rest = self._split(a, n)[1]
        return rest if self.is_below(rest, n) else Modulo(rest, n)

    def _split(self, a: Term, n: Term) -> tuple[Term, Term]:
        """`(q, r)` with `a = n*q + r`, as much as can be seen of it."""
        quotients, rests = [], []
        for part in sympy.Add.make_args(recombine(a)):
            q = _divide(part, n)
            if q is None:
                rests.append(part)
            else:
                quotients.append(q)
        return sympy.Add(*quotients), sympy.Add(*rests)

    # ---------------------------------------------------------------- conditions

    def compare(self, relation: Callable[[Term, Term], Term], a: Term, b: Term) -> Term:
        """`relation(a, b)`, decided where the bounds of `a - b` decide it."""
        if a.is_integer and b.is_integer:
            verdict = self._decide(relation, a, b)
            if verdict is not None:
                return sympy.true if verdict else sympy.false
        return relation(a, b)

    def _decide(self, relation: Callable[[Term, Term], Term], a: Term, b: Term) -> bool | None:
        difference = sympy.expand(a - b)
        if relation in (sympy.Gt, sympy.Ge):
            difference = -difference
            relation = sympy.Lt if relation is sympy.Gt else sympy.Le
        if difference == 0:
            return relation in (sympy.Le, sympy.Eq)
        below, above = self.is_nonnegative(-difference - 1), self.is_nonnegative(difference - 1)
        if relation is sympy.Lt:
            return True if below else False if self.is_nonnegative(difference) else None
        if relation is sympy.Le:
            return False if above else True if self.is_nonnegative(-difference) else None
        if below or above:
            return relation is sympy.Ne
        return None

    def given(self, condition: Term) -> Ranges:
        """These ranges, narrowed by a condition on one index symbol; the same ranges if it says nothing usable."""
        narrowed = dict(self._bounds)
        for part in condition.args if isinstance(condition, And) else (condition,):
            _narrow(narrowed, part)
        return Ranges(narrowed)

    def refine(self, term: Term) -> Term:
        """`term` with symbols that can have but one value replaced, and its conditions decided where possible."""
        fixed = {s: low for s, (low, high) in self._bounds.items() if s in term.free_symbols and low == high}
        return self._rebuild(term.xreplace(fixed) if fixed else term)

    def _rebuild(self, term: Term) -> Term:
        if isinstance(term, sympy.core.relational.Relational):
            return self.compare(type(term), sympy.expand(term.args[0]), sympy.expand(term.args[1]))
        if isinstance(term, (And, Or, Not)):
            return term.func(*(self._rebuild(a) for a in term.args))
        if isinstance(term, Where):
            return self.where(self._rebuild(term.args[0]), self._rebuild(term.args[1]), self._rebuild(term.args[2]))
        if isinstance(term, FloorDiv):
            return self.floordiv(self._rebuild(term.args[0]), term.args[1])
        if isinstance(term, Modulo):
            return self.modulo(self._rebuild(term.args[0]), term.args[1])
        if term.args and not term.is_Atom:
            return term.func(*(self._rebuild(a) for a in term.args))
        return term

    def where(self, condition: Term, then: Term, otherwise: Term) -> Term:
        """`Where`, each branch simplified under its condition; a condition if its branches are conditions."""
        if condition in (sympy.true, sympy.false):
            return then if condition is sympy.true else otherwise
        if self._narrows(condition):
            then = self.given(condition).refine(then)
            otherwise = self.given(Not(condition)).refine(otherwise)
        if isinstance(then, Where):
            then = then.xreplace({condition: sympy.true, Not(condition): sympy.false})
        if isinstance(otherwise, Where):
            otherwise = otherwise.xreplace({condition: sympy.false, Not(condition): sympy.true})
        if is_condition(then) or is_condition(otherwise):
            return Or(And(condition, then), And(Not(condition), otherwise))
        return Where(condition, then, otherwise)

    def _narrows(self, condition: Term) -> bool:
        return isinstance(condition, sympy.core.relational.Relational) and any(s in self._bounds for s in condition.args)


def _narrow(bounds: dict[sympy.Symbol, tuple[Term, Term]], condition: Term) -> None:
    """Tighten `bounds` by `symbol < constant` and its like."""
    if not isinstance(condition, sympy.core.relational.Relational):
        return
    relation, (a, b) = type(condition), condition.args
    if b in bounds and a not in bounds:
        mirrored = {sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge, sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le}
        relation, a, b = mirrored.get(relation, relation), b, a
    if a not in bounds or b.free_symbols & set(bounds) or not b.is_integer:
        return
    low, high = bounds[a]
    if relation in (sympy.Lt, sympy.Le, sympy.Eq):
        high = sympy.Min(high, b - 1 if relation is sympy.Lt else b)
    if relation in (sympy.Gt, sympy.Ge, sympy.Eq):
        low = sympy.Max(low, b + 1 if relation is sympy.Gt else b)
    bounds[a] = (low, high)


def recombine(a: Term) -> Term:
    """`n * FloorDiv(x, n) + Modulo(x, n) -> x`, also under a common factor."""
    if not a.is_Add or not a.has(Modulo):
        return a
    for part in a.args:
        factor, rest = part.as_coeff_Mul()
        if not isinstance(rest, Modulo):
            continue
        x, n = rest.args
        partner = factor * n * FloorDiv(x, n)
        if partner in a.args:
            return recombine(a - part - partner + factor * x)
    return a


def _divide(part: Term, n: Term) -> Term | None:
    """`part / n` if `n` divides it visibly."""
    if part == n:
        return sympy.S.One
    factor, rest = part.as_coeff_Mul()
    if n.is_Integer:
        return (factor / n) * rest if factor.is_Integer and factor % n == 0 else None
    quotient = part / n
    denominator = sympy.fraction(quotient)[1]
    return quotient if denominator == 1 else None


@lru_cache(maxsize=4096)
def _nonnegative_in_sizes(bound: Term) -> bool:
    if bound.is_number:
        return bool(bound >= 0)
    shifted = {s: s + _MIN_DYNAMIC_SIZE for s in bound.free_symbols if s.is_nonnegative}
    expanded = sympy.expand(bound.xreplace(shifted))
    return bool(expanded.is_nonnegative) or all(
        part.is_number and part >= 0 or part.as_coeff_Mul()[0] >= 0 and part.is_nonnegative
        for part in sympy.Add.make_args(expanded)
    )

"""Interval arithmetic on index expressions, and what it proves about the tiles of a mask.

A *tile* is a rectangle of queries `[i0, i1]` and keys `[j0, j1]` (ends included). Three questions are answered without data:

    interval(term, ranges)           lo <= term <= hi
    verdict(condition, ranges)       certainly true, possibly true
    tile_bounds(mask, wanted="j")    for queries [i0, i1]: the keys [lo, hi) outside of which the mask is false,
                                     and the keys [full_lo, full_hi) inside of which it is true

Ends are numbers or terms in the symbols that have no range (sizes, `i0`, loads that depend on neither index): whatever is left
becomes integer arithmetic of a few scalars in the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Literal, TypeAlias

import sympy
from sympy.logic.boolalg import And, Not, Or

from .terms import FloorDiv, IsTrue, Load, Modulo, Sigmoid, Term, Where, integer_symbol

End: TypeAlias = Term | None  # None: unbounded
Interval = tuple[End, End]
Ranges = Mapping[Term, tuple[int | Term | None, int | Term | None]]
Axis = Literal["i", "j"]

I, J = integer_symbol("i"), integer_symbol("j")
I0, I1, J0, J1 = (integer_symbol(name) for name in ("i0", "i1", "j0", "j1"))
ALWAYS = 2**30  # beyond every index: the end of a range that a condition opens or shuts

_RANGE: dict[type, tuple[int, int]] = {
    sympy.tanh: (-1, 1),
    sympy.erf: (-1, 1),
    sympy.sin: (-1, 1),
    sympy.cos: (-1, 1),
    Sigmoid: (0, 1),
}
_GROWING = (sympy.exp, sympy.log, sympy.tanh, sympy.erf, Sigmoid, sympy.floor, sympy.ceiling)


def interval(term: Term, ranges: Ranges) -> Interval:
    """`(lo, hi)` with `lo <= term <= hi` whenever every key of `ranges` lies in its range; `None` is an unbounded end.

    Keys are symbols or loads. A symbol without a range stands for itself; a load without one is unbounded if an index of it has a
    range, and else stands for itself.
    """
    known = {key: (_end(lo), _end(hi)) for key, (lo, hi) in ranges.items()}
    return _Intervals(known).of(term)


def _end(value: int | Term | None) -> End:
    return None if value is None else sympy.sympify(value)


class _Intervals:
    """One evaluation: interval by subterm, remembered."""

    def __init__(self, known: Mapping[Term, Interval]):
        self.known = known
        self.moving = set(known)
        self.seen: dict[Term, Interval] = {}

    def of(self, term: Term) -> Interval:
        if term not in self.seen:
            self.seen[term] = self.compute(term)
        return self.seen[term]

    def compute(self, term: Term) -> Interval:
        if term in self.known:
            return self.known[term]
        if not any(part in self.moving for part in sympy.preorder_traversal(term)):
            return (term, term)
        if isinstance(term, Load):
            return (None, None)
        if isinstance(term, sympy.Add):
            return _sum([self.of(a) for a in term.args])
        if isinstance(term, sympy.Mul):
            return reduce(_product, [self.of(a) for a in term.args])
        if isinstance(term, FloorDiv):
            return self.floor_div(term)
        if isinstance(term, Modulo):
            return self.modulo(term)
        if isinstance(term, (sympy.Min, sympy.Max)):
            return _extreme(type(term), [self.of(a) for a in term.args])
        if isinstance(term, Where):
            return _hull([self.of(term.args[1]), self.of(term.args[2])])
        if isinstance(term, sympy.Abs):
            return _absolute(self.of(term.args[0]))
        if isinstance(term, sympy.Pow) and term.exp.is_Integer and term.exp.is_positive and term.exp.is_even:
            lo, hi = _absolute(self.of(term.base))
            return (lo**term.exp if lo is not None else None, hi**term.exp if hi is not None else None)
        if isinstance(term, sympy.Pow) and term.base.is_number and term.base > 1:
            lo, hi = self.of(term.exp)  # growing
            return (sympy.S.Zero if lo is None else term.base**lo, None if hi is None else term.base**hi)
        return self.function(term)

    def floor_div(self, term: Term) -> Interval:
        lo, hi = self.of(term.args[0])
        divisor = term.args[1]
        if self.of(divisor) != (divisor, divisor) or not _is_positive(divisor):
            return (None, None)
        return (None if lo is None else FloorDiv(lo, divisor), None if hi is None else FloorDiv(hi, divisor))

    def modulo(self, term: Term) -> Interval:
        divisor = term.args[1]
        if self.of(divisor) != (divisor, divisor) or not _is_positive(divisor):
            return (None, None)
        lo, hi = self.of(term.args[0])
        if lo is not None and hi is not None and (lo >= 0) == sympy.true and (hi < divisor) == sympy.true:
            return (lo, hi)
        return (sympy.S.Zero, divisor - 1)

    def function(self, term: Term) -> Interval:
        low, high = _RANGE.get(type(term), (None, None))
        lo, hi = _end(low), _end(high)
        if isinstance(term, sympy.exp):
            lo = sympy.S.Zero
        if isinstance(term, _GROWING):
            inner = self.of(term.args[0])
            lo = term.func(inner[0]) if inner[0] is not None and inner[0].is_number else lo
            hi = term.func(inner[1]) if inner[1] is not None and inner[1].is_number else hi
        return (lo, hi)


def _sum(parts: Iterable[Interval]) -> Interval:
    lows, highs = zip(*parts, strict=True)
    return (None if None in lows else sympy.Add(*lows), None if None in highs else sympy.Add(*highs))


def _product(a: Interval, b: Interval) -> Interval:
    for one, other in ((a, b), (b, a)):
        if one[0] is not None and one[0] == one[1]:
            scaled = _scaled(one[0], other)
            if scaled is not None:
                return scaled
    if None in a or None in b:
        nonnegative = all(x[0] is not None and x[0].is_nonnegative for x in (a, b))
        return (a[0] * b[0], None) if nonnegative and a[0] is not None and b[0] is not None else (None, None)
    corners = [x * y for x in a for y in b]  # type: ignore[operator]
    return (sympy.Min(*corners), sympy.Max(*corners))


def _scaled(factor: Term, other: Interval) -> Interval | None:
    lo, hi = (None if end is None else factor * end for end in other)
    if factor.is_nonnegative:
        return (lo, hi)
    return (hi, lo) if factor.is_nonpositive else None


def _extreme(kind: type, parts: list[Interval]) -> Interval:
    lows, highs = zip(*parts, strict=True)
    absorbing = [e for e in (highs if kind is sympy.Min else lows) if e is not None]
    other = None if None in (lows if kind is sympy.Min else highs) else kind(*(lows if kind is sympy.Min else highs))
    absorbed = kind(*absorbing) if absorbing else None
    return (other, absorbed) if kind is sympy.Min else (absorbed, other)


def _hull(parts: list[Interval]) -> Interval:
    lows, highs = zip(*parts, strict=True)
    return (None if None in lows else sympy.Min(*lows), None if None in highs else sympy.Max(*highs))


def _absolute(inner: Interval) -> Interval:
    lo, hi = inner
    low = sympy.Max(0, *([] if lo is None else [lo]), *([] if hi is None else [-hi]))
    return (low, None if lo is None or hi is None else sympy.Max(-lo, hi))


def _is_positive(divisor: Term) -> bool:
    """Whether a divisor is positive. Sizes are never negative, and nothing is divided by zero."""
    return bool(divisor.is_nonnegative)


# ---------------------------------------------------------------------------------------------------------------- conditions


def verdict(condition: Term, ranges: Ranges) -> tuple[Term, Term]:
    """`(certain, possible)`: if `certain`, the condition holds all over the ranges; unless `possible`, it holds nowhere in them."""
    if condition in (sympy.true, sympy.false):
        return (condition, condition)
    if isinstance(condition, (And, Or)):
        certain, possible = zip(*(verdict(part, ranges) for part in condition.args), strict=True)
        return (type(condition)(*certain), type(condition)(*possible))
    if isinstance(condition, Not):
        certain, possible = verdict(condition.args[0], ranges)
        return (Not(possible), Not(certain))
    if isinstance(condition, IsTrue):
        lo, hi = interval(condition.args[0], ranges)
        zero_possible, zero_certain = _contains_zero(lo, hi)
        return (Not(zero_possible), Not(zero_certain))
    if isinstance(condition, sympy.core.relational.Relational):
        return _relation_verdict(condition, ranges)
    return (sympy.false, sympy.true)


def _contains_zero(lo: End, hi: End) -> tuple[Term, Term]:
    """Whether zero may lie in the interval, and whether it is all there is."""
    possible = And(True if lo is None else lo <= 0, True if hi is None else hi >= 0)
    certain = sympy.false if lo is None or hi is None else And(sympy.Eq(lo, 0), sympy.Eq(hi, 0))
    return (possible, certain)


def _relation_verdict(relation: Term, ranges: Ranges) -> tuple[Term, Term]:
    lo, hi = interval(relation.lhs - relation.rhs, ranges)
    if isinstance(relation, (sympy.Eq, sympy.Ne)):
        possible, certain = _contains_zero(lo, hi)
        return (certain, possible) if isinstance(relation, sympy.Eq) else (Not(possible), Not(certain))
    least, most = (lo, hi) if isinstance(relation, (sympy.Le, sympy.Lt)) else (hi, lo)
    certain = sympy.false if most is None else type(relation)(most, 0)
    return (certain, sympy.true if least is None else type(relation)(least, 0))


# --------------------------------------------------------------------------------------------------------------- tile bounds


@dataclass(frozen=True, kw_only=True)
class TileBounds:
    """Half-open ranges of the wanted index.

    `remaining`: some part of the mask can empty further tiles, and a table would tell which. `uniform`: the condition does not
    depend on the wanted index, so that each range is everything or nothing.
    """

    lo: Term
    hi: Term
    full_lo: Term
    full_hi: Term
    remaining: bool
    uniform: bool = False


_ALL = TileBounds(lo=-sympy.oo, hi=sympy.oo, full_lo=-sympy.oo, full_hi=sympy.oo, remaining=False)


@lru_cache(maxsize=256)
def tile_bounds(mask: Term, *, wanted: Axis = "j", size: Term | None = None) -> TileBounds:
    """The range of keys (`wanted="j"`) for queries `[i0, i1]`, or of queries (`wanted="i"`) for keys `[j0, j1]`.

    The ends are terms in `i0, i1` (or `j0, j1`), sizes, `b`, `h` and loads without `i` and `j`, clipped to `[0, size)`; without
    `size`, an end that the mask leaves open is `oo`. A range whose `lo` is not below its `hi` is empty.
    """
    raw = _Bounds(wanted).of(mask)
    low, high = (sympy.S.Zero, sympy.oo if size is None else size)
    return TileBounds(
        lo=sympy.Max(low, raw.lo),
        hi=sympy.Min(high, raw.hi),
        full_lo=sympy.Min(high, sympy.Max(low, raw.full_lo)),
        full_hi=sympy.Max(low, sympy.Min(high, raw.full_hi)),
        remaining=raw.remaining,
    )


class _Bounds:
    def __init__(self, wanted: Axis):
        self.index = J if wanted == "j" else I
        self.ranges: Ranges = {I: (I0, I1)} if wanted == "j" else {J: (J0, J1)}
        self.other = I if wanted == "j" else J

    def of(self, condition: Term) -> TileBounds:
        if condition == sympy.true:
            return _ALL
        if condition == sympy.false:
            return _all_or_nothing(sympy.false, sympy.false, remaining=False)
        if isinstance(condition, And):
            return reduce(_both, [self.of(part) for part in condition.args])
        if isinstance(condition, Or):
            return reduce(_either, [self.of(part) for part in condition.args])
        if isinstance(condition, Not):
            return self.negated(condition.args[0])
        if isinstance(condition, sympy.core.relational.Relational):
            return self.relation(condition)
        return self.opaque(condition)

    def negated(self, condition: Term) -> TileBounds:
        if isinstance(condition, (And, Or)):
            dual = Or if isinstance(condition, And) else And
            return self.of(dual(*(Not(part) for part in condition.args)))
        return self.opaque(Not(condition))

    def opaque(self, condition: Term) -> TileBounds:
        """A condition with no range of its own: uniform over the tile, or anything."""
        if not condition.has(self.index, self.other):
            return _all_or_nothing(condition, condition, remaining=False)
        by_data = any(load.has(self.index, self.other) for load in condition.atoms(Load))
        return TileBounds(lo=-sympy.oo, hi=sympy.oo, full_lo=sympy.oo, full_hi=-sympy.oo, remaining=by_data)

    def relation(self, relation: Term) -> TileBounds:
        if not relation.has(self.index) or isinstance(relation, sympy.Ne):
            return self.uniform(relation)
        difference = relation.lhs - relation.rhs
        if not difference.is_integer:
            return self.opaque(relation)
        strict = 1 if isinstance(relation, (sympy.Lt, sympy.Gt)) else 0
        below = self.at_most(difference, sympy.Integer(-strict))
        above = self.at_most(-difference, sympy.Integer(-strict))
        if isinstance(relation, sympy.Eq):
            found = None if below is None or above is None else _both(below, above)
        else:
            found = below if isinstance(relation, (sympy.Le, sympy.Lt)) else above
        return self.opaque(relation) if found is None else found

    def uniform(self, relation: Term) -> TileBounds:
        """A relation in the other index alone decides whole rows of the tile at once."""
        if relation.has(self.index):
            return self.opaque(relation)
        certain, possible = verdict(relation, self.ranges)
        by_data = any(load.has(self.index, self.other) for load in relation.atoms(Load))
        return _all_or_nothing(certain, possible, remaining=by_data)

    def at_most(self, term: Term, bound: Term) -> TileBounds | None:
        """The indices with `term <= bound`, if the term can be solved for the index."""
        solved = _solve(term, bound, self.index)
        if solved is None:
            return None
        if isinstance(solved, tuple):  # |x| <= bound
            parts = [self.at_most(part, bound) for part in solved]
            return None if None in parts else reduce(_both, parts)  # type: ignore[arg-type]
        side, limit = solved.side, solved.limit
        lo, hi = interval(limit, self.ranges)
        if lo is None or hi is None:
            return None
        if side == "upper":
            return TileBounds(lo=-sympy.oo, hi=hi + 1, full_lo=-sympy.oo, full_hi=lo + 1, remaining=False)
        return TileBounds(lo=lo, hi=sympy.oo, full_lo=hi, full_hi=sympy.oo, remaining=False)


@dataclass(frozen=True)
class _Solved:
    """`index <= limit` (upper) or `index >= limit` (lower)."""

    side: Literal["upper", "lower"]
    limit: Term


def _solve(term: Term, bound: Term, index: Term) -> _Solved | tuple[Term, Term] | None:
    """`term <= bound` solved for the index, through sums, integer factors and floor divisions; a pair of terms for `abs`."""
    if term == index:
        return _Solved("upper", bound)
    if isinstance(term, sympy.Add):
        inside = [part for part in term.args if part.has(index)]
        rest = sympy.Add(*(part for part in term.args if not part.has(index)))
        if len(inside) != 1:
            return None
        found = _solve(inside[0], bound - rest, index)
        return tuple(part + rest for part in found) if isinstance(found, tuple) else found  # type: ignore[return-value]
    if isinstance(term, FloorDiv) and not term.args[1].has(index) and _is_positive(term.args[1]):
        divisor = term.args[1]
        return _no_pair(_solve(term.args[0], divisor * bound + divisor - 1, index))
    if isinstance(term, sympy.Abs):
        return (term.args[0], -term.args[0])
    if isinstance(term, sympy.Mul) and term.args[0].is_Integer:
        return _solve_product(int(term.args[0]), sympy.Mul(*term.args[1:]), bound, index)
    return None


def _solve_product(factor: int, inner: Term, bound: Term, index: Term) -> _Solved | tuple[Term, Term] | None:
    if factor > 0:
        return _no_pair(_solve(inner, FloorDiv(bound, sympy.Integer(factor)), index))
    least = -FloorDiv(bound, sympy.Integer(-factor))  # inner >= least
    if inner == index:
        return _Solved("lower", least)
    if isinstance(inner, FloorDiv) and _is_positive(inner.args[1]) and not inner.args[1].has(index):
        return _no_pair(_solve(-inner.args[0], -inner.args[1] * least, index))
    return None


def _no_pair(solved: _Solved | tuple[Term, Term] | None) -> _Solved | None:
    return solved if isinstance(solved, _Solved) else None


def _all_or_nothing(certain: Term, possible: Term, *, remaining: bool) -> TileBounds:
    """Ranges that hold every index or, with `lo` beyond `hi`, none: neutral in `Min` and `Max` of ends."""
    zero, beyond = sympy.S.Zero, sympy.Integer(ALWAYS)
    return TileBounds(
        lo=Where(possible, zero, beyond),
        hi=Where(possible, beyond, zero),
        full_lo=Where(certain, zero, beyond),
        full_hi=Where(certain, beyond, zero),
        remaining=remaining,
        uniform=True,
    )


def _both(a: TileBounds, b: TileBounds) -> TileBounds:
    return TileBounds(
        lo=sympy.Max(a.lo, b.lo),
        hi=sympy.Min(a.hi, b.hi),
        full_lo=sympy.Max(a.full_lo, b.full_lo),
        full_hi=sympy.Min(a.full_hi, b.full_hi),
        remaining=a.remaining or b.remaining,
        uniform=a.uniform and b.uniform,
    )


def _either(a: TileBounds, b: TileBounds) -> TileBounds:
    """The hull; the full range is the union where both share an end. Ranges that may leave a gap ask for a table."""
    joined = a.lo == b.lo or a.hi == b.hi or a.uniform or b.uniform
    full_lo, full_hi = _joined_full(a, b)
    return TileBounds(
        lo=sympy.Min(a.lo, b.lo),
        hi=sympy.Max(a.hi, b.hi),
        full_lo=full_lo,
        full_hi=full_hi,
        remaining=a.remaining or b.remaining or not joined,
        uniform=a.uniform and b.uniform,
    )


def _joined_full(a: TileBounds, b: TileBounds) -> tuple[Term, Term]:
    if a.full_lo == b.full_lo:
        return (a.full_lo, sympy.Max(a.full_hi, b.full_hi))
    if a.full_hi == b.full_hi or a.uniform or b.uniform:
        return (sympy.Min(a.full_lo, b.full_lo), sympy.Max(a.full_hi, b.full_hi))
    if _never(a) or _never(b):
        return (b.full_lo, b.full_hi) if _never(a) else (a.full_lo, a.full_hi)
    if all(end.is_finite is not False for end in (a.full_lo, a.full_hi, b.full_lo, b.full_hi)):
        longer = (a.full_hi - a.full_lo) >= (b.full_hi - b.full_lo)
        return (Where(longer, a.full_lo, b.full_lo), Where(longer, a.full_hi, b.full_hi))
    infinite = a if a.full_lo == -sympy.oo or a.full_hi == sympy.oo else b
    return (infinite.full_lo, infinite.full_hi)


def _never(bounds: TileBounds) -> bool:
    return bounds.full_lo == sympy.oo or bounds.full_hi == -sympy.oo

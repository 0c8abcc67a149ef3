"""One form for conditions and numbers that are written in several, so that equal meanings give equal specifications.

i - j < 4, j > i - 4, ~(j < i - 3)   ->  j >= i - 3          s / 8  ->  0.125 * s
(j <= i) & (j <= i + 1)              ->  j <= i              x - y != 0, ~(x == y)  ->  x != y
"""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Not, Or, Xor

from .ranges import Ranges
from .terms import IsTrue, Term, is_condition, to_text


def canonical(term: Term, ranges: Ranges, key: sympy.Symbol) -> Term:
    """An equal term in one form; comparisons are solved for `key` where they are linear in it."""
    if not term.args or term.is_number:
        return _decimal(term)
    if is_condition(term):
        return _condition(term, ranges, key)
    parts = [canonical(a, ranges, key) for a in term.args]
    return term.func(*parts) if tuple(parts) != term.args else term


def _decimal(term: Term) -> Term:
    """A fraction as a float."""
    return sympy.Float(term) if term.is_Rational and not term.is_Integer else term


def _condition(term: Term, ranges: Ranges, key: sympy.Symbol) -> Term:
    if isinstance(term, Relational):
        return _relation(term, ranges, key)
    if isinstance(term, Not):
        return _negated(term.args[0], ranges, key)
    if isinstance(term, Xor):
        return canonical(_spelled_out(term), ranges, key)
    if isinstance(term, (And, Or)):
        return _strongest(term.func, term.func(*(canonical(a, ranges, key) for a in term.args)), ranges)
    return term.func(*(canonical(a, ranges, key) for a in term.args))


def _spelled_out(term: Xor) -> Term:
    """`a ^ b` as `(a & ~b) | (~a & b)`."""
    result = sympy.false
    for part in term.args:
        result = Or(And(result, Not(part)), And(Not(result), part))
    return result


def _negated(term: Term, ranges: Ranges, key: sympy.Symbol) -> Term:
    term = _spelled_out(term) if isinstance(term, Xor) else term
    if isinstance(term, (And, Or)):
        dual = Or if isinstance(term, And) else And
        return canonical(dual(*(Not(a) for a in term.args)), ranges, key)
    if isinstance(term, IsTrue):
        return Not(canonical(term, ranges, key))
    inner = canonical(term, ranges, key)
    return Not(inner)


# -------------------------------------------------------------------- comparisons of integers


def _relation(term: Relational, ranges: Ranges, key: sympy.Symbol) -> Term:
    a, b = (canonical(x, ranges, key) for x in term.args)
    kind = type(term)
    if not (a.is_integer and b.is_integer):
        return kind(a, b)
    difference = sympy.expand(a - b)
    if kind in (sympy.Eq, sympy.Ne):
        return _equation(kind, difference)
    if kind in (sympy.Gt, sympy.Ge):
        difference, kind = -difference, sympy.Lt if kind is sympy.Gt else sympy.Le
    if kind is sympy.Lt:
        difference = difference + 1
    return _at_most_zero(sympy.expand(difference), ranges, key)


def _equation(kind: type[Relational], difference: Term) -> Term:
    """`difference == 0`, as positive terms == negative terms; `|x| == 0` as `x == 0`."""
    inner = difference.as_coeff_Mul()[1]
    if isinstance(inner, sympy.Abs):
        return _equation(kind, sympy.expand(inner.args[0]))
    left, right = _sides(difference)
    left, right = sorted((left, right), key=lambda side: (side.is_number, to_text(side)))
    return kind(left, right)


def _sides(difference: Term) -> tuple[Term, Term]:
    parts = sympy.Add.make_args(difference)
    minus = [part for part in parts if part.could_extract_minus_sign()]
    plus = [part for part in parts if part not in minus]
    constants = [part for part in plus if part.is_number]
    if len(constants) < len(plus):
        plus, minus = [part for part in plus if part not in constants], [*minus, *constants]
    return sympy.Add(*plus), -sympy.Add(*minus)


def _at_most_zero(difference: Term, ranges: Ranges, key: sympy.Symbol) -> Term:
    """`difference <= 0`, solved for the key; `|x| <= n` as two comparisons."""
    for part in sympy.Add.make_args(difference):
        sign, rest = part.as_coeff_Mul()
        if isinstance(rest, sympy.Abs) and sign == 1:
            others = difference - part
            halves = [_at_most_zero(sympy.expand(side * rest.args[0] + others), ranges, key) for side in (1, -1)]
            return _strongest(And, And(*halves), ranges)
    slope = difference.coeff(key)
    rest = sympy.expand(difference - slope * key)
    if slope in (1, -1) and key not in rest.free_symbols:
        return ranges.compare(sympy.Le, key, -rest) if slope == 1 else ranges.compare(sympy.Ge, key, rest)
    return ranges.compare(sympy.Le, *_sides(difference))


def _strongest(kind: type[And] | type[Or], term: Term, ranges: Ranges) -> Term:
    """A conjunction without the parts that another part implies, false if two exclude each other; likewise a disjunction."""
    if not isinstance(term, kind):
        return term
    kept = list(term.args)
    for part in term.args:
        others = [x for x in kept if x is not part]
        if any(_implies(*((x, part) if kind is And else (part, x)), ranges) for x in others):
            kept = others
    if kind is And and any(_exclude(x, y, ranges) for x in kept for y in kept):
        return sympy.false
    return kind(*kept)


def _exclude(a: Term, b: Term, ranges: Ranges) -> bool:
    """Whether `key <= x` and `key >= y` cannot both hold, because x < y."""
    if not (isinstance(a, sympy.Le) and isinstance(b, sympy.Ge)) or a.args[0] != b.args[0]:
        return False
    gap = b.args[1] - a.args[1] - 1
    return bool(gap.is_integer) and ranges.is_nonnegative(sympy.expand(gap))


def _implies(a: Term, b: Term, ranges: Ranges) -> bool:
    """Whether `key <= x` implies `key <= y`, because x <= y; and likewise for `>=`."""
    if type(a) is not type(b) or not isinstance(a, (sympy.Le, sympy.Ge)) or a.args[0] != b.args[0]:
        return False
    slack = b.args[1] - a.args[1] if isinstance(a, sympy.Le) else a.args[1] - b.args[1]
    return bool(slack.is_integer) and ranges.is_nonnegative(sympy.expand(slack))

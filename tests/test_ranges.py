"""Bounds and simplifications against all values."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import sympy
from hypothesis import given, settings

from effcompile.canonical import canonical
from effcompile.ranges import Ranges
from effcompile.terms import FloorDiv, IntLoad, Modulo, Term, Where, integer_symbol, is_condition

I, J, N = integer_symbol("i"), integer_symbol("j"), integer_symbol("n")
SIZES = {I: 5, J: 7}
RELATIONS = (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne)
_SEARCH = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def ranges(sizes: dict[Any, Any] = SIZES) -> Ranges:
    found = Ranges({})
    for symbol, size in sizes.items():
        found.add(symbol, sympy.sympify(size))
    return found


_SMALL = st.integers(-4, 9)


@st.composite
def terms(draw: Any, depth: int = 3) -> Term:
    """Integer terms over i and j."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from([I, J, sympy.Integer(draw(_SMALL))]))
    a, b = draw(terms(depth - 1)), draw(terms(depth - 1))
    n = sympy.Integer(draw(st.integers(1, 6)) * draw(st.sampled_from([1, 1, 1, -1])))
    build = draw(
        st.sampled_from(
            [
                lambda: a + b,
                lambda: a - b,
                lambda: n * a,
                lambda: FloorDiv(a, n),
                lambda: Modulo(a, n),
                lambda: sympy.Max(a, b),
                lambda: sympy.Min(a, b),
                lambda: sympy.Abs(a),
                lambda: a * b,
                lambda: Where(a < b, a, b + n),
            ]
        )
    )
    return build()


@st.composite
def conditions(draw: Any, depth: int = 2) -> Term:
    relation = draw(st.sampled_from(RELATIONS))(draw(terms(2)), draw(terms(2)))
    if depth == 0:
        return relation
    other = draw(conditions(depth - 1))
    return draw(
        st.sampled_from(
            [relation, sympy.And(relation, other), sympy.Or(relation, other), sympy.Not(other), sympy.Xor(relation, other)]
        )
    )


def value(term: Term, i: int, j: int) -> Any:
    """The term at a point, by Python's own arithmetic."""
    if isinstance(term, sympy.Symbol):
        return {I: i, J: j}[term]
    if term in (sympy.true, sympy.false):
        return term is sympy.true
    if term.is_Number:
        return int(term) if term.is_Integer else float(term)
    args = [value(a, i, j) for a in term.args]
    python: dict[type, Any] = {
        sympy.Add: lambda *xs: sum(xs),
        sympy.Mul: lambda *xs: _product(xs),
        FloorDiv: lambda a, n: a // n,
        Modulo: lambda a, n: a % n,
        sympy.Max: max,
        sympy.Min: min,
        sympy.Abs: abs,
        Where: lambda c, a, b: a if c else b,
        sympy.Pow: lambda a, n: a**n,
        sympy.Lt: lambda a, b: a < b,
        sympy.Le: lambda a, b: a <= b,
        sympy.Gt: lambda a, b: a > b,
        sympy.Ge: lambda a, b: a >= b,
        sympy.Eq: lambda a, b: a == b,
        sympy.Ne: lambda a, b: a != b,
        sympy.And: lambda *xs: all(xs),
        sympy.Or: lambda *xs: any(xs),
        sympy.Not: lambda a: not a,
        sympy.Xor: lambda *xs: sum(xs) % 2 == 1,
    }
    return python[type(term)](*args)


def _product(factors: Any) -> Any:
    result = 1
    for factor in factors:
        result *= factor
    return result


POINTS = list(itertools.product(range(SIZES[I]), range(SIZES[J])))


def assert_equal_everywhere(a: Term, b: Term, points: Any = POINTS) -> None:
    for i, j in points:
        assert value(a, i, j) == value(b, i, j), f"at i={i}, j={j}: {a} is {value(a, i, j)}, {b} is {value(b, i, j)}"


@given(terms())
@_SEARCH
def test_bounds_hold(term):
    low, high = ranges().bounds(term)
    found = [value(term, i, j) for i, j in POINTS]
    assert low is None or low <= min(found)
    assert high is None or high >= max(found)


@given(terms(), st.integers(1, 12) | st.integers(-6, -1))
@_SEARCH
def test_floordiv_and_modulo(term, n):
    divisor = sympy.Integer(n)
    assert_equal_everywhere(ranges().floordiv(term, divisor), FloorDiv(term, divisor))
    assert_equal_everywhere(ranges().modulo(term, divisor), Modulo(term, divisor))


@given(terms(), terms(), st.sampled_from(RELATIONS))
@_SEARCH
def test_compare(a, b, relation):
    assert_equal_everywhere(ranges().compare(relation, a, b), relation(a, b, evaluate=False))


@given(conditions(), st.one_of(terms(), conditions()))
@_SEARCH
def test_refine_under_a_condition(condition, term):
    """What is simplified given a condition is right wherever the condition is true."""
    points = [(i, j) for i, j in POINTS if value(condition, i, j)]
    assert_equal_everywhere(ranges().given(condition).refine(term), term, points)


@given(conditions(), terms(), terms())
@_SEARCH
def test_where(condition, then, otherwise):
    assert_equal_everywhere(ranges().where(condition, then, otherwise), Where(condition, then, otherwise))


@given(conditions(), conditions(), conditions())
@_SEARCH
def test_where_of_conditions(condition, then, otherwise):
    chosen = ranges().where(condition, then, otherwise)
    assert is_condition(chosen)
    for i, j in POINTS:
        assert value(chosen, i, j) == value(then if value(condition, i, j) else otherwise, i, j)


@given(st.one_of(terms(), conditions()))
@_SEARCH
def test_canonical_form(term):
    tidy = canonical(term, ranges(), J)
    assert_equal_everywhere(tidy, term)
    assert canonical(tidy, ranges(), J) == tidy


@pytest.mark.parametrize(
    ("relation", "a", "b", "wanted"),
    [
        (sympy.Lt, I, N, True),
        (sympy.Le, I, N - 1, True),
        (sympy.Ge, I + N, N, True),
        (sympy.Lt, I, N - 1, None),
        (sympy.Eq, I, N, False),
        (sympy.Lt, I, 2 * N - 1, True),
        (sympy.Ge, N, sympy.Integer(2), True),
        (sympy.Ge, N, sympy.Integer(3), None),
    ],
    ids=str,
)
def test_symbolic_sizes(relation, a, b, wanted):
    found = ranges({I: N}).compare(relation, a, b)
    assert found == relation(a, b) if wanted is None else found == wanted


@pytest.mark.parametrize("bound", [sympy.Float(2.5), sympy.Rational(5, 2)], ids=str)
def test_a_bound_with_a_fraction_is_not_taken_for_an_integer(bound):
    within = ranges().given(sympy.Lt(I, bound))
    assert within.bounds(I) == (0, 4)


def test_nothing_is_known_of_an_integer_that_may_be_negative():
    offset = sympy.Symbol("offset", integer=True)
    assert not ranges().is_nonnegative(offset)
    assert not ranges().is_nonnegative(I + offset)


def test_nothing_is_known_of_data():
    assert ranges().bounds(IntLoad(sympy.Symbol("t"), I)) == (None, None)

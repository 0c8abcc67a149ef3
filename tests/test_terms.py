"""Index expressions: the text form reads back as the same term, and derivatives are right."""

from __future__ import annotations

import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.errors import ExpressionError
from effcompile.terms import derivative, from_text, score_symbol, to_text

INTEGERS = st.sampled_from(["i", "j", "b", "h", "n0", "0", "1", "2", "64", "-3", "t0.i[b, i]", "t1.b[j]"])
REALS = st.sampled_from(["s", "0.5", "-1.5", "3", "1e-3", "t2.f[h]", "t3.f[b, h, i, j]", "inf"])


def combined(parts: st.SearchStrategy[str], operators: list[str]) -> st.SearchStrategy[str]:
    return st.tuples(parts, st.sampled_from(operators), parts).map(lambda p: f"(({p[0]}) {p[1]} ({p[2]}))")


integers = st.recursive(
    INTEGERS,
    lambda parts: (
        combined(parts, ["+", "-", "*"])
        | st.tuples(parts, st.sampled_from(["//", "%"]), st.sampled_from(["4", "n0", "64"])).map(
            lambda p: f"(({p[0]}) {p[1]} {p[2]})"
        )
    ),
    max_leaves=5,
)
relations = combined(integers, ["<", "<=", ">", ">=", "==", "!="]) | st.just("bool(t0.b[b, j])")
conditions = st.recursive(relations, lambda parts: combined(parts, ["&", "|"]) | parts.map(lambda p: f"(~({p}))"), max_leaves=4)
reals = st.recursive(
    REALS | integers,
    lambda parts: (
        combined(parts, ["+", "-", "*"])
        | st.tuples(st.sampled_from(["tanh", "sigmoid", "exp", "abs"]), parts).map(lambda p: f"{p[0]}({p[1]})")
        | st.tuples(parts, st.sampled_from(["/ 3", "/ n0", "** 2"])).map(lambda p: f"(({p[0]}) {p[1]})")
        | st.tuples(conditions, parts, parts).map(lambda p: f"where({p[0]}, {p[1]}, {p[2]})")
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300)
@given(text=reals | integers | conditions)
def test_text_reads_back(text: str) -> None:
    term = from_text(to_text(from_text(text)))  # arithmetic may leave a whole float, which reads back as an integer
    assert from_text(to_text(term)) == term
    assert to_text(from_text(to_text(term))) == to_text(term)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("i - j < 1024", "i - j < 1024"),
        ("(j <= i) & (t0.i[b,i] == t0.i[b,j])", "(j <= i) & (t0.i[b, i] == t0.i[b, j])"),
        ("(j <= i) | (j < n0) & (i < n0)", "(i < n0) & (j < n0) | (j <= i)"),
        ("s * 0.125", "0.125 * s"),
        ("50 * tanh(s / 50)", "50 * tanh(s / 50)"),
        ("s / sqrt(n0)", "s / sqrt(n0)"),
        ("s * 0.125 + t0.f[h] * (j - i)", "0.125 * s + (j - i) * t0.f[h]"),
        ("~bool(t0.b[b, j])", "~bool(t0.b[b, j])"),
        ("i // 8 == j // 8", "i // 8 == j // 8"),
        ("where(j <= i, s, -inf)", "where(j <= i, s, -inf)"),
    ],
)
def test_text_is_readable(text: str, expected: str) -> None:
    assert to_text(from_text(text)) == expected


@pytest.mark.parametrize("text", ["s +", "f(s)", "a.b", "t0[b]", "'x'", "i if j else b", "i < j < b"])
def test_text_that_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError, match="Expected an index expression"):
        from_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "3 * s",
        "50 * tanh(s / 50)",
        "sigmoid(s) * s",
        "s ** 3",
        "exp(-s)",
        "max(s, 0.3)",
        "abs(s - 2)",
        "where(j <= i, 2 * s, s)",
        "floor(s) * s",
    ],
)
@pytest.mark.parametrize("at", [-1.3, 0.1, 2.7])
def test_derivative_agrees_with_differences(text: str, at: float) -> None:
    s, step = score_symbol(), 1e-5
    fixed = {"i": 3, "j": 2}
    term = from_text(text).subs({symbol: fixed[symbol.name] for symbol in from_text(text).free_symbols if symbol != s})
    difference = (float(term.subs(s, at + step).evalf()) - float(term.subs(s, at - step).evalf())) / (2 * step)
    assert math.isclose(float(derivative(term, s).subs(s, at).evalf()), difference, rel_tol=1e-4, abs_tol=1e-6)


def test_a_term_without_derivative_is_refused() -> None:
    with pytest.raises(ExpressionError, match="differentiable"):
        derivative(sympy.Function("f")(score_symbol()), score_symbol())

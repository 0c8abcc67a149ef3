"""Interval arithmetic and tile bounds: never wrong about a tile, and exact where one condition stands alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile.intervals import I0, I1, J0, J1, I, J, interval, tile_bounds, verdict
from effcompile.terms import IntLoad, Term, from_text, integer_symbol

N = 40  # length of the index ranges that are enumerated
SIZES = {"n0": 7, "n1": 30}

SINGLE = {
    "causal": "j <= i",
    "strictly-causal": "j < i",
    "anti-causal": "i <= j",
    "shifted": "j <= i + 5",
    "window": "i - j < 9",
    "symmetric-window": "abs(i - j) <= 6",
    "length": "j < n0",
    "query-length": "i < n0",
    "size-offset": "j <= i + n1 - n0",
    "chunk": "i // 8 == j // 8",
    "block-causal": "i // 8 >= j // 8",
    "block-shifted": "(i + 3) // 8 >= j // 8",
    "scaled": "3 * j <= i",
    "scaled-below": "i <= 2 * j + 1",
    "diagonal": "j == i",
    "scaled-blocks": "j // 4 <= 2 * (i // 8)",
}
COMBINED = {
    "sliding-causal": "(j <= i) & (i - j < 9)",
    "prefix": "(j <= i) | (j < n0)",
    "sinks-and-window": "((j <= i) & (i - j < 9)) | ((j <= i) & (j < 3))",
    "padded-causal": "(j <= i) & (j < n1) & (i < n1)",
    "negated": "~((j > i) | (j >= n1))",
    "chunk-causal": "(i // 8 == j // 8) & (j <= i)",
    "dilated": "(j <= i) & ((i - j) % 3 == 0)",
    "not-diagonal": "(j != i) & (j <= i)",
    "two-blocks": "((i < 10) & (j < 10)) | ((i >= 10) & (j >= 10))",
    "always": "True",
    "never": "False",
}


def evaluate(term: Term, **values: int) -> Any:
    """A term at integers."""
    found = term.subs({integer_symbol(name): value for name, value in {**SIZES, **values}.items()})
    return found.doit() if hasattr(found, "doit") else found


def rows_of(mask: str) -> list[list[bool]]:
    """mask[i][j] by Python's own arithmetic."""
    text = mask.replace("&", " and ").replace("|", " or ").replace("~", " not ").strip()
    code = compile(text, mask, "eval")
    return [[bool(eval(code, {"i": i, "j": j, "abs": abs, **SIZES})) for j in range(N)] for i in range(N)]


TRUTH = {name: rows_of(mask) for name, mask in {**SINGLE, **COMBINED}.items()}


def ends_of(mask: str, wanted: str, lo: int, hi: int) -> tuple[int, int, int, int]:
    bounds = tile_bounds(from_text(mask), wanted=wanted, size=sympy.Integer(N))  # type: ignore[arg-type]
    names = ("i0", "i1") if wanted == "j" else ("j0", "j1")
    at = dict(zip(names, (lo, hi), strict=True))
    return tuple(int(evaluate(end, **at)) for end in (bounds.lo, bounds.hi, bounds.full_lo, bounds.full_hi))  # type: ignore[return-value]


def lines_of(name: str, wanted: str, lo: int, hi: int) -> list[list[bool]]:
    """For each index of the wanted axis, the truth over the tile's lines."""
    truth = TRUTH[name]
    return [[truth[a][w] if wanted == "j" else truth[w][a] for a in range(lo, hi + 1)] for w in range(N)]


tiles = st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)).map(sorted)


@pytest.mark.parametrize("wanted", ["i", "j"])
@pytest.mark.parametrize("name", [*SINGLE, *COMBINED])
@settings(deadline=None, max_examples=25)
@given(tile=tiles)
def test_bounds_are_never_wrong(name: str, wanted: str, tile: list[int]) -> None:
    lo, hi, full_lo, full_hi = ends_of({**SINGLE, **COMBINED}[name], wanted, *tile)
    lines = lines_of(name, wanted, *tile)
    assert all(lo <= w < hi for w in range(N) if any(lines[w]))
    assert all(all(lines[w]) for w in range(max(0, full_lo), min(N, full_hi)))


@pytest.mark.parametrize("wanted", ["i", "j"])
@pytest.mark.parametrize("name", SINGLE)
@settings(deadline=None, max_examples=25)
@given(tile=tiles)
def test_one_condition_is_exact(name: str, wanted: str, tile: list[int]) -> None:
    lo, hi, full_lo, full_hi = ends_of(SINGLE[name], wanted, *tile)
    lines = lines_of(name, wanted, *tile)
    some, full = [w for w in range(N) if any(lines[w])], [w for w in range(N) if all(lines[w])]
    assert (list(range(lo, hi)) or []) == (list(range(some[0], some[-1] + 1)) if some else [])
    assert list(range(full_lo, full_hi)) == full


@pytest.mark.parametrize("name", [*SINGLE, *COMBINED])
@settings(deadline=None, max_examples=25)
@given(queries=tiles, keys=tiles)
def test_verdict_is_never_wrong(name: str, queries: list[int], keys: list[int]) -> None:
    mask = from_text({**SINGLE, **COMBINED}[name])
    certain, possible = verdict(mask, {I: (I0, I1), J: (J0, J1)})
    at = dict(zip(("i0", "i1", "j0", "j1"), (*queries, *keys), strict=True))
    values = [TRUTH[name][i][j] for i, j in itertools.product(range(queries[0], queries[1] + 1), range(keys[0], keys[1] + 1))]
    assert not any(values) or evaluate(possible, **at) == sympy.true
    assert all(values) or evaluate(certain, **at) != sympy.true


@pytest.mark.parametrize(
    ("mask", "remaining"),
    [
        ("j <= i", False),
        ("(j <= i) & (i - j < n0)", False),
        ("j <= i + t0.i[0]", False),
        ("j < t0.i[b]", False),
        ("(j <= i) | (j < t0.i[b])", False),
        ("(j <= i) & (t0.i[b, i] == t0.i[b, j])", True),
        ("(j <= i) & bool(t0.b[b, j])", True),
        ("bool(t0.b[b, 0, i, j])", True),
        ("((j <= i) & (i - j < 16)) | ((j <= i) & (j < 4))", True),
    ],
)
def test_what_needs_a_table(mask: str, remaining: bool) -> None:
    term = from_text(mask)
    assert (tile_bounds(term, wanted="j").remaining or tile_bounds(term, wanted="i").remaining) == remaining


def test_bounds_keep_loads_that_do_not_move() -> None:
    bounds = tile_bounds(from_text("j <= i + t0.i[b]"), wanted="j")
    offset = IntLoad(sympy.Symbol("t0"), integer_symbol("b"))
    assert bounds.hi == I1 + offset + 1
    assert bounds.full_hi == sympy.Max(0, I0 + offset + 1)


integers = st.integers(0, 20)  # indices are never negative
ATOMS = st.sampled_from(["x", "y", "3", "7", "-2"])


def combine(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.tuples(parts, st.sampled_from(["+", "-", "*"]), parts).map(lambda p: f"({p[0]} {p[1]} {p[2]})")
    divided = st.tuples(parts, st.sampled_from(["//", "%"]), st.sampled_from(["3", "8"])).map(lambda p: f"({p[0]} {p[1]} {p[2]})")
    called = st.tuples(st.sampled_from(["min", "max"]), parts, parts).map(lambda p: f"{p[0]}({p[1]}, {p[2]})")
    return binary | divided | called | parts.map(lambda p: f"abs({p})")


@settings(deadline=None, max_examples=200)
@given(text=st.recursive(ATOMS, combine, max_leaves=6), x=st.tuples(integers, integers).map(sorted), y=tiles)
def test_interval_contains_every_value(text: str, x: list[int], y: list[int]) -> None:
    lo, hi = interval(from_text(text), {integer_symbol("x"): tuple(x), integer_symbol("y"): tuple(y)})  # type: ignore[dict-item]
    code = compile(text, text, "eval")
    for a, b in itertools.product({x[0], x[1], (x[0] + x[1]) // 2}, {y[0], y[1], (y[0] + y[1]) // 2}):
        value = eval(code, {"x": a, "y": b, "min": min, "max": max, "abs": abs})
        assert (lo is None or lo <= value) and (hi is None or value <= hi)


@pytest.mark.parametrize(
    ("text", "ranges", "expected"),
    [
        ("i - j", {"i": (0, 9), "j": (2, 5)}, (-5, 7)),
        ("i // 4 - 1", {"i": (3, 9)}, (-1, 1)),
        ("i % 4", {"i": (0, 9)}, (0, 3)),
        ("i % 16", {"i": (3, 9)}, (3, 9)),
        ("i + n0", {"i": (0, None)}, (integer_symbol("n0"), None)),
        ("50 * tanh(s)", {"s": (None, None)}, (-50, 50)),
        ("2 * i * j", {"i": (1, 3), "j": (2, 4)}, (4, 24)),
    ],
)
def test_interval_of(text: str, ranges: dict[str, Any], expected: tuple[Any, Any]) -> None:
    known = {sympy.Symbol("s", real=True) if name == "s" else integer_symbol(name): ends for name, ends in ranges.items()}
    assert interval(from_text(text), known) == expected

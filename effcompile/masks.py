"""Takes a logit apart: the score, the condition under which a key takes part, and what a row without any key yields.

s + where(c, 0, -inf)          -> score s, mask c          where(c, s, finfo.min)  -> score s, mask c
where(c, s + bias, -1e30)      -> score s + bias, mask c   (s + where(c, 0, -inf)) * 2 -> score 2*s, mask c
where(a, where(c, s, -inf), s) -> score s, mask c | ~a
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Not, Or

from .ops.attention import Empty
from .ranges import Ranges
from .terms import Load, Sigmoid, Term, Where, is_condition

_MASKING = -6e4  # at most this, a fill takes a key out: its weight is exp(fill - maximum) = 0 in float32
_MOST_PARTS = 16
_ABSORBING = -1e30  # at most this, score + fill == fill in every floating-point dtype


@dataclass(frozen=True, kw_only=True)
class Logit:
    """`score` where `mask`, and what becomes of a row whose mask is empty."""

    score: Term
    mask: Term
    empty: Empty


@dataclass(frozen=True)
class _Fill:
    value: Term
    added: bool


def split(
    logit: Term, ranges: Ranges, i: sympy.Symbol, j: sympy.Symbol, keys: Term, queries: Term, *, safe: bool, trains: bool = True
) -> Logit:
    """Separate score and mask.

    Args:
        keys, queries: the extents of `j` and `i`.
        safe: whether the softmax turns an empty row into zeros (SDPA) rather than NaN.
        trains: whether queries or keys need a gradient. An empty row passes one on to them through a fill that is added to the
            scores, and none through one that replaces them: only the latter is the `empty="mean"` of a specification.
    """
    score, mask, fills = _peel(logit)
    if mask is sympy.true:
        return Logit(score=logit, mask=mask, empty="impossible")
    if never_empty(mask, ranges, i, j, keys, queries):
        return Logit(score=score, mask=mask, empty="impossible")
    if all(fill.value == -sympy.oo for fill in fills):
        return Logit(score=score, mask=mask, empty="zero" if safe else "nan")
    if len(fills) == 1 and (not fills[0].added or (float(fills[0].value) <= _ABSORBING and not trains)):
        return Logit(score=score, mask=mask, empty="mean")
    return Logit(score=logit, mask=sympy.true, empty="impossible")


def split_weight(weight: Term) -> tuple[Term, Term]:
    """A weight that no softmax follows as what it is where a key takes part, and that condition; elsewhere it is zero.

    where(c, w, 0)  w * where(c, 1, 0)  sigmoid(where(c, s, -inf))  sigmoid(s + where(c, 0, finfo.min))  -> w or sigmoid(s), c
    """
    if isinstance(weight, Where) and sympy.S.Zero in weight.args[1:]:
        condition, then, otherwise = weight.args
        score, mask = split_weight(otherwise if then == 0 else then)
        return score, And(Not(condition) if then == 0 else condition, mask)
    if isinstance(weight, sympy.Mul):
        scores, masks = zip(*(split_weight(factor) for factor in weight.args), strict=True)
        return sympy.Mul(*scores), And(*masks)
    if isinstance(weight, Sigmoid):
        score, mask, _ = _peel(weight.args[0])
        return (weight, sympy.true) if mask is sympy.true else (Sigmoid(score), mask)
    return weight, sympy.true


def _peel(logit: Term) -> tuple[Term, Term, tuple[_Fill, ...]]:
    if isinstance(logit, Where):
        condition, then, otherwise = logit.args
        if _is_fill(otherwise):
            score, mask, fills = _peel(then)
            return score, And(condition, mask), (_Fill(otherwise, False), *fills)
        if _is_fill(then):
            score, mask, fills = _peel(otherwise)
            return score, And(Not(condition), mask), (_Fill(then, False), *fills)
        return _peel_choice(logit)
    if isinstance(logit, sympy.Mul):
        factor, rest = logit.as_coeff_Mul()
        if factor.is_positive and rest.is_Add and rest.has(Where):
            return _peel(sympy.Add(*(factor * part for part in rest.args)))
        if factor.is_positive and isinstance(rest, Where) and factor != 1:
            condition, then, otherwise = rest.args
            return _peel(Where(condition, factor * then, factor * otherwise))
        return logit, sympy.true, ()
    if isinstance(logit, sympy.Add):
        return _peel_sum(logit)
    return logit, sympy.true, ()


def _peel_choice(logit: Where) -> tuple[Term, Term, tuple[_Fill, ...]]:
    """A choice between two logits, of which one is masked at least: the masks are chosen between, and so are the scores."""
    condition, then, otherwise = logit.args
    (score, mask, fills), (other, other_mask, other_fills) = _peel(then), _peel(otherwise)
    if not fills and not other_fills:
        return logit, sympy.true, ()
    both = Or(And(condition, mask), And(Not(condition), other_mask))
    return Where(condition, score, other), both, tuple(dict.fromkeys((*fills, *other_fills)))


def _peel_sum(logit: sympy.Add) -> tuple[Term, Term, tuple[_Fill, ...]]:
    scores, masks, fills = [], [], []
    for part in _merged(logit.args):
        score, mask, found = _peel(part)
        scores.append(score)
        masks.append(mask)
        fills += [_Fill(fill.value, True) for fill in found]
    return sympy.Add(*scores), And(*masks), tuple(fills)


def _merged(parts: Sequence[Term]) -> list[Term]:
    """`s * where(c, 1, 0) + where(c, 0, -1e10)` as one `where(c, s, -1e10)`."""
    chosen: dict[Term, list[Where]] = {}
    rest = []
    for part in (_outermost(part) for part in parts):
        if isinstance(part, Where):
            chosen.setdefault(part.args[0], []).append(part)
        else:
            rest.append(part)
    merged = [Where(c, *(sympy.Add(*(w.args[k] for w in found)) for k in (1, 2))) for c, found in chosen.items()]
    return rest + merged


def _outermost(part: Term) -> Term:
    """`x * where(c, n, 0)` as `where(c, n * x, 0)`: x is finite."""
    for factor in part.args if isinstance(part, sympy.Mul) else ():
        if isinstance(factor, Where) and factor.args[2] == 0 and factor.args[1].is_number:
            others = sympy.Mul(*(f for f in part.args if f is not factor))
            if others.has(sympy.oo, -sympy.oo):
                continue
            return Where(factor.args[0], factor.args[1] * others, sympy.S.Zero)
    return part


def _is_fill(term: Term) -> bool:
    return bool(term.is_number) and not is_condition(term) and (term == -sympy.oo or float(term) <= _MASKING)


def never_empty(mask: Term, ranges: Ranges, i: sympy.Symbol, j: sympy.Symbol, keys: Term, queries: Term) -> bool:
    """Whether every row is proved to have a key: one of `j = i`, `j = i + keys - queries`, `j = 0`, the last, always satisfies."""
    chosen = [mask.xreplace({j: key}) for key in (i, i + keys - queries, sympy.S.Zero, keys - 1) if ranges.is_below(key, keys)]
    if any(ranges.refine(row) is sympy.true for row in chosen):
        return True
    parts = _parts(mask, ranges, i)
    return bool(parts) and all(any(part.refine(row) is sympy.true for row in chosen) for part in parts)


def _parts(mask: Term, ranges: Ranges, i: sympy.Symbol) -> list[Ranges]:
    """The range of `i`, taken apart at the numbers that the mask compares it with; nothing if there are none, or many."""
    compared = [x for x in mask.atoms(Relational) if i in x.args and any(a.is_Integer for a in x.args)]
    ends = {int(a) + step for x in compared for a in x.args if a.is_Integer for step in (0, 1)}
    bounds = ranges.get(i)
    if not compared or len(ends) > _MOST_PARTS or bounds is None or not bounds[1].is_Integer:
        return []
    starts = sorted({0, *(n for n in ends if 0 < n <= bounds[1])})
    return [ranges.given(And(i >= start, i < end)) for start, end in zip(starts, [*starts[1:], int(bounds[1]) + 1], strict=True)]


def drop_shift(
    logit: Term, key: sympy.Symbol, is_maximum: Callable[[Load], bool], also: Term | None = None
) -> tuple[Term, Term | None]:
    """Remove a maximum of the logits that is subtracted for all keys alike: softmax(x - c) = softmax(x).

    Other shifts stay: one by -3e38 (a padded query) absorbs what it is added to. `also` is a logit of the same softmax (a sink):
    only what both have is removed.
    """
    shifts = []
    for part in sympy.Add.make_args(logit):
        if key not in part.free_symbols and _is_maximum(part.as_coeff_Mul()[1], is_maximum):
            shifts.append(part)
    if also is None:
        return logit - sympy.Add(*shifts), None
    others = sympy.Add.make_args(also)
    common = sympy.Add(*(part for part in shifts if part in others))
    return logit - common, also - common


def _is_maximum(term: Term, is_maximum: Callable[[Load], bool]) -> bool:
    """Whether a term is a maximum of logits, or the larger one of that and a number."""
    if isinstance(term, sympy.Max):
        return all(x.is_number or _is_maximum(x, is_maximum) for x in term.args)
    return isinstance(term, Load) and is_maximum(term)

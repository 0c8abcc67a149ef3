"""Takes a logit apart: the score, the condition under which a key takes part, and what a row without any key yields.

    s + where(c, 0, -inf)          -> score s, mask c          where(c, s, finfo.min)  -> score s, mask c
    where(c, s + bias, -1e30)      -> score s + bias, mask c   (s + where(c, 0, -inf)) * 2 -> score 2*s, mask c
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import And, Not

from .ops.attention import Empty
from .ranges import Ranges
from .terms import Load, Term, Where, is_condition

_MASKING = -6e4  # at most this, a fill takes a key out: its weight is exp(fill - maximum) = 0 in float32
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


def split(logit: Term, ranges: Ranges, i: sympy.Symbol, j: sympy.Symbol, keys: Term, queries: Term, *, safe: bool) -> Logit:
    """Separate score and mask.

    Args:
        keys, queries: the extents of `j` and `i`.
        safe: whether the softmax turns an empty row into zeros (SDPA) rather than NaN.
    """
    score, mask, fills = _peel(logit)
    if mask is sympy.true:
        return Logit(score=logit, mask=mask, empty="impossible")
    if never_empty(mask, ranges, i, j, keys, queries):
        return Logit(score=score, mask=mask, empty="impossible")
    if all(fill.value == -sympy.oo for fill in fills):
        return Logit(score=score, mask=mask, empty="zero" if safe else "nan")
    if len(fills) == 1 and (not fills[0].added or float(fills[0].value) <= _ABSORBING):
        return Logit(score=score, mask=mask, empty="mean")
    return Logit(score=logit, mask=sympy.true, empty="impossible")


def _peel(logit: Term) -> tuple[Term, Term, tuple[_Fill, ...]]:
    if isinstance(logit, Where):
        condition, then, otherwise = logit.args
        if _is_fill(otherwise):
            score, mask, fills = _peel(then)
            return score, And(condition, mask), (_Fill(otherwise, False), *fills)
        if _is_fill(then):
            score, mask, fills = _peel(otherwise)
            return score, And(Not(condition), mask), (_Fill(then, False), *fills)
        return logit, sympy.true, ()
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


def _peel_sum(logit: sympy.Add) -> tuple[Term, Term, tuple[_Fill, ...]]:
    scores, masks, fills = [], [], []
    for part in logit.args:
        score, mask, found = _peel(part)
        scores.append(score)
        masks.append(mask)
        fills += [_Fill(fill.value, True) for fill in found]
    return sympy.Add(*scores), And(*masks), tuple(fills)


def _is_fill(term: Term) -> bool:
    return bool(term.is_number) and not is_condition(term) and (term == -sympy.oo or float(term) <= _MASKING)


def never_empty(mask: Term, ranges: Ranges, i: sympy.Symbol, j: sympy.Symbol, keys: Term, queries: Term) -> bool:
    """Whether every row is proved to have a key: one of `j = i`, `j = i + keys - queries`, `j = 0`, the last, always satisfies."""
    for key in (i, i + keys - queries, sympy.S.Zero, keys - 1):
        if not ranges.is_below(key, keys):
            continue
        if ranges.refine(mask.xreplace({j: key})) is sympy.true:
            return True
    return False


def drop_shift(logit: Term, varying: frozenset[Term], also: Term | None = None) -> tuple[Term, Term | None]:
    """Remove summands that are the same for all keys: softmax(x + c) = softmax(x).

    `also` is a logit of the same softmax (a sink): only what both have is removed.
    """
    kept, shifts = [], []
    for part in sympy.Add.make_args(logit):
        constant = not (part.free_symbols & varying) and part.has(Load)
        (shifts if constant else kept).append(part)
    if also is None:
        return sympy.Add(*kept), None
    others = sympy.Add.make_args(also)
    common = [part for part in shifts if part in others]
    return logit - sympy.Add(*common), also - sympy.Add(*common)

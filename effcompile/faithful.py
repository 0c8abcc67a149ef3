"""Where a term, which is exact, may stand for an element, which was rounded.

Leaving out roundings changes a sum by its last digits, and a comparison altogether: `arange(300).bfloat16() == 255` holds once, and
`== 257` twice. An element whose term could differ from it in more than its last digits is loaded instead.
"""

from __future__ import annotations

import sympy
import torch

from .contraction import Dot
from .ranges import Ranges
from .terms import Load, Term, Where, is_condition, number

_OFFSET = 2.0  # a constant up to here loses no more digits of a logit than the logit's own rounding
_NARROW = (torch.float16, torch.bfloat16)
_UNREAL = (sympy.zoo, sympy.I, sympy.AccumBounds)


def simple_number(term: Term) -> Term:
    """A number as an integer, a fraction, or a float: no roots and logarithms."""
    if isinstance(term, sympy.Number) or not term.is_number or is_condition(term) or term.has(*_UNREAL, sympy.nan):
        return term
    return sympy.Float(float(term)) if term.is_real else term


def rounded(term: Term, dtype: torch.dtype) -> Term:
    """A number as a narrow dtype holds it; other terms unchanged."""
    if dtype not in _NARROW or not term.is_number or not term.is_finite:
        return term
    return number(torch.tensor(float(term), dtype=dtype).item())


def is_finite_choice(term: Term) -> bool:
    """Whether a term is an integer, a number, or a choice among such: what a cast does to it is known."""
    if isinstance(term, Where):
        return all(is_finite_choice(a) for a in term.args[1:])
    return bool(is_condition(term) or term.is_number or term.is_integer)


def stands_for(term: Term, dtype: torch.dtype, ranges: Ranges) -> bool:
    """Whether the term of an element of this dtype differs from it in its last digits at most."""
    if is_condition(term):
        return True
    if term.has(*_UNREAL):
        return False
    if not dtype.is_floating_point:
        return dtype in (torch.int64, torch.int32, torch.bool) or _within(
            term, torch.iinfo(dtype).min, torch.iinfo(dtype).max, ranges
        )
    if dtype in _NARROW and term.is_integer and not term.is_number:
        most = int(2 / torch.finfo(dtype).eps)
        return _within(term, -most, most, ranges)
    return not _cancels(term)


def _within(term: Term, least: int, most: int, ranges: Ranges) -> bool:
    return ranges.is_nonnegative(term - least) and ranges.is_nonnegative(most - term)


def _cancels(term: Term) -> bool:
    """Whether a large constant may cancel against a load, as in `1e9 * mask - 1e9`: the terms of a sum have no order."""
    if not isinstance(term, sympy.Add) or term.has(Dot):
        return False
    constant = term.as_coeff_Add()[0]
    return bool(constant.is_finite and abs(constant) > _OFFSET and term.has(Load))


def is_exact(term: Term) -> bool:
    """Whether an element of floating-point dtype equals its term, so that a comparison of the two comes out alike."""
    if is_condition(term) or term.is_number or term.is_integer or isinstance(term, Load):
        return True
    if isinstance(term, Where):
        return all(is_exact(a) for a in term.args[1:])
    if isinstance(term, (sympy.Abs, sympy.Min, sympy.Max)):
        return all(is_exact(a) for a in term.args)
    if isinstance(term, sympy.Mul) and len(term.args) == 2 and term.args[0] == -1:
        return is_exact(term.args[1])
    return bool(term.has(Dot))  # scores are compared with scores, or clamped: there is no digit to agree in

"""Weights over two positions as a mask times a decay: w(i, j) = s(i, j) * exp(x_i - x_j) for j <= i, else 0.

    where(j <= i, gamma**(i - j), 0)           gate  log(gamma)
    exp(F_i - F_j + where(j <= i, 0, -inf))    gate  g,  F = cumsum(g)
    tril(P_i / P_j)                            gate  log(a),  P = cumprod(a)

Conditions and absolute values are decided in each of the three cases j < i, j == i and j > i, so it does not matter how the mask is
written. What depends on one position alone is left as a factor of queries or keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Not, Or
from torch.fx import Node

from effcompile.expr import Interpreter, is_longer
from effcompile.ops.recurrence import Read
from effcompile.ranges import Ranges
from effcompile.rules import wrap_dim
from effcompile.terms import Load, Term, Where, integer_symbol
from effcompile.viewmaps import shape_of, view_source

from .specify import H, I, J, Stop, short

aten = torch.ops.aten

U = integer_symbol("u")  # the position that a cumulative sum runs over
_GAP = integer_symbol("gap")
_NOTHING = sympy.Float("1e-1000000")
_NEGLIGIBLE = -1e8  # added to an exponent, it leaves nothing in any dtype that holds the rest
_POSITIVE = (aten.sigmoid.default, aten.exp.default)
_MOST_WORK = 4000  # subterms of a weight that is taken apart


class Prefix(sympy.Function):
    """`Prefix(x(u), n)`: the sum of x(u) over u <= n."""

    is_real = True


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Weights `exp(row(i) + gates up to and with i, from after j + key(j)) * rows * keys`, for j <= i or j < i.

    Attributes:
        read: whether j == i takes part ("after" the update) or not ("before" it).
        gate: log-decay at position `U`, 0 if there is none. For "before", that of step i is left out.
        row, key: further exponents, over I and over J.
        rows, keys: further factors.
    """

    read: Read
    gate: Term
    row: Term
    key: Term
    rows: Term
    keys: Term


def decay_of(weight: Term, score: Term, interpreter: Interpreter, exponent: Term, node: Node) -> Decay:
    """Takes a weight over (I, J), which is `score` times something, apart; `exponent` is added to that of the weight.

    Raises:
        Stop: it is no such decay.
    """
    if is_longer(weight, _MOST_WORK):
        raise Stop("decay", "the weights of the keys are too long an expression", node)
    below, same, above = (_resolved(weight, interpreter.ranges, case, node) for case in (_BELOW, _SAME, _ABOVE))
    if not _vanishes(above):
        raise Stop("mask", f"later positions take part: {short(above)}", node)
    terms = _parted(below, score, interpreter, exponent, node)
    read: Read = "before" if _vanishes(same) else "after"
    if read == "after":
        _check_diagonal(terms, _parted(same, score, interpreter, exponent, node), same, node)
    return _paired(terms, read, node)


# -------------------------------------------------------------------- the mask

_BELOW = {I: J + 1 + _GAP}
_SAME = {I: J}
_ABOVE = {J: I + 1 + _GAP}


def _resolved(term: Term, ranges: Ranges, case: dict[Term, Term], node: Node) -> Term:
    """A term with its choices made as they come out in one case of the two positions."""
    inner = Ranges({s: bounds for s in (I, J, *term.free_symbols) if (bounds := ranges.get(s)) is not None})
    inner.add(_GAP, (ranges.get(J) or (None, sympy.oo))[1] + 1)
    return _Resolver(inner, case, node).resolve(term)


class _Resolver:
    def __init__(self, ranges: Ranges, case: dict[Term, Term], node: Node):
        self.ranges, self.case, self.node = ranges, case, node
        self.memo: dict[Term, Term] = {}

    def resolve(self, term: Term) -> Term:
        if not term.args or not term.has(Where, sympy.Abs, sympy.Min, sympy.Max):
            return term
        if term not in self.memo:
            self.memo[term] = self._resolve(term)
        return self.memo[term]

    def _resolve(self, term: Term) -> Term:
        if isinstance(term, Where):
            verdict = self.truth(term.args[0])
            if verdict is None:
                if {I, J} <= term.args[0].free_symbols:
                    raise Stop("mask", _undecided(term.args[0]), self.node)
                return Where(term.args[0], self.resolve(term.args[1]), self.resolve(term.args[2]))
            return self.resolve(term.args[1] if verdict else term.args[2])
        parts = [self.resolve(a) for a in term.args]
        if isinstance(term, sympy.Abs):
            return self._absolute(parts[0])
        if isinstance(term, (sympy.Max, sympy.Min)) and len(parts) == 2:
            return self._extreme(term, parts)
        return term.func(*parts)

    def _absolute(self, x: Term) -> Term:
        sign = self._sign(x)
        return sympy.Abs(x) if sign is None else sign * x

    def _extreme(self, term: Term, parts: list[Term]) -> Term:
        sign = self._sign(parts[0] - parts[1])
        if sign is None:
            return term.func(*parts)
        first = (sign > 0) == isinstance(term, sympy.Max)
        return parts[0] if first else parts[1]

    def _sign(self, x: Term) -> int | None:
        """1 or -1, times which an integer is not negative."""
        there = sympy.expand(x.xreplace(self.case))
        if not there.is_integer:
            return None
        return 1 if self.ranges.is_nonnegative(there) else -1 if self.ranges.is_nonnegative(-there) else None

    def truth(self, condition: Term) -> bool | None:
        """Whether a condition holds in this case; None if that is not known."""
        if condition in (sympy.true, sympy.false):
            return condition is sympy.true
        if isinstance(condition, Not):
            inner = self.truth(condition.args[0])
            return None if inner is None else not inner
        if isinstance(condition, (And, Or)):
            decisive = isinstance(condition, Or)
            found = [self.truth(a) for a in condition.args]
            return decisive if decisive in found else None if None in found else not decisive
        if isinstance(condition, Relational):
            a, b = (self.resolve(x).xreplace(self.case) for x in condition.args)
            verdict = self.ranges.compare(type(condition), sympy.expand(a), sympy.expand(b))
            return verdict is sympy.true if verdict in (sympy.true, sympy.false) else None
        return None


def _undecided(condition: Term) -> str:
    """Why nothing is known of a condition on both positions: one tensor's equal entries may stand anywhere."""
    equal = next((x for x in condition.atoms(sympy.Eq) if all(isinstance(a, Load) for a in x.args)), None)
    if equal is not None:
        a, b = equal.args
        if a.tensor == b.tensor and {a, b} == {a.xreplace({J: I}), a.xreplace({I: J})}:
            return (
                f"entries of {a.tensor} that are equal are not known to stand side by side, as those of one document do: "
                f"{short(equal)}; a loop or a scan that resets its state at each document's start needs no such knowledge"
            )
    return f"the mask is not known to be causal: {short(condition)}"


def _vanishes(term: Term) -> bool:
    """Whether a weight is zero, or has a factor exp(x - 1e9)."""
    if term == 0:
        return True
    for factor in sympy.Mul.make_args(term):
        if factor.is_number and abs(factor) < _NOTHING:  # exp(x - 1e9), as sympy keeps it
            return True
        if isinstance(factor, sympy.exp) and factor.args[0].as_coeff_Add()[0] <= _NEGLIGIBLE:
            return True
    return False


# -------------------------------------------------------------------- exponents and factors


@dataclass(frozen=True, kw_only=True)
class _Parted:
    """A weight as `exp(exponent) * rows * keys`."""

    exponent: Term
    rows: Term
    keys: Term


def _parted(weight: Term, score: Term, interpreter: Interpreter, exponent: Term, node: Node) -> _Parted:
    rows, keys = sympy.S.One, sympy.S.One
    factors = list(sympy.Mul.make_args(weight))
    if score not in factors or any(factor.has(score) for factor in factors if factor != score):
        raise Stop("scores", f"the weights are no multiple of the scores: {short(weight)}", node)
    factors.remove(score)
    for factor in factors:
        power = _logarithm(factor, interpreter, node)
        if power is not None:
            exponent = exponent + power
        elif J not in factor.free_symbols:
            rows = rows * factor
        elif I not in factor.free_symbols:
            keys = keys * factor
        else:
            raise Stop("decay", f"a factor of the weights is no decay from one position to the other: {short(factor)}", node)
    exponent = _with_prefixes(sympy.expand(exponent), interpreter, node)
    return _Parted(exponent=sympy.expand(exponent), rows=rows, keys=keys)


def _logarithm(factor: Term, interpreter: Interpreter, node: Node) -> Term | None:
    """The exponent of a factor that is an exponential: exp(x), gamma**x, a cumulative product."""
    if isinstance(factor, sympy.exp):
        return factor.args[0]
    base, power = factor.as_base_exp()
    if isinstance(base, Load) and _accumulates(base, interpreter) == aten.cumprod.default and power.is_number:
        return power * sympy.log(base)
    if {I, J} & power.free_symbols and not {I, J} & base.free_symbols:
        if not is_positive(base, interpreter):
            raise Stop("decay", f"a decay is not known to be positive: {short(base)}", node)
        return power * sympy.log(base)
    return None


def power_of(term: Term, interpreter: Interpreter) -> Term | None:
    """The exponent of a product of exponentials and cumulative products; None if another factor is among them."""
    exponent: Term = sympy.S.Zero
    for factor in sympy.Mul.make_args(term):
        base, power = factor.as_base_exp()
        if isinstance(factor, sympy.exp):
            exponent = exponent + factor.args[0]
        elif isinstance(base, Load) and _accumulates(base, interpreter) == aten.cumprod.default and power.is_number:
            exponent = exponent + power * sympy.log(base)
        else:
            return None
    return exponent


def _accumulates(load: Load, interpreter: Interpreter) -> object:
    """The overload by which a load's tensor adds or multiplies up, if it does."""
    source, _ = _behind(load, interpreter)
    return source.target


def _behind(load: Load, interpreter: Interpreter) -> tuple[Node, tuple[Term, ...]]:
    """The node that a load reads, beyond views, and the index there."""
    node, index = interpreter.loaded[load.tensor], load.indices
    while (step := view_source(node, index, interpreter.ranges)) is not None:
        node, index = step
    return node, index


def _with_prefixes(exponent: Term, interpreter: Interpreter, node: Node) -> Term:
    """An exponent with its loads from cumulative sums as `Prefix`es."""
    found = {}
    for load in exponent.atoms(Load):
        source, index = _behind(load, interpreter)
        if source.target in (aten.cumsum.default, aten.cumprod.default):
            prefix = _prefix(source, index, interpreter, node)
            if prefix is not None:
                found[load if source.target is aten.cumsum.default else sympy.log(load)] = prefix
    return exponent.xreplace(found) if found else exponent


def _prefix(source: Node, index: tuple[Term, ...], interpreter: Interpreter, node: Node) -> Term | None:
    summed: Node = source.args[0]  # type: ignore[assignment]
    dim = wrap_dim(int(source.args[1]), len(index))  # type: ignore[call-overload]
    position = index[dim]
    elsewhere = {s for k, term in enumerate(index) if k != dim for s in term.free_symbols}
    interpreter.ranges.add(U, shape_of(summed)[dim])
    at = tuple(U if k == dim else term for k, term in enumerate(index))
    if {I, J} & elsewhere:
        return _masked_prefix(interpreter.element(summed, at), position, interpreter, node)
    if not {I, J} & position.free_symbols:
        return None
    term = _load_of(summed, at, interpreter)
    if source.target is aten.cumprod.default:
        if not is_positive(term, interpreter):
            raise Stop("decay", f"a decay is not known to be positive: {short(term)}", node)
        term = sympy.log(term)
    return _up_to(term, position)


def _up_to(summand: Term, position: Term) -> Term | None:
    """The sum up to i - 1 is that up to i without the last summand."""
    for symbol in (I, J):
        if position == symbol:
            return Prefix(summand, symbol)
        if position == symbol - 1:
            return Prefix(summand, symbol) - summand.xreplace({U: symbol})
    return None


def is_positive(term: Term, interpreter: Interpreter) -> bool:
    """Whether a number, one for each head or loaded from a sigmoid or an exponential, is proved to be above zero."""
    positive = {
        load: sympy.Symbol(f"positive{k}", positive=True)
        for k, load in enumerate(sorted(term.atoms(Load), key=str))
        if _behind(load, interpreter)[0].target in _POSITIVE
    }
    term = term.xreplace(positive)
    if term.is_positive or term.free_symbols - {H}:
        return bool(term.is_positive)
    heads = (interpreter.ranges.get(H) or (0, sympy.S.Zero))[1]
    return bool(heads.is_Integer) and all(float(term.xreplace({H: sympy.Integer(n)})) > 0 for n in range(int(heads) + 1))


def _load_of(node: Node, index: tuple[Term, ...], interpreter: Interpreter) -> Term:
    """What a gate is: a load of the last node that computes it, or a term if it is no data."""
    term = interpreter.element(node, index)
    return term if not term.has(Load) else interpreter.load(node, index)


def _masked_prefix(term: Term, position: Term, interpreter: Interpreter, node: Node) -> Term | None:
    """The sum over u <= i of x(u) where j < u (or j <= u), as prefix(i) - prefix(j) (+ x(j)): Mamba-2's segment sums."""
    if position != I:
        return None
    later, same, earlier = (
        _resolved(term.xreplace({U: I}), interpreter.ranges, case, node).xreplace({I: U}) for case in (_BELOW, _SAME, _ABOVE)
    )
    if earlier != 0 or {I, J} & later.free_symbols or same.xreplace({U: J}) not in (0, later.xreplace({U: J})):
        raise Stop("decay", f"the decay adds up what depends on both positions: {short(term)}", node)
    return Prefix(later, I) - Prefix(later, J) + same.xreplace({U: J})


def _check_diagonal(below: _Parted, same: _Parted, weight: Term, node: Node) -> None:
    """At j == i the weight must be what it is below, carried on."""

    def at_once(parted: _Parted) -> tuple[Term, Term]:
        exponent = sympy.expand(parted.exponent.xreplace({I: J}))
        return exponent, (parted.rows * parted.keys).xreplace({I: J})

    if at_once(below) != at_once(same):
        raise Stop("mask", f"a position's weight for itself is another than its decay gives: {short(weight)}", node)


def _paired(terms: _Parted, read: Read, node: Node) -> Decay:
    """Splits the exponent by position, and pairs what the two have in common as a gate."""
    row, key, gate = sympy.S.Zero, sympy.S.Zero, sympy.S.Zero
    for part in sympy.Add.make_args(terms.exponent):
        symbols = part.free_symbols
        if I in symbols and J in symbols:
            raise Stop("decay", f"the decay is not a ratio of one tensor at the two positions: {short(part)}", node)
        if J in symbols:
            key = key + part
        else:
            row = row + part
    for slope, summand in _rates(row):
        gate = gate + slope * (sympy.S.One if summand is None else summand)
        row, key = (
            sympy.expand(side + sign * slope * summed)
            for side, sign, summed in ((row, -1, _sum_to(summand, I)), (key, 1, _sum_to(summand, J)))
        )
    left = key.atoms(Prefix) | row.atoms(Prefix) | (key.free_symbols & {U})
    if left or _linear(key, J) or row.free_symbols & {U}:
        raise Stop("decay", f"the decay is not a ratio of one tensor at the two positions: {short(row)} and {short(key)}", node)
    if read == "before":
        row = sympy.expand(row + gate.xreplace({U: I}))
    return Decay(read=read, gate=gate, row=row, key=key, rows=terms.rows, keys=terms.keys)


def _rates(row: Term) -> list[tuple[Term, Term | None]]:
    """What the row's exponent has of sums up to I, each as (factor, summand); a summand None stands for ones."""
    found: list[tuple[Term, Term | None]] = []
    for part in sympy.Add.make_args(row):
        prefixes = [x for x in part.atoms(Prefix) if x.args[1] == I]
        if len(prefixes) == 1:
            found.append((part / prefixes[0], prefixes[0].args[0]))
    slope = _linear(row, I)
    return [*found, (slope, None)] if slope != 0 else found


def _sum_to(summand: Term | None, position: sympy.Symbol) -> Term:
    return position if summand is None else Prefix(summand, position)


def _linear(term: Term, position: sympy.Symbol) -> Term:
    """The factor of a position by itself."""
    parts = [p for p in sympy.Add.make_args(sympy.expand(term)) if p.has(position) and not (p / position).has(position)]
    return sympy.Add(*(p / position for p in parts))

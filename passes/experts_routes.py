"""Which assignments a layer of experts computes: the ids of each token's experts, and that all other experts add nothing.

    dense, or spelled out:   sum_e w[t,e] y[t,e]  =  sum_s w[t, ids[t,s]] y[t, ids[t,s]]    if w[t,e] = 0 for e not in ids[t]

That drops `0 * y[t,e]` for experts that were not chosen, which is 0 for every finite y: where an expert that was not chosen
overflows, the original has NaN and the operation has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy
from sympy.logic.boolalg import And, Not, Or
from torch.fx import Node

from effcompile.contraction import Dot
from effcompile.terms import IntLoad, Load, Sigmoid, Term, Where, integer_symbol
from effcompile.viewmaps import shape_of

from .experts_counts import resolved
from .experts_nodes import holds_each_once
from .experts_read import Projection, Reading, Total
from .experts_terms import Group, RowInterpreter, RowRanges, SlotAny, SlotSum, Z, features_of
from .specify import Stop

S, X = integer_symbol("s"), integer_symbol("e")
"""A slot of a token; an expert."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """`readings` are the summands for slot s of token t, one, or one for each expert of `keys`; `ids` is the expert of the slot."""

    ids: Term
    slots: Term
    readings: tuple[Reading, ...]
    keys: tuple[Term, ...]


def routing_of(rows: RowInterpreter, total: Total, readings: list[Reading], anchor: Node) -> Routing:
    """The assignments that summands are of.

    Raises:
        Stop: it is not known which, or that others add nothing.
    """
    experts = {_expert(reading, anchor) for reading in readings}
    if total.count is None:
        return _spelled_out(rows, readings, anchor)
    (expert,) = experts
    if expert == Z:
        return _of_dense(rows, readings[0], Z, anchor)
    if expert is None or not expert.has(IntLoad, Group):
        raise Stop("anchor", "all summands are of one matrix", anchor)
    return _of_slots(rows, total, readings[0], expert, anchor)


def _expert(reading: Reading, anchor: Node) -> Term | None:
    """The index of the expert in the matrix of the second projection."""
    found = [i for i in reading.down.matrix.indices if not features_of((i,))]
    if len(found) > 1:
        raise Stop("anchor", "the matrix is not of one expert", anchor)
    return found[0] if found else None


# -------------------------------------------------------------------- slot by slot


def _of_slots(rows: RowInterpreter, total: Total, reading: Reading, expert: Term, anchor: Node) -> Routing:
    count = total.count
    assert count is not None
    grouped = expert.has(Group)
    at_slot = (lambda term: resolved(rows, term).xreplace({Z: S})) if count != 1 else lambda term: resolved(rows, term)
    rows.ranges.add(S, count)
    ids = settled(at_slot(expert), rows.ranges)
    experts = _matrices(rows, reading, expert)
    low = rows.ranges.bounds(ids)[0]
    if low is None or not rows.ranges.is_nonnegative_bound(low):
        raise Stop("route", "the ids of experts may be negative, which count from the last expert", anchor)
    within = _within(rows.ranges, ids, sympy.S.Zero, experts - 1)
    taken = _of_reading(reading, lambda term: settled(at_slot(term), within))
    if grouped and not rows.ranges.is_below(ids, experts):
        beyond = _within(rows.ranges, ids, experts, None)
        left = (settled(at_slot(term), beyond) for term in (reading.scale, reading.added))
        if any(term != 0 for term in left):
            raise Stop("route", "ids may be those of no expert, whose rows of a grouped product are undefined", anchor)
    return Routing(ids=ids, slots=count, readings=(taken,), keys=(ids,))


def _matrices(rows: RowInterpreter, reading: Reading, expert: Term) -> Term:
    """How many matrices there are to choose from."""
    matrix = reading.down.matrix
    return shape_of(rows.loaded[matrix.tensor])[matrix.indices.index(expert)]


def _within(ranges: RowRanges, ids: Term, low: Term, high: Term | None) -> RowRanges:
    """The ranges, if ids that are just loaded are between two numbers."""
    return ranges.holding(ids.tensor, low, high) if isinstance(ids, IntLoad) else ranges


# -------------------------------------------------------------------- expert by expert


def _of_dense(rows: RowInterpreter, reading: Reading, key: Term, anchor: Node) -> Routing:
    ids = _chosen(rows, reading, key, anchor)
    return Routing(ids=ids, slots=_slots(rows, ids), readings=(_at_slot_of(rows, reading, ids, key, anchor),), keys=(ids,))


def _spelled_out(rows: RowInterpreter, readings: list[Reading], anchor: Node) -> Routing:
    if len(readings) < 2:
        raise Stop("anchor", "one product is no sum over experts", anchor)
    found = []
    for reading in readings:
        compared = {expert for _, expert in keys_of(reading) if expert.is_Integer}
        if len(compared) != 1:
            raise Stop("route", "what is added up is not weighted by whether one expert was chosen", anchor)
        found.append(compared.pop())
    if sorted(found) != list(range(len(found))):
        raise Stop("route", f"the experts that are added up are not those from 0 on, each once: {sorted(found)}", anchor)
    order = sorted(range(len(found)), key=lambda k: found[k])
    readings, keys = [readings[k] for k in order], tuple(found[k] for k in order)
    ids = _chosen(rows, readings[0], keys[0], anchor)
    taken = tuple(_at_slot_of(rows, reading, ids, key, anchor) for reading, key in zip(readings, keys, strict=True))
    return Routing(ids=ids, slots=_slots(rows, ids), readings=taken, keys=keys)


def _chosen(rows: RowInterpreter, reading: Reading, key: Term, anchor: Node) -> Term:
    """The ids without which a summand is zero.

    Raises:
        Stop: there are none.
    """
    for ids, expert in keys_of(reading):
        if expert == key and _vanishes(reading, _Choice(ids=ids, key=key, ranges=rows.ranges)):
            if ids.has(S):
                rows.ranges.add(S, _slots(rows, ids))
            return ids
    raise Stop("route", "every expert computes for every token: no weights are known to be zero for those not chosen", anchor)


def _at_slot_of(rows: RowInterpreter, reading: Reading, ids: Term, key: Term, anchor: Node) -> Reading:
    choice = _Choice(ids=ids, key=key, ranges=rows.ranges)
    if not _vanishes(reading, choice):
        raise Stop("route", f"the weights of expert {key} are not known to be zero for tokens that did not choose it", anchor)
    if not (_different(rows, ids) or _adds_per_slot(reading)):
        raise Stop("route", "a token may have chosen an expert twice, which it is asked only once", anchor)
    return _of_reading(reading, choice.taken)


def _vanishes(reading: Reading, choice: _Choice) -> bool:
    """Whether a summand is zero for a token that did not choose the expert: its factor is, or its input all through."""
    if choice.missed(reading.scale) == 0 and choice.missed(reading.added) == 0:
        return True
    zeros: dict[Term, Term] = {}
    for up in reading.up:
        if up.bias is not None or choice.missed(up.rows) != 0:
            return False
        zeros[up.term] = sympy.S.Zero
    inner = settled(reading.down.rows.xreplace(zeros), choice.ranges)
    return bool(inner == 0 and reading.down.bias is None and reading.added == 0)


def _different(rows: RowInterpreter, ids: Term) -> bool:
    """Whether the ids of a token are certainly different ones."""
    if not ids.has(S):
        return True
    return isinstance(ids, IntLoad) and ids.indices[-1] == S and holds_each_once(rows.loaded[ids.tensor])


def _adds_per_slot(reading: Reading) -> bool:
    """Whether each slot adds its own weight times the expert's result: then a token may have chosen an expert twice."""
    parts = [x for x in sympy.Mul.make_args(reading.scale) if not x.is_number]
    rest = (reading.added, *(up.rows for up in reading.up), reading.down.rows)
    return len(parts) == 1 and isinstance(parts[0], SlotSum) and not any(x.has(SlotSum, SlotAny) for x in rest)


def _slots(rows: RowInterpreter, ids: Term) -> Term:
    """How many slots a token has."""
    if not ids.has(S):
        return sympy.S.One
    load = next(x for x in ids.atoms(IntLoad) if S in x.indices)
    return shape_of(rows.loaded[load.tensor])[load.indices.index(S)]


def keys_of(reading: Reading) -> list[tuple[Term, Term]]:
    """`(ids, expert)` for each comparison in a summand's factors, the slot named s."""
    found: list[tuple[Term, Term]] = []
    for term in (reading.scale, *(up.rows for up in reading.up)):
        for _, own, expert in _equalities(term):
            pair = (_with_slot(own), expert)
            if pair not in found:
                found.append(pair)
    return found


# -------------------------------------------------------------------- chosen or not


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Whether a token chose the expert `key`: whether one of its `ids` is that."""

    ids: Term
    key: Term
    ranges: RowRanges

    def taken(self, term: Term) -> Term:
        """A term for a token whose slot s has the expert: no other slot has."""
        known = self._known(term, sympy.true)
        binders = {}
        for x in (*term.atoms(SlotAny), *term.atoms(SlotSum)):
            if any(y in known for y in x.atoms(sympy.Eq, sympy.Ne)):
                binders[x] = x.args[1].xreplace(known).xreplace({x.args[0]: S})
        term = term.xreplace(binders).xreplace(known)
        return settled(term.xreplace({self.key: self.ids}) if self.key == Z else term, self.ranges)

    def missed(self, term: Term) -> Term:
        """A term for a token that did not choose the expert."""
        known = self._known(term, sympy.false)
        binders = {}
        for x in (*term.atoms(SlotAny), *term.atoms(SlotSum)):
            inner = x.args[1].xreplace(known)
            if inner in (sympy.S.Zero, sympy.false):
                binders[x] = inner
        return settled(term.xreplace(binders).xreplace(known), self.ranges)

    def _known(self, term: Term, chosen: Term) -> dict[Term, Term]:
        """The comparisons of the ids with the expert, as they come out."""
        own = [x for x, ids, expert in _equalities(term) if expert == self.key and _with_slot(ids) == self.ids]
        return {x: chosen if isinstance(x, sympy.Eq) else Not(chosen) for x in own}


def _equalities(term: Term) -> list[tuple[Term, Term, Term]]:
    """`(condition, ids, expert)` for each comparison of what was loaded with an expert."""
    return [
        (x, own, other)
        for x in term.atoms(sympy.Eq, sympy.Ne)
        for own, other in (x.args, x.args[::-1])
        if own.has(IntLoad) and (other.is_Integer or other == Z)
    ]


def _with_slot(ids: Term) -> Term:
    return ids.xreplace({x: S for x in ids.free_symbols if x.name.startswith("slot_")})  # type: ignore[attr-defined]


_AT_INFINITY = {Sigmoid(-sympy.oo): sympy.S.Zero, Sigmoid(sympy.oo): sympy.S.One}


def settled(term: Term, ranges: RowRanges) -> Term:
    """A term with its conditions decided where the ranges decide them."""
    if not term.args or isinstance(term, (SlotAny, SlotSum)):
        return term
    if isinstance(term, sympy.core.relational.Relational):
        return ranges.compare(type(term), *(sympy.expand(settled(a, ranges)) for a in term.args))
    args = [settled(a, ranges) for a in term.args]
    if isinstance(term, (Where, And, Or, Not)):
        return term.func(*args)
    result = ranges.pruned(term.func(*args) if list(term.args) != args else term)
    return _AT_INFINITY.get(result, result)


def _of_reading(reading: Reading, take: Callable[[Term], Term]) -> Reading:
    """A reading with each of its terms changed."""

    def projection(x: Projection) -> Projection:
        term, matrix = take(x.term), take(x.matrix)
        assert isinstance(term, Dot) and isinstance(matrix, Load)
        bias = None if x.bias is None else take(x.bias)
        return replace(x, term=term, rows=take(x.rows), matrix=matrix, bias=bias)

    return Reading(
        scale=take(reading.scale), added=take(reading.added), down=projection(reading.down),
        up=tuple(projection(x) for x in reading.up),
    )  # fmt: skip

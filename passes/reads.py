"""Who reads the states of a recurrence, and how.

after    q_t . S_t            a contraction over one dimension of the states
before   q_t . S_{t-1}        of the states one step late, cat([initial, states[:-1]])
last     S_T                  states[-1]
whole    everything else
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.contraction import Contraction
from effcompile.pattern import CASTS
from effcompile.ranges import Ranges
from effcompile.terms import FloorDiv, Modulo, Term, integer_symbol
from effcompile.viewmaps import VIEWS, Index, broadcast, shape_of, view_source

from .factors import Factor, constant, contraction, sums_of

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Read:
    """A contraction of states with queries.

    Attributes:
        node: its result.
        index: the index of each dimension of the result, in the states' own index symbols.
        query: what the states are contracted with, in the same symbols.
        summed: the symbol of the states' dimension that is summed over.
        before: whether the states are those before each step.
        beside: what is added to the states before they are read, if anything.
    """

    node: Node
    index: Index
    query: Factor
    summed: sympy.Symbol
    before: bool
    beside: Factor | None


@dataclass(kw_only=True)
class Reads:
    """All uses of the states. `last` has the index of each view of the last state."""

    contractions: list[Read] = field(default_factory=list)
    last: dict[Node, Index] = field(default_factory=dict)
    whole: list[Node] = field(default_factory=list)
    before: set[Node] = field(default_factory=set)


def reads_of(states: Node, initial: Any, symbols: Index, ranges: Ranges) -> Reads:
    """The uses of `states` [T, ...], whose element is at `symbols`."""
    found = Reads()
    seen: set[Node] = set()
    frontier: list[tuple[Node, Node | None]] = [(states, None)]  # a node, and the sum on the way to it
    while frontier:
        node, total = frontier.pop()
        for user in node.users:
            if user in seen:
                continue
            last = _last(user, states, symbols, ranges) if total is None and user.target in VIEWS else None
            if last is not None:
                seen.add(user)
                found.last[user] = last
            elif node is states and _late(user, initial):
                late = _late(user, initial)
                found.before |= set(late)
                frontier += [(x, None) for x in late]
            elif user.target in VIEWS or user.target in CASTS:
                seen.add(user)
                frontier.append((user, total))
            elif user.target is aten.add.Tensor and total is None and not user.kwargs:
                seen.add(user)
                frontier.append((user, user))
            else:
                _classify(user, node, states, found, symbols, ranges)
    return found


def _classify(user: Node, operand: Node, states: Node, found: Reads, symbols: Index, ranges: Ranges) -> None:
    candidates = [user] if user.target is not aten.mul.Tensor else sums_of(user)
    for node in candidates:
        taken = contraction(node)
        read = None if taken is None else _read(taken, operand, states, found, symbols, ranges)
        if read is None:
            found.whole.append(node)
        elif all(read.node is not other.node for other in found.contractions):
            found.contractions.append(read)
    if not candidates:
        found.whole.append(user)


def _last(node: Node, states: Node, symbols: Index, ranges: Ranges) -> Index | None:
    """The index of a view of `states[-1]`, in the states' own symbols; None if it is not that."""
    steps = ranges.get(symbols[0])[1] + 1  # type: ignore[index]
    if not steps.is_Integer:
        return None
    if steps == 1 and (node.target is not aten.select.int or node.args != (states, 0, -1)):
        return None  # all views are of the last state: the one that is spelled so
    letters, local = [], Ranges({})
    for k, size in enumerate(shape_of(node)):
        letters.append(integer_symbol(f"l_{k}") if size != 1 else sympy.S.Zero)
        local.add(integer_symbol(f"l_{k}"), size)
    back = _back(node, tuple(letters), states, set(), local)
    if back is None or back.index[0] != steps - 1:
        return None
    solved = _solved(back.index[1:], symbols[1:], local, ranges)
    if solved is None or any(x != 0 and x not in solved for x in letters):
        return None
    return tuple(x.xreplace(solved) for x in letters)


def _late(node: Node, initial: Any) -> list[Node]:
    """The nodes `cat([initial, states[:-1]])` that use `node`, if that is `states[:-1]` and nothing else uses it."""
    if node.target is not aten.slice.Tensor or len(node.args) < 4 or node.args[1] != 0 or node.args[2] not in (0, None):
        return []
    size = node.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    if not (node.args[3] == -1 or (isinstance(size, int) and node.args[3] == size - 1)) or len(node.args) > 4:
        return []
    users = list(node.users)
    return users if all(_begins_with(user, initial, node) for user in users) else []


def _begins_with(node: Node, initial: Any, states: Node) -> bool:
    if node.target is not aten.cat.default or (node.args[1] if len(node.args) > 1 else 0) != 0:
        return False
    parts: Any = node.args[0]
    if len(parts) != 2 or parts[1] is not states or parts[0].meta["val"].shape[0] != 1:
        return False
    return bool(origin(parts[0]) is origin(initial)) or (constant(parts[0]) == 0 and is_zero(initial))


def origin(node: Any) -> Any:
    """A node without the views and casts that lead to it."""
    while isinstance(node, Node) and node.op == "call_function" and (node.target in VIEWS or node.target in CASTS):
        node = node.args[0]
    return node


def is_zero(initial: Any) -> bool:
    """Whether a state is none, or zeros."""
    return initial is None or constant(initial) == 0


# -------------------------------------------------------------------- a contraction, in the symbols of the states


def _read(taken: Contraction, operand: Node, states: Node, found: Reads, symbols: Index, ranges: Ranges) -> Read | None:
    sides = [which for which in (0, 1) if taken.operands[which] is operand]
    if len(sides) != 1:
        return None
    letters = {letter: integer_symbol(f"l_{letter}") for letter in (*taken.out, taken.summed)}
    local = Ranges({})
    for letter, symbol in letters.items():
        local.add(symbol, taken.size(letter) if letter != "z" or "z" in taken.letters[0] + taken.letters[1] else sympy.S.One)
    out = tuple(letters[letter] for letter in taken.out)
    index = taken.operand_index(sides[0], out, letters[taken.summed])
    back = _back(operand, index, states, found.before, local)
    if back is None:
        return None
    solved = _solved(back.index, symbols, local, ranges)
    if solved is None:
        return None
    free = [s for s in letters.values() if s not in solved]
    if any(local.get(s) != (sympy.S.Zero, sympy.S.Zero) for s in free):
        return None
    solved.update({s: sympy.S.Zero for s in free})
    summed = solved[letters[taken.summed]]
    if summed not in symbols[1:]:
        return None
    other = 1 - sides[0]
    query = taken.operand_index(other, out, letters[taken.summed])
    beside = back.beside and Factor(back.beside.node, tuple(t.xreplace(solved) for t in back.beside.index))
    return Read(
        node=taken.node, index=tuple(t.xreplace(solved) for t in out), summed=summed, before=back.before, beside=beside,
        query=Factor(taken.operands[other], tuple(t.xreplace(solved) for t in query)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Back:
    index: Index
    before: bool
    beside: Factor | None


def _back(node: Node, index: Index, states: Node, before: set[Node], ranges: Ranges) -> _Back | None:
    """The index into the states, from one into a node that they reach."""
    beside = None
    while node is not states and node not in before:
        if node.target is aten.add.Tensor:
            sides = [x for x in node.args[:2] if isinstance(x, Node) and _reaches(x, states, before)]
            others = [x for x in node.args[:2] if isinstance(x, Node) and x not in sides]
            if len(sides) != 1 or len(others) != 1 or beside is not None:
                return None
            beside = Factor(others[0], broadcast(index, shape_of(others[0])))
            node, index = sides[0], broadcast(index, shape_of(sides[0]))
            continue
        step = (node.args[0], index) if node.target in CASTS else view_source(node, index, ranges)
        if step is None:
            return None
        node, index = step  # type: ignore[assignment]
    return _Back(index, node in before, beside)


def _reaches(node: Node, states: Node, before: set[Node]) -> bool:
    while node is not states and node not in before:
        if node.op != "call_function" or not (node.target in VIEWS or node.target in CASTS):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def _solved(index: Index, symbols: Index, local: Ranges, ranges: Ranges) -> dict[Any, Term] | None:
    """Each letter in the states' own symbols, from the index into the states in letters."""
    digits: dict[Any, list[tuple[Term, Term, Term]]] = {}
    for term, symbol in zip(index, symbols, strict=True):
        size = ranges.get(symbol)[1] + 1 if symbol != 0 else sympy.S.One  # type: ignore[index]
        if term == 0 and size == 1:
            continue
        digit = _digit(term)
        if digit is None:
            return None
        digits.setdefault(digit[0], []).append((digit[1], size, symbol))
    solved: dict[Any, Term] = {}
    for letter, parts in digits.items():
        bounds = local.get(letter)
        if bounds is None or sympy.expand(sympy.Mul(*(size for _, size, _ in parts)) - bounds[1] - 1) != 0:
            return None
        solved[letter] = sympy.Add(*(stride * symbol for stride, _, symbol in parts))
    return solved


def _digit(term: Term) -> tuple[Any, Term] | None:
    """`(letter, stride)` of `letter // stride`, modulo whatever."""
    if isinstance(term, sympy.Symbol):
        return term, sympy.S.One
    if isinstance(term, Modulo):
        return _digit(term.args[0])
    if isinstance(term, FloorDiv):
        inner = _digit(term.args[0])
        return None if inner is None else (inner[0], inner[1] * term.args[1])
    return None

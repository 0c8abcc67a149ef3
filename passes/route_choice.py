"""What a router chooses by, read backwards from its top-k: scores, a bias for each expert, and the groups that are kept.

topk(where(group of e is kept, s[t,e] + b[e], fill))        kept: among the topk of max or top-2 sum of s + b over the group
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import is_tensor_node
from effcompile.expr import Interpreter
from effcompile.ops.route import GroupFill, GroupStat, Score
from effcompile.pattern import CASTS
from effcompile.ranges import Ranges, recombine
from effcompile.rules import wrap_dim
from effcompile.terms import FloorDiv, IntLoad, Load, Term, Where, integer_symbol
from effcompile.viewmaps import VIEWS, Index, is_float, reshape, shape_of

from .experts_nodes import Facts, argument
from .experts_terms import RowInterpreter, RowRanges, SlotAny, SlotSum
from .specify import Stop

aten = torch.ops.aten

E, J = integer_symbol("expert"), integer_symbol("member")
_G = integer_symbol("group")
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_VERY_LOW = -1e30


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Of `count` groups of neighbouring experts `kept` are chosen from, by the statistic `stat`; others have the value `fill`."""

    count: int
    kept: int
    stat: GroupStat
    fill: GroupFill


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a top-k chooses by: the elements of `values`, outside of the kept groups a fill.

    `first` is the node before which the choice has not begun.
    """

    anchor: Node
    values: Node
    groups: Groups | None
    experts: int

    @property
    def first(self) -> Node:
        """What stands first of the choice."""
        return self.values

    @cached_property
    def terms(self) -> tuple[Node, Node | None]:
        """`(scores, bias)`: `values` as a tensor that has a row for each token, and one that has an element for each expert."""
        return _with_bias(self.values, self.anchor)


def part_of(node: Node, position: int) -> Node | None:
    """The result of an operation at a position, if it is used."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == position), None)


def tokens_of(node: Node) -> tuple[Index, Ranges]:
    """Index symbols for all dimensions of a node but the last, with their bounds."""
    symbols = tuple(integer_symbol(f"token{k}") for k in range(len(shape_of(node)) - 1))
    ranges = Ranges({})
    for symbol, size in zip(symbols, shape_of(node), strict=False):
        ranges.add(symbol, size)  # type: ignore[arg-type]
    return symbols, ranges


def row_of(index: Index, shape: Index) -> Term:
    """The number of a row, of all dimensions in order."""
    linear: Term = sympy.S.Zero
    for i, n in zip(index, shape, strict=True):
        linear = linear * n + (0 if n == 1 else i)
    return recombine(sympy.expand(linear))


def same_rows(index: Index, shape: Index, other: Index, other_shape: Index) -> bool:
    """Whether two indices are of the same row of as many."""
    sizes = sympy.expand(sympy.Mul(*shape) - sympy.Mul(*other_shape))
    return bool(sizes == 0 and sympy.expand(row_of(index, shape) - row_of(other, other_shape)) == 0)


def settled(node: Node, *, detached: bool) -> Node:
    """What a node is a cast or a view of, that has the same rows.

    Args:
        detached: whether to look through what cuts gradients.
    """

    def stops(x: Node) -> bool:
        return not _moves(x) or (not detached and x.target is aten.detach.default)

    symbols, ranges = tokens_of(node)
    interpreter = Interpreter(ranges, stops)
    ranges.add(E, shape_of(node)[-1])
    term = interpreter.element(node, (*symbols, E))
    if not isinstance(term, Load) or isinstance(term, IntLoad) or not _is_row(interpreter, term, node, symbols):
        return node
    return interpreter.loaded[term.tensor]


def _is_row(interpreter: Interpreter, load: Load, node: Node, symbols: Index) -> bool:
    """Whether an element is that of the same row, for the same expert."""
    shape = shape_of(interpreter.loaded[load.tensor])
    if load.indices[-1] != E or shape[-1] != shape_of(node)[-1]:
        return False
    return same_rows(load.indices[:-1], shape[:-1], symbols, shape_of(node)[:-1])


def _moves(node: Node) -> bool:
    return node.op == "call_function" and (node.target in VIEWS or node.target in CASTS)


def score_of(node: Node) -> tuple[Score, Node]:
    """The score that a node is, and what it is the score of: its logits, before they are cast to a wider type."""
    if node.op == "call_function" and is_tensor_node(node.args[0] if node.args else None):
        source: Any = node.args[0]
        rank = source.meta["val"].dim()
        if node.target is aten.sigmoid.default:
            return "sigmoid", before_widening(source)
        if node.target in _SOFTMAX and rank and wrap_dim(argument(node, "dim", -1), rank) == rank - 1:
            return "softmax", before_widening(source)
    return "none", node


def before_widening(node: Node) -> Node:
    """What a node is a copy of, in a dtype that holds all of its values."""
    while node.op == "call_function" and node.target in CASTS and is_tensor_node(node.args[0]):
        source: Any = node.args[0]
        before, after = source.meta["val"].dtype, node.meta["val"].dtype
        if not before.is_floating_point or torch.promote_types(before, after) != after or after is torch.float64:
            break
        node = source
    return node


def _with_bias(values: Node, anchor: Node) -> tuple[Node, Node | None]:
    """Scores and bias that add up to what is chosen by.

    Raises:
        Stop: they are something else.
    """
    symbols, ranges = tokens_of(values)
    ranges.add(E, shape_of(values)[-1])
    interpreter = Interpreter(ranges, lambda x: not _moves(x) and x.target is not aten.add.Tensor)
    term = interpreter.element(values, (*symbols, E))
    loads = sympy.Add.make_args(term)
    if not all(isinstance(x, Load) for x in loads):
        raise Stop("choice", "what is chosen by is not scores, with a bias for each expert or without", anchor)
    scores = [x for x in loads if any(i.free_symbols & set(symbols) for i in x.indices)]
    biases = [x for x in loads if x not in scores]
    if len(scores) != 1 or len(biases) > 1 or not _is_row(interpreter, scores[0], values, symbols):
        raise Stop("choice", "what is chosen by is not scores, with a bias for each expert or without", anchor)
    bias = None
    if biases:
        bias = interpreter.loaded[biases[0].tensor]
        if biases[0].indices[-1] != E or any(n != 1 for n in shape_of(bias)[:-1]) or shape_of(bias)[-1] != shape_of(values)[-1]:
            raise Stop("choice", "the bias of the choice is not one number for each expert", anchor)
    return interpreter.loaded[scores[0].tensor], bias


# -------------------------------------------------------------------- groups


def choice_of(anchor: Node, facts: Facts) -> Choice:
    """What a top-k chooses by.

    Raises:
        Stop: it is masked by something else than groups that are kept.
    """
    source: Any = anchor.args[0]
    experts = int(shape_of(source)[-1])
    symbols, plain = tokens_of(source)
    ranges = RowRanges({s: plain.get(s) for s in symbols}, {})  # type: ignore[misc]
    ranges.add(E, sympy.Integer(experts))
    rows = RowInterpreter(ranges, facts)
    term = rows.element(source, (*symbols, E))
    if not term.has(SlotAny, SlotSum, Where):
        return Choice(anchor=anchor, values=source, groups=None, experts=experts)
    loads = [x for x in term.atoms(Load) if isinstance(x, Load) and not isinstance(x, IntLoad) and is_float(rows.loaded[x.tensor])]
    if len(loads) != 1 or not _is_row(rows, loads[0], source, symbols):
        raise Stop("groups", "what is chosen by is masked by something else than groups of experts", anchor)
    values = rows.loaded[loads[0].tensor]
    condition, positions = _kept(term, anchor)
    outside = term.xreplace(_decided(term, condition, False))
    if term.xreplace(_decided(term, condition, True)) != loads[0] or not outside.is_number:
        raise Stop("groups", "what is chosen by is masked by something else than groups of experts", anchor)
    size = _size(positions.args, experts, anchor)
    chosen = rows.loaded[next(a.tensor for a in positions.args if isinstance(a, IntLoad))]
    groups = Groups(
        count=experts // size,
        kept=int(shape_of(chosen)[-1]),
        stat=_stat(chosen, values, experts // size, size, anchor),
        fill=_fill(outside, anchor),
    )
    return Choice(anchor=anchor, values=values, groups=groups, experts=experts)


def _kept(term: Term, anchor: Node) -> tuple[Term, Term]:
    """The condition that an expert's group is kept, or that it is not, and the comparison in it."""
    conditions = term.atoms(SlotAny) or {x for x in term.atoms(sympy.Eq, sympy.Ne) if x.has(IntLoad)}
    if len(conditions) == 1:
        (condition,) = conditions
        found = [x for x in condition.atoms(sympy.Eq, sympy.Ne) if x.has(IntLoad)]
        over_slots = isinstance(condition, SlotAny) and isinstance(condition.args[1], sympy.Eq)
        if len(found) == 1 and found[0] == (condition.args[1] if over_slots else condition):
            return condition, found[0]
    raise Stop("groups", "what is chosen by is masked by something else than groups that are kept", anchor)


def _decided(term: Term, condition: Term, kept: bool) -> dict[Term, Term]:
    """The condition, and sums of ones over the groups that meet it, as they come out where a group is kept or not."""
    one = Where(condition.args[1], sympy.S.One, sympy.S.Zero) if isinstance(condition, SlotAny) else None
    ones = {x for x in term.atoms(SlotSum) if x.args[1] == one}
    holds = sympy.true if kept != isinstance(condition, sympy.Ne) else sympy.false
    return {condition: holds, **dict.fromkeys(ones, sympy.S.One if kept else sympy.S.Zero)}


def _size(compared: tuple[Any, ...], experts: int, anchor: Node) -> int:
    """How many experts a group has, of the number of an expert's group."""
    group = next((a for a in compared if not isinstance(a, IntLoad)), None)
    if isinstance(group, FloorDiv) and group.args[0] == E and group.args[1].is_Integer and experts % int(group.args[1]) == 0:
        return int(group.args[1])
    if group in (E, 0):
        return 1 if group == E else experts
    raise Stop("groups", "the groups are not of equally many neighbouring experts", anchor)


def _fill(outside: Term, anchor: Node) -> GroupFill:
    if outside == 0:
        return "zero"
    if outside == -sympy.oo or (outside.is_real and outside < _VERY_LOW):
        return "-inf"
    raise Stop("groups", f"experts outside the kept groups are chosen by {outside}, neither 0 nor -inf", anchor)


def _stat(chosen: Node, values: Node, count: int, size: int, anchor: Node) -> GroupStat:
    """By which statistic of each group's members groups are kept.

    Raises:
        Stop: groups are chosen by something else.
    """
    selection: Any = chosen.args[0] if chosen.target is operator.getitem and chosen.args[1] == 1 else None
    if selection is None or selection.target is not aten.topk.default or not _of_last(selection):
        raise Stop("groups", "the groups that are kept are not those of a top-k", anchor)
    source = settled(selection.args[0], detached=True)
    for stat, members in ((name, read(source)) for name, read in _STATS.items()):
        if members is not None:
            _check_members(members, values, count, size, anchor)
            return stat
    raise Stop("groups", "groups are not kept by their greatest, or by the sum of their two greatest", anchor)


def _of_last(node: Node) -> bool:
    """Whether a top-k takes the greatest of the last dimension."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return wrap_dim(argument(node, "dim", -1), rank) == rank - 1 and argument(node, "largest", True)


def _check_members(members: Node, values: Node, count: int, size: int, anchor: Node) -> None:
    """The members [tokens, groups, size] of groups are what experts are chosen by, in this order."""
    symbols = (*(integer_symbol(f"token{k}") for k in range(len(shape_of(members)) - 2)), _G, J)
    if len(symbols) < 2 or tuple(shape_of(members)[-2:]) != (count, size):
        raise Stop("groups", "groups are kept by members of others than those that are chosen from", anchor)
    ranges = Ranges({})
    for symbol, n in zip(symbols, shape_of(members), strict=True):
        ranges.add(symbol, n)  # type: ignore[arg-type]
    interpreter = Interpreter(ranges, lambda x: not _moves(x) and x.target is not aten.add.Tensor)
    same = sympy.expand(sympy.Mul(*shape_of(members)) - sympy.Mul(*shape_of(values))) == 0
    place = reshape(symbols, shape_of(members), shape_of(values), ranges) if same else None
    if place is None or interpreter.element(members, symbols) != interpreter.element(values, place):
        raise Stop("groups", "groups are kept by something else than what experts are chosen by", anchor)


def _members_of_max(source: Node) -> Node | None:
    """What a node is the maximum of, along the last dimension."""
    if source.target is operator.getitem and source.args[1] == 0:
        call: Any = source.args[0]
        if call.target is aten.max.dim or (call.target is aten.topk.default and _count(call) == 1):
            return call.args[0] if _along_last(call, -1) else None
    if source.target is aten.amax.default:
        return source.args[0] if _along_last(source, None) else None  # type: ignore[return-value]
    return None


def _members_of_top_two(source: Node) -> Node | None:
    """What a node is the sum of the two greatest of, along the last dimension."""
    if source.target is not aten.sum.dim_IntList or not _along_last(source, None):
        return None
    values: Any = source.args[0]
    values = settled(values, detached=True) if is_tensor_node(values) else values
    call: Any = values.args[0] if isinstance(values, Node) and values.target is operator.getitem and values.args[1] == 0 else None
    if call is None or call.target is not aten.topk.default or _count(call) != 2 or not _of_last(call):
        return None
    members: Node = call.args[0]
    return members


def _count(call: Node) -> int:
    return int(argument(call, "k", 0))


def _along_last(node: Node, default: int | None) -> bool:
    """Whether a reduction is along the last dimension of its operand alone."""
    dims = argument(node, "dim", default)
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return len(dims) == 1 and wrap_dim(dims[0], rank) == rank - 1


_STATS: dict[GroupStat, Callable[[Node], Node | None]] = {"max": _members_of_max, "top2": _members_of_top_two}

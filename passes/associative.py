"""Associative scans as recurrences: torch's operation, the tree of calls that Dynamo makes of it, and trees written by hand.

    scan of ((a1, b1), (a2, b2)) -> (a1 * a2, a2 * b1 + b2)   =   (products of a, linear_scan(a, b))
    scan of (x, y) -> x + y                                   =   linear_scan(1, x)

A tree of levels is recognised by what it computes (`prefixes`), whatever its shape; torch's own operation by its combine function,
which is evaluated exactly on random elements. Scans in log space, with (la1 + la2, logaddexp(la2 + lb1, lb2)), are those of exp(la)
and exp(lb) where only exp of their result is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from effcompile import _torch
from effcompile.builder import Builder
from effcompile.ir import Rejected

from .exact import ENTER_LANE, LEAVE_LANE, Evaluator, OutsideError, P, Sizes, Value, name_of
from .exact_moves import CUMULATIVE, MOVES
from .exact_operations import OPERATIONS, VIEWS
from .prefixes import AS_LOGARITHM, Component, Left, Recurrence, survey
from .scans import in_memory_order, one, scan_of, written
from .tentative import Stop, Substitution, substitutions

aten = torch.ops.aten

_ARITHMETIC = frozenset(("add", "sub", "mul", "addcmul", "lerp", "logaddexp"))
_ONLY_MOVE = VIEWS | {"slice", "select", "flip", "clone", "contiguous"}
_MOST_ENTRIES = 32  # a tree takes its leaves apart in a few places; a loop at every step
_LEVELS = 3  # of moves and arithmetic, from which on a tree is spoken of

NOT_AFFINE = "its combine function is not that of a linear recurrence, (a1 * a2, a2 * b1 + b2)"
COMPLEX = "its states are complex numbers; a recurrence has real ones"
NOT_ALL_PREFIXES = "it combines steps as a linear recurrence does, but its results are not the recurrence's states"


def find(module: GraphModule) -> tuple[list[Substitution], list[Rejected]]:
    """Scans in place of what computes them, not yet applied, and why others stay."""
    operators = [node for node in module.graph.nodes if isinstance(node.target, _torch.HigherOrderOperator)]
    whole = [node for node in operators if str(node.target) == "associative_scan"]
    found, refused = substitutions(((node, partial(_whole, module, node)) for node in whole), "scan")
    trees, reasons = _trees(module)
    return found + trees, refused + reasons


# -------------------------------------------------------------------- trees


def _trees(module: GraphModule) -> tuple[list[Substitution], list[Rejected]]:
    found = survey(module, _is_tree, _is_worthwhile)
    reasons: list[Rejected] = []
    explained = {node for recurrence in found.found for node in recurrence.interior}
    sizes = Sizes(module.graph.nodes)
    for block in found.blocks:
        if _is_first_level(block) and explained.isdisjoint(block):
            why = next((x.why for x in found.left if x.why and not set(block).isdisjoint(x.component.nodes)), "")
            reasons.append(Rejected(step="scan", why=why or _why_not(block, sizes), node=_place(block)))
    inside = {node for block in found.blocks for node in block}
    for left in sorted(found.left, key=lambda x: (not x.why, -len(x.component.nodes))):
        why = "" if inside & set(left.component.nodes) else _why_left(left)
        if why and explained.isdisjoint(left.component.nodes):
            explained |= set(left.component.nodes)
            reasons.append(Rejected(step="scan", why=why, node=left.component.nodes[-1]))
    trees, refused = written(found.found, "an associative scan", found.blocks, "scan")
    return trees, refused + reasons


def _is_tree(component: Component) -> bool:
    names = {name_of(node) for node in component.nodes}
    return len(component.entries) <= _MOST_ENTRIES and bool(names & _ARITHMETIC) and not names & CUMULATIVE


def _is_worthwhile(recurrence: Recurrence) -> bool:
    """Two steps are a tree only if written as one: x + a * shift(x) is often no recurrence to its author."""
    regional = any(name_of(node) == LEAVE_LANE for node in recurrence.interior)
    return regional or recurrence.node.meta["val"].shape[recurrence.dim] != 2


def _why_left(left: Left) -> str:
    """What to say of moved and combined values that are no recurrence, if they look like one."""
    if left.why:
        return left.why
    if left.agreeing >= 3:
        of = f"the first {left.agreeing} of {left.component.length} steps"
        return f"what is computed is a linear recurrence for {of} only"
    if _levels(left.component) >= _LEVELS:
        return "shifted and added values are not the states of a linear recurrence of what is shifted first"
    return ""


def _levels(component: Component) -> int:
    """How often arithmetic follows a move, at most, on a way through a component."""
    levels: dict[Node, tuple[int, bool]] = {}
    for node in component.nodes:
        before = [levels[source] for source in node.all_input_nodes if source in levels]
        level = max((n for n, _ in before), default=0)
        moved = any(m for n, m in before)
        name = name_of(node)
        if name in MOVES:
            moved = True
        elif name in _ARITHMETIC and moved:
            level, moved = level + 1, False
        levels[node] = (level, moved)
    return max(level for level, _ in levels.values())


# -------------------------------------------------------------------- functorch regions


def _is_first_level(block: Sequence[Node]) -> bool:
    """Whether a region combines every other element with its neighbour, straight from what is scanned."""
    sources = [node.args[0] for node in block if name_of(node) == ENTER_LANE]
    slices = [s for s in sources if isinstance(s, Node) and s.target is aten.slice.Tensor and len(s.args) > 4 and s.args[4] == 2]
    begin = [s.args[2] for s in slices]
    from_regions = any(name_of(s.args[0]) == LEAVE_LANE for s in slices)
    return len(slices) == len(sources) > 0 and begin.count(0) == begin.count(1) == len(slices) // 2 and not from_regions


def _place(block: Sequence[Node]) -> Node:
    """The node of a region with the user's line."""
    body = [
        n for n in block if n.meta.get("stack_trace") and name_of(n) not in (ENTER_LANE, LEAVE_LANE, "lazy_load_decompositions")
    ]
    return body[-1] if body else block[-1]


def _why_not(block: Sequence[Node], sizes: Sizes) -> str:
    entering = [node for node in block if name_of(node) == ENTER_LANE]
    if any(isinstance(x := node.meta.get("val"), torch.Tensor) and x.is_complex() for node in block):
        return COMPLEX
    leaving = [node.args[0] for node in block if name_of(node) == LEAVE_LANE]
    body = [node for node in block if node not in entering]
    combine = _Combine(entering, body, leaving, sizes)
    meanings = combine.meanings
    if not all(meanings):
        return NOT_AFFINE
    return AS_LOGARITHM if any(meaning and meaning.logarithmic for meaning in meanings) else NOT_ALL_PREFIXES


# -------------------------------------------------------------------- combine functions


@dataclass(frozen=True)
class Meaning:
    """What a combine function does to one element: adds it, multiplies it, or advances a recurrence with decay number `decay`.

    `logarithmic`: it does so to exponentials.
    """

    kind: Literal["sum", "product", "recurrence"]
    decay: int = -1
    logarithmic: bool = False


class _Combine:
    """A combine function on elements at random: `inputs` are all of the left operand, then all of the right one."""

    def __init__(self, inputs: Sequence[Node], body: Sequence[Node], outputs: Sequence[Any], sizes: Sizes):
        self.count = len(outputs)
        self._evaluator = Evaluator(OPERATIONS, set(body) - set(inputs), set(), set(), sizes)
        self._evaluator.run(node for node in body if node not in inputs and name_of(node) in OPERATIONS)
        self._operands = [self._operand(node) for node in inputs[: 2 * self.count]]
        self._results = [self._result(node) for node in outputs]
        self.meanings = [self._meaning(k) for k in range(self.count)]

    def _operand(self, node: Node) -> Value | None:
        try:
            return self._evaluator.operands((node,))[0]
        except OutsideError:
            return None

    def _result(self, node: Any) -> Value | None:
        value = self._evaluator.value(node) if isinstance(node, Node) else None
        return value if value is not None and self._evaluator.is_laned(value) and set(value.lengths) <= {1} else None

    def _meaning(self, k: int) -> Meaning | None:
        if len(self._operands) != 2 * self.count:
            return None
        for plane in ("plain", "image"):
            logarithmic = plane == "image"
            left, right = self._plane(self._operands[k], plane), self._plane(self._operands[self.count + k], plane)
            if self._is(k, "plain", lambda a=left, b=right: (a + b) % P) and not logarithmic:
                return Meaning("sum")
            if self._is(k, plane, lambda a=left, b=right: a * b % P):
                return Meaning("product", logarithmic=logarithmic)
            for j in range(self.count):
                decay = self._plane(self._operands[self.count + j], plane)
                earlier = self._plane(self._operands[j], plane)
                recurs = self._is(k, plane, lambda a=left, b=right, c=decay: (c * a + b) % P)
                if j != k and recurs and self._is(j, plane, lambda c=decay, d=earlier: c * d % P):
                    return Meaning("recurrence", j, logarithmic)
        return None

    def _is(self, k: int, plane: str, wanted: Any) -> bool:
        found = self._plane(self._results[k], plane)
        if found is None:
            return False
        try:
            return bool((found == wanted()).all())
        except TypeError:  # an operand of which nothing is known
            return False

    def _plane(self, value: Value | None, plane: str) -> Any:
        array = None if value is None else getattr(value, plane)
        return None if array is None else array.reshape(array.shape[0])


# -------------------------------------------------------------------- torch's operation


def _whole(module: GraphModule, node: Node, builder: Builder) -> Substitution | None:
    """Scans for the results of `associative_scan(combine, xs, further)` that are used."""
    body, xs = module.get_submodule(str(node.args[0].target)), node.args[1]  # type: ignore[union-attr]
    assert isinstance(body, GraphModule)
    meanings = _combine_of(body.graph).meanings
    results = {user: meanings[int(user.args[1])] for user in node.users if user.users}  # type: ignore[arg-type]
    for result, meaning in results.items():
        if meaning is None:
            raise Stop(NOT_AFFINE)
        if meaning.logarithmic and not _is_exponentiated(result):
            raise Stop(AS_LOGARITHM)
    pairs: list[tuple[Node, Node]] = []
    scans: list[Node] = []
    for result, meaning in results.items():
        assert meaning is not None
        scans.append(_scan_of(builder, meaning, xs, int(result.args[1])))  # type: ignore[arg-type]
        states = builder.call(aten.log.default, scans[-1]) if meaning.logarithmic else scans[-1]
        pairs.append((result, in_memory_order(builder, states, result)))
    if not pairs:
        return None
    return Substitution(what="an associative scan", anchor=node, pairs=tuple(pairs), scans=tuple(scans), regions=((node,),))


def _is_exponentiated(node: Node) -> bool:
    """Whether nothing but exp of a node's elements is used."""
    return all(
        user.target is aten.exp.default or (name_of(user) in _ONLY_MOVE and _is_exponentiated(user)) for user in node.users
    )  # fmt: skip


def _combine_of(graph: Graph) -> _Combine:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    returned = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    return _Combine(inputs, [node for node in graph.nodes if node.op != "output"], returned, Sizes(graph.nodes))


def _scan_of(builder: Builder, meaning: Meaning | None, xs: Any, number: int) -> Node:
    assert meaning is not None

    def operand(k: int) -> Node:
        return builder.call(aten.exp.default, xs[k]) if meaning.logarithmic else xs[k]

    if meaning.kind == "sum":
        return scan_of(builder, None, operand(number), None)
    if meaning.kind == "recurrence":
        return scan_of(builder, operand(meaning.decay), operand(number), None)
    factor = operand(number)
    return scan_of(builder, factor, builder.call(aten.zeros_like.default, factor), one(builder, factor))

"""The rule engine: try rules at their anchors, replace what matched, verify each replacement, log everything.

A replacement must have the shape, dtype and strides of what it replaces, and leave nothing behind that computes it a second time.
"""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from ._torch import DataDependentError
from .builder import Builder
from .errors import VerifyError, summary
from .ir import Computed, Match, Operand, Rejected, Rule
from .pattern import GraphView, describe, module_path, source_line
from .terms import FloorDiv, Modulo, integer_symbol
from .viewmaps import shape_of, size_term

aten = torch.ops.aten

Lower = Callable[..., "Node | Mapping[str, Node]"]
LAYOUTS = {"attention": ("bhtd", "bthd"), "recurrence": ("tbhd", "bhtd", "bthd"), "experts": ("bhtd",), "route": ("bhtd",)}
"""The memory orders in which a family's operation can be asked to write its result."""
_COPIES = (aten.clone.default, aten.contiguous.default)
_B, _H, _I, _C, _D = (integer_symbol(name) for name in ("b", "h", "i", "c", "d"))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One rule tried at one anchor. `result` is its match, or why not.

    `where` is `file:line` in the user's code, `module` the path of the module that the line runs in.
    """

    rule: str
    family: str
    anchor: str
    where: str
    module: str
    result: Match | Rejected
    seconds: float

    @property
    def matched(self) -> bool:
        return isinstance(self.result, Match)

    @property
    def error(self) -> Exception | None:
        """What the rule raised, which no rule should."""
        return self.result.error if isinstance(self.result, Rejected) else None

    @property
    def site(self) -> str:
        """The place in a few words: `model.layers.0.self_attn (modeling_llama.py:208)`."""
        line = Path(self.where).name if self.where != self.module else ""
        return f"{self.module} ({line})" if self.module and line else self.module or line

    def __str__(self) -> str:
        place = f"{self.rule} at {self.anchor} ({', '.join(filter(None, (self.module, self.where))) or 'no source line'})"
        if isinstance(self.result, Match):
            return f"{place}: matched, {self.result.spec.to_json()}"
        stopped = f", stopped at {describe(self.result.node)}" if self.result.node is not None else ""
        return f"{place}: refused at step {self.result.step!r}: {self.result.why}{stopped}"


def attempt_all(view: GraphView, rules: Iterable[Rule]) -> list[Attempt]:
    """Try every rule at each of its anchors, in graph order."""
    by_anchor: dict[Any, list[Rule]] = {}
    for rule in rules:
        for anchor in rule.anchors:
            by_anchor.setdefault(anchor, []).append(rule)
    attempts = []
    for node in view.graph.nodes:
        for rule in by_anchor.get(node.target, ()) if node.op == "call_function" else ():
            attempt = _attempt(rule, node, view)
            if not (rule.quiet and isinstance(attempt.result, Rejected) and attempt.result.step == "anchor"):
                attempts.append(attempt)
    return attempts


def attempt_again(attempt: Attempt, rules: Iterable[Rule], view: GraphView) -> Attempt:
    """The same rule at the same anchor, in a graph that has changed since."""
    rule = next(rule for rule in rules if rule.name == attempt.rule)
    anchor = next((node for node in view.graph.nodes if node.name == attempt.anchor), None)
    if anchor is None:
        why = "it vanished with the rewrite of another site"
        return dataclasses.replace(attempt, result=Rejected(step="anchor", why=why))
    return _attempt(rule, anchor, view)


def unmatched(rejected: Rejected, family: str) -> Attempt:
    """The attempt that a rejection outside of the rules amounts to; of the whole graph, if it names no node."""
    node = rejected.node
    anchor, where, module = (node.name, source_line(node), module_path(node)) if node is not None else ("", "", "")
    return Attempt(rule=family, family=family, anchor=anchor, where=where, module=module, result=rejected, seconds=0.0)


def is_stale(match: Match, graph: Graph) -> bool:
    """Whether a rewrite since took away a node that a match stands on."""
    return not {match.output, *match.further, *match.bases} <= set(graph.nodes)


def _attempt(rule: Rule, node: Node, view: GraphView) -> Attempt:
    start = time.perf_counter()
    try:
        result = rule.recognise(node, view)
    except DataDependentError:
        result = Rejected(step="anchor", why="its sizes depend on data", node=node)
    except Exception as error:  # a rule that fails must not take the compile with it
        why = f"rule {rule.name} failed with {summary(error)}"
        result = Rejected(step="internal", why=why, node=node, error=error)
    return Attempt(
        rule=rule.name,
        family=rule.family,
        anchor=node.name,
        where=source_line(node),
        module=module_path(node),
        result=result,
        seconds=time.perf_counter() - start,
    )


# -------------------------------------------------------------------- replacing


def replace(match: Match, lower: Lower) -> Node:
    """Put `lower`'s nodes in the place of a match.

    Args:
        lower: `lower(builder, operands, captures, sizes, match, layout)` adds the operation and returns its result
            [b, h, i, d], or its results by name, that one as "out"; `layout` names its memory order.

    Returns:
        The node that has taken over the uses of `match.output`.

    Raises:
        VerifyError: the result would differ from the original in shape, dtype or strides.

    Whatever is raised, by `lower` too, the graph is as it was.
    """
    graph = match.output.graph
    builder = Builder(graph, _place(match))
    copied = _copy_after(match)
    try:
        operands = {name: materialise(builder, operand) for name, operand in match.inputs.items()}
        common = len(builder.added)
        layouts = ("bthd",) if copied is not None else LAYOUTS[match.family]
        for layout in layouts:
            lowered = lower(builder, operands, match.captures, match.sizes, match, layout)
            results = {"out": lowered} if isinstance(lowered, Node) else lowered
            result = in_layout(builder, results["out"], match.output, match.layout)
            if copied is not None or _same_strides(result, match.output):
                break
            if layout != layouts[-1]:
                _drop_since(builder, common)
        if copied is None and not _same_strides(result, match.output):
            result = _with_strides_of(builder, result, match.output)
        _verify(result, match.output)
        further = {node: _further(builder, results[x.name], node, x.layout) for node, x in match.further.items()}
        swapped = None if copied is None else _contiguous_swap(builder, result)
    except Exception:
        builder.undo()
        raise
    match.output.replace_all_uses_with(result)  # from here on nothing can fail
    for node, substitute in further.items():
        node.replace_all_uses_with(substitute)
    if copied is not None and swapped is not None:
        _forget_copy(swapped, *copied)
    _erase_dead(match)
    return result


def _place(match: Match) -> Node:
    """Where the operation goes: before its first result and all that needs another, behind all that it is computed from."""
    place = min((match.output, *(user for node in match.further for user in node.users)))
    for node in match.bases:
        if not node < place:
            raise VerifyError(f"Expected {node.name} before {place.name}, a result of the operation that is computed from it")
    return place


def _drop_since(builder: Builder, count: int) -> None:
    for node in reversed(builder.added[count:]):
        builder.graph.erase_node(node)
    del builder.added[count:]


def materialise(builder: Builder, operand: Operand | Computed) -> Node:
    """Adds the nodes of an operand."""
    if isinstance(operand, Computed):
        node = operand.compute(builder, [materialise(builder, part) for part in operand.parts])
    else:
        node = operand.base
        for target, arguments in operand.views:
            node = builder.call(target, node, *arguments)
    if node.meta["val"].dtype != operand.dtype:
        node = builder.call(aten._to_copy.default, node, dtype=operand.dtype)
    return node


def _further(builder: Builder, result: Node, original: Node, layout: tuple[Any, ...]) -> Node:
    """A further result as its own dimensions, in the original's dtype and memory order."""
    if len(result.meta["val"].shape) == 3:  # [b, h, i]
        result = builder.call(aten.unsqueeze.default, result, 3)
    result = in_layout(builder, result, original, layout)
    if not _same_strides(result, original):
        result = _with_strides_of(builder, result, original)
    _verify(result, original)
    return result


def in_layout(builder: Builder, result: Node, original: Node, layout: tuple[Any, ...]) -> Node:
    """[b, h, i, d], or [b, h, c, d], as the original's own dimensions: batch dimensions split or merged, then permuted."""
    target = original.meta["val"]
    row = _I if _I in layout else _C
    for dim, symbol in ((3, _D), (2, row)):
        if symbol not in layout:
            result = builder.call(aten.select.int, result, dim, 0)
    batch = sorted((k for k, term in enumerate(layout) if term not in (row, _D)), key=lambda k: _significance(layout[k]))
    if len(batch) == 0:
        result = builder.call(aten.select.int, builder.call(aten.select.int, result, 0, 0), 0, 0)
    elif len(batch) == 1 and result.meta["val"].shape[1] == 1:
        result = builder.call(aten.select.int, result, 1, 0)
    elif tuple(layout[k] for k in batch) != (_B, _H):
        result = _unfolded(builder, result, [target.shape[k] for k in batch])
    dims = [*batch, *(layout.index(symbol) for symbol in (row, _D) if symbol in layout)]
    order = [dims.index(k) for k in range(len(dims))]
    if order != sorted(order):
        result = builder.call(aten.permute.default, result, order)
    if result.meta["val"].dtype != target.dtype:
        result = builder.call(aten._to_copy.default, result, dtype=target.dtype)
    return result


def _significance(term: Any) -> tuple[int, int]:
    """Where a batch dimension stands among those that b and h, in this order, come apart into."""
    if term == _B or term == 0:
        return (0, 0)
    if isinstance(term, Modulo):
        return _significance(term.args[0])
    if isinstance(term, FloorDiv):
        rank, stride = _significance(term.args[0])
        return (rank, stride - int(term.args[1]))
    return (1, 0)


def _unfolded(builder: Builder, result: Node, sizes: list[Any]) -> Node:
    """[b, h, ...] with b times h as dimensions of these sizes."""
    if sum(not isinstance(n, int) for n in sizes) > 1:
        raise VerifyError("Expected at most one symbolic batch dimension in the output but got several")
    merged = builder.call(aten.flatten.using_ints, result, 0, 1)
    lengths = [n if isinstance(n, int) else -1 for n in sizes]
    return builder.call(aten.unflatten.int, merged, 0, lengths) if len(sizes) > 1 else merged


def _same_strides(a: Node, b: Node) -> bool:
    """Whether two values lie alike in memory; strides of dimensions of size 1 do not count."""
    x, y = a.meta["val"], b.meta["val"]
    if x.dim() != y.dim():
        return False
    pairs = zip(x.shape, x.stride(), y.stride(), strict=True)
    return all(isinstance(n, int) and n == 1 or size_term(s) == size_term(t) for n, s, t in pairs)


def _with_strides_of(builder: Builder, result: Node, wanted: Node) -> Node:
    """A copy in the memory order of `wanted`."""
    strides = wanted.meta["val"].stride()
    if not all(isinstance(s, int) for s in strides):
        return builder.call(aten.clone.default, result, memory_format=torch.contiguous_format)
    order = sorted(range(len(strides)), key=lambda k: -strides[k])
    copy = builder.call(aten.permute.default, result, order)
    copy = builder.call(aten.clone.default, copy, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, copy, [order.index(k) for k in range(len(order))])


def _verify(result: Node, original: Node) -> None:
    new, old = result.meta["val"], original.meta["val"]
    if shape_of(result) != shape_of(original):
        raise VerifyError(f"Expected the rewrite of {original.name} to have shape {tuple(old.shape)} but got {tuple(new.shape)}")
    if new.dtype != old.dtype or new.device != old.device:
        raise VerifyError(f"Expected {old.dtype} on {old.device} for {original.name} but got {new.dtype} on {new.device}")


def _copy_after(match: Match) -> tuple[Node, Node] | None:
    """`(permutation, copy)` if the output is only swapped to [b, i, h, d] and copied: then it may be made in that order."""
    output = match.output
    if len(match.layout) != 4 or match.layout[2:] != (_I, _D) or len(output.users) != 1:
        return None
    swap = next(iter(output.users))
    swaps = (swap.target is aten.transpose.int and {d % 4 for d in swap.args[1:3]} == {1, 2}) or (  # type: ignore[operator]
        swap.target is aten.permute.default and [d % 4 for d in swap.args[1]] == [0, 2, 1, 3]  # type: ignore[operator, union-attr]
    )
    if not swaps or len(swap.users) != 1:
        return None
    copy = next(iter(swap.users))
    if copy.target not in _COPIES or copy.kwargs.get("memory_format", torch.contiguous_format) is not torch.contiguous_format:
        return None
    return (swap, copy) if copy.target is not aten.clone.default or "memory_format" in copy.kwargs else None


def _contiguous_swap(builder: Builder, result: Node) -> Node | None:
    """`result` swapped to [b, i, h, d], if that is contiguous."""
    count = len(builder.added)
    swapped = builder.call(aten.transpose.int, result, 1, 2)
    if swapped.meta["val"].is_contiguous():
        return swapped
    _drop_since(builder, count)
    return None


def _forget_copy(swapped: Node, swap: Node, copy: Node) -> None:
    """A copy of what is contiguous already is the same."""
    copy.replace_all_uses_with(swapped)
    for node in (copy, swap):
        node.graph.erase_node(node)


def _erase_dead(match: Match) -> None:
    """Erases what nothing needs any more; not the results of an operation that stays, which may be given back their uses."""
    own = {*match.interior, match.output, *match.further}
    for node in reversed(match.output.graph.nodes):
        result = node.target is operator.getitem and node.args[0] not in own
        if node in own and not node.users and not result:
            node.graph.erase_node(node)


def hits_by_rule(attempts: Iterable[Attempt]) -> Mapping[str, tuple[int, int, float]]:
    """For each rule: matches, attempts, seconds."""
    table: dict[str, tuple[int, int, float]] = {}
    for attempt in attempts:
        hits, tries, seconds = table.get(attempt.rule, (0, 0, 0.0))
        table[attempt.rule] = (hits + attempt.matched, tries + 1, seconds + attempt.seconds)
    return table

"""Recurrences whose last state is copied to where the first came from: it is written there at once.

    out, _, final = recurrence(v, [..., view(state)])          out, _ = recurrence_update(v, [...], view(state))
    state.copy_(view'(final))                             ->

if state is an input of the graph, view' undoes view, nothing else reads the last state, and nothing that comes later the first one.
Where something learns, the copy stays: a gradient needs the first state. So it does where the dtypes differ.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from . import _torch
from ._regions import mode_regions, requires_grad
from .builder import Builder, erase_with_inputs
from .ops.recurrence import FEW_STEPS, RecurrenceSpec
from .ranges import Ranges, recombine
from .terms import integer_symbol
from .viewmaps import VIEWS, Index, shape_of, view_source

aten = torch.ops.aten

_RECURRENCE: Any = torch.ops.effcompile.recurrence.default
_UPDATE: Any = torch.ops.effcompile.recurrence_update.default
_COPIES = (aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The recurrences that write to their first state now, and why others do not though theirs is written back, one line each."""

    made: tuple[str, ...]
    left: tuple[str, ...]


def update_in_place(module: GraphModule, mutating: frozenset[Node] = frozenset()) -> Updates:
    """Replace the recurrences of a lifted graph of which that can be said. `mutating`: nodes that may write to any memory."""
    made, left = [], []
    for node in list(module.graph.nodes):
        write = _written_back(node) if node.target is _RECURRENCE else None
        if write is None:
            continue
        why = _why_not(node, write, module, mutating)
        if why:
            left.append(f"the state of {node.name} is copied to {write.args[0]}: {why}")
        else:
            made.append(f"{node.name} updates {write.args[0]} in place")
            _replace(node, write)
    if made:
        module.graph.lint()
        module.recompile()
    return Updates(made=tuple(made), left=tuple(left))


def _written_back(node: Node) -> Node | None:
    """The `copy_` of a recurrence's last state to an input of the graph, through views and copies."""
    for reader in _readers(_result(node, 2)):
        if reader.target is aten.copy_.default and reader.args[0].op == "placeholder":  # type: ignore[union-attr]
            return reader
    return None


def _readers(node: Node | None) -> list[Node]:
    """What uses a node, or a view or copy of it."""
    found: list[Node] = []
    for user in node.users if node is not None else ():
        found += _readers(user) if user.target in VIEWS or user.target in _COPIES else [user]
    return found


def _result(node: Node, position: int) -> Node | None:
    found = (user for user in node.users if user.target is operator.getitem and user.args[1] == position)
    return next(found, None)


# -------------------------------------------------------------------- whether it may


def _why_not(node: Node, write: Node, module: GraphModule, mutating: frozenset[Node]) -> str:
    """Why a recurrence must not write to its first state; empty if it may."""
    operands: Any = node.args[1]
    state: Any = write.args[0]
    final = _result(node, 2)
    assert final is not None
    spec = RecurrenceSpec.from_json(str(node.args[2]))
    if "initial" not in spec.operands:
        return "the recurrence does not begin with it"
    if not spec.has_rows or spec.decay == "full":
        return "kernels for single rows and for decays of each element write the last state apart"
    others = [reader for reader in _readers(final) if reader is not write]
    if others:
        return f"{others[0].name} reads the last state, too"
    steps, initial = node.args[0].meta["val"].shape[2], operands[-1]  # type: ignore[union-attr]
    if not isinstance(steps, int) or steps > FEW_STEPS:
        return f"of more than {FEW_STEPS} steps, the copy is the smaller part"
    if not initial.meta["val"].dtype == state.meta["val"].dtype == final.meta["val"].dtype:
        return f"it is kept in {state.meta['val'].dtype} and computed in {final.meta['val'].dtype}"
    if _torch.storage_key(initial.meta["val"]) != _torch.storage_key(state.meta["val"]) or not _is_undone(initial, write, final):
        return "the recurrence does not begin with what is written, element by element"
    requiring = requires_grad(module)
    if any(x in requiring for x in node.all_input_nodes):
        return "a gradient needs the first state"
    regions = mode_regions(module.graph, mutating)
    if regions[node] != regions[write]:
        return "grad mode or autocast is switched, or something else may write to it, in between"
    late = _later_reader(node, write, state)
    return f"{late.name} reads the first state afterwards" if late is not None else ""


def _is_undone(initial: Node, write: Node, final: Node) -> bool:
    """Whether each element of the last state goes to where the same element of the first was."""
    state: Any = write.args[0]
    ranges = Ranges({})
    symbols: list[Any] = []
    for k, size in enumerate(shape_of(state)):
        symbols.append(integer_symbol(f"s{k}") if size != 1 else sympy.S.Zero)
        if size != 1:
            ranges.add(symbols[-1], size)
    source: Any = write.args[1]
    if shape_of(source) != shape_of(state):
        return False
    there = _index_in(final, source, tuple(symbols), ranges)
    back = None if there is None else _index_in(state, initial, there, ranges)
    return back is not None and all(recombine(term) == s for term, s in zip(back, symbols, strict=True))


def _index_in(base: Node, node: Node, index: Index, ranges: Ranges) -> Index | None:
    """The index into `base` of an element of `node`, which is a view of it, or a copy of one."""
    while node is not base:
        if node.target in _COPIES:
            step = node.args[0], index
        else:
            step = view_source(node, index, ranges)  # type: ignore[assignment]
        if step is None:
            return None
        node, index = step  # type: ignore[assignment]
    return tuple(recombine(term) for term in index)


def _later_reader(node: Node, write: Node, state: Node) -> Node | None:
    """What reads the first state behind the recurrence, or may let the caller do so, but for `write` and what that returns."""
    key = _torch.storage_key(state.meta["val"])
    views = {state: None}
    for other in node.graph.nodes:
        if other is not write and _shares(other, key) and any(source in views for source in other.all_input_nodes):
            views[other] = None
    for view in views:
        for user in view.users:
            if user not in views and user is not write and user > node:
                return user
    return None


def _shares(node: Node, key: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and _torch.storage_key(value) == key and node.op != "output"


# -------------------------------------------------------------------- carrying it out


def _replace(node: Node, write: Node) -> None:
    v, operands, spec, layout = node.args
    builder = Builder(node.graph, node)
    updated = builder.call(_UPDATE, v, list(operands[:-1]), operands[-1], spec, layout)  # type: ignore[index, arg-type]
    for position in (0, 1):
        old = _result(node, position)
        if old is not None:
            old.replace_all_uses_with(builder.call(operator.getitem, updated, position))
            node.graph.erase_node(old)
    write.replace_all_uses_with(write.args[0])  # type: ignore[arg-type]
    erase_with_inputs(write)

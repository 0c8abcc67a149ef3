"""Grad mode and autocast along a graph, and which of its values require grad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from effcompile import _torch

aten = torch.ops.aten
_CUTS_GRADIENT = {aten.detach.default, aten.detach_.default, _torch.DATA_ATTRIBUTE}


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The modes in which a node runs. `autocasts` and `inference` hold the open regions' arguments, outermost first."""

    grad: bool
    autocasts: tuple[tuple[Node, tuple[Any, ...]], ...] = ()
    inference: tuple[tuple[Node, tuple[Any, ...]], ...] = ()
    epoch: int = 0

    @property
    def tracks_gradients(self) -> bool:
        """Whether autograd records what runs here."""
        return self.grad and not any(args[:1] == (True,) for _, args in self.inference)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two places exactly if an operator means the same in both."""
        return self.grad, tuple(a for _, a in self.autocasts), tuple(a for _, a in self.inference), self.epoch


def modes(graph: Graph, grad: bool | None = None, mutating: frozenset[Node] = frozenset()) -> Iterator[tuple[Node, Modes]]:
    """Each node with the modes in which it runs; a mode switch has those that it leaves.

    `grad` is the grad mode at the graph's start, by default the present one. Nodes in `mutating` write to memory behind the graph's
    back: what follows one never has the same modes as what precedes it.
    """
    state = Modes(grad=torch.is_grad_enabled() if grad is None else grad)
    for node in graph.nodes:
        yield node, state
        if node in mutating:
            state = replace(state, epoch=state.epoch + 1)
        elif node.op == "call_function":
            state = _after(node, state)


def _after(node: Node, state: Modes) -> Modes:
    if node.target is _torch.SET_GRAD:
        return replace(state, grad=bool(node.args[0]))
    if node.target is _torch.AUTOCAST_ENTER:
        return replace(state, autocasts=(*state.autocasts, (node, node.args)))
    if node.target is _torch.AUTOCAST_EXIT:
        return replace(state, autocasts=tuple(region for region in state.autocasts if region[0] is not node.args[0]))
    if node.target is _torch.INFERENCE_ENTER:
        return replace(state, inference=(*state.inference, (node, node.args)))
    if node.target is _torch.INFERENCE_EXIT:
        return replace(state, inference=tuple(region for region in state.inference if region[0] is not node.args[0]))
    return state


def mode_regions(graph: Graph, mutating: frozenset[Node] = frozenset()) -> dict[Node, int]:
    """A number for each node, equal for two nodes exactly if an operator may move from one's place to the other's.

    It changes at every switch of grad mode, autocast and inference mode, and after a region's end is the enclosing one's again.
    Two regions with the same modes have the same number. A node in `mutating` (a barrier that writes) parts before from after.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    return {node: numbers.setdefault(state.key, len(numbers)) for node, state in modes(graph, mutating=mutating)}


def requires_grad(graph_module: GraphModule, grad: bool | None = None) -> set[Node]:
    """The nodes with a result that requires grad when the graph runs in grad mode `grad` (by default the present one).

    Inputs by their example values; then forward through operators with floating-point or complex results, where grad mode is on.
    Views keep the flag of their base even where it is off, as autograd has it. `detach` cuts. A write passes it to what is written.
    """
    requiring: set[Node] = set()
    for node, state in modes(graph_module.graph, grad):
        if node.op in ("placeholder", "get_attr"):
            value = node.meta.get("val", node.meta.get("example_value"))
            if isinstance(value, torch.Tensor) and value.requires_grad:
                requiring.add(node)
        elif node.op != "output" and _receives(node, state, requiring):
            requiring.add(node)
            requiring.update(_written(node))
    return requiring


def _receives(node: Node, state: Modes, requiring: set[Node]) -> bool:
    if not any(source in requiring for source in node.all_input_nodes) or node.target in _CUTS_GRADIENT:
        return False
    value = node.meta.get("val")
    if not _is_differentiable(value):
        return False
    return state.tracks_gradients or _is_view(node, value)


def _is_differentiable(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (tuple, list)) and any(_is_differentiable(part) for part in value)


def _is_view(node: Node, value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    sources = {_torch.storage_key(v) for s in node.all_input_nodes if isinstance(v := s.meta.get("val"), torch.Tensor)}
    return all(isinstance(part, torch.Tensor) and _torch.storage_key(part) in sources for part in values)


def _written(node: Node) -> list[Node]:
    if not isinstance(node.target, _torch.OpOverload) or not node.target._schema.is_mutable:
        return []
    return [argument for argument, schema in written_arguments(node) if isinstance(argument, Node)]


def written_arguments(node: Node) -> list[tuple[Any, Any]]:
    """The arguments that an ATen node's operator writes to, each with its schema."""
    found = []
    for index, schema in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if schema.alias_info is not None and schema.alias_info.is_write:
            argument = node.args[index] if index < len(node.args) else node.kwargs.get(schema.name)
            if argument is not None:
                found.append((argument, schema))
    return found

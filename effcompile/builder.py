"""Adds nodes to a graph, each with the fake value that it would have."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ._torch import OpOverload

_COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


class Builder:
    """Appends calls before one node of a graph; `call` returns the new node.

    The new nodes carry the source location of the node that they stand in for.
    """

    def __init__(self, graph: Graph, before: Node):
        self.graph = graph
        self.before = before
        self.added: list[Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a call of an ATen overload or an operator, with its fake value in `meta["val"]`; added even if that fails."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self.added.append(node)
        node.meta.update({key: self.before.meta[key] for key in _COPIED_META if key in self.before.meta})
        values = map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode(), torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def fake_mode(self) -> Any:
        """The fake-tensor mode of the graph's values."""
        value = self.before.meta.get("val")
        value = value[0] if isinstance(value, (tuple, list)) else value
        mode = getattr(value, "fake_mode", None)
        return mode if mode is not None else contextlib.nullcontext()

    def undo(self) -> None:
        """Remove what was added."""
        for node in reversed(self.added):
            self.graph.erase_node(node)
        self.added.clear()


def is_tensor_node(value: Any) -> bool:
    """Whether a value stands for a tensor in the graph."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def erase_with_inputs(node: Node) -> None:
    """Erase an unused node, and what only it needed: pure ATen operations and attributes, nothing that has an effect."""
    graph, frontier = node.graph, list(node.all_input_nodes)
    graph.erase_node(node)
    erased: set[Node] = set()
    while frontier:
        current = frontier.pop()
        if current not in erased and not current.users and is_pure(current):
            erased.add(current)
            frontier += current.all_input_nodes
            graph.erase_node(current)


def is_pure(node: Node) -> bool:
    """Whether a node does nothing but give its value: no write, no random number, no call that the dispatcher does not see."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable or not node.target._schema.returns:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def escapes(node: Node) -> bool:
    """Whether a node's own memory may reach the caller or be written to: then nothing that lives elsewhere may stand for it."""
    for user in node.users:
        if not isinstance(user.target, OpOverload) or user.target._schema.is_mutable:
            return True
        shares = user.target is torch.ops.aten.dropout.default or any(result.alias_info for result in user.target._schema.returns)
        if shares and escapes(user):
            return True
    return False

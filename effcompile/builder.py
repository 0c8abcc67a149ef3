"""Adds nodes to a graph, each with the fake value that it would have."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

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

"""Tensors that a graph makes of nothing but numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effcompile._torch import OpOverload
from effcompile.builder import is_pure

_MOST_ELEMENTS = 4096
_MOST_NODES = 40


def values_of(node: Node) -> torch.Tensor | None:
    """The elements of a small tensor that depends on no input; None if it does, or is not small.

    1 - exp(linspace(log(1 / 32), log(1 / 512), 8))
    """
    needed: dict[Node, None] = {}
    frontier = [node]
    while frontier:
        current = frontier.pop()
        if current in needed:
            continue
        if len(needed) >= _MOST_NODES or not _is_computable(current):
            return None
        needed[current] = None
        frontier += current.all_input_nodes
    values: dict[Node, Any] = {}
    with torch.no_grad(), torch.device("cpu"):
        for current in sorted(needed):
            args, kwargs = map_arg((current.args, current.kwargs), lambda x: values[x])
            target: Any = current.target
            values[current] = target(*args, **{name: "cpu" if name == "device" else x for name, x in kwargs.items()})
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None


def _is_computable(node: Node) -> bool:
    value = node.meta.get("val")
    small = isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in value.shape) and value.numel() <= _MOST_ELEMENTS
    return node.op == "call_function" and isinstance(node.target, OpOverload) and is_pure(node) and small

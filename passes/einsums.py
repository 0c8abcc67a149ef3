"""An einsum of several tensors as products of two, in the order in which torch carries it out.

    einsum("bihn,bjhn,bhij,bjhp->bihp", c, b, l, x)   ->   einsum("bihj,bjhp->bihp", einsum("bihn,bjhn->bihj", c, b) * l, x)

Products in which nothing is summed over stay one operation if nothing at all is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effcompile.builder import Builder

from .scans import in_memory_order
from .tentative import Stop

aten = torch.ops.aten


@dataclass(frozen=True)
class _Operand:
    """A tensor, a letter for each dimension."""

    node: Node
    letters: str


def pairwise(node: Node) -> Node | None:
    """What an einsum of three tensors or more is; None if it cannot be written as products of two."""
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    if len(tensors) < 3 or "->" not in equation or "." in equation:  # type: ignore[arg-type]
        return None
    inputs, out = equation.split("->")
    terms = inputs.split(",")
    if set("".join(terms)) == set(out) or any(len(set(x)) != len(x) for x in (*terms, out)):
        return None
    builder = Builder(node.graph, node)
    operands = [_Operand(x, letters) for x, letters in zip(tensors, terms, strict=True)]  # type: ignore[arg-type]
    try:
        for first, second in _path(node, len(operands)):
            pair = [operands.pop(k) for k in sorted((first, second), reverse=True)][::-1]
            further = out + "".join(x.letters for x in operands)
            kept = "".join(dict.fromkeys(x for operand in pair for x in operand.letters if x in further)) if operands else out
            operands.append(_product(builder, pair[0], pair[1], kept))
        return in_memory_order(builder, operands[0].node, node)
    except (RuntimeError, Stop):  # sizes of 1 that stand for others
        builder.undo()
        return None


def _path(node: Node, count: int) -> Iterator[tuple[int, int]]:
    """The places of the two tensors in each step, among those that are left; the product goes to their end."""
    path: Any = node.kwargs.get("path")
    if path:
        yield from zip(path[::2], path[1::2], strict=True)
        return
    yield 0, 1
    for left in range(count - 1, 1, -1):
        yield left - 1, 0


def _product(builder: Builder, left: _Operand, right: _Operand, out: str) -> _Operand:
    if not set(left.letters + right.letters) <= set(out):
        equation = f"{left.letters},{right.letters}->{out}"
        return _Operand(builder.call(aten.einsum.default, equation, [left.node, right.node]), out)
    return _Operand(builder.call(aten.mul.Tensor, _aligned(builder, left, out), _aligned(builder, right, out)), out)


def _aligned(builder: Builder, operand: _Operand, out: str) -> Node:
    """A tensor with the dimensions of `out`, of size 1 where it has none."""
    node, order = operand.node, [operand.letters.index(x) for x in out if x in operand.letters]
    if order != sorted(order):
        node = builder.call(aten.permute.default, node, order)
    for k, letter in enumerate(out):
        if letter not in operand.letters:
            node = builder.call(aten.unsqueeze.default, node, k)
    return node

"""What a layer of experts costs as it is: the products that would vanish, and what is copied between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import sympy
import torch
from torch.fx import Node

from effcompile.builder import is_tensor_node
from effcompile.contraction import contraction_of
from effcompile.ir import Work
from effcompile.terms import Term
from effcompile.viewmaps import is_float, shape_of

from .experts_nodes import is_product

aten = torch.ops.aten

_COPIES = (aten.index.Tensor, aten.index_put.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.index_add.default)


def leaving(dead: Collection[Node], bases: Iterable[Node]) -> Work:
    """The work of the nodes that only a layer of experts needs, behind what it is computed from.

    Each product reads its operands and writes its result, each copy likewise; what is between them is fused with one or the other.
    """
    own = set(dead) - _before(bases)
    products = [node for node in own if is_product(node)]
    copies = [node for node in own if node.target in _COPIES and is_float(node)]
    flops = sympy.Add(*(2 * _count(node) * _summed(node) for node in products))
    traffic = sympy.Add(*(_bytes(x) for node in (*products, *copies) for x in (node, *_read(node))))
    return Work(flops=flops, bytes=traffic, launches=len(products) + len(copies) + 1)


def _before(nodes: Iterable[Node]) -> set[Node]:
    found: set[Node] = set()
    frontier = list(nodes)
    while frontier:
        node = frontier.pop()
        if node not in found:
            found.add(node)
            frontier += node.all_input_nodes
    return found


def _read(node: Node) -> list[Node]:
    """The operands of a product; of a copy, as much as it writes."""
    return [x for x in node.all_input_nodes if is_tensor_node(x) and is_float(x)] if is_product(node) else [node]


def _summed(node: Node) -> Term:
    found = contraction_of(node)
    if found is not None:
        return found.size(found.summed)
    return shape_of(node.args[0])[-1]  # type: ignore[arg-type]


def _count(node: Node) -> Term:
    return sympy.Mul(*shape_of(node))


def _bytes(node: Node) -> Term:
    return _count(node) * node.meta["val"].dtype.itemsize

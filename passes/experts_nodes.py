"""What a node is to a layer of experts: a matrix product, a permutation, indices of what was chosen, what is made from ids."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from effcompile import elementwise
from effcompile.builder import is_tensor_node
from effcompile.contraction import contraction_of
from effcompile.pattern import CASTS
from effcompile.rules import wrap_dim
from effcompile.terms import Term
from effcompile.viewmaps import VIEWS, is_float, shape_of

aten = torch.ops.aten

LINEAR = (aten.linear.default,)
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Products of groups of rows with a matrix each: `(rows [M, r], matrices [E, r, c], offsets [E])`."""

REDUCTIONS: dict[Any, str] = {
    aten.sum.dim_IntList: "sum",
    aten.any.dim: "any",
    aten.any.dims: "any",
    aten.amax.default: "max",
}
_CHOOSES = (aten.sum.dim_IntList, aten.any.dim, aten.any.dims, aten.amax.default, aten.softmax.int, aten._softmax.default)
_MASKS = (
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
)  # fmt: skip
_ACTIVATIONS = (aten.gelu.default, aten.leaky_relu.default, aten.glu.default)
_SCATTERS = (aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.one_hot.default)
_EQUALITIES = (aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar)
_SELECTIONS = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
_ORDERS = (aten.argsort.default, aten.argsort.stable)
_EXTREMES = (aten.argmax.default, aten.argmin.default)
_POINTWISE = frozenset({*elementwise.ARITHMETIC, *elementwise.CONDITIONS, *_MASKS, *CASTS, *_ACTIVATIONS})
_MOVING = (
    aten.index.Tensor, aten.index_put.default, aten.index_select.default, aten.index_copy.default, aten.scatter.src,
    aten.gather.default,
)  # fmt: skip


def is_grouped(node: Node) -> bool:
    """Whether a node multiplies groups of rows with a matrix each."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in _GROUPED


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product of any kind."""
    return node.op == "call_function" and (node.target in LINEAR or contraction_of(node) is not None or is_grouped(node))


def is_pointwise(node: Node) -> bool:
    """Whether each element of a node is computed from one element of each operand."""
    return node.target in _POINTWISE


def chosen_along(node: Node) -> tuple[Node, int] | None:
    """`(tensor, dim)` if a node holds positions along a dimension of a tensor: of its largest elements, or in sorted order."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node):
        return None
    if node.target is operator.getitem and source.target in _SELECTIONS and node.args[1] == 1:
        tensor, call = source.args[0], source
    elif node.target in (*_ORDERS, *_EXTREMES):
        tensor, call = source, node
    else:
        return None
    dim = argument(call, "dim", None if call.target in _EXTREMES else -1)
    if not is_tensor_node(tensor) or not isinstance(dim, int):
        return None
    return tensor, wrap_dim(dim, tensor.meta["val"].dim())  # type: ignore[union-attr, return-value]


def bound_of(node: Node) -> Term | None:
    """How many values there are for what a node holds: its elements are in 0 .. that - 1. None if not known."""
    found = chosen_along(node)
    return None if found is None else shape_of(found[0])[found[1]]


def is_permutation(node: Node) -> bool:
    """Whether a node is a permutation of all positions of a tensor with one dimension."""
    found = chosen_along(node)
    orders = node.target in _ORDERS or (found is not None and node.args[0].target in _SELECTIONS[1:3])  # type: ignore[union-attr]
    return found is not None and orders and found[0].meta["val"].dim() == 1


def holds_each_once(node: Node) -> bool:
    """Whether what a node holds along its last dimension are different positions."""
    found = chosen_along(node)
    if found is None or found[1] != found[0].meta["val"].dim() - 1:
        return False
    return node.target in _ORDERS or node.args[0].target in _SELECTIONS[:3]  # type: ignore[union-attr]


def argument(node: Node, name: str, default: Any) -> Any:
    """An argument of an ATen call, by its name."""
    for position, schema in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if schema.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return default


class Facts:
    """What the nodes of one graph are made of, each found out once."""

    def __init__(self) -> None:
        self._made: dict[Node, bool] = {}
        self._holding: dict[Node, bool] = {}

    def is_made_of_ids(self, node: Any) -> bool:
        """Whether a node comes, element by element, from the comparison of ids with experts, or from what was scattered by ids."""
        return self._search(self._made, node, lambda x: x.target in _SCATTERS or _compares_integers(x), _leads_to_ids)

    def holds_product(self, node: Any) -> bool:
        """Whether the elements of a node are made from those of a matrix product, moved and combined element by element."""
        return self._search(self._holding, node, _multiplies_rows, _leads_to_products)

    def _search(
        self, memo: dict[Node, bool], node: Any, found: Callable[[Node], bool], inputs: Callable[[Node], list[Node]]
    ) -> bool:
        stack = [node] if isinstance(node, Node) else []
        while stack:
            current = stack[-1]
            if current in memo:
                stack.pop()
                continue
            if current.op != "call_function" or found(current):
                memo[current] = current.op == "call_function"
                continue
            before = inputs(current)
            unknown = [x for x in before if x not in memo]
            if unknown:
                stack += unknown
                continue
            memo[current] = any(memo[x] for x in before)
        return isinstance(node, Node) and memo[node]


def _compares_integers(node: Node) -> bool:
    left = node.args[0] if node.target in _EQUALITIES else None
    return is_tensor_node(left) and not is_float(left) and left.meta["val"].dtype is not torch.bool  # type: ignore[arg-type, union-attr]


def _leads_to_ids(node: Node) -> list[Node]:
    if contraction_of(node) is not None:
        return [x for x in node.all_input_nodes if _is_mask(x)]
    return node.all_input_nodes if node.target in _CHOOSES or _passes(node) else []


def _is_mask(node: Node) -> bool:
    """Whether a node is what ids were compared to give, through views and casts alone."""
    while node.op == "call_function" and (node.target in VIEWS or node.target in CASTS):
        node = node.all_input_nodes[0]
    return node.op == "call_function" and (node.target in _SCATTERS or _compares_integers(node))


def _multiplies_rows(node: Node) -> bool:
    return is_product(node) and not any(_is_mask(x) for x in node.all_input_nodes)


def _leads_to_products(node: Node) -> list[Node]:
    if node.target is aten.stack.default or node.target is aten.cat.default or node.target in _MOVING:
        return node.all_input_nodes
    return node.all_input_nodes if _passes(node) else []


def _passes(node: Node) -> bool:
    parts = node.target is operator.getitem or node.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
                                                               aten.chunk.default)  # fmt: skip
    return parts or node.target in VIEWS or is_pointwise(node)

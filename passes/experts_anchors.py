"""Where a layer of experts may end: what adds up products of rows, at a glance."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effcompile._torch import has_unbacked
from effcompile.builder import is_tensor_node
from effcompile.contraction import contraction_of
from effcompile.pattern import CASTS
from effcompile.viewmaps import VIEWS, is_float

from .experts_chosen import landing_of
from .experts_nodes import Facts, is_pointwise

aten = torch.ops.aten

ACCUMULATES = frozenset({aten.index_add.default, aten.scatter_add.default, aten.index_put.default})
CONTRACTS = frozenset({aten.bmm.default, aten.matmul.default, aten.einsum.default})
ANCHORS = frozenset({aten.sum.dim_IntList, aten.add.Tensor, *ACCUMULATES, *CONTRACTS})


def may_end(anchor: Node, facts: Facts) -> bool:
    """Whether it is worth reading what an anchor adds up."""
    if not is_float(anchor) or anchor.meta["val"].dim() < 2 or _is_chosen(anchor):
        return False
    if anchor.target is aten.sum.dim_IntList:
        return facts.holds_product(anchor.args[0])
    if anchor.target in ACCUMULATES:
        if any(user.target in ACCUMULATES and user.args[0] is anchor and landing_of(user) is not None for user in anchor.users):
            return False
        return any(facts.holds_product(x) for x in anchor.all_input_nodes)
    if anchor.target is aten.add.Tensor:
        return _ends_a_loop(anchor, facts)
    found = contraction_of(anchor)
    return found is not None and any(facts.holds_product(x) for x in found.operands)


def _is_chosen(anchor: Node) -> bool:
    """Whether how many rows a tensor has depends on data: then they are those that one expert was chosen for."""
    return any(isinstance(n, torch.SymInt) and has_unbacked(n) for n in anchor.meta["val"].shape)


def _ends_a_loop(anchor: Node, facts: Facts) -> bool:
    """Whether an addition adds a weighted product, and no further one is added to it."""
    if not any(_is_weighted(x, facts) for x in anchor.args):
        return False
    following = [user for user in _after_casts(anchor) if user.target is aten.add.Tensor]
    return not any(_is_weighted(x, facts) for user in following for x in user.args if _source(x) is not anchor)


def _after_casts(node: Node) -> list[Node]:
    found = []
    for user in node.users:
        found += _after_casts(user) if _moves(user) else [user]
    return found


def _moves(node: Node) -> bool:
    return node.op == "call_function" and (node.target in VIEWS or node.target in CASTS)


def _source(node: Any) -> Any:
    """What a node is a view or a cast of."""
    while isinstance(node, Node) and _moves(node):
        node = node.args[0]
    return node


def _is_weighted(node: Any, facts: Facts) -> bool:
    """Whether a node is a product times, or where, something made from ids."""
    node = _source(node)
    if not is_tensor_node(node) or not is_pointwise(node):
        return False
    inputs = [x for x in node.all_input_nodes if is_tensor_node(x)]
    made = [x for x in inputs if facts.is_made_of_ids(x) and not facts.holds_product(x)]
    return bool(made) and any(x not in made and facts.holds_product(x) for x in inputs)

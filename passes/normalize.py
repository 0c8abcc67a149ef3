"""One spelling for what has several, before anything is recognised.

exp(x - max(x)) / sum(exp(x - max(x)))  ->  softmax(x)        cat([empty, x])        ->  x
exp(x - logsumexp(x))                   ->  softmax(x)        reshape, _unsafe_view  ->  view
exp(log_softmax(x))                     ->  softmax(x)        detach(copy(constant)) ->  constant
(exp(x) @ v) / sum(exp(x))              ->  softmax(x) @ v
dropout(x, p, training=False)           ->  x                 x + 0 (integers)     ->  x
einsum of several                       ->  einsums of two
sqrt(full([], 64))                      ->  full([], 8)       (single numbers; larger constants are read as index expressions)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from effcompile.builder import Builder, erase_with_inputs, escapes, is_pure

from .einsums import pairwise
from .handwritten import VIEWS as _VIEWS
from .handwritten import softmax_of_exponential, softmax_of_product, softmax_of_quotient
from .rearrange import rearrange

aten = torch.ops.aten

Rewrite = Callable[[Node], "Node | None"]
_CONSTANTS = (aten.full.default, aten.ones.default, aten.zeros.default, aten.scalar_tensor.default)
_COPIES = (aten.lift_fresh_copy.default, aten.detach.default, aten.clone.default)


def normalize(module: GraphModule, *, strict: bool = False) -> list[str]:
    """Apply every rewrite once at each node, in graph order, then rearrange sums; returns a line for each that applied.

    `strict` is that of the view in which attentions will be recognised.
    """
    log = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        for rewrite in (*REWRITES.get(node.target, ()), _folded):
            if not node.users:
                break
            replacement = rewrite(node)
            if replacement is not None:
                log.append(f"{rewrite.__name__.strip('_')} at {node.name}")
                node.replace_all_uses_with(replacement)
                erase_with_inputs(node)
                break
    return log + rearrange(module, strict=strict)


# -------------------------------------------------------------------- concatenations, views, constants


def _cat_with_empty(node: Node) -> Node | None:
    """What has no elements adds nothing to a concatenation."""
    parts = [part for part in node.args[0] if not _is_empty(part)]  # type: ignore[union-attr, arg-type]
    if len(parts) == len(node.args[0]) or not parts:  # type: ignore[arg-type]
        return None
    if any(part.meta["val"].dtype != node.meta["val"].dtype for part in parts):
        return None
    if len(parts) == 1:
        return (
            parts[0]
            if not escapes(node) and parts[0].meta["val"].stride() == node.meta["val"].stride()
            else _copied(node, parts[0])
        )
    return Builder(node.graph, node).call(aten.cat.default, parts, *node.args[1:])


def _copied(node: Node, part: Node) -> Node:
    return Builder(node.graph, node).call(aten.clone.default, part, memory_format=torch.contiguous_format)


def _is_empty(node: Node) -> bool:
    shape = node.meta["val"].shape
    return any(isinstance(n, int) and n == 0 for n in shape)


def _as_view(node: Node) -> Node | None:
    """A reshape that moves no data is a view."""
    source = node.args[0]
    if not isinstance(source, Node) or not source.meta["val"].is_contiguous():
        return None
    builder = Builder(node.graph, node)
    return builder.call(aten.view.default, source, node.args[1])


def _constant_copy(node: Node) -> Node | None:
    """A functional graph writes to no constant, so a copy of one is the constant."""
    source = node.args[0]
    constant = isinstance(source, Node) and source.op == "get_attr" and not _is_parameter(source)
    return source if constant and not escapes(node) else None  # type: ignore[return-value]


def _folded(node: Node) -> Node | None:
    """A single number computed from single numbers is that number."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not _is_single(value) or not is_pure(node) or node.target in _CONSTANTS:
        return None
    if node.target is operator.getitem or not node.all_input_nodes or escapes(node):
        return None
    if any(x.target is not aten.full.default or not _is_single(x.meta["val"]) for x in node.all_input_nodes):
        return None
    if any(isinstance(a, torch.device) for a in node.kwargs.values()):
        return None
    arguments = map_arg((node.args, node.kwargs), lambda x: torch.full(x.args[0], x.args[1], dtype=x.meta["val"].dtype))
    result = node.target(*arguments[0], **arguments[1])
    return Builder(node.graph, node).call(
        aten.full.default, list(result.shape), result.item(), dtype=value.dtype, device=value.device
    )  # fmt: skip


def _is_single(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and all(isinstance(n, int) and n == 1 for n in value.shape) and not value.is_complex()


def _is_parameter(node: Node) -> bool:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return isinstance(owner, torch.nn.Parameter) or (isinstance(owner, torch.Tensor) and owner.requires_grad)


def _added_zero(node: Node) -> Node | None:
    """`x + 0` of integers is x."""
    source, other = node.args[:2]
    exact = isinstance(source, Node) and other == 0 and not node.meta["val"].dtype.is_floating_point
    return source if exact and not escapes(node) and source.meta["val"].dtype == node.meta["val"].dtype else None  # type: ignore[union-attr, return-value]


def _inactive_dropout(node: Node) -> Node | None:
    """Dropout outside training, or of nothing, is the identity and draws no random numbers."""
    source, p, training = node.args
    return source if isinstance(source, Node) and (p == 0 or not training) else None


REWRITES: dict[Any, tuple[Rewrite, ...]] = {
    aten.div.Tensor: (softmax_of_quotient,),
    aten.mul.Tensor: (softmax_of_product,),
    aten.exp.default: (softmax_of_exponential,),
    aten.cat.default: (_cat_with_empty,),
    aten.add.Tensor: (_added_zero,),
    aten.dropout.default: (_inactive_dropout,),
    aten.einsum.default: (pairwise,),
    **dict.fromkeys(_VIEWS, (_as_view,)),
    **dict.fromkeys(_COPIES, (_constant_copy,)),
}

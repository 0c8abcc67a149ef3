"""One spelling for what has several, before anything is recognised.

exp(x - max(x)) / sum(exp(x - max(x)))  ->  softmax(x)        cat([empty, x])        ->  x
exp(x - logsumexp(x))                   ->  softmax(x)        reshape, _unsafe_view  ->  view
exp(log_softmax(x))                     ->  softmax(x)        detach(copy(constant)) ->  constant
(exp(x) @ v) / sum(exp(x))              ->  softmax(x) @ v
dropout(x, p, training=False)           ->  x                 x + 0 (integers)     ->  x
sqrt(full([], 64))                      ->  full([], 8)       (single numbers; larger constants are read as index expressions)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from effcompile.builder import Builder, erase_with_inputs, escapes, is_pure
from effcompile.viewmaps import shape_of

aten = torch.ops.aten

Rewrite = Callable[[Node], "Node | None"]
_VIEWS = (aten.reshape.default, aten._unsafe_view.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_CONSTANTS = (aten.full.default, aten.ones.default, aten.zeros.default, aten.scalar_tensor.default)
_COPIES = (aten.lift_fresh_copy.default, aten.detach.default, aten.clone.default)


def normalize(module: GraphModule) -> list[str]:
    """Apply every rewrite once at each node, in graph order; returns a line for each that applied."""
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
    return log


# -------------------------------------------------------------------- softmax written out


def _softmax_of_quotient(node: Node) -> Node | None:
    """`e / sum(e, dim)` with `e = exp(x)`, shifted or not; also `(e @ v) / sum(e, -1)`."""
    numerator, denominator = node.args[:2]
    if not isinstance(numerator, Node) or not isinstance(denominator, Node):
        return None
    return _normalised(node, numerator, denominator)


def _softmax_of_product(node: Node) -> Node | None:
    """`e * (1 / sum(e, dim))`, either way round."""
    for numerator, factor in (node.args[:2], node.args[1::-1]):
        if isinstance(numerator, Node) and isinstance(factor, Node) and factor.target is aten.reciprocal.default:
            return _normalised(node, numerator, factor.args[0])  # type: ignore[arg-type]
    return None


def _normalised(node: Node, numerator: Node, denominator: Node) -> Node | None:
    total, weights = _unviewed(denominator), numerator
    if total.target is not aten.sum.dim_IntList or total.kwargs.get("dtype") not in (None, node.meta["val"].dtype):
        return None
    if numerator.target in _PRODUCTS and total.args[0] is numerator.args[0]:
        weights = numerator.args[0]  # type: ignore[assignment]
    dim = _reduced(denominator, total, weights)
    logits = None if dim is None else _exponent(weights)
    if dim is None or logits is None or shape_of(node) != shape_of(numerator):
        return None
    if weights is numerator:
        return _softmax(node, _unshifted(logits, dim), dim)
    if dim != weights.meta["val"].dim() - 1 or numerator.meta["val"].dim() != dim + 1:
        return None
    softmax = _softmax(weights, _unshifted(logits, dim), dim, before=node)
    return None if softmax is None else Builder(node.graph, node).call(numerator.target, softmax, *numerator.args[1:])


def _exponent(weights: Node) -> Any:
    """`x` of `exp(x)`; `masked_fill(x, m, -inf)` of `masked_fill(exp(x), m, 0)`."""
    if weights.target is aten.exp.default:
        return weights.args[0]
    if weights.target is not aten.masked_fill.Scalar or weights.args[2] != 0:
        return None
    inner: Any = weights.args[0]
    if inner.target is not aten.exp.default:
        return None
    # A shift by the maximum of all, masked ones too, changes nothing.
    logits = _unshifted(inner.args[0], None)
    return Builder(weights.graph, weights).call(aten.masked_fill.Scalar, logits, weights.args[1], float("-inf"))


def _softmax_of_exponential(node: Node) -> Node | None:
    """`exp(x - logsumexp(x, dim))` and `exp(log_softmax(x, dim))`."""
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    if source.target in (aten.log_softmax.int, aten._log_softmax.default):
        return _softmax(node, source.args[0], int(source.args[1]))  # type: ignore[call-overload]
    if source.target is not aten.sub.Tensor or not isinstance(source.args[1], Node):
        return None
    logits, shift = source.args[:2]
    total = _unviewed(shift)
    if total.target is not aten.logsumexp.default:
        return None
    dim = _reduced(shift, total, logits)
    return None if dim is None else _softmax(node, logits, dim)


def _unviewed(node: Any) -> Any:
    """What `node` is a view of, with dimensions of size 1 put in."""
    while node.target in (*_VIEWS, aten.view.default, aten.unsqueeze.default, aten.detach.default):
        node = node.args[0]
    return node


def _reduced(result: Node, reduction: Node, source: Any) -> int | None:
    """The one dimension that `reduction` takes of `source`, if `result`, a view of it, has size 1 there and is else as `source`."""
    if reduction.args[0] is not source or len(reduction.args) < 2:
        return None
    dims: Any = reduction.args[1]
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len(dims) != 1:
        return None
    shape = list(shape_of(source))
    dim = int(dims[0]) % len(shape)
    shape[dim] = sympy.S.One
    return dim if list(shape_of(result)) == shape else None


def _unshifted(logits: Any, dim: int | None) -> Any:
    """`x` of `x - max(x, dim)`, of any dimension if it is None; anything else unchanged."""
    if not isinstance(logits, Node) or logits.target is not aten.sub.Tensor or not isinstance(logits.args[1], Node):
        return logits
    source, shift = logits.args[:2]
    top = _unviewed(shift)
    if getattr(top.target, "__name__", "") == "getitem" and top.args[1] == 0:
        top = top.args[0]
    if top.target not in (aten.amax.default, aten.max.dim):
        return logits
    found = _reduced(shift, top, source)
    return source if found is not None and dim in (None, found) else logits


def _softmax(node: Node, logits: Any, dim: int, before: Node | None = None) -> Node | None:
    if not isinstance(logits, Node):
        return None
    new, old = logits.meta["val"], node.meta["val"]
    dtype = old.dtype if new.dtype != old.dtype else None
    builder = Builder(node.graph, before or node)
    result = builder.call(aten.softmax.int, logits, dim, dtype)
    if shape_of(result) != shape_of(node) or result.meta["val"].dtype != old.dtype:
        builder.undo()
        return None
    return result


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
    aten.div.Tensor: (_softmax_of_quotient,),
    aten.mul.Tensor: (_softmax_of_product,),
    aten.exp.default: (_softmax_of_exponential,),
    aten.cat.default: (_cat_with_empty,),
    aten.add.Tensor: (_added_zero,),
    aten.dropout.default: (_inactive_dropout,),
    **dict.fromkeys(_VIEWS, (_as_view,)),
    **dict.fromkeys(_COPIES, (_constant_copy,)),
}

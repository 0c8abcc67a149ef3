"""A softmax written out, as one.

exp(x - max(x)) / sum(exp(x - max(x)))  ->  softmax(x)        exp(x - logsumexp(x))  ->  softmax(x)
(exp(x) @ v) / sum(exp(x))              ->  softmax(x) @ v    exp(log_softmax(x))    ->  softmax(x)
m * exp(x) / sum(m * exp(x))            ->  softmax(x where m)                       for a boolean m
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.viewmaps import shape_of

aten = torch.ops.aten

VIEWS = (aten.reshape.default, aten._unsafe_view.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def softmax_of_quotient(node: Node) -> Node | None:
    """`e / sum(e, dim)` with `e = exp(x)`, shifted or not; also `(e @ v) / sum(e, -1)`."""
    numerator, denominator = node.args[:2]
    if not isinstance(numerator, Node) or not isinstance(denominator, Node):
        return None
    return _normalised(node, numerator, denominator)


def softmax_of_product(node: Node) -> Node | None:
    """`e * (1 / sum(e, dim))`, either way round."""
    for numerator, factor in (node.args[:2], node.args[1::-1]):
        if isinstance(numerator, Node) and isinstance(factor, Node) and factor.target is aten.reciprocal.default:
            return _normalised(node, numerator, factor.args[0])  # type: ignore[arg-type]
    return None


@dataclass(frozen=True, kw_only=True)
class Quotient:
    """`exp(logits) / sum(exp(logits), dim)`, or that times values: `product` is then the contraction.

    Where `hidden` holds, the exponential is set to zero.
    """

    logits: Node
    dim: int
    hidden: Node | None
    product: Node | None

    def shown(self, logits: Node, builder: Builder) -> Node:
        """`logits`, which stand for the quotient's own, with -inf where they are hidden."""
        return logits if self.hidden is None else builder.call(aten.masked_fill.Scalar, logits, self.hidden, float("-inf"))


def quotient_of(node: Node, numerator: Node, total: Node) -> Quotient | None:
    """`numerator / total` as a quotient of exponentials, `node` being what has its shape and dtype."""
    sums, weights, product = _unviewed(total), numerator, None
    if sums.target is not aten.sum.dim_IntList or sums.kwargs.get("dtype") not in (None, node.meta["val"].dtype):
        return None
    if numerator.target in _PRODUCTS and sums.args[0] is numerator.args[0]:
        weights, product = sums.args[0], numerator
    dim = _reduced(total, sums, weights)
    if dim is None or shape_of(node) != shape_of(numerator):
        return None
    rank = weights.meta["val"].dim()
    if product is not None and (dim != rank - 1 or product.meta["val"].dim() != rank):
        return None
    exponent = _exponent(weights)
    return None if exponent is None else Quotient(logits=exponent[0], dim=dim, hidden=exponent[1], product=product)


def _normalised(node: Node, numerator: Node, denominator: Node) -> Node | None:
    quotient = quotient_of(node, numerator, denominator)
    if quotient is None:
        return None
    # Of masked logits, any shift may go: one by the maximum of all, hidden ones too, changes nothing.
    logits = _unshifted(quotient.logits, quotient.dim if quotient.hidden is None else None)
    whole = numerator if quotient.product is None else numerator.args[0]
    softmax = _softmax(whole, quotient.shown(logits, Builder(node.graph, node)), quotient.dim, before=node)  # type: ignore[arg-type]
    if softmax is None or quotient.product is None:
        return softmax
    return Builder(node.graph, node).call(quotient.product.target, softmax, *quotient.product.args[1:])


def _exponent(weights: Node) -> tuple[Node, Node | None] | None:
    """`x` of `exp(x)`, and where it is hidden: `where(m, exp(x), 0)`, `m * exp(x)`, `masked_fill(exp(x), m, 0)`."""
    if weights.target is aten.exp.default:
        return weights.args[0], None  # type: ignore[return-value]
    builder = Builder(weights.graph, weights)
    if weights.target is aten.exp2.default:
        return builder.call(aten.mul.Tensor, weights.args[0], math.log(2)), None
    masked = _masked(weights)
    inner = None if masked is None or not isinstance(masked[0], Node) else _exponent(masked[0])
    if masked is None or inner is None or inner[1] is not None or shape_of(masked[0]) != shape_of(weights):
        return None
    _, mask, shown = masked
    return inner[0], builder.call(aten.logical_not.default, mask) if shown else mask


def _masked(node: Node) -> tuple[Any, Node, bool] | None:
    """What is set to zero, by which boolean tensor, and whether it is shown or hidden where that holds."""
    if node.target is aten.masked_fill.Scalar and node.args[2] == 0:
        return node.args[0], node.args[1], False  # type: ignore[return-value]
    if node.target is aten.where.ScalarOther and node.args[2] == 0:
        return node.args[1], node.args[0], True  # type: ignore[return-value]
    if node.target is aten.mul.Tensor:
        for inner, factor in (node.args, node.args[::-1]):
            mask = _as_boolean(factor)
            if mask is not None:
                return inner, mask, True
    return None


def _as_boolean(node: Any) -> Node | None:
    """The boolean tensor that a tensor of zeros and ones was cast from."""
    while isinstance(node, Node) and node.target in (aten._to_copy.default, aten.to.dtype, aten.type_as.default):
        node = node.args[0]
    value = node.meta.get("val") if isinstance(node, Node) else None
    return node if isinstance(value, torch.Tensor) and value.dtype is torch.bool else None


def softmax_of_exponential(node: Node) -> Node | None:
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
    while node.target in (*VIEWS, aten.view.default, aten.unsqueeze.default, aten.detach.default):
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

"""Attention as torch's own scaled_dot_product_attention, where that says the same.

    score = a * s + bias(b, h, i, j)  with a mask   ->   sdpa(q, k, v, attn_mask, scale=a)

On a CPU this is the fused path (FlashAttention for CPU); on a GPU, cuDNN or FlashAttention for what needs no dense mask.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import Builder, is_tensor_node
from effcompile.evaluate import Evaluator
from effcompile.ir import Match
from effcompile.ops.attention import AttentionSpec
from effcompile.terms import Term, Where, from_text, integer_symbol, is_condition, score_symbol

aten = torch.ops.aten

_S, _I, _J = score_symbol(), integer_symbol("i"), integer_symbol("j")
_LOWEST = -3.0e38  # a finite logit that any other outweighs


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments that express a specification: `attn_mask` is a term, a condition or a bias, or None."""

    scale: float
    causal: bool
    attn_mask: Term | None


def as_call(spec: AttentionSpec, *, square: bool) -> Call | None:
    """The call that computes `spec`, or None if there is none.

    Args:
        square: whether there are as many keys as queries, so that `is_causal` means `j <= i` to every backend.
    """
    if spec.sink is not None or spec.empty == "nan" or spec.dropout or spec.normaliser != "softmax":
        return None
    score, mask = from_text(spec.score), from_text(spec.mask)
    scale = sympy.diff(score, _S)
    if not scale.is_number:
        return None
    bias = sympy.expand(score - scale * _S)
    if square and bias == 0 and is_causal(mask):
        return Call(scale=float(scale), causal=True, attn_mask=None)
    return Call(scale=float(scale), causal=False, attn_mask=_attn_mask(bias, mask, spec))


def _attn_mask(bias: Term, mask: Term, spec: AttentionSpec) -> Term | None:
    if bias == 0:
        if mask is sympy.true:
            return None
        return mask if spec.empty != "mean" else Where(mask, sympy.S.Zero, sympy.Float(_LOWEST))
    if mask is sympy.true:
        return bias
    return Where(mask, bias, sympy.Float(_LOWEST) if spec.empty == "mean" else -sympy.oo)


def is_causal(mask: Term) -> bool:
    """Whether a mask is `j <= i`, however written."""
    if not isinstance(mask, sympy.core.relational.Relational):
        return False
    a, b = mask.args
    slack = {
        sympy.Le: b - a,
        sympy.Lt: b - a - 1,
        sympy.Ge: a - b,
        sympy.Gt: a - b - 1,
    }.get(type(mask))
    return slack is not None and sympy.expand(slack - (_I - _J)) == 0


def lower(
    builder: Builder,
    operands: Mapping[str, Node],
    captures: Mapping[str, Node],
    sizes: Mapping[str, Any],
    match: Match,
    layout: str,
) -> Node:
    """Add the call; its memory order is the library's own."""
    q, k, v = (operands[name] for name in ("q", "k", "v"))
    call = as_call(match.spec, square=is_square(q, k))
    assert call is not None
    mask = None if call.attn_mask is None else _mask_node(builder, call.attn_mask, q, k, captures, sizes)
    grouped = q.meta["val"].shape[1] != k.meta["val"].shape[1]
    return builder.call(
        aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, call.causal, scale=call.scale, enable_gqa=grouped
    )  # fmt: skip


def is_square(q: Node, k: Node) -> bool:
    """Whether queries and keys are proved to be as many."""
    a, b = q.meta["val"].shape[2], k.meta["val"].shape[2]
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def _mask_node(builder: Builder, term: Term, q: Node, k: Node, captures: Mapping[str, Node], sizes: Mapping[str, Any]) -> Node:
    """The mask as nodes that compute it from index tensors: Inductor makes one kernel of them."""
    value, symbols = q.meta["val"], {str(s) for s in term.free_symbols}
    extents = {"b": (q, 0, (-1, 1, 1, 1)), "h": (q, 1, (-1, 1, 1)), "i": (q, 2, (-1, 1)), "j": (k, 2, (-1,))}
    known: dict[str, Any] = dict(sizes)
    for name in sorted(symbols & set(extents)):
        node, dim, shape = extents[name]
        arange = builder.call(aten.arange.default, _extent(builder, node, dim), device=value.device)
        known[name] = builder.call(aten.view.default, arange, list(shape))
    evaluator = Evaluator(known, captures, dtype=value.dtype, device=value.device, call=builder.call, is_tensor=is_tensor_node)
    mask = evaluator.tensor(term, torch.bool if is_condition(term) else value.dtype)
    if mask.meta["val"].dtype not in (torch.bool, value.dtype):
        mask = builder.call(aten._to_copy.default, mask, dtype=value.dtype)
    sizes_out = [
        _extent(builder, q, 0),
        _extent(builder, q, 1) if "h" in symbols else 1,
        _extent(builder, q, 2),
        _extent(builder, k, 2),
    ]
    return builder.call(aten.expand.default, mask, sizes_out)


def _extent(builder: Builder, node: Node, dim: int) -> Any:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else builder.call(aten.sym_size.int, node, dim)


def lower_cudnn(
    builder: Builder,
    operands: Mapping[str, Node],
    captures: Mapping[str, Node],
    sizes: Mapping[str, Any],
    match: Match,
    layout: str,
) -> Node:
    """Add cuDNN's own operator: the dispatcher would prefer FlashAttention 2."""
    q, k, v = (operands[name] for name in ("q", "k", "v"))
    call = as_call(match.spec, square=is_square(q, k))
    assert call is not None and call.attn_mask is None
    outputs = builder.call(
        aten._scaled_dot_product_cudnn_attention.default, q, k, v, None, True, 0.0, call.causal, False, scale=call.scale
    )  # fmt: skip
    return builder.call(operator.getitem, outputs, 0)

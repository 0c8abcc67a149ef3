"""scaled_dot_product_attention with any mask: what the call says, as an `AttentionSpec`.

    softmax(q @ k.T * scale + mask) @ v,   rows without a key give zeros

A dense mask that is an expression of indices (how Hugging Face passes causality) becomes that expression.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.errors import ExpressionError
from effcompile.ir import Match, Rejected, Rule
from effcompile.masks import split
from effcompile.pattern import GraphView
from effcompile.ranges import Ranges
from effcompile.terms import Term, is_condition, number
from effcompile.viewmaps import Index, broadcast, shape_of

from .attention import batch_index
from .specify import (
    B,
    Coordinates,
    D,
    H,
    I,
    J,
    Parts,
    S,
    Stop,
    candidates,
    check_logit,
    choose,
    compute_dtype,
    match_of,
    with_depth,
)  # fmt: skip

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match one call, or say why it is left as it is."""
    try:
        return match_of(_parts(anchor, view))
    except Stop as stop:
        return stop.rejected
    except ExpressionError as error:
        return Rejected(step="expression", why=str(error), node=anchor)


def _parts(anchor: Node, view: GraphView) -> Parts:
    call = _arguments(anchor)
    q, k, v = (call[name] for name in ("query", "key", "value"))
    at = matrix_coordinates(anchor, k)
    if call["enable_gqa"] and anchor.meta["val"].dim() != 4:
        raise Stop("operands", f"heads in groups are read in four dimensions, not in {anchor.meta['val'].dim()}", anchor)
    index = tuple(at.index[x] for x in _letters(anchor))
    batch = index[:-2]
    depth = shape_of(q)[-1]
    if not depth.is_Integer:
        raise Stop("scores", "the head dimension is not a fixed number", anchor)
    inner = with_depth(at, depth)
    traced = (
        candidates(q, broadcast((*batch, I, D), shape_of(q)), inner, view, anchor, (B, H, I, D), whole=True),
        candidates(k, grouped_index(k, (*batch, J, D), call["enable_gqa"], at), inner, view, anchor, (B, H, J, D), whole=True),
        candidates(v, grouped_index(v, (*batch, J, D), call["enable_gqa"], at), at, view, anchor, (B, H, J, D), whole=True),
    )
    best = choose(*traced, anchor)
    interpreter = view.interpreter(at.ranges, anchor)
    scale = sympy.Float(float(depth) ** -0.5) if call["scale"] is None else number(float(call["scale"]))
    logit: Term = scale * best[0].factor * best[1].factor * S
    if call["attn_mask"] is not None:
        mask = interpreter.argument(call["attn_mask"], (*batch, I, J))
        logit = at.ranges.where(mask, logit, -sympy.oo) if is_condition(mask) else logit + mask
    if call["is_causal"]:
        logit = at.ranges.where(at.ranges.compare(sympy.Le, J, I), logit, -sympy.oo)
    trains = any(view.needs_gradient(x.node, anchor) for x in best[:2])
    taken = split(logit, at.ranges, I, J, at.extents["j"], at.extents["i"], safe=True, trains=trains)
    check_logit(taken, None, anchor)
    return Parts(
        view=view, anchor=anchor, output=anchor, coordinates=at, logit=taken, sink=None, q=best[0], k=best[1], v=best[2],
        layout=index, vanishing=(), dtype=compute_dtype(anchor, anchor, best[0], best[1]), loaded=interpreter.loaded,
        dropout=float(call["dropout_p"]),
    )  # fmt: skip


def _arguments(anchor: Node) -> dict[str, Any]:
    """The call's arguments by name, defaults filled in."""
    given = {argument.name: argument.default_value for argument in anchor.target._schema.arguments if argument.has_default_value()}
    names = [argument.name for argument in anchor.target._schema.arguments]
    given.update(zip(names, anchor.args, strict=False))
    given.update(anchor.kwargs)
    return given


def _letters(anchor: Node) -> list[str]:
    rank = anchor.meta["val"].dim()
    return [f"batch{k}" for k in range(rank - 2)] + ["query", "value"]


def matrix_coordinates(anchor: Node, k: Node) -> Coordinates:
    """Names for the dimensions of a [..., queries, depth] result."""
    shape, keys = shape_of(anchor), shape_of(k)[-2]
    ranges = Ranges({})
    letters = _letters(anchor)
    index = batch_index(letters[:-2], list(shape[:-2]), anchor, None, ranges)
    extents = {"i": shape[-2], "j": keys, "d": shape[-1], **index.pop("extents")}
    for symbol, name in ((I, "i"), (J, "j"), (D, "d")):
        ranges.add(symbol, extents[name])
    return Coordinates(ranges=ranges, index={**index, "query": I, "value": D}, extents=extents)


def grouped_index(node: Node, index: Index, grouped: bool, at: Coordinates) -> Index:
    """The index into keys or values [batch, heads, length, depth]: heads in groups, or broadcast."""
    shape = shape_of(node)
    if grouped and len(index) == 4 and shape[-3] != 1:
        group = at.extents["h"] / shape[-3]
        index = (*index[:-3], at.ranges.floordiv(index[-3], group), *index[-2:])
    return broadcast(index, shape)


SCALED_DOT_PRODUCT = Rule(
    name="sdpa",
    family="attention",
    summary="scaled_dot_product_attention, its dense mask read as an expression",
    anchors=frozenset({SDPA}),
    recognise=recognise,
)

"""flex_attention with its score_mod and mask_mod read as expressions: the same `AttentionSpec` as the attention written out.

    flex_attention(q, k, v, score_mod, block_mask)   ->   softmax(score_mod(q @ k.T * scale) where mask_mod) @ v

A call without a block mask means what its score_mod says. With one, whole blocks are left out by index lists that the graph only
receives; whether these list every block that mask_mod allows cannot be proved, and the call is left as it is.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.elementwise import as_condition
from effcompile.errors import ExpressionError, LiftError
from effcompile.expr import Interpreter
from effcompile.ir import Match, Rejected, Result, Rule
from effcompile.masks import split
from effcompile.pattern import GraphView
from effcompile.ranges import Ranges
from effcompile.terms import IntLoad, Load, Term, number
from effcompile.viewmaps import broadcast, shape_of

from .sdpa import grouped_index, matrix_coordinates
from .specify import B, D, H, I, J, Parts, S, Stop, candidates, check_logit, choose, compute_dtype, match_of, with_depth

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match one call, or say why it is left as it is."""
    try:
        return match_of(_parts(anchor, view))
    except Stop as stop:
        return stop.rejected
    except (ExpressionError, LiftError) as error:
        return Rejected(step="expression", why=str(error), node=anchor)


def _parts(anchor: Node, view: GraphView) -> Parts:
    q, k, v, score_mod, block_mask, scale, _options, score_buffers, mask_buffers = anchor.args
    output, lse = _results(anchor)
    if not _covers_everything(block_mask):
        raise Stop("mask", "its block mask leaves out blocks by lists that the graph cannot prove equal to mask_mod", anchor)
    at = matrix_coordinates(output, k)
    index = (*(at.index[f"batch{n}"] for n in range(2)), I, D)
    depth = shape_of(q)[-1]
    inner = with_depth(at, depth)
    best = choose(
        candidates(q, broadcast(index, shape_of(q)), inner, view, anchor, (B, H, I, D), whole=True),
        candidates(k, grouped_index(k, (*index[:2], J, D), True, at), inner, view, anchor, (B, H, J, D), whole=True),
        candidates(v, grouped_index(v, (*index[:2], J, D), True, at), at, view, anchor, (B, H, J, D), whole=True),
        anchor,
    )
    loaded: dict[str, Node] = {}
    dot = number(float(scale)) * best[0].factor * best[1].factor * S
    logit = _read(view, score_mod, [dot, *_positions(at.extents)], score_buffers, at.ranges, loaded)
    allowed = _read(view, block_mask[-1], _positions(at.extents), mask_buffers, at.ranges, loaded)
    logit = at.ranges.where(as_condition(allowed), logit, -sympy.oo)
    taken = split(logit, at.ranges, I, J, at.extents["j"], at.extents["i"], safe=True)
    check_logit(taken, None, anchor)
    return Parts(
        view=view, anchor=anchor, output=output, coordinates=at, logit=taken, sink=None, q=best[0], k=best[1], v=best[2],
        layout=index, vanishing=(), dtype=compute_dtype(output, output, best[0], best[1]), loaded=loaded,
        further={} if lse is None else {lse: Result(name="lse in log2", layout=index[:-1])},
    )  # fmt: skip


def _positions(extents: dict[str, Term]) -> list[Term]:
    return [sympy.S.Zero if extents[name] == 1 else symbol for name, symbol in (("b", B), ("h", H))] + [I, J]


def _results(anchor: Node) -> tuple[Node, Node | None]:
    """The attention's result, and its log-sum-exp in units of log2 if that is used."""
    results = {user.args[1]: user for user in anchor.users if user.users}
    if 2 in results:
        raise Stop("uses", "its largest scores are used too", anchor)
    if 0 not in results:
        raise Stop("uses", "its log-sum-exp alone is used", anchor)
    return results[0], results.get(1)


def _covers_everything(block_mask: Any) -> bool:
    """Whether a block mask is the one block that flex_attention makes for none."""
    counts, indices, full, block_q, block_kv = block_mask[2], block_mask[3], block_mask[4], block_mask[-3], block_mask[-2]
    single = all(isinstance(n, Node) and n.meta["val"].numel() == 1 for n in (counts, indices))
    return bool(
        single and full is None and counts.target is aten.ones.default and indices.target is aten.zeros.default
        and min(block_q, block_kv) >= 1 << 30
    )  # fmt: skip


def _read(
    view: GraphView, body: Node, arguments: list[Term], buffers: tuple[Node, ...], ranges: Ranges, loaded: dict[str, Node]
) -> Term:
    """What a score_mod or mask_mod returns, as a term."""
    graph = view.body(body)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    interpreter = Interpreter(ranges)
    term = interpreter.element(result, ())
    known = {}
    for node, value in zip(inputs, arguments, strict=False):
        kind = Load if node.meta["val"].dtype.is_floating_point else IntLoad
        known[kind(sympy.Symbol(node.name))] = value
    names = {}
    for node, outer in zip(inputs[len(arguments) :], buffers, strict=True):
        names[sympy.Symbol(node.name)] = sympy.Symbol(outer.name)
        loaded[outer.name] = outer
    unknown = set(interpreter.loaded) - {node.name for node in inputs}
    if unknown:
        raise Stop("expression", f"its function computes what is no index expression ({', '.join(sorted(unknown))})", body)
    return ranges.refine(term.xreplace(known).xreplace(names))


FLEX_ATTENTION = Rule(
    name="flex",
    family="attention",
    summary="flex_attention, its score_mod and mask_mod read as expressions",
    anchors=frozenset({FLEX}),
    recognise=recognise,
)

"""A router behind its logits: which experts each token goes to, and with what weights, as one operation.

    p = score(l),  c = p + bias, or fill outside the kept groups;  ids = topk(c, k),  w = scale p[ids] / norm

Anchored at a top-k of which both positions and values, or what is gathered at the positions, are used. What it chooses by is read
backwards to the logits (`route_choice`), what is made of what was chosen forwards (`route_weights`), as far as the operation has a
form for it; the rest stays. So do logits, scores and ids that something else needs, such as an auxiliary loss.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import sympy
import torch
from torch.fx import Node

from effcompile.builder import is_tensor_node
from effcompile.errors import ExpressionError
from effcompile.ir import Match, Operand, Rejected, Result, Rule, Work
from effcompile.ops.route import RouteSpec
from effcompile.pattern import GraphView
from effcompile.rules import wrap_dim
from effcompile.terms import Term
from effcompile.viewmaps import is_float, shape_of

from .experts_nodes import Facts, argument
from .route_choice import Choice, choice_of, part_of
from .route_weights import Weights, weights_of
from .specify import B, D, I, Stop

aten = torch.ops.aten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LAYOUTS = {2: (I, D), 3: (B, I, D)}
_FACTS: WeakKeyDictionary[GraphView, Facts] = WeakKeyDictionary()


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the router around a top-k, or say at which step and why it is none that we take."""
    try:
        return _match(anchor, view, _FACTS.setdefault(view, Facts()))
    except Stop as stop:
        return stop.rejected
    except ExpressionError as error:
        return Rejected(step="expression", why=str(error), node=anchor)


def _match(anchor: Node, view: GraphView, facts: Facts) -> Match:
    ids = _ids(anchor)
    choice = choice_of(anchor, facts)
    weights = weights_of(anchor, ids, choice, view)
    logits = weights.logits
    _check_dtypes(anchor, weights, view)
    _check_modes(anchor, ids, weights, choice, view)
    for node in (ids, weights.output):
        _check_shape(node, anchor)
    groups = choice.groups
    if groups and int(shape_of(ids)[-1]) > groups.kept * (choice.experts // groups.count):
        raise Stop("groups", "more experts are chosen than the kept groups have", anchor)
    spec = RouteSpec(
        k=int(shape_of(ids)[-1]), score=weights.score, score_after=weights.after, select_bias=weights.bias is not None,
        groups=groups.count if groups else 1, kept_groups=groups.kept if groups else 1,
        group_stat=groups.stat if groups else "max", group_fill=groups.fill if groups else "-inf",
        norm=weights.norm, eps=weights.eps, clamp=weights.clamp, scale=weights.scale,
        weights=str(weights.output.meta["val"].dtype).removeprefix("torch."),
    )  # fmt: skip
    inputs = {"logits": _rows(logits, 2)} | ({} if weights.bias is None else {"bias": _rows(weights.bias, 1)})
    dead = view.dead_without(weights.output, ids)
    return Match(
        family="route", anchor=anchor, output=weights.output, spec=spec, inputs=inputs, interior=frozenset(dead),
        layout=_LAYOUTS[len(shape_of(weights.output))], leaving=_leaving(dead, logits),
        further={ids: Result(name="ids", layout=_LAYOUTS[len(shape_of(ids))])}, trains=view.needs_gradient(logits, anchor),
    )  # fmt: skip


def _ids(anchor: Node) -> Node:
    """The positions of what a top-k chooses.

    Raises:
        Stop: nothing needs them, or it chooses the least, or along another dimension than the last.
    """
    source, ids = anchor.args[0], part_of(anchor, 1)
    if not is_tensor_node(source) or not is_float(source) or ids is None or not ids.users:  # type: ignore[arg-type]
        raise Stop("anchor", "nothing needs the positions of what is chosen", anchor)
    rank = source.meta["val"].dim()  # type: ignore[union-attr]
    if not rank or wrap_dim(argument(anchor, "dim", -1), rank) != rank - 1:
        raise Stop("anchor", "what is chosen is not among the last dimension", anchor)
    if not argument(anchor, "largest", True):
        raise Stop("anchor", "the least are chosen", anchor)
    sizes = shape_of(source)[-1], shape_of(ids)[-1]  # type: ignore[arg-type]
    if not all(size.is_Integer for size in sizes):
        raise Stop("sizes", "how many experts there are, or how many of them are chosen, is not known beforehand", anchor)
    return ids


def _check_dtypes(anchor: Node, weights: Weights, view: GraphView) -> None:
    for node in (weights.logits, weights.scores, weights.output):
        dtype = node.meta["val"].dtype
        if dtype not in _DTYPES:
            raise Stop("dtype", f"a router in {dtype} has no kernel; float16, bfloat16 and float32 have", anchor)
    rounded = weights.scores.meta["val"].dtype
    if view.strict and rounded is not torch.float32:
        raise Stop("numerics", f"numerics=strict keeps the rounding of the scores to {rounded}, which a fused kernel omits", anchor)


def _check_modes(anchor: Node, ids: Node, weights: Weights, choice: Choice, view: GraphView) -> None:
    """The operation stands where the weights or the ids are first needed, and has the modes of the weights."""
    here = view.regions.get(weights.output)
    place = min((weights.output, *ids.users))
    if any(view.regions.get(node) != here for node in (*weights.path, place)):
        raise Stop("modes", "weights and ids are computed in different grad or autocast modes", anchor)
    order = view.order
    if any(order[choice.first] < order[node] < order[place] for node in view.mutating):
        raise Stop("modes", "something is written to memory between the choice and its use", anchor)


def _check_shape(node: Node, anchor: Node) -> None:
    shape = shape_of(node)
    if len(shape) not in _LAYOUTS:
        raise Stop("shape", f"the results have {len(shape)} dimensions, not tokens and slots, or batch, tokens and slots", anchor)
    if len(shape) == 3 and not (shape[0].is_Integer or shape[1].is_Integer):
        raise Stop("shape", "neither the batch size nor the number of tokens is known beforehand", anchor)


def _rows(node: Node, rank: int) -> Operand:
    """A node as [T, E] or as [E]."""
    shape = shape_of(node)
    merged = len(shape) - rank
    views = ((aten.flatten.using_ints, (0, merged)),) if merged > 0 else ()
    return Operand(
        base=node, views=views, shape=(sympy.Mul(*shape[: merged + 1]), *shape[merged + 1 :]), dtype=node.meta["val"].dtype
    )


# -------------------------------------------------------------------- what it costs as it is

_LAUNCHES_OF_SELECTION = 2  # selects, then sorts
_REDUCTIONS = (aten.softmax.int, aten._softmax.default, aten.gather.default, aten.topk.default)


def _leaving(dead: set[Node], logits: Node) -> Work:
    """Each top-k is launches of its own, and what is between two of them is fused into one more."""
    own = {node for node in dead if node.op == "call_function" and node is not logits}
    selections = [node for node in own if node.target is aten.topk.default]
    traffic: Term = sympy.S.Zero
    for node in own:
        if node.target in _REDUCTIONS:
            read = node.args[0]
            traffic += sympy.Mul(*shape_of(read)) * read.meta["val"].dtype.itemsize  # type: ignore[arg-type, union-attr]
    return Work(flops=0, bytes=2 * traffic, launches=(_LAUNCHES_OF_SELECTION + 1) * len(selections) + 1)


ROUTE = Rule(
    name="route",
    family="route",
    summary="which experts a token goes to, and with what weights: the router of a Mixture of Experts",
    anchors=frozenset({aten.topk.default}),
    recognise=recognise,
    quiet=True,
)

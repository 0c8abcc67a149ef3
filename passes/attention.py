"""softmax(score(q @ k.T)) @ v, without the score matrix in memory.

Equal to the original up to the order of additions. Anchored at a softmax: its result must reach one contraction over its own axis
(the values), and its input must read, element by element, as an index expression of one contraction (queries with keys). What
lies between, however spelled, becomes the `score` and `mask` of an `AttentionSpec`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.contraction import BIASED, Contraction, Dot, contraction_of
from effcompile.errors import ExpressionError
from effcompile.expr import Interpreter, names_of
from effcompile.ir import Match, Rejected, Result, Rule
from effcompile.masks import drop_shift, split
from effcompile.operands import Traced
from effcompile.pattern import CASTS, GraphView, contractions_after, describe, is_passage
from effcompile.ranges import Ranges
from effcompile.terms import FloorDiv, Load, Modulo, Term
from effcompile.viewmaps import VIEWS, Index, shape_of

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
    short,
    with_depth,
)  # fmt: skip
from .weights import may_mask, weights_of

aten = torch.ops.aten

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default})
_REARRANGEMENTS = frozenset({
    aten.pad.default, aten.constant_pad_nd.default, aten.as_strided.default, aten.roll.default, aten.unfold.default
})  # fmt: skip


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the attention around a softmax, or say at which step and why it is none that we take."""
    try:
        return match_of(_parts(anchor, view))
    except Stop as stop:
        return stop.rejected
    except ExpressionError as error:
        return Rejected(step="expression", why=str(error), node=anchor)


# -------------------------------------------------------------------- the softmax and what it feeds


def _parts(anchor: Node, view: GraphView) -> Parts:
    values, side = _values_contraction(anchor)
    coordinates = coordinates_of(values, side, anchor, None)
    try:
        return parts_in(anchor, view, values, side, coordinates)
    except Refold as refold:
        coordinates = coordinates_of(values, side, anchor, refold.heads)
        return parts_in(anchor, view, values, side, coordinates)


class Refold(Exception):
    """The one batch dimension turned out to be batch times heads."""

    def __init__(self, heads: Term):
        self.heads = heads


def parts_in(anchor: Node, view: GraphView, values: Contraction, side: int, at: Coordinates) -> Parts:
    """Everything of the attention whose output contraction reads in these coordinates."""
    check_modes(anchor, values.node, view)
    weights = weights_of(anchor, view, values, side, at)
    interpreter = view.interpreter(at.ranges, anchor)
    logit = interpreter.element(anchor.args[0], weights.index)
    beside = _further_logit(anchor, weights.index, at)
    sink = None if beside is None else interpreter.element(anchor.args[0], beside)
    logit, dot, contraction = score_contraction(logit, interpreter, anchor)
    given = logit
    logit, sink = drop_shift(logit, J, lambda load: is_maximum(interpreter.loaded[load.tensor]), sink)
    shifted = logit != given
    q, k = query_and_key(contraction, dot, at, view, anchor)
    v_index = values.operand_index(1 - side, tuple(at.index[letter] for letter in values.out), J)
    v = candidates(values.operands[1 - side], v_index, at, view, anchor, (B, H, J, D))
    refold_if_folded(at, (logit, *(c[-1].index for c in (q, k, v) if c)))
    q_best, k_best, v_best = choose(q, k, v, anchor)
    factor = q_best.factor * k_best.factor
    logit = logit.xreplace({dot: factor * S})
    trains = any(view.needs_gradient(x.node, anchor) for x in (q_best, k_best))
    safe = anchor.target is aten._safe_softmax.default
    taken = split(logit, at.ranges, I, J, at.extents["j"], at.extents["i"], safe=safe, trains=trains)
    if sink is not None and taken.empty in ("mean", "nan"):
        taken = replace(taken, empty="zero")  # all of the row's weight is the sink's
    taken = weights.apply(taken, at.ranges, values.node)
    check_logit(taken, sink, anchor)
    further = {} if shifted else _log_sums(anchor, weights.index)
    return Parts(
        view=view, anchor=anchor, output=values.node, coordinates=at, logit=taken, sink=sink, q=q_best, k=k_best, v=v_best,
        layout=tuple(at.index[letter] for letter in values.out),
        vanishing=((anchor, "probabilities"), (contraction.node, "scores")),
        dtype=compute_dtype(contraction.node, values.node, q_best, k_best), loaded=interpreter.loaded, further=further,
        dropout=weights.dropout, drawing=() if weights.dropped is None else (weights.dropped,),
    )  # fmt: skip


def _log_sums(anchor: Node, index: Index) -> dict[Node, Result]:
    """The log-sum-exps of what the softmax takes, over the same dimension; `index` is that of the softmax."""
    dim, rank, logits = _softmax_dim(anchor), len(index), anchor.args[0]
    while isinstance(logits, Node) and logits.target in CASTS:
        logits = logits.args[0]
    found, frontier = dict[Node, Result](), [logits]
    while frontier:
        for user in frontier.pop().users:  # type: ignore[union-attr]
            if user.target in CASTS:
                frontier.append(user)
            elif user.target is aten.logsumexp.default and [d % rank for d in user.args[1]] == [dim]:  # type: ignore[union-attr]
                kept = len(user.args) > 2 and user.args[2]
                layout = tuple(D if k == dim else term for k, term in enumerate(index) if kept or k != dim)
                if I in layout:
                    found[user] = Result(name="lse", layout=layout)
    return found


def is_maximum(node: Node) -> bool:
    """Whether a node is the maximum or the log-sum-exp of something, or a view of it."""
    while node.target in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    if getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    return node.target in (aten.amax.default, aten.max.dim, aten.max.default, aten.logsumexp.default)


def _softmax_dim(anchor: Node) -> int:
    rank = anchor.meta["val"].dim()
    return int(anchor.args[1]) % rank  # type: ignore[call-overload]


def _values_contraction(anchor: Node) -> tuple[Contraction, int]:
    """The contraction that the probabilities feed, and which of its operands they are."""
    found = list(contractions_after(anchor, may_mask))
    if not found:
        _check_changed(anchor)
        _check_rearranged(anchor)
        raise Stop("anchor", "the softmax feeds no contraction", anchor)
    if len(found) > 1:
        raise Stop("probabilities", f"the probabilities feed {len(found)} contractions", found[1][0])
    node, operand = found[0]
    contraction = contraction_of(node)
    assert contraction is not None
    if contraction.operands[0] is contraction.operands[1]:
        raise Stop("probabilities", "the probabilities are contracted with themselves", node)
    if node.target in BIASED and node.kwargs.get("beta", 1) != 0:
        raise Stop("probabilities", "the contraction with the values adds a bias", node)
    return contraction, contraction.operands.index(operand)


def _check_changed(anchor: Node) -> None:
    """Refuse probabilities that other operations change, element by element, before a contraction over the axis of the softmax."""
    dim, seen, frontier = _softmax_dim(anchor), {anchor}, [anchor]
    first: dict[Node, Node] = {}
    while frontier:
        node = frontier.pop()
        for user in node.users:
            contraction = contraction_of(user)
            if contraction is not None:
                axes = [
                    x.index(contraction.summed) for n, x in zip(contraction.operands, contraction.letters, strict=True) if n is node
                ]
                if node in first and dim in axes:
                    raise Stop(
                        "probabilities",
                        f"the probabilities are changed by {describe(first[node])} before they meet the values",
                        user,
                    )
            elif user not in seen and _has_shape_of(user, anchor):
                seen.add(user)
                frontier.append(user)
                if node in first or not is_passage(user):
                    first[user] = first.get(node, user)


def _check_rearranged(anchor: Node) -> None:
    """Refuse probabilities that are padded, rolled or read in overlapping chunks before a contraction (chunked attention)."""
    seen, frontier, moved = {anchor}, [anchor], dict[Node, Node]()
    while frontier:
        node = frontier.pop()
        for user in node.users:
            if contraction_of(user) is not None and node in moved:
                why = f"the probabilities are rearranged by {describe(moved[node])} before they meet the values"
                raise Stop("probabilities", why, moved[node])
            if user in seen or not (is_passage(user) or user.target in _REARRANGEMENTS or _has_shape_of(user, anchor)):
                continue
            seen.add(user)
            frontier.append(user)
            if node in moved or user.target in _REARRANGEMENTS:
                moved[user] = moved.get(node, user)


def _has_shape_of(node: Node, other: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(other.meta["val"].shape)


def check_modes(anchor: Node, values: Node, view: GraphView) -> None:
    """Stop if a border lies between what makes weights of the scores and the contraction that takes them."""
    if view.regions.get(anchor) != view.regions.get(values):
        name = "sigmoid" if anchor.target is aten.sigmoid.default else "softmax"
        raise Stop("modes", f"grad mode or autocast changes between the {name} and the contraction with the values", values)


def coordinates_of(values: Contraction, side: int, anchor: Node, heads: Term | None) -> Coordinates:
    """Names for the output's dimensions: the probabilities' own last dimension is i, the values' own is d, the rest batch."""
    own_rows, own_columns = values.own(side), values.own(1 - side)
    position = values.letters[side].index
    rows = sorted((x for x in own_rows if values.size(x) != 1), key=position) or sorted(own_rows, key=position)
    columns = [x for x in own_columns if values.size(x) != 1] or own_columns[-1:]
    if not rows or len(columns) != 1:
        raise Stop("probabilities", "the contraction after the softmax has no query or no value dimension of its own", values.node)
    query, value = rows[-1], columns[0]
    batch = [x for x in values.out if x not in (query, value)]
    ranges = Ranges({})
    index = batch_index(batch, [values.size(x) for x in batch], anchor, heads, ranges)
    extents = {"i": values.size(query), "j": values.size(values.summed), "d": values.size(value), **index.pop("extents")}
    for symbol, name in ((I, "i"), (J, "j"), (D, "d")):
        ranges.add(symbol, extents[name])
    return Coordinates(ranges=ranges, index={**index, query: I, value: D}, extents=extents)


def batch_index(batch: list[str], sizes: list[Term], anchor: Node, heads: Term | None, ranges: Ranges) -> dict[str, Any]:
    """Terms for the batch letters: (b, h), more dimensions folded into h, one unfolded if it is known to hold heads."""
    if len(batch) >= 2:
        inner = sympy.Mul(*sizes[1:])
        b, h = _symbol(B, sizes[0], ranges), _symbol(H, inner, ranges)
        index: dict[str, Any] = {batch[0]: b}
        for position, letter in enumerate(batch[1:], start=1):
            below = sympy.Mul(*sizes[position + 1 :])
            digit = ranges.floordiv(h, below)
            index[letter] = digit if position == 1 else ranges.modulo(digit, sizes[position])
        return {**index, "extents": {"b": sizes[0], "h": inner}}
    if not batch:
        return {"extents": {"b": sympy.S.One, "h": sympy.S.One}}
    heads = heads or _heads_of(anchor, sizes[0])
    if heads is None:
        return {batch[0]: _symbol(B, sizes[0], ranges), "extents": {"b": sizes[0], "h": sympy.S.One}}
    outer = sympy.cancel(sizes[0] / heads)
    b, h = _symbol(B, outer, ranges), _symbol(H, heads, ranges)
    return {batch[0]: b * heads + h, "extents": {"b": outer, "h": heads}}


def _symbol(symbol: sympy.Symbol, size: Term, ranges: Ranges) -> Term:
    ranges.add(symbol, size)
    return sympy.S.Zero if size == 1 else symbol


def _heads_of(anchor: Node, folded: Term) -> Term | None:
    """The head count, if the softmax itself has separate batch and head dimensions of that product."""
    shape = shape_of(anchor)
    if len(shape) == 4 and sympy.expand(shape[0] * shape[1] - folded) == 0:
        return shape[1]
    return None


def _further_logit(anchor: Node, index: Index, at: Coordinates) -> Index | None:
    """The index of the one logit that has no value, before the keys or after them; None if there is none."""
    dim = _softmax_dim(anchor)
    extra = sympy.expand(shape_of(anchor)[dim] - at.extents["j"])
    first = index[dim] - J
    if extra == 0:
        return None
    if extra != 1:
        raise Stop("probabilities", f"{extra} more logits than values take part in the softmax", anchor)
    return tuple((at.extents["j"] if first == 0 else sympy.S.Zero) if k == dim else term for k, term in enumerate(index))


# -------------------------------------------------------------------- queries, keys and values


def score_contraction(logit: Term, interpreter: Interpreter, anchor: Node) -> tuple[Term, Dot, Contraction]:
    """The logit as one of queries with keys, the element of that contraction, and it. Other contractions are loaded."""
    elements = [dot for found in names_of(logit, Dot).values() for dot in found]
    if not elements:
        raise Stop("scores", f"the logits are no function of a contraction: {short(logit)}", anchor)
    found = [dot for dot in elements if _sides(interpreter.contraction(dot), dot) is not None]
    if not found:
        raise Stop(
            "scores",
            "an operand of the score contraction depends on both the query and the key position",
            interpreter.contraction(elements[0]).node,
        )
    chosen = max(found, key=lambda dot: _depth(interpreter.contraction(dot)))
    others = {dot: interpreter.load(interpreter.contraction(dot).node, dot.index) for dot in elements if dot != chosen}
    logit = logit.xreplace(others)
    if any(load.has(Dot) for found in names_of(logit, Load).values() for load in found):
        raise Stop("scores", "a tensor is indexed by scores", anchor)
    return logit, chosen, interpreter.contraction(chosen)


def _depth(contraction: Contraction) -> int:
    depth = contraction.size(contraction.summed)
    return int(depth) if depth.is_Integer else 0


def _sides(contraction: Contraction, dot: Dot) -> tuple[int, list[Index]] | None:
    """Which operand has the keys, and the index into each; None if one depends on both positions."""
    indices = [contraction.operand_index(which, dot.index, D) for which in (0, 1)]
    has_key = [any(J in term.free_symbols for term in index) for index in indices]
    has_query = [any(I in term.free_symbols for term in index) for index in indices]
    key = 0 if has_key[0] or has_query[1] else 1
    return None if has_key[1 - key] or has_query[key] else (key, indices)


def query_and_key(
    contraction: Contraction, dot: Dot, at: Coordinates, view: GraphView, anchor: Node
) -> tuple[list[Traced], list[Traced]]:
    """The tensors that could be passed for the queries and for the keys of a score `dot`."""
    sides = _sides(contraction, dot)
    assert sides is not None
    key, indices = sides
    depth = contraction.size(contraction.summed)
    if not depth.is_Integer:
        raise Stop("scores", "the head dimension is not a fixed number", contraction.node)
    inner = with_depth(at, depth)
    q = candidates(contraction.operands[1 - key], indices[1 - key], inner, view, anchor, (B, H, I, D))
    k = candidates(contraction.operands[key], indices[key], inner, view, anchor, (B, H, J, D))
    return q, k


def refold_if_folded(at: Coordinates, terms: tuple[Any, ...]) -> None:
    """If one batch dimension is taken apart by a constant in any expression, that constant is the number of heads."""
    if at.extents["h"] != 1 or at.extents["b"] == 1:
        return
    found: set[Term] = set()
    for term in terms:
        for part in term if isinstance(term, tuple) else (term,):
            found |= {x.args[1] for x in part.atoms(FloorDiv, Modulo) if x.args[0] == B}
    heads = [n for n in found if n.is_Integer and at.ranges.modulo(at.extents["b"], n) == 0]
    if heads:
        raise Refold(max(heads))


ATTENTION = Rule(
    name="attention",
    family="attention",
    summary="softmax between two contractions, however spelled",
    anchors=SOFTMAXES,
    recognise=recognise,
)

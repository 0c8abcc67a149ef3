"""softmax(score(q @ k.T)) @ v, without the score matrix in memory.

Equal to the original up to the order of additions. Anchored at a softmax: its result must reach one contraction over its own axis
(the values), and its input must read, element by element, as an index expression of one contraction (queries with keys). What
lies between, however spelled, becomes the `score` and `mask` of an `AttentionSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.canonical import canonical
from effcompile.contraction import Contraction, Dot, contraction_of
from effcompile.errors import ExpressionError
from effcompile.expr import Interpreter, names_of, rename
from effcompile.ir import Match, Operand, Rejected, Rule
from effcompile.masks import Logit, drop_shift, split
from effcompile.operands import Traced, as_operand, trace
from effcompile.ops.attention import AttentionSpec
from effcompile.pattern import GraphView, contractions_after, describe, is_passage
from effcompile.ranges import Ranges
from effcompile.terms import FloorDiv, Load, Modulo, Term, integer_symbol, score_symbol, to_text
from effcompile.viewmaps import VIEWS, Index, shape_of

aten = torch.ops.aten

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default})
B, H, I, J, D, P = (integer_symbol(name) for name in ("b", "h", "i", "j", "d", "p"))
S = score_symbol()
_REARRANGEMENTS = frozenset({
    aten.pad.default, aten.constant_pad_nd.default, aten.as_strided.default, aten.roll.default, aten.unfold.default
})  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Stop(Exception):
    """Recognition ends here, for a reason."""

    def __init__(self, step: str, why: str, node: Node | None = None):
        self.rejected = Rejected(step=step, why=why, node=node)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """How the output contraction's dimensions read as (b, h, i, d).

    `index` is the term of each output letter; `extents` those of b, h, i, j and the value dimension.
    """

    ranges: Ranges
    index: dict[str, Term]
    extents: dict[str, Term]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What was found of an attention before it becomes a specification."""

    view: GraphView
    anchor: Node
    output: Node
    coordinates: Coordinates
    logit: Logit
    sink: Term | None
    q: Traced
    k: Traced
    v: Traced
    layout: Index
    vanishing: tuple[tuple[Node, str], ...]
    dtype: torch.dtype
    loaded: Mapping[str, Node]


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
    coordinates = _coordinates(values, side, anchor, None)
    try:
        return parts_in(anchor, view, values, side, coordinates)
    except _Refold as refold:
        coordinates = _coordinates(values, side, anchor, refold.heads)
        return parts_in(anchor, view, values, side, coordinates)


class _Refold(Exception):
    """The one batch dimension turned out to be batch times heads."""

    def __init__(self, heads: Term):
        self.heads = heads


def parts_in(anchor: Node, view: GraphView, values: Contraction, side: int, at: Coordinates) -> Parts:
    """Everything of the attention whose output contraction reads in these coordinates."""
    _check_modes(anchor, values.node, view)
    where, keys_with_sink = _probability_index(anchor, view, values, side, at)
    extra = sympy.expand(keys_with_sink - at.extents["j"])
    if extra not in (0, 1):
        raise Stop("probabilities", f"{extra} more logits than values take part in the softmax", anchor)
    interpreter = view.interpreter(at.ranges, anchor)
    logit = interpreter.element(anchor.args[0], where)
    dim = _softmax_dim(anchor)
    sink = None
    if extra == 1:
        past_the_end = tuple(at.extents["j"] if k == dim else term for k, term in enumerate(where))
        sink = interpreter.element(anchor.args[0], past_the_end)
    dot, contraction = _score_contraction(logit, interpreter, anchor)
    logit, sink = drop_shift(logit, J, lambda load: is_maximum(interpreter.loaded[load.tensor]), sink)
    q, k = _query_and_key(contraction, dot, at, view, anchor)
    v_index = values.operand_index(1 - side, tuple(at.index[letter] for letter in values.out), J)
    v = candidates(values.operands[1 - side], v_index, at, view, anchor, (B, H, J, D))
    _refold_if_folded(at, (logit, *(c[-1].index for c in (q, k, v) if c)))
    q_best, k_best, v_best = choose(q, k, v, anchor)
    factor = q_best.factor * k_best.factor
    logit = logit.xreplace({dot: factor * S})
    trains = any(view.needs_gradient(x.node, anchor) for x in (q_best, k_best))
    safe = anchor.target is aten._safe_softmax.default
    taken = split(logit, at.ranges, I, J, at.extents["j"], at.extents["i"], safe=safe, trains=trains)
    check_logit(taken, sink, anchor)
    return Parts(
        view=view, anchor=anchor, output=values.node, coordinates=at, logit=taken, sink=sink, q=q_best, k=k_best, v=v_best,
        layout=tuple(at.index[letter] for letter in values.out),
        vanishing=((anchor, "probabilities"), (contraction.node, "scores")),
        dtype=compute_dtype(contraction.node, values.node, q_best, k_best), loaded=interpreter.loaded,
    )  # fmt: skip


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
    found = list(contractions_after(anchor))
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
    if node.target is aten.baddbmm.default and node.kwargs.get("beta", 1) != 0:
        raise Stop("probabilities", "the contraction with the values adds a bias", node)
    _check_dropout(anchor, operand)
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


def _check_modes(anchor: Node, values: Node, view: GraphView) -> None:
    if view.regions.get(anchor) != view.regions.get(values):
        raise Stop("modes", "grad mode or autocast changes between the softmax and the contraction with the values", values)


def _check_dropout(anchor: Node, operand: Node) -> None:
    node = operand
    while node is not anchor and is_passage(node):
        if node.target is aten.dropout.default and node.args[1] != 0 and node.args[2]:
            raise Stop("dropout", f"dropout p={node.args[1]} is active on the probabilities", node)
        node = node.args[0]  # type: ignore[assignment]


def _coordinates(values: Contraction, side: int, anchor: Node, heads: Term | None) -> Coordinates:
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


def _probability_index(anchor: Node, view: GraphView, values: Contraction, side: int, at: Coordinates) -> tuple[Index, Term]:
    """The index into the softmax's result at which (b, h, i, j) stands, and the extent of its axis."""
    interpreter = view.interpreter(at.ranges, anchor, opaque=(anchor,))
    out = tuple(at.index[letter] for letter in values.out)
    element = interpreter.element(values.operands[side], values.operand_index(side, out, J))
    if not (isinstance(element, Load) and element.tensor == anchor.name):
        raise Stop("probabilities", f"the probabilities are changed before they meet the values: {short(element)}", values.node)
    where, dim = element.indices, _softmax_dim(anchor)
    if where[dim] != J or any(J in term.free_symbols for k, term in enumerate(where) if k != dim):
        raise Stop("probabilities", "the contraction with the values is not over the axis of the softmax", values.node)
    return where, shape_of(anchor)[dim]


# -------------------------------------------------------------------- queries, keys and values


def _score_contraction(logit: Term, interpreter: Interpreter, anchor: Node) -> tuple[Dot, Contraction]:
    dots = names_of(logit, Dot)
    elements = [dot for found in dots.values() for dot in found]
    if not elements:
        raise Stop("scores", f"the logits are no function of a contraction: {short(logit)}", anchor)
    if len(elements) > 1:
        raise Stop("scores", f"the logits depend on {len(elements)} contraction results ({', '.join(dots)})", anchor)
    if any(elements[0] in load.free_symbols or load.has(Dot) for found in names_of(logit, Load).values() for load in found):
        raise Stop("scores", "a tensor is indexed by scores", anchor)
    return elements[0], interpreter.contraction(elements[0])


def _query_and_key(
    contraction: Contraction, dot: Dot, at: Coordinates, view: GraphView, anchor: Node
) -> tuple[list[Traced], list[Traced]]:
    indices = [contraction.operand_index(which, dot.index, D) for which in (0, 1)]
    has_key = [any(J in term.free_symbols for term in index) for index in indices]
    has_query = [any(I in term.free_symbols for term in index) for index in indices]
    key = 0 if has_key[0] or has_query[1] else 1
    if has_key[1 - key] or has_query[key]:
        raise Stop("scores", "an operand of the score contraction depends on both the query and the key position", contraction.node)
    depth = contraction.size(contraction.summed)
    if not depth.is_Integer:
        raise Stop("scores", "the head dimension is not a fixed number", contraction.node)
    ranges = Ranges({s: bounds for s in (B, H, I, J) if (bounds := at.ranges.get(s)) is not None})
    ranges.add(D, depth)
    inner = Coordinates(ranges=ranges, index=at.index, extents={**at.extents, "d": depth})
    q = candidates(contraction.operands[1 - key], indices[1 - key], inner, view, anchor, (B, H, I, D))
    k = candidates(contraction.operands[key], indices[key], inner, view, anchor, (B, H, J, D))
    return q, k


def candidates(node: Node, index: Index, at: Coordinates, view: GraphView, anchor: Node, roles: tuple[Term, ...]) -> list[Traced]:
    """The tensors that could be passed for an operand, within the mode region of the anchor."""
    here = view.regions.get(anchor)
    return trace(node, index, at.ranges, H, roles, lambda n: view.regions.get(n) != here)


def _refold_if_folded(at: Coordinates, terms: tuple[Any, ...]) -> None:
    """If one batch dimension is taken apart by a constant in any expression, that constant is the number of heads."""
    if at.extents["h"] != 1 or at.extents["b"] == 1:
        return
    found: set[Term] = set()
    for term in terms:
        for part in term if isinstance(term, tuple) else (term,):
            found |= {x.args[1] for x in part.atoms(FloorDiv, Modulo) if x.args[0] == B}
    heads = [n for n in found if n.is_Integer and at.ranges.modulo(at.extents["b"], n) == 0]
    if heads:
        raise _Refold(max(heads))


def choose(q: list[Traced], k: list[Traced], v: list[Traced], anchor: Node) -> tuple[Traced, Traced, Traced]:
    """The deepest queries, and the deepest keys and values that share their head groups; values without a factor."""
    v = [x for x in v if x.factor == 1]
    q = [x for x in q if x.group == 1]
    for name, found in (("queries", q), ("keys", k), ("values", v)):
        if not found:
            raise Stop("operands", f"the {name} cannot be read as a [batch, heads, length, depth] view of a tensor", anchor)
    for key in reversed(k):
        for value in reversed(v):
            if key.group == value.group and _has_heads(key) == _has_heads(value):
                return q[-1], key, value
    raise Stop("operands", "keys and values share no grouping of heads", anchor)


def _has_heads(traced: Traced) -> bool:
    return any(H in term.free_symbols for term in traced.index)


def compute_dtype(scores: Node, values: Node, q: Traced, k: Traced) -> torch.dtype:
    """The dtype to compute in: the widest of the values' contraction and of queries and keys as that of the scores takes them."""
    result: torch.dtype = values.meta["val"].dtype
    scored = scores.meta["val"].dtype
    for traced in (q, k):
        dtype = traced.node.meta["val"].dtype
        if torch.finfo(scored).bits < torch.finfo(dtype).bits:
            dtype = scored  # autocast
        result = torch.promote_types(result, dtype)
    if result not in _DTYPES:
        raise Stop("dtype", f"{result} operands have no kernel; float16, bfloat16 and float32 have", values)
    return result


# -------------------------------------------------------------------- the specification


def check_logit(logit: Logit, sink: Term | None, anchor: Node) -> None:
    """Stop unless the score is of the contraction, the mask is not, and the sink is of neither scores nor keys."""
    if S not in logit.score.free_symbols:
        raise Stop("scores", "the score does not depend on the contraction", anchor)
    if S in logit.mask.free_symbols:
        raise Stop("mask", "the mask depends on the scores themselves", anchor)
    if sink is not None and (sink.has(Dot) or J in sink.free_symbols):
        raise Stop("sink", "the further logit depends on keys", anchor)


def match_of(parts: Parts) -> Match:
    """The match, if what was found can be replaced: nothing else needs it, and no gradient is lost."""
    view = parts.view
    dead = _check_dead(parts)
    _check_group(parts)
    terms = [parts.logit.score, parts.logit.mask, *([] if parts.sink is None else [parts.sink])]
    captures = _captures(terms, parts)
    _check_gradients(captures, parts)
    names = {node.name: name for name, node in captures.items()}
    score, mask, *sink = (canonical(rename(term, names), parts.coordinates.ranges, J) for term in terms)
    sizes = _sizes((score, mask, *sink), parts)
    if view.strict and parts.dtype is not torch.float32:
        raise Stop(
            "numerics",
            f"numerics=strict keeps the rounding of the scores to {parts.dtype}, which a fused kernel omits",
            parts.anchor,
        )
    spec = AttentionSpec(
        score=to_text(score), mask=to_text(mask), empty=parts.logit.empty, sink=to_text(sink[0]) if sink else None,
        captures=tuple(captures), sizes=tuple(sizes),
        precision="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )  # fmt: skip
    return Match(
        family="attention", anchor=parts.anchor, output=parts.output, spec=spec, inputs=_operands(parts),
        captures=captures, sizes=sizes, interior=frozenset(dead),
        layout=parts.layout, trains=any(view.needs_gradient(x.node, parts.anchor) for x in (parts.q, parts.k, parts.v)),
    )  # fmt: skip


def _check_dead(parts: Parts) -> set[Node]:
    """Scores and probabilities must vanish, or rewriting would compute them twice."""
    dead = parts.view.dead_without(parts.output)
    for node, what in parts.vanishing:
        if node not in dead:
            user = next((u for u in _alive_users(node, dead)), None)
            raise Stop("uses", f"the {what} are also used by {describe(user) if user else 'something else'}", node)
    return dead


def _alive_users(node: Node, dead: set[Node]) -> list[Node]:
    """What, outside `dead`, uses `node`, directly or through views of it."""
    found, seen, frontier = [], {node}, [node]
    while frontier:
        for user in frontier.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in dead or is_passage(user):
                frontier.append(user)
            else:
                found.append(user)
    return found


def _check_group(parts: Parts) -> None:
    heads, group = parts.coordinates.extents["h"], parts.k.group
    if not heads.is_Integer or int(heads) % group:
        raise Stop("operands", f"{heads} query heads do not divide into groups of {group}", parts.anchor)


def _captures(terms: list[Term], parts: Parts) -> dict[str, Node]:
    names: list[str] = []
    for term in terms:
        names += [name for name in names_of(term, Load) if name not in names]
    elsewhere = [n for n in names if parts.loaded[n].meta["val"].device != parts.output.meta["val"].device]
    if elsewhere:
        raise Stop(
            "captures",
            f"{describe(parts.loaded[elsewhere[0]])} is on another device than the attention",
            parts.loaded[elsewhere[0]],
        )
    return {f"t{position}": parts.loaded[name] for position, name in enumerate(names)}


def _check_gradients(captures: dict[str, Node], parts: Parts) -> None:
    """A captured tensor in the score has no gradient yet; one in the sink has."""
    for node in captures.values():
        if parts.view.needs_gradient(node, parts.anchor) and parts.logit.score.has(sympy.Symbol(node.name)):
            raise Stop("gradient", f"the bias {describe(node)} requires a gradient, which the kernels do not give", node)
    in_sink = [n for n in captures.values() if parts.sink is not None and parts.sink.has(sympy.Symbol(n.name))]
    if any(parts.view.needs_gradient(node, parts.anchor) for node in in_sink):
        if not isinstance(parts.sink, Load) or parts.sink.indices != (H,):
            raise Stop("gradient", "the gradient of a sink is known for one learned logit a head only", parts.anchor)


def _sizes(terms: tuple[Term, ...], parts: Parts) -> dict[str, Node | int]:
    """The graph's nodes for the symbolic sizes that the expressions mention."""
    wanted = {s.name for term in terms for s in term.free_symbols} - {"b", "h", "i", "j", "s"}
    wanted -= {f"t{k}" for k in range(len(parts.loaded) + len(terms))}
    found: dict[str, Node | int] = {}
    for name in sorted(wanted):
        node = symbol_node(parts.view, name)
        if node is None:
            raise Stop("sizes", f"the size {name} is not known as a value of the graph", parts.anchor)
        found[name] = node
    return found


def symbol_node(view: GraphView, name: str) -> Node | None:
    """The placeholder that holds a symbolic size."""
    for node in view.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.SymInt) and str(value.node.expr) == name:
            return node
    return None


def _operands(parts: Parts) -> dict[str, Operand]:
    extents = parts.coordinates.extents
    b = extents["b"]
    return {
        "q": as_operand(parts.q, (B, H, I, D), (b,), parts.dtype, lambda n: _concrete(parts, n)),
        "k": as_operand(parts.k, (B, H, J, D), (b,), parts.dtype, lambda n: _concrete(parts, n)),
        "v": as_operand(parts.v, (B, H, J, D), (b,), parts.dtype, lambda n: _concrete(parts, n)),
    }


def _concrete(parts: Parts, size: Term) -> Any:
    if size.is_Integer:
        return int(size)
    node = symbol_node(parts.view, str(size))
    if node is None:
        raise Stop("sizes", f"the size {size} is not known as a value of the graph", parts.anchor)
    return node


def short(term: Term) -> str:
    """A term for a sentence."""
    text = str(term)
    return text if len(text) <= 120 else text[:117] + "..."


ATTENTION = Rule(
    name="attention",
    family="attention",
    summary="softmax between two contractions, however spelled",
    anchors=SOFTMAXES,
    recognise=recognise,
)

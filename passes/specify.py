"""From the parts of an attention to its specification: what every recogniser of the family ends with.

queries, keys, values as views of tensors  +  a logit over (s, b, h, i, j)   ->   Match
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from effcompile.canonical import canonical
from effcompile.contraction import Dot
from effcompile.expr import names_of, rename
from effcompile.ir import Match, Operand, Rejected, Result
from effcompile.masks import Logit
from effcompile.operands import Roles, Traced, as_operand, regrouped, trace
from effcompile.ops.attention import AttentionSpec, Normaliser
from effcompile.ops.captured import loads_that_learn
from effcompile.pattern import GraphView, describe, is_passage
from effcompile.ranges import Ranges
from effcompile.terms import Load, Term, integer_symbol, score_symbol, to_text
from effcompile.viewmaps import Index

B, H, I, J, D = (integer_symbol(name) for name in ("b", "h", "i", "j", "d"))
S = score_symbol()
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
    """What was found of an attention before it becomes a specification. `drawing` are the nodes that carry out its dropout."""

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
    further: Mapping[Node, Result] = field(default_factory=dict)
    dropout: float = 0.0
    drawing: tuple[Node, ...] = ()
    normaliser: Normaliser = "softmax"


def candidates(
    node: Node, index: Index, at: Coordinates, view: GraphView, anchor: Node, roles: tuple[Term, ...], *, whole: bool = False
) -> list[Traced]:
    """The tensors that could be passed for an operand, within the mode region of the anchor.

    `whole` says that all of `node` takes part, so that its sizes are those of the operation, by whatever symbols they go.
    """
    here = view.regions.get(anchor)
    known = Roles(symbols=roles, extents=tuple(at.extents[str(role)] for role in roles))
    return trace(
        node, index, at.ranges, known.within(node, index) if whole else known,
        lambda n: view.regions.get(n) != here, lambda size: symbol_node(view, str(size)) is not None,
    )  # fmt: skip


def with_depth(at: Coordinates, depth: Term) -> Coordinates:
    """The same coordinates with the head dimension of queries and keys as d."""
    ranges = Ranges({s: bounds for s in (B, H, I, J) if (bounds := at.ranges.get(s)) is not None})
    ranges.add(D, depth)
    return Coordinates(ranges=ranges, index=at.index, extents={**at.extents, "d": depth})


def choose(q: list[Traced], k: list[Traced], v: list[Traced], anchor: Node) -> tuple[Traced, Traced, Traced]:
    """The deepest queries, and the deepest keys and values that share their head groups; values without a factor.

    Where no two share any, the larger groups are copied out. Queries that all heads share are expanded to one for each.
    """
    v = [x for x in v if x.factor == 1]
    q = [x if x.has_heads or not x.roles.heads.is_Integer else regrouped(x, 1) for x in q if x.group == 1]
    for name, found in (("queries", q), ("keys", k), ("values", v)):
        if not found:
            raise Stop("operands", f"the {name} cannot be read as a [batch, heads, length, depth] view of a tensor", anchor)
    for key in reversed(k):
        for value in reversed(v):
            if key.group == value.group and key.has_heads == value.has_heads:
                return q[-1], key, value
    heads = k[-1].roles.heads
    if not heads.is_Integer:
        raise Stop("operands", "keys and values share no grouping of heads", anchor)
    group = math.gcd(*(x.group if x.has_heads else int(heads) for x in (k[-1], v[-1])))
    return q[-1], regrouped(k[-1], group), regrouped(v[-1], group)


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
    """The match, if what was found can be replaced: nothing else needs it."""
    view = parts.view
    _check_further(parts)
    _check_dropout(parts)
    terms = [parts.logit.score, parts.logit.mask, *([] if parts.sink is None else [parts.sink])]
    captures = _captures(terms, parts)
    dead = _check_dead(parts, captures)
    _check_group(parts)
    learned = _learned(terms, captures, parts)
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
        captures=(*captures, *(("seed",) if parts.dropout else ())), sizes=tuple(sizes), learned=learned, dropout=parts.dropout,
        precision="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32", normaliser=parts.normaliser,
    )  # fmt: skip
    return Match(
        family="attention", anchor=parts.anchor, output=parts.output, spec=spec, inputs=_operands(parts),
        captures=captures, sizes=sizes, interior=frozenset(dead),
        layout=parts.layout, further=parts.further,
        trains=bool(learned) or any(view.needs_gradient(x.node, parts.anchor) for x in (parts.q, parts.k, parts.v)),
    )  # fmt: skip


def _check_dead(parts: Parts, captures: Mapping[str, Node]) -> set[Node]:
    """Scores and probabilities must vanish, or rewriting would compute them twice: nothing else needs them, captures included."""
    dead = parts.view.dead_without(parts.output, *parts.further, *parts.drawing)
    captured = _needed(list(captures.values()))
    for node, what in parts.vanishing:
        if node not in dead:
            user = next(iter(_alive_users(node, dead, parts.anchor)), None)
            raise Stop("uses", f"the {what} are also used by {describe(user) if user else 'something else'}", node)
        if node in captured:
            user = next(user for user in node.users if user in captured or node in captures.values())
            raise Stop("uses", f"the {what} are also used by {describe(user)}", node)
    return dead


def _check_dropout(parts: Parts) -> None:
    """Dropped weights must serve the attention alone, and be what is left of a softmax."""
    if not parts.dropout:
        return
    if not 0 < parts.dropout < 1:
        raise Stop("dropout", f"dropout p={parts.dropout} leaves nothing", parts.anchor)
    if parts.logit.empty == "mean":
        raise Stop("dropout", f"dropout p={parts.dropout} of rows that may have no key but fills", parts.anchor)
    dead = parts.view.dead_without(parts.output, *parts.drawing)
    used = [user for node in parts.drawing for user in node.users if user not in dead]
    if used:
        raise Stop("uses", f"the probabilities are also used by {describe(used[0])}", used[0])


def _check_further(parts: Parts) -> None:
    """A log-sum-exp must be that of the attention's own sum, and not be needed before it."""
    if not parts.further:
        return
    order, needed = parts.view.order, _needed([x.node for x in (parts.q, parts.k, parts.v)] + list(parts.loaded.values()))
    dead = parts.view.dead_without(parts.output, *parts.further)
    for node in parts.further:
        if parts.logit.empty == "mean":
            raise Stop("uses", "the log-sum-exp is used of rows that may have no key but fills", node)
        early = [x for x in node.users if x in needed or (x not in dead and order[x] < order[parts.output])]
        if early:
            raise Stop("uses", f"the log-sum-exp is used by {describe(early[0])} before the values are summed", node)


def _alive_users(node: Node, dead: set[Node], anchor: Node) -> list[Node]:
    """What uses `node` beside the attention: directly, through views of it, or through what the attention needs too."""
    needed = dead | _needed([anchor])
    found, seen, frontier = [], {node}, [node]
    while frontier:
        for user in frontier.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in needed or is_passage(user):
                frontier.append(user)
            else:
                found.append(user)
    return found


def _needed(nodes: list[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found, frontier = set(nodes), list(nodes)
    while frontier:
        inputs = [x for x in frontier.pop().all_input_nodes if x not in found]
        found.update(inputs)
        frontier += inputs
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


def _learned(terms: list[Term], captures: dict[str, Node], parts: Parts) -> tuple[str, ...]:
    """The captured tensors that a gradient must be sent to: through the score or the sink, not through conditions."""
    wanted = {node.name for node in captures.values() if parts.view.needs_gradient(node, parts.anchor)}
    found = {load.tensor for term in (terms[0], *terms[2:]) for load in loads_that_learn(term, wanted)}
    return tuple(name for name, node in captures.items() if node.name in found)


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
    traced = {"q": parts.q, "k": parts.k, "v": parts.v}
    return {name: as_operand(x, parts.dtype, lambda n: _concrete(parts, n)) for name, x in traced.items()}


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

"""Sums brought into the order in which an attention can be recognised. Each change is kept only if it then is.

(p1 - c * p2) @ v                       ->  p1 @ v - c * (p2 @ v)                 for c without the key
(p[:, 0] - c * p[:, 1]) @ v             ->  (p @ v)[:, 0] - c * (p @ v)[:, 1]
exp(x) / (sum(exp(x)) + r)              ->  softmax(cat([x, log(r)]))[..., :-1]
softmax((q @ k) * t) with t to learn    ->  softmax((q * t) @ k)                  for t without the key

Without an attention in place of the softmax the left side may be the cheaper one: `take_back` restores it where none was put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from effcompile.builder import Builder, erase_with_inputs, is_pure, is_tensor_node
from effcompile.contraction import BIASED, Contraction, contraction_of
from effcompile.ir import Match
from effcompile.pattern import CASTS, GraphView, is_passage
from effcompile.viewmaps import shape_of

from .attention import SOFTMAXES, recognise
from .handwritten import quotient_of

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
_KEPT = "rearranged"  # in a module's meta: the changes that were kept
_FAR = 12  # operations between a learned factor and its softmax


@dataclass(frozen=True, kw_only=True)
class Change:
    """`new` stands for `old`; the softmaxes in `sites` must be recognised for it to stay."""

    name: str
    old: Node
    new: Node
    sites: tuple[Node, ...]
    builder: Builder


Proposal = Callable[[Node, GraphView], "Change | None"]


def rearrange(module: GraphModule, *, strict: bool = False) -> list[str]:
    """Make every change after which all attentions that it concerns are recognised; returns a line for each."""
    view = GraphView(module, strict=strict)
    changes = [change for node in list(module.graph.nodes) if (change := _proposed(node, view)) is not None]
    if not changes:
        return []
    for change in changes:
        change.old.replace_all_uses_with(change.new)
    after = GraphView(module, strict=strict)
    log = []
    for change in changes:
        if all(isinstance(recognise(site, after), Match) for site in change.sites):
            log.append(f"{change.name} at {change.old.name}")
            calls = _recorded(change.old)
            if all(call.node.op == "call_function" for call in calls):
                module.meta.setdefault(_KEPT, []).append((change, calls))
            erase_with_inputs(change.old)
        else:
            change.new.replace_all_uses_with(change.old)
            change.builder.undo()
    return log


@dataclass(frozen=True)
class _Call:
    """A node that was erased, and what it called."""

    node: Node
    target: Any
    args: Any
    kwargs: Any


def _recorded(node: Node) -> list[_Call]:
    """The calls that vanish with a node, in graph order: its own, and those that nothing else needs."""
    vanishing, found = {node}, []
    for current in reversed(list(node.graph.nodes)):
        if current is node or (current.users and is_pure(current) and all(user in vanishing for user in current.users)):
            vanishing.add(current)
            found.append(_Call(current, current.target, current.args, current.kwargs))
    return found[::-1]


def take_back(module: GraphModule, replaced: Container[str]) -> list[str]:
    """Undo every change of which no softmax was replaced, by name; returns a line for each."""
    log = []
    for change, calls in module.meta.pop(_KEPT, []):
        known = {call.node for call in calls}
        needed = [x for call in calls for x in _nodes((call.args, call.kwargs)) if x not in known]
        if any(site.name in replaced for site in change.sites) or any(x._erased for x in (*needed, change.new)):
            continue
        builder, made = Builder(module.graph, change.new), dict[Node, Node]()
        for call in calls:
            args, kwargs = map_arg((call.args, call.kwargs), lambda x, made=made: made.get(x, x))  # type: ignore[misc]
            made[call.node] = builder.call(call.target, *args, **kwargs)
        change.new.replace_all_uses_with(made[change.old])
        erase_with_inputs(change.new)
        log.append(f"{change.name} at {change.old.name} taken back")
    return log


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found


def _proposed(node: Node, view: GraphView) -> Change | None:
    proposals = PROPOSALS.get(node.target, ()) if node.op == "call_function" else ()
    return next((change for propose in proposals if node.users and (change := propose(node, view)) is not None), None)


# -------------------------------------------------------------------- sums of probabilities


@dataclass(frozen=True)
class _Step:
    """One operation on probabilities: a sum of `parts`, a part scaled by `factor`, or a part cast to `dtype`."""

    target: Any
    parts: tuple[Any, ...]
    factor: Any = None
    dtype: torch.dtype | None = None


def _distributed(node: Node, view: GraphView) -> Change | None:
    """A contraction of a sum of probabilities with values, as the sum of the contractions."""
    contraction = contraction_of(node)
    if contraction is None or node.target in BIASED:
        return None
    for side in (0, 1):
        tree = _linear(contraction.operands[side], contraction.letters[side].find(contraction.summed))
        if not isinstance(tree, _Step):
            continue
        softmaxes = [_softmax_before(leaf) for leaf in _leaves(tree)]
        if None in softmaxes:
            continue
        builder = Builder(node.graph, node)
        new = _Distribution(contraction, side, builder).build(tree)
        if new is not None:
            sites = tuple(dict.fromkeys(site for site in softmaxes if site is not None))
            return Change(name="distributed", old=node, new=new, sites=sites, builder=builder)
        builder.undo()
    return None


def _linear(node: Any, dim: int) -> Any:
    """How probabilities are summed, and scaled by what does not depend on dimension `dim`: a tree of steps, or the node itself."""
    if not is_tensor_node(node) or len(node.users) != 1 or node.kwargs.get("alpha", 1) != 1:
        return node
    if node.target in _SUMS and all(is_tensor_node(a) and shape_of(a) == shape_of(node) for a in node.args):
        return _Step(node.target, tuple(_linear(a, dim) for a in node.args))
    if node.target in _SCALINGS:
        for inner, factor in (node.args, node.args[::-1])[: 2 if node.target is aten.mul.Tensor else 1]:
            if is_tensor_node(inner) and shape_of(inner) == shape_of(node) and _is_constant_along(factor, node, dim):
                return _Step(node.target, (_linear(inner, dim),), factor)
    if node.target is aten.neg.default:
        return _Step(node.target, (_linear(node.args[0], dim),))
    if node.target in CASTS and node.meta["val"].is_floating_point():
        inner = _linear(node.args[0], dim)
        return _Step(node.target, (inner,), dtype=node.meta["val"].dtype) if isinstance(inner, _Step) else node
    return node


def _is_constant_along(factor: Any, node: Node, dim: int) -> bool:
    if not is_tensor_node(factor):
        return isinstance(factor, (int, float))
    shape = shape_of(factor)
    position = dim - (len(shape_of(node)) - len(shape))
    return position < 0 or shape[position] == 1


def _leaves(tree: Any) -> Iterator[Node]:
    if isinstance(tree, _Step):
        for part in tree.parts:
            yield from _leaves(part)
    else:
        yield tree


def _softmax_before(leaf: Node) -> Node | None:
    """The softmax that a node is a view or a cast of."""
    node: Any = leaf
    while is_passage(node) and is_tensor_node(node.args[0]):
        node = node.args[0]
    return node if node.target in SOFTMAXES else None


class _Distribution:
    """Builds the steps of a tree anew, behind the contraction instead of before it."""

    def __init__(self, contraction: Contraction, side: int, builder: Builder):
        self.contraction, self.side, self.builder = contraction, side, builder
        self.whole: dict[Node, Node] = {}

    def build(self, tree: _Step) -> Node | None:
        """The sum of the contractions; None if it cannot be had, or would be of another shape."""
        node = self.contraction.node
        result = self.step(tree, None)
        if result is None or shape_of(result) != shape_of(node):
            return None
        dtype = node.meta["val"].dtype
        return result if result.meta["val"].dtype == dtype else self.builder.call(aten._to_copy.default, result, dtype=dtype)

    def step(self, tree: Any, dtype: torch.dtype | None) -> Node | None:
        if not isinstance(tree, _Step):
            return self.contracted(tree, dtype)
        parts = [self.step(part, tree.dtype or dtype) for part in tree.parts]
        if None in parts:
            return None
        if tree.dtype is not None:
            return parts[0]
        factor = [] if tree.factor is None else [self.moved(tree.factor)]
        return self.builder.call(tree.target, *parts, *factor)

    def contracted(self, weights: Node, dtype: torch.dtype | None) -> Node | None:
        values = self.contraction.operands[1 - self.side]
        if weights.target is aten.select.int and len(weights.args[0].users) > 1:  # type: ignore[union-attr]
            return self.selected(weights, values, dtype)
        pair = (self.cast(weights, dtype), values)
        target, pair = self.contraction.node.target, pair if self.side == 0 else pair[::-1]
        if target is aten.einsum.default:
            return self.builder.call(target, self.contraction.node.args[0], list(pair))
        return self.builder.call(target, *pair)

    def selected(self, weights: Node, values: Node, dtype: torch.dtype | None) -> Node | None:
        """`p[..., n, :, :] @ v` as `(p @ v[..., None, :, :])[..., n, :, :]`: one contraction for every n."""
        source, dim, position = weights.args
        assert isinstance(source, Node)
        rank = len(shape_of(source))
        dim = int(dim) % rank  # type: ignore[call-overload]
        fits = self.contraction.node.target is aten.matmul.default and self.side == 0 and dim < rank - 2
        if not fits or len(shape_of(values)) != rank - 1:
            return None
        if source not in self.whole:
            every = self.builder.call(aten.unsqueeze.default, values, dim)
            self.whole[source] = self.builder.call(aten.matmul.default, self.cast(source, dtype), every)
        return self.builder.call(aten.select.int, self.whole[source], dim, position)

    def cast(self, node: Node, dtype: torch.dtype | None) -> Node:
        if dtype is None or node.meta["val"].dtype == dtype:
            return node
        return self.builder.call(aten._to_copy.default, node, dtype=dtype)

    def moved(self, factor: Any) -> Any:
        """A factor of the probabilities in the dimensions of the result."""
        return _with_letters(self.builder, factor, self.contraction.letters[self.side], self.contraction.out)


def _with_letters(builder: Builder, factor: Any, letters: str, wanted: str) -> Any:
    """A factor whose last dimensions are `letters`, those that are not wanted of size 1, as one with dimensions `wanted`."""
    if not is_tensor_node(factor):
        return factor
    own = letters[len(letters) - len(shape_of(factor)) :]
    for dim in reversed([k for k, letter in enumerate(own) if letter not in wanted]):
        factor = builder.call(aten.select.int, factor, dim, 0)
    own = "".join(letter for letter in own if letter in wanted)
    order = sorted(range(len(own)), key=lambda k: wanted.index(own[k]))
    if order != list(range(len(own))):
        factor = builder.call(aten.permute.default, factor, order)
    for position, letter in enumerate(wanted):
        if letter not in own:
            factor = builder.call(aten.unsqueeze.default, factor, position)
    return factor


# -------------------------------------------------------------------- a softmax with more in its denominator


def _with_further_logit(node: Node, view: GraphView) -> Change | None:
    """`exp(x) / (sum(exp(x)) + r)`, and `(exp(x) @ v) / (sum(exp(x)) + r)`: r is the exponential of a logit without a value."""
    numerator, denominator = node.args[:2]
    if not is_tensor_node(denominator) or denominator.target is not aten.add.Tensor or denominator.kwargs:  # type: ignore[union-attr]
        return None
    for total, further in (denominator.args, denominator.args[::-1]):  # type: ignore[union-attr]
        quotient = quotient_of(node, numerator, total) if is_tensor_node(total) and is_tensor_node(numerator) else None
        if quotient is None or shape_of(denominator) != shape_of(total):  # type: ignore[arg-type]
            continue
        if not is_tensor_node(further) and not (isinstance(further, (int, float)) and further > 0):
            continue
        builder = Builder(node.graph, node)
        joined = builder.call(
            aten.cat.default, [quotient.shown(quotient.logits, builder), _logarithm(builder, further, total)], quotient.dim
        )
        softmax = builder.call(aten.softmax.int, joined, quotient.dim)
        new = builder.call(aten.slice.Tensor, softmax, quotient.dim, 0, -1)
        if quotient.product is not None:
            new = builder.call(quotient.product.target, new, *quotient.product.args[1:])
        if shape_of(new) == shape_of(node) and new.meta["val"].dtype == node.meta["val"].dtype:
            return Change(name="with_further_logit", old=node, new=new, sites=(softmax,), builder=builder)
        builder.undo()
    return None


def _logarithm(builder: Builder, further: Any, total: Node) -> Node:
    """log(r), of the shape of the sum beside it."""
    if not is_tensor_node(further):
        return builder.call(aten.full_like.default, total, math.log(further))
    return builder.call(aten.expand_as.default, builder.call(aten.log.default, further), total)


# -------------------------------------------------------------------- a learned temperature


def _learned_temperature(node: Node, view: GraphView) -> Change | None:
    """Scores times a factor that learns, as the queries times it: its gradient is then none of the attention's.

    One number for all stays: as a factor of the queries its gradient would be a single sum over all of their elements.
    """
    for scores, factor in (node.args[:2], node.args[1::-1]):
        if not (is_tensor_node(scores) and is_tensor_node(factor)) or all(n == 1 for n in shape_of(factor)):  # type: ignore[arg-type]
            continue
        contraction, scales = _scaled_contraction(scores)  # type: ignore[arg-type]
        sites = () if contraction is None else _softmaxes_after(node)
        if contraction is None or len(sites) != 1 or shape_of(contraction.node) != shape_of(node):
            continue
        if not view.needs_gradient(factor, node):  # type: ignore[arg-type]
            continue
        key = contraction.out[int(sites[0].args[1])]  # type: ignore[call-overload]
        queries = [side for side in (0, 1) if key not in contraction.letters[side]]
        if len(queries) == 1 and _fits(factor, contraction, queries[0]):  # type: ignore[arg-type]
            return _scaled_queries(node, contraction, queries[0], factor, scales, sites)  # type: ignore[arg-type]
    return None


def _scaled_contraction(node: Node) -> tuple[Contraction | None, list[tuple[Any, Any]]]:
    """A contraction that is used here alone, and the numbers that its result is multiplied with or divided by, the last first."""
    scales: list[tuple[Any, Any]] = []
    while len(node.users) == 1 and node.target in _SCALINGS and isinstance(node.args[1], (int, float)):
        scales.append((node.target, node.args[1]))
        node = node.args[0]  # type: ignore[assignment]
    contraction = contraction_of(node) if len(node.users) == 1 and node.target not in BIASED else None
    return contraction, scales


def _fits(factor: Node, contraction: Contraction, side: int) -> bool:
    """Whether a factor of the scores depends on nothing but what the queries depend on."""
    letters = contraction.out[len(contraction.out) - len(shape_of(factor)) :]
    return all(n == 1 or letter in contraction.letters[side] for letter, n in zip(letters, shape_of(factor), strict=True))


def _scaled_queries(
    node: Node, contraction: Contraction, side: int, factor: Node, scales: list[tuple[Any, Any]], sites: tuple[Node, ...]
) -> Change | None:
    builder = Builder(node.graph, node)
    operands = list(contraction.operands)
    moved = _with_letters(builder, factor, contraction.out, contraction.letters[side])
    operands[side] = builder.call(aten.mul.Tensor, operands[side], moved)
    alike = len({x.meta["val"].dtype for x in operands}) == 1
    if alike and shape_of(operands[side]) == shape_of(contraction.operands[side]):
        target = contraction.node.target
        pair = (contraction.node.args[0], operands) if target is aten.einsum.default else tuple(operands)
        new = builder.call(target, *pair)
        for scaling, number in reversed(scales):
            new = builder.call(scaling, new, number)
        if new.meta["val"].dtype == node.meta["val"].dtype:
            return Change(name="learned_temperature", old=node, new=new, sites=sites, builder=builder)
    builder.undo()
    return None


def _softmaxes_after(node: Node) -> tuple[Node, ...]:
    """The softmaxes that a node reaches through a few operations, each of which keeps its shape."""
    found: dict[Node, None] = {}
    seen, frontier = {node}, [(node, 0)]
    while frontier:
        current, steps = frontier.pop()
        for user in current.users:
            if user.target in SOFTMAXES:
                found[user] = None
            elif user not in seen and steps < _FAR and is_tensor_node(user) and shape_of(user) == shape_of(node):
                seen.add(user)
                frontier.append((user, steps + 1))
    return tuple(found)


PROPOSALS: dict[Any, tuple[Proposal, ...]] = {
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default), (_distributed,)),
    aten.div.Tensor: (_with_further_logit,),
    aten.mul.Tensor: (_learned_temperature,),
}

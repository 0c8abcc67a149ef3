"""sigmoid(score(q @ k.T)) @ v: each key weighed by itself, without the score matrix in memory (https://arxiv.org/abs/2409.04431).

Anchored at a sigmoid between two batched contractions. What the values meet is read, element by element, as an index expression of
the first one; it becomes the `score` and the `mask` of an `AttentionSpec` without a normaliser. A gate between projections, whose
weights belong to no batch entry, is no attention and is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from effcompile.contraction import Contraction, Dot, contraction_of
from effcompile.errors import ExpressionError
from effcompile.expr import Interpreter
from effcompile.ir import Match, Rejected, Rule
from effcompile.masks import Logit, split_weight
from effcompile.pattern import GraphView, contractions_after
from effcompile.terms import Load, Sigmoid, Term

from .attention import Refold, check_modes, coordinates_of, query_and_key, refold_if_folded, score_contraction
from .specify import B, Coordinates, D, H, I, J, Parts, S, Stop, candidates, check_logit, choose, compute_dtype, match_of
from .weights import drops_between, may_mask

aten = torch.ops.aten

_SCALING = frozenset({aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


@dataclass(frozen=True, kw_only=True)
class _Site:
    """A sigmoid of scores: `weight` is what the values are multiplied with, over (b, h, i, j), `dot` the score in it."""

    anchor: Node
    values: Contraction
    side: int
    at: Coordinates
    interpreter: Interpreter
    weight: Term
    dot: Dot
    scores: Contraction
    dropped: Node | None
    uses: int


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the attention around a sigmoid, or say at which step and why it is none that we take."""
    try:
        return match_of(_parts(anchor, view))
    except Stop as stop:
        return stop.rejected
    except ExpressionError as error:
        return Rejected(step="expression", why=str(error), node=anchor)


def _parts(anchor: Node, view: GraphView) -> Parts:
    try:
        return _parts_of(_site(anchor, view, None), view)
    except Refold as refold:
        return _parts_of(_site(anchor, view, refold.heads), view)


# -------------------------------------------------------------------- is it attention?


def _site(anchor: Node, view: GraphView, heads: Term | None) -> _Site:
    """The sigmoid and what it stands between.

    Raises:
        Stop: at the step "anchor", if it is no weight of an attention.
    """
    try:
        return _read(anchor, view, heads)
    except Stop as stop:
        raise Stop("anchor", stop.rejected.why, anchor) from None
    except ExpressionError as error:
        raise Stop("anchor", str(error), anchor) from None


def _read(anchor: Node, view: GraphView, heads: Term | None) -> _Site:
    found = [(x, operand) for node, operand in contractions_after(anchor, _may_scale) if (x := _batched(node)) is not None]
    if not found:
        raise Stop("anchor", "the sigmoid feeds no contraction with values", anchor)
    values, operand = found[0]
    side = values.operands.index(operand)
    at = coordinates_of(values, side, anchor, heads)
    drops = drops_between(operand, anchor)
    interpreter = view.interpreter(at.ranges, anchor, opaque=drops)
    weight = interpreter.element(operand, values.operand_index(side, tuple(at.index[letter] for letter in values.out), J))
    dropped = next((x for x in drops if isinstance(weight, Load) and weight.tensor == x.name), None)
    if dropped is not None:
        _check_each_dropped(weight, at, dropped)
        weight = interpreter.element(dropped.args[0], weight.indices)
    weight, dot, scores = score_contraction(weight, interpreter, anchor)
    if not _is_batched(scores) or not any(x.has(dot) for x in weight.atoms(Sigmoid)):
        raise Stop("anchor", "the sigmoid is not that of scores", anchor)
    return _Site(
        anchor=anchor, values=values, side=side, at=at, interpreter=interpreter, weight=weight, dot=dot, scores=scores,
        dropped=dropped, uses=len(found),
    )  # fmt: skip


def _may_scale(node: Node) -> bool:
    return may_mask(node) or node.target in _SCALING


def _batched(node: Node) -> Contraction | None:
    contraction = contraction_of(node)
    return contraction if contraction is not None and _is_batched(contraction) else None


def _is_batched(contraction: Contraction) -> bool:
    """Whether both operands are of batch entries or heads, unlike a projection's weight."""
    return any(letter in contraction.letters[0] and letter in contraction.letters[1] for letter in contraction.out)


def _check_each_dropped(weight: Load, at: Coordinates, dropped: Node) -> None:
    known = {symbol for index in weight.indices for symbol in index.free_symbols}
    if any(at.extents[symbol.name] != 1 and symbol not in known for symbol in (B, H, I, J)):
        raise Stop("dropout", "weights of several rows are dropped alike", dropped)


# -------------------------------------------------------------------- its parts


def _parts_of(site: _Site, view: GraphView) -> Parts:
    anchor, at, values = site.anchor, site.at, site.values
    check_modes(anchor, values.node, view)
    if site.uses > 1:
        raise Stop("probabilities", f"the weights feed {site.uses} contractions", anchor)
    score, mask = split_weight(site.weight)
    q, k = query_and_key(site.scores, site.dot, at, view, anchor)
    v_index = values.operand_index(1 - site.side, tuple(at.index[letter] for letter in values.out), J)
    v = candidates(values.operands[1 - site.side], v_index, at, view, anchor, (B, H, J, D))
    refold_if_folded(at, (site.weight, *(c[-1].index for c in (q, k, v) if c)))
    q_best, k_best, v_best = choose(q, k, v, anchor)
    scaled = {site.dot: q_best.factor * k_best.factor * S}
    logit = Logit(score=score.xreplace(scaled), mask=mask.xreplace(scaled), empty="zero")
    check_logit(logit, None, anchor)
    return Parts(
        view=view, anchor=anchor, output=values.node, coordinates=at, logit=logit, sink=None, q=q_best, k=k_best, v=v_best,
        layout=tuple(at.index[letter] for letter in values.out), vanishing=((anchor, "weights"), (site.scores.node, "scores")),
        dtype=compute_dtype(site.scores.node, values.node, q_best, k_best), loaded=site.interpreter.loaded,
        dropout=0.0 if site.dropped is None else float(site.dropped.args[1]),  # type: ignore[arg-type]
        drawing=() if site.dropped is None else (site.dropped,), normaliser="none",
    )  # fmt: skip


SIGMOID_ATTENTION = Rule(
    name="sigmoid",
    family="attention",
    summary="sigmoid between two contractions: attention whose weights are not normalised",
    anchors=frozenset({aten.sigmoid.default}),
    recognise=recognise,
    quiet=True,
)

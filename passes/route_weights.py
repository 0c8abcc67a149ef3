"""What a router makes of the experts that were chosen, read forwards from its top-k: weights, as far as the operation has a form.

    u = p[ids], the chosen values themselves, or softmax or sigmoid of either
    w = scale u / (norm(u) + eps),  or scale u / max(norm(u), eps)

Of all that is computed element by element from these, the last is taken that leaves nothing needing the top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile import elementwise
from effcompile.builder import is_tensor_node
from effcompile.errors import ExpressionError
from effcompile.expr import Interpreter
from effcompile.ops.route import Score
from effcompile.pattern import CASTS, GraphView, describe
from effcompile.rules import wrap_dim
from effcompile.terms import IntLoad, Load, Sigmoid, Term, integer_symbol
from effcompile.viewmaps import VIEWS, is_float, shape_of

from .experts_nodes import argument
from .route_choice import Choice, before_widening, part_of, same_rows, score_of, settled, tokens_of
from .specify import Stop

aten = torch.ops.aten

_S = integer_symbol("slot")
_U, _SUM, _SQUARES, _LEAST = (sympy.Symbol(name, positive=True) for name in ("u", "sum", "squares", "least"))
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_NORMS = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
_REDUCTIONS = (aten.sum.dim_IntList, *_NORMS, *_SOFTMAX)
_FOLLOWED = frozenset({*elementwise.ARITHMETIC, *CASTS, *VIEWS, *_REDUCTIONS}) - {aten.detach.default}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """`output` is scale times the scores of what was chosen, divided by their norm; `path` what its gradient goes through."""

    output: Node
    logits: Node
    scores: Node
    bias: Node | None
    score: Score
    after: bool
    norm: int
    eps: float
    clamp: bool
    scale: float
    path: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the weights begin: the top-k's values, or what is gathered at its positions.

    `scores` are the tensor that they are elements of, `score` is what that is of `logits`.
    """

    node: Node
    scores: Node
    score: Score
    logits: Node
    bias: Node | None
    after: Score = "none"
    whole: bool = False
    """The scores are a softmax of all experts, but what was chosen is divided by its sum: the softmax of what was chosen."""


@dataclass(frozen=True, kw_only=True)
class _Form:
    """An element as `scale u / (norm + eps)`, with `after` the score in u that is made of what was chosen."""

    after: Score
    norm: int = 0
    eps: float = 0.0
    clamp: bool = False
    scale: float = 1.0


def weights_of(anchor: Node, ids: Node, choice: Choice, view: GraphView) -> Weights:
    """The weights of what a top-k chooses.

    Raises:
        Stop: there are none, or the operation has no form for them.
    """
    values = part_of(anchor, 0)
    gathered = [user for user in _users_of(ids) if user.target is aten.gather.default and is_float(user)]
    starts = [x for x in (values, *gathered) if x is not None and x.users]
    if not starts:
        raise Stop("anchor", "nothing is made of what is chosen, at the positions that are chosen", anchor)
    stops: list[Stop] = []
    for node in starts:
        try:
            return _made_of(_source(node, node is values, anchor, choice), anchor, ids, view)
        except Stop as stop:
            stops.append(stop)
    raise next((stop for stop in stops if stop.rejected.step != "anchor"), stops[0])


def _users_of(ids: Node) -> Iterator[Node]:
    """What uses the positions, through casts and views."""
    for user in ids.users:
        if user.op == "call_function" and (user.target in VIEWS or user.target in CASTS):
            yield from _users_of(user)
        else:
            yield user


# -------------------------------------------------------------------- where they begin


def _source(node: Node, is_values: bool, anchor: Node, choice: Choice) -> _Source:
    return _of_values(node, anchor, choice) if is_values else _of_gathered(node, anchor, choice)


def _of_values(node: Node, anchor: Node, choice: Choice) -> _Source:
    scores = settled(choice.values, detached=False)
    score, logits = score_of(scores)
    if score == "none":
        inner, bias = _terms(choice)
        if bias is not None and score_of(inner)[0] != "none":
            raise Stop("weights", "the weights are what experts are chosen by, the bias of the choice included", anchor)
        if choice.groups is not None and choice.groups.fill == "zero":
            raise Stop("groups", "logits outside the kept groups are 0, which may be the greatest", anchor)
    return _Source(node=node, scores=scores, score=score, logits=logits, bias=None)


def _terms(choice: Choice) -> tuple[Node, Node | None]:
    try:
        return choice.terms
    except Stop:
        return choice.values, None


def _of_gathered(node: Node, anchor: Node, choice: Choice) -> _Source:
    source: Any = node.args[0]
    if wrap_dim(argument(node, "dim", -1), source.meta["val"].dim()) != source.meta["val"].dim() - 1:
        raise Stop("weights", "weights are gathered along another dimension than that of the experts", anchor)
    if int(choice.experts) != shape_of(source)[-1]:
        raise Stop("weights", "weights are gathered from others than the experts that are chosen among", anchor)
    chosen_by, bias = choice.terms
    scores, chosen_by = settled(source, detached=False), settled(chosen_by, detached=True)
    (score, logits), (by, by_logits) = score_of(scores), score_of(chosen_by)
    if scores is chosen_by or (score == by != "none" and logits is by_logits):
        return _Source(node=node, scores=scores, score=score, logits=logits, bias=bias)
    of_logits = by == "none" and logits is before_widening(chosen_by)
    if of_logits and score == "sigmoid":
        return _Source(node=node, scores=scores, score="none", logits=logits, bias=bias, after="sigmoid")
    if of_logits and score == "softmax":
        return _Source(node=node, scores=scores, score="none", logits=logits, bias=bias, whole=True)
    raise Stop("weights", "experts are chosen by other scores than they are weighted by", anchor)


# -------------------------------------------------------------------- what is made of them


def _made_of(source: _Source, anchor: Node, ids: Node, view: GraphView) -> Weights:
    slots = int(shape_of(ids)[-1])
    downstream = _downstream(source.node)
    interesting = [node for node in reversed(downstream) if node is source.node or node.target not in VIEWS]
    stops: list[Stop] = []
    for node in interesting:
        shape = shape_of(node)
        if len(shape) < 2 or shape[-1] != slots:
            continue
        try:
            form = _form(node, source, ids, downstream)
            weights = _weights(node, form, source, anchor, downstream)
        except Stop as stop:
            stops.append(stop)
            continue
        except ExpressionError as error:
            stops.append(Stop("weights", str(error), anchor))
            continue
        if anchor in view.dead_without(node, ids):
            return weights
        user = next((x for x in source.node.users if x not in view.dead_without(node, ids)), source.node)
        stops.append(Stop("uses", f"what is chosen is also used by {describe(user)}", anchor))
    uses = [stop for stop in stops if stop.rejected.step == "uses"]
    raise (
        (uses or stops)[-1]
        if stops
        else Stop("anchor", "nothing is made of what is chosen, at the positions that are chosen", anchor)
    )


def _downstream(start: Node) -> list[Node]:
    """What is computed from the chosen values alone: as many numbers, or one for each token. In graph order."""
    shape = shape_of(start)
    sizes = (sympy.expand(sympy.Mul(*shape)), sympy.expand(sympy.Mul(*shape[:-1])))
    found, frontier = {start}, [start]
    while frontier:
        for user in frontier.pop().users:
            if user in found or user.target not in _FOLLOWED or not is_tensor_node(user) or not is_float(user):
                continue
            if sympy.expand(sympy.Mul(*shape_of(user))) in sizes:
                found.add(user)
                frontier.append(user)
    return sorted(found)


def _form(node: Node, source: _Source, ids: Node, downstream: list[Node]) -> _Form:
    """An element of a node.

    Raises:
        Stop: it is none that the operation has.
    """
    reader = _Reader(source, ids, frozenset(downstream))
    after, term = reader.read(node)
    known = _without_norms(term)
    factor = sympy.together(_U / known) if known != 0 else sympy.zoo
    least = known.atoms(sympy.Max)
    eps, clamp = 0.0, False
    if least:
        (bounded,) = least if len(least) == 1 else (None,)
        numbers = [] if bounded is None else [a for a in bounded.args if a.is_number]
        if bounded is None or len(numbers) != 1 or len(bounded.args) != 2:
            raise _unknown(node)
        eps, clamp = float(numbers[0]), True
        norm = next(a for a in bounded.args if not a.is_number)
        factor = sympy.together(_U / known.xreplace({bounded: _LEAST}))
        kind, symbol = _kind(norm, node), _LEAST
    else:
        kind, symbol = _norm_in(factor, node)
    factor = sympy.expand(factor)
    if _U in factor.free_symbols or factor.free_symbols - {symbol}:
        raise _unknown(node)
    if symbol is None:
        slope, rest = factor, sympy.S.Zero
    else:
        slope = factor.coeff(symbol, 1)
        rest = sympy.expand(factor - slope * symbol)
    if not (slope.is_real and slope.is_number and rest.is_number and slope != 0) or (clamp and rest != 0):
        raise _unknown(node)
    if not clamp:
        eps = _tidy(rest / slope)
    if eps < 0 or not sympy.Float(eps).is_finite:
        raise Stop("weights", f"the norm of the weights is lessened, by {-eps}", node)
    return _Form(after=after, norm=kind, eps=eps, clamp=clamp, scale=_tidy(1 / slope))


def _tidy(number: Term) -> float:
    """A number that was computed from numbers of the program, without the last digit, which that rounded."""
    return float(f"{float(number):.15g}")


def _unknown(node: Node) -> Stop:
    return Stop("weights", "the weights are no multiple of the scores of what was chosen, divided by their norm", node)


def _without_norms(term: Term) -> Term:
    """A root of a sum of squares by its own symbol."""
    return term.replace(
        lambda x: isinstance(x, sympy.Pow) and x.base == _SQUARES and abs(x.exp) == sympy.Rational(1, 2),
        lambda x: _LENGTH if x.exp > 0 else 1 / _LENGTH,
    )


_LENGTH = sympy.Symbol("length", positive=True)


def _kind(norm: Term, node: Node) -> int:
    if norm == _SUM:
        return 1
    if norm == _LENGTH:
        return 2
    raise _unknown(node)


def _norm_in(factor: Term, node: Node) -> tuple[int, Term | None]:
    found = factor.free_symbols & {_SUM, _LENGTH, _SQUARES}
    if not found:
        return 0, None
    if len(found) > 1 or _SQUARES in found:
        raise _unknown(node)
    (symbol,) = found
    return _kind(symbol, node), symbol


def _weights(node: Node, form: _Form, source: _Source, anchor: Node, downstream: list[Node]) -> Weights:
    score, norm = source.score, form.norm
    after = source.after if source.after != "none" else form.after
    if form.after != "none" and (source.score != "none" or source.after != "none" or source.whole):
        raise Stop("weights", "what is chosen is scored before and after it is chosen", anchor)
    if source.whole:
        if norm != 1 or form.eps or form.clamp:
            why = "experts are chosen by logits, and the softmax of all of them is not divided by the sum of what is chosen"
            raise Stop("weights", why, anchor)
        after, norm = "softmax", 0
    if (score == "none") == (after == "none"):
        raise Stop("anchor", "what is chosen is not scored by softmax or sigmoid", anchor)
    path = {
        source.node,
        node,
        *(() if source.score == "none" and not source.whole and source.after == "none" else (source.scores,)),
    }
    path |= {x for x in downstream if x < node and x.target in _REDUCTIONS}
    return Weights(
        output=node, logits=source.logits, scores=source.scores, bias=source.bias, score=score if after == "none" else after,
        after=after != "none", norm=norm, eps=form.eps, clamp=form.clamp, scale=form.scale, path=tuple(path),
    )  # fmt: skip


class _Reader:
    """Reads elements of what is computed from the chosen values as terms of u, its sum and its sum of squares over slots."""

    def __init__(self, source: _Source, ids: Node, downstream: frozenset[Node]):
        self.source, self.ids, self.downstream = source, ids, downstream
        self._slot = sympy.S.Zero if shape_of(ids)[-1] == 1 else _S

    def read(self, node: Node) -> tuple[Score, Term]:
        """The score that is made of what was chosen, and the element with u for that score.

        Raises:
            Stop: the element is no such term.
        """
        symbols, ranges = tokens_of(node)
        ranges.add(_S, shape_of(node)[-1])
        interpreter = Interpreter(ranges, self._stops)
        term = interpreter.element(node, (*symbols, _S))
        known: dict[Term, Term] = {}
        scores: set[Score] = set()
        for load in sorted((x for x in term.atoms(Load) if not isinstance(x, IntLoad)), key=str):
            loaded = interpreter.loaded[load.tensor]
            if self._chosen(load, loaded, symbols, node):
                score, known[load] = self._scored(load, term, node), _U
                term = term.xreplace({Sigmoid(load): load})
            else:
                score, known[load] = self._reduced(load, loaded, symbols, node)
            scores.add(score)
        term = term.xreplace(known)
        if len(scores) != 1 or term.atoms(Load) or not term.has(_U):
            raise _unknown(node)
        return scores.pop(), term

    def _scored(self, load: Load, term: Term, node: Node) -> Score:
        """The score of a chosen value, wherever it stands in a term: its sigmoid, or none."""
        sigmoid = Sigmoid(load)
        if not term.has(sigmoid):
            return "none"
        if term.xreplace({sigmoid: _U}).has(load):
            raise _unknown(node)
        return "sigmoid"

    def _stops(self, node: Node) -> bool:
        if node is self.source.node:
            return node.target is not aten.gather.default
        return is_tensor_node(node) and is_float(node) and (node not in self.downstream or node.target in _REDUCTIONS)

    def _chosen(self, load: Load, loaded: Node, symbols: Any, node: Node) -> bool:
        """Whether an element is that of what was chosen, for the same token and slot."""
        shape = shape_of(node)[:-1]
        lead, last = load.indices[:-1], load.indices[-1]
        if not same_rows(lead, shape_of(loaded)[:-1], symbols, shape):
            return False
        if loaded is self.source.node:
            return last == self._slot
        if (
            self.source.node.target is not aten.gather.default
            or not isinstance(last, IntLoad)
            or loaded is not self.source.node.args[0]
        ):
            return False
        return last.tensor == self.ids.name and last.indices[-1] == self._slot and same_rows(
            last.indices[:-1], shape_of(self.ids)[:-1], symbols, shape
        )  # fmt: skip

    def _reduced(self, load: Load, loaded: Node, symbols: Any, node: Node) -> tuple[Score, Term]:
        """What a sum or a softmax over the slots of the same token is."""
        source: Any = loaded.args[0] if loaded.target in _REDUCTIONS and loaded in self.downstream else None
        if source is None:
            raise _unknown(node)
        softmax, rank = loaded.target in _SOFTMAX, source.meta["val"].dim()
        dims = argument(loaded, "dim", None)
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        if len(dims) != 1 or wrap_dim(dims[0], rank) != rank - 1:
            raise _unknown(node)
        kept = softmax or argument(loaded, "keepdim", False)
        lead, shape = (load.indices[:-1], shape_of(loaded)[:-1]) if kept else (load.indices, shape_of(loaded))
        last = load.indices[-1] if kept else sympy.S.Zero
        if not same_rows(lead, shape, symbols, shape_of(node)[:-1]) or last != (self._slot if softmax else 0):
            raise _unknown(node)
        score, term = self.read(source)
        if softmax:
            if score != "none" or term != _U:
                raise _unknown(node)
            return "softmax", _U
        return score, self._summed(loaded, term, node)

    def _summed(self, loaded: Node, term: Term, node: Node) -> Term:
        if loaded.target in _NORMS:
            p = argument(loaded, "ord" if loaded.target is aten.linalg_vector_norm.default else "p", 2)
            factor = term / _U
            if p not in (1, 2) or not factor.is_number or not factor.is_positive:
                raise _unknown(node)
            return factor * (_SUM if p == 1 else sympy.sqrt(_SQUARES))
        for power, symbol in ((1, _SUM), (2, _SQUARES)):
            factor = sympy.cancel(term / _U**power)
            if factor.is_number:
                return factor * symbol
        raise _unknown(node)

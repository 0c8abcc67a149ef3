"""((q k^T) * D) v with a causal decay D: a linear recurrence, in its parallel spelling.

    o_i = sum over j <= i of exp(G_i - G_j) (q_i . k_j) v_j   =   q_i^T S_i,    S_i = exp(g_i) S_{i-1} + k_i v_i^T,    G = cumsum(g)

Equal to the original up to the order of additions; what overflows in exp(-G_j) does not any more. A division of the rows by
their sums stays as it is: the sums are the operation's second result.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Node

from effcompile.contraction import BIASED, Contraction, Dot, contraction_of
from effcompile.elementwise import ARITHMETIC
from effcompile.errors import ExpressionError
from effcompile.expr import Interpreter, names_of
from effcompile.ir import Computed, Match, Operand, Rejected, Result, Rule
from effcompile.operands import Traced, one_step, regrouped
from effcompile.ops.recurrence import OPTIONAL, RecurrenceSpec
from effcompile.ops.recurrence import Decay as Along
from effcompile.pattern import CASTS, GraphView, describe
from effcompile.ranges import Ranges
from effcompile.terms import Load, Term
from effcompile.viewmaps import VIEWS, Index, broadcast, is_float, shape_of

from .attention import SOFTMAXES, batch_index
from .compose import Composer
from .reads import origin
from .row_maxima import RowMaximum, row_maximum, without_maximum
from .rows import RowSum, check_movable, division_of, moved_behind, postpone, row_sums, undetached
from .specify import B, Coordinates, D, H, I, J, Stop, candidates, with_depth
from .weighting import Decay, U, decay_of, power_of

aten = torch.ops.aten

CONTRACTIONS = frozenset({aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default})
_REDUCTIONS = (aten.sum.dim_IntList, aten.amax.default, aten.max.dim, aten.logsumexp.default)
_PASSED = (operator.getitem, aten.detach.default)
_EXTENDING = (aten.cat.default, aten.pad.default, aten.constant_pad_nd.default)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_STEPS = 60  # back from the weights to the scores


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the recurrence whose output a contraction is, or say at which step and why it is none that we take."""
    try:
        return _Reading(anchor, view).match()
    except Stop as stop:
        return stop.rejected
    except ExpressionError as error:
        return Rejected(step="expression", why=str(error), node=anchor)


# -------------------------------------------------------------------- the two contractions


def _weights_side(values: Contraction) -> int | None:
    """Which operand has the weights: [.., i, j] with j summed, of equal extents, made from a contraction by more than a softmax."""
    for side in (0, 1):
        rows = [x for x in values.own(side) if values.size(x) == values.size(values.summed)]
        if rows and values.size(rows[-1]) != 1 and _scores_behind(values.operands[side]) is not None:
            return side
    return None


def _scores_behind(node: Node) -> Node | None:
    """The nearest contraction with square results from which weights are made element by element, without a softmax."""
    seen, frontier = {node}, [node]
    while frontier and len(seen) < _MOST_STEPS:
        current = frontier.pop()
        if current.target in SOFTMAXES:
            return None
        if contraction_of(current) is not None:
            return current
        for source in current.all_input_nodes:
            if source not in seen and is_float(source) and _is_square(source) and source.op == "call_function":
                seen.add(source)
                frontier.append(source)
    return None


def _is_square(node: Node) -> bool:
    """Whether two dimensions, neither of size 1, are equally long."""
    sizes = [n for n in shape_of(node) if n != 1]
    return len(set(sizes)) < len(sizes)


def _coordinates(values: Contraction, side: int) -> Coordinates:
    """Names for the output's dimensions: the weights' own last one is i, the values' own is d, the rest batch."""
    length = values.size(values.summed)
    rows = sorted((x for x in values.own(side) if values.size(x) == length), key=values.letters[side].index)
    columns = [x for x in values.own(1 - side) if values.size(x) != 1] or values.own(1 - side)[-1:]
    if len(columns) != 1:
        raise Stop("values", "the values have no dimension of their own, or several", values.node)
    query, value = rows[-1], columns[0]
    batch = [x for x in values.out if x not in (query, value)]
    ranges = Ranges({})
    index = batch_index(batch, [values.size(x) for x in batch], values.node, None, ranges)
    extents = {"i": length, "j": length, "u": length, "d": values.size(value), **index.pop("extents")}
    for symbol in (I, J, U, D):
        ranges.add(symbol, extents[str(symbol)])
    return Coordinates(ranges=ranges, index={**index, query: I, value: D}, extents=extents)


# -------------------------------------------------------------------- reading them


@dataclass(frozen=True, kw_only=True)
class _Factor:
    """An operand of the scores: `node[index] * exp(exponent) * scale`, the exponent that of accumulated gates."""

    node: Node
    index: Index
    exponent: Term
    scale: Term


class _Reading:
    """One recurrence, read from the contraction `anchor`.

    Raises:
        Stop: it is none.
    """

    def __init__(self, anchor: Node, view: GraphView):
        values = contraction_of(anchor)
        side = None if values is None else _weights_side(values)
        if values is None or side is None:
            raise Stop("anchor", "no contraction of weights, which are made of scores, with values", anchor)
        if anchor.target in BIASED and anchor.kwargs.get("beta", 1) != 0:
            raise Stop("values", "the contraction with the values adds a bias", anchor)
        self.anchor, self.view, self.values, self.side = anchor, view, values, side
        self.weights = values.operands[side]
        self.at = _coordinates(values, side)
        self.out = tuple(self.at.index[letter] for letter in values.out)
        self.index = values.operand_index(side, self.out, J)
        self.key_dim = values.letters[side].index(values.summed)
        self.interpreter = Interpreter(self.at.ranges, _Opaque(view, anchor))

    def match(self) -> Match:
        """The match; a division of the weights by their sums has then been moved behind the contraction."""
        division = division_of(self.weights, self.key_dim)
        scores = _scores_behind(self.weights)
        assert scores is not None
        if division is not None and not self._depends(division.divisor, scores):
            division = None
        source = self.weights if division is None else division.weights
        dot, contraction = self._scores(self.interpreter.element(source, self.index))
        sums = row_sums(source, self.key_dim)
        q, k = self._factors(contraction, dot)
        weight = self.interpreter.element(source, self.index)
        decay = decay_of(weight, dot, self.interpreter, q.exponent + k.exponent, self.anchor)
        maximum = row_maximum(decay.row, source, self.interpreter)
        self._check(decay if maximum is None else replace(decay, row=decay.row + maximum.load), contraction.node)
        self._check_dead(contraction.node, source, sums, maximum)
        check_movable([x.node for x in sums], self.anchor, self.view)
        decay = replace(decay, rows=decay.rows * q.scale * k.scale)
        if maximum is not None:
            composer = Composer(self.view, self.anchor, self.inner, self.terms, contraction.node)
            decay = without_maximum(decay, maximum, dot, self.terms, composer)
        inputs = self._inputs(decay, q, k, normalised=bool(sums))
        output = self.anchor if division is None else moved_behind(division, self.values, self.side, self.view)
        summed = [undetached(x, self.view) for x in sums]
        postpone(summed, output, self.view)
        return self._match(decay, inputs, output, summed)

    # ---------------------------------------------------------------- scores

    def _scores(self, weight: Term) -> tuple[Dot, Contraction]:
        """The one score that the weight is made of."""
        dots = [dot for found in names_of(weight, Dot).values() for dot in found if {I, J} <= dot.free_symbols]
        if len(dots) != 1:
            why = "no scores" if not dots else f"{len(dots)} contractions"
            raise Stop("anchor" if not dots else "scores", f"the weights of the values are made of {why}", self.anchor)
        if not {I, J} & weight.xreplace({dots[0]: sympy.S.One}).free_symbols:
            raise Stop("anchor", "nothing masks the scores", self.anchor)
        return dots[0], self.interpreter.contraction(dots[0])

    def _factors(self, scores: Contraction, dot: Dot) -> tuple[_Factor, _Factor]:
        """Queries and keys."""
        self.depth = scores.size(scores.summed)
        if not self.depth.is_Integer:
            raise Stop("scores", "the depth of queries and keys is not a fixed number", scores.node)
        self.inner = with_depth(self.at, self.depth)
        self.inner.ranges.add(U, self.at.extents["u"])
        indices = [scores.operand_index(which, dot.index, D) for which in (0, 1)]
        has = [[any(s in term.free_symbols for term in index) for s in (I, J)] for index in indices]
        if has not in ([[True, False], [False, True]], [[False, True], [True, False]]):
            raise Stop("scores", "an operand of the scores depends on both positions", scores.node)
        order = (0, 1) if has[0][0] else (1, 0)
        self.terms = Interpreter(self.inner.ranges, self.interpreter.is_opaque)
        self.terms.loaded = self.interpreter.loaded
        q, k = (self._peeled(scores.operands[which], indices[which]) for which in order)
        return q, k

    def _peeled(self, node: Node, index: Index) -> _Factor:
        """An operand of the scores without factors exp(x) where x is made of cumulative sums."""
        exponent: Term = sympy.S.Zero
        scale = passed = sympy.S.One
        current, at = node, index
        while True:
            step = one_step(current, at, self.inner.ranges)
            if step is not None:
                current, at, passed = step[0], step[1], passed * step[2]
            elif (split := self._exponential_factor(current, at)) is not None:
                power, rest = split
                exponent, scale, passed = exponent + power, scale * passed, sympy.S.One
                node, index = current, at = rest, broadcast(at, shape_of(rest))
            else:
                return _Factor(node=node, index=index, exponent=exponent, scale=scale)

    def _exponential_factor(self, node: Node, index: Index) -> tuple[Term, Node] | None:
        """`x * exp(y)` or `x / exp(y)` as (y or -y, x), if y is made of a cumulative sum."""
        if node.target not in (aten.mul.Tensor, aten.div.Tensor) or not all(isinstance(a, Node) for a in node.args):
            return None
        pairs = [(node.args[0], node.args[1], sympy.S.One)]
        pairs += [(node.args[1], node.args[0], sympy.S.One)] if node.target is aten.mul.Tensor else []
        for rest, factor, sign in pairs:
            assert isinstance(rest, Node) and isinstance(factor, Node)
            if not accumulates(factor) or shape_of(rest) != shape_of(node):
                continue
            power = power_of(self.terms.element(factor, broadcast(index, shape_of(factor))), self.terms)
            if power is not None:
                return (power if node.target is aten.mul.Tensor else -power) * sign, rest
        return None

    # ---------------------------------------------------------------- what may not be

    def _depends(self, node: Node, source: Node) -> bool:
        """Whether a node is computed from another."""
        order = self.view.order
        seen, frontier = {node}, [node]
        while frontier:
            current = frontier.pop()
            if current is source:
                return True
            for before in current.all_input_nodes:
                if before not in seen and order.get(before, -1) >= order[source]:
                    seen.add(before)
                    frontier.append(before)
        return False

    def _check(self, decay: Decay, scores: Node) -> None:
        if self.view.regions.get(scores) != self.view.regions.get(self.anchor):
            raise Stop("modes", "grad mode or autocast changes between the scores and the contraction with the values", scores)
        for load in (decay.row * decay.rows).atoms(Load):
            node = self.interpreter.loaded[load.tensor]
            if self._depends(node, scores):
                raise Stop("rows", f"the weights are scaled by what is computed from all of a row: {describe(node)}", node)
            if _is_square_sum(node):
                raise Stop("rows", f"the weights are scaled by {describe(node)} of a tensor over both positions", node)
        if self.anchor.meta["val"].dtype not in _DTYPES:
            raise Stop("dtype", f"{self.anchor.meta['val'].dtype} has no kernel; float16, bfloat16 and float32 have", self.anchor)
        if self.view.strict and self.anchor.meta["val"].dtype is not torch.float32:
            raise Stop(
                "numerics",
                f"numerics=strict keeps the rounding of the scores to {self.anchor.meta['val'].dtype}, which a recurrence omits",
                self.anchor,
            )

    # ---------------------------------------------------------------- operands

    def _inputs(self, decay: Decay, q: _Factor, k: _Factor, *, normalised: bool) -> dict[str, Operand | Computed]:
        query, key = self._grouped(q, k)
        composer = Composer(self.view, self.anchor, self.inner, self.terms, query.node)
        rows = [(decay.rows, False), (decay.row, True)]
        keys = [(decay.keys, False), (decay.key, True)]
        shared = _shared(query) > 1
        on_values = shared and not normalised and not any(term.has(D) for term, _ in keys)
        if shared and any(term.has(H) for term, _ in (rows if on_values else [*rows, *keys])):
            query, key = regrouped(query, 1), regrouped(key, 1)
        inputs = {
            "v": self._values(keys if on_values else []),
            "q": composer.product(query, rows, I),
            "k": composer.product(key, [] if on_values else keys, J),
        }
        if decay.gate != 0:
            inputs["gate"] = composer.term(decay.gate, U, last=1)
        return inputs

    def _grouped(self, q: _Factor, k: _Factor) -> tuple[Traced, Traced]:
        """Queries and keys, as far back as both have the same groups of heads."""
        queries = self._candidates(q.node, q.index, self.inner, (B, H, I, D), "queries")
        keys = self._candidates(k.node, k.index, self.inner, (B, H, J, D), "keys")
        for query in reversed(queries):
            for key in reversed(keys):
                if query.group == key.group and query.has_heads == key.has_heads:
                    return query, key
        return regrouped(queries[-1], 1), regrouped(keys[-1], 1)

    def _values(self, factors: list[tuple[Term, bool]]) -> Operand | Computed:
        index = self.values.operand_index(1 - self.side, self.out, J)
        found = self._candidates(self.values.operands[1 - self.side], index, self.at, (B, H, J, D), "values")[-1]
        found = regrouped(found, 1) if _shared(found) > 1 else found
        return Composer(self.view, self.anchor, self.at, self.interpreter, found.node).product(found, factors, J)

    def _candidates(self, node: Node, index: Index, at: Coordinates, roles: tuple[Term, ...], what: str) -> list[Traced]:
        found = [x for x in candidates(node, index, at, self.view, self.anchor, roles) if x.factor == 1]
        if not found:
            raise Stop("operands", f"the {what} cannot be read as a [batch, heads, length, depth] view of a tensor", node)
        return found

    # ---------------------------------------------------------------- the match

    def _check_dead(self, scores: Node, weights: Node, sums: list[RowSum], maximum: RowMaximum | None) -> None:
        """Scores and weights must vanish, and no gradient be cut before they do."""
        dead = self.view.dead_without(self.anchor, *(x.node for x in sums))
        for node, what in ((weights, "weights"), (scores, "scores")):
            if node not in dead:
                user = next((u for u in node.users if u not in dead), None)
                raise Stop("uses", f"the {what} are also used by {describe(user) if user else 'something else'}", node)
        for node in dead:
            cut = node.target is aten.detach.default and self.view.needs_gradient(node.args[0], self.anchor)  # type: ignore[arg-type]
            taken_off = maximum is not None and origin(node) is maximum.node
            if cut and not taken_off and not any(x.detached and x.node in node.users for x in sums):
                raise Stop("gradient", "the gradient is cut within the recurrence", node)

    def _match(self, decay: Decay, inputs: dict[str, Operand | Computed], output: Node, sums: list[Node]) -> Match:
        dead = self.view.dead_without(output, *sums)
        trains = any(self.view.needs_gradient(base, self.anchor) for x in inputs.values() for base in x.bases)
        along: Along = "none" if "gate" not in inputs else "key" if decay.gate.has(D) else "head"
        spec = RecurrenceSpec(
            operands=tuple(name for name in OPTIONAL if name in inputs), decay=along, read=decay.read, normaliser=bool(sums),
            out=str(output.meta["val"].dtype).removeprefix("torch."),
        )  # fmt: skip
        layouts = {node: self._row_layout(node) for node in sums}
        return Match(
            family="recurrence", anchor=self.anchor, output=output, spec=spec, inputs=inputs, interior=frozenset(dead),
            layout=self.out,
            further={node: Result(name="normaliser", layout=layout) for node, layout in layouts.items()}, trains=trains,
        )  # fmt: skip

    def _row_layout(self, node: Node) -> Index:
        """The layout of a sum of the weights over the keys: that of the weights, without the keys or with one."""
        layout = tuple(sympy.S.Zero if n == 1 else term for term, n in zip(self.index, shape_of(self.weights), strict=True))
        kept = len(shape_of(node)) == len(layout)
        return tuple(sympy.S.Zero if d == self.key_dim else x for d, x in enumerate(layout) if kept or d != self.key_dim)


def _shared(traced: Traced) -> int:
    """How many heads share an element."""
    return traced.group if traced.has_heads else int(traced.roles.heads)


class _Opaque:
    """Nodes to load: those beyond the mode region, and data that is not over both positions and no function of a cumulative sum."""

    def __init__(self, view: GraphView, anchor: Node):
        self.beyond = view.interpreter(Ranges({}), anchor).is_opaque
        self.known: dict[Node, bool] = {}

    def __call__(self, node: Node) -> bool:
        if node not in self.known:
            self.known[node] = self.beyond(node) or self._is_data(node)
        return self.known[node]

    def _is_data(self, node: Node) -> bool:
        if node.op != "call_function" or not is_float(node) or node.target in VIEWS or node.target in CASTS or _is_square(node):
            return False
        return not accumulates(node) and _has_inputs(node)


def accumulates(node: Node) -> bool:
    """Whether a node is a cumulative sum or product, or made of one element by element."""
    frontier, seen = [node], {node}
    while frontier and len(seen) < _MOST_STEPS:
        current = frontier.pop()
        if current.target in (aten.cumsum.default, aten.cumprod.default):
            return True
        if current.target in ARITHMETIC or current.target in VIEWS or current.target in CASTS or current.target in _EXTENDING:
            new = [x for x in current.all_input_nodes if x not in seen]
            seen.update(new)
            frontier += new
    return False


def _has_inputs(node: Node) -> bool:
    """Whether a node's value depends on an input of the graph or a tensor that it holds."""
    frontier, seen = [node], {node}
    while frontier:
        current = frontier.pop()
        if current.op in ("placeholder", "get_attr") and isinstance(current.meta.get("val"), torch.Tensor):
            return True
        new = [x for x in current.all_input_nodes if x not in seen]
        seen.update(new)
        frontier += new
    return False


def _is_square_sum(node: Node) -> bool:
    """Whether a node is computed from a reduction of a tensor over both positions."""
    while node.target in VIEWS or node.target in CASTS or node.target in ARITHMETIC or node.target in _PASSED:
        node = node.all_input_nodes[0]
    return node.target in _REDUCTIONS and _is_square(node.all_input_nodes[0])


PARALLEL = Rule(
    name="parallel",
    quiet=True,
    family="recurrence",
    summary="a causal, decaying product of queries, keys and values: a linear recurrence over all positions at once",
    anchors=CONTRACTIONS,
    recognise=recognise,
)

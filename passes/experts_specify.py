"""From the parts of a layer of experts to its specification and operands: what ends the recognition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sympy
import torch
from torch.fx import Node

from effcompile.ir import Computed, Match, Operand
from effcompile.ops.experts import ExpertsSpec
from effcompile.pattern import GraphView, describe
from effcompile.terms import IntLoad, Load, Term
from effcompile.viewmaps import shape_of

from .experts_activation import Activation, activation_of
from .experts_cost import leaving
from .experts_operands import assignment, can_emit
from .experts_read import Projection
from .experts_routes import Routing, S, X
from .experts_terms import C, F, R, RowInterpreter, T, features_of
from .experts_views import Axes, as_view
from .specify import B, D, I, Stop

aten = torch.ops.aten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROW = {2: (I, D), 3: (B, I, D)}
_STACKINGS: dict[tuple[bool, bool], Literal["one", "pair", "experts", "experts_pair"]] = {
    (True, False): "one",
    (True, True): "pair",
    (False, False): "experts",
    (False, True): "experts_pair",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What was found of a layer of experts before it becomes a specification."""

    rows: RowInterpreter
    view: GraphView
    anchor: Node
    routing: Routing
    rest: tuple[Node, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The matrices or biases of all experts: one tensor with a dimension for the experts, or one for each."""

    operands: tuple[Operand, ...]
    experts: Term | None
    """How many, of one tensor."""


def match_of(layer: Layer) -> Match:
    """The match, if what was found can be replaced.

    Raises:
        Stop: it cannot, or the operation has no such form.
    """
    anchor, routing = layer.anchor, layer.routing
    if len(shape_of(anchor)) not in _ROW:
        raise Stop("combine", "the result has more than two dimensions of tokens", anchor)
    activations = [activation_of(x.down.rows, x.up, anchor) for x in routing.readings]
    kinds = {(x.text, x.gated, x.interleaved, len(x.projections)) for x in activations}
    if len(kinds) != 1:
        raise Stop("activation", "experts differ in their activation", anchor)
    activation, dtype = activations[0], _dtype(layer)
    dead = _check_uses(layer)
    matrices = [_stored(layer, [a.projections[k] for a in activations], F, R, dtype) for k in range(len(activation.projections))]
    matrices.append(_stored(layer, [x.down for x in routing.readings], C, F, dtype))
    experts = _count(layer, matrices)
    biases = _biases(layer, activations, dtype)
    factor, x = _input(layer, dtype)
    weighted, weights = _weights(layer, factor, experts)
    axes = _axes(layer)
    ids = assignment(layer.rows, routing.ids, routing.ids, axes, experts, torch.int64, "ids", anchor)
    stacked = matrices[0].experts is not None
    if any((m.experts is not None) != stacked for m in (*matrices, *(b for b in biases if b is not None))):
        raise Stop("weights", "some of the experts' weights are one tensor, others one for each expert", anchor)
    spec = ExpertsSpec(
        activation=activation.text, gated=activation.gated, interleaved=activation.interleaved,
        stacking=_STACKINGS[stacked, activation.is_pair], biased=(biases[0] is not None, biases[-1] is not None),
        weighted=weighted, out=str(anchor.meta["val"].dtype).removeprefix("torch."),
    )  # fmt: skip
    inputs: dict[str, Operand | Computed] = {"x": x, "ids": ids}
    if weights is not None:
        inputs["weights"] = weights
    for name, stored in (("up", matrices[:-1]), ("down", matrices[-1:]), ("bias", [b for b in biases if b is not None])):
        tensors = [operand for part in stored for operand in part.operands]
        inputs.update({f"{name}{k}": operand for k, operand in enumerate(tensors)})
    inputs.update({f"rest{k}": _as_rows(node) for k, node in enumerate(layer.rest)})
    bases = [base for operand in inputs.values() for base in operand.bases]
    return Match(
        family="experts", anchor=anchor, output=anchor, spec=spec, inputs=inputs, interior=frozenset(dead),
        layout=_ROW[len(shape_of(anchor))], leaving=leaving(dead, bases),
        trains=any(layer.view.needs_gradient(base, anchor) for base in bases),
    )  # fmt: skip


def _as_rows(node: Node) -> Operand:
    """A node of the result's shape, as [T, d_out]."""
    shape = shape_of(node)
    views = ((aten.flatten.using_ints, (0, len(shape) - 2)),) if len(shape) > 2 else ()
    return Operand(base=node, views=views, shape=(sympy.Mul(*shape[:-1]), shape[-1]), dtype=node.meta["val"].dtype)


def _dtype(layer: Layer) -> torch.dtype:
    products = [p.node for x in layer.routing.readings for p in (x.down, *x.up)]
    dtypes = {node.meta["val"].dtype for node in products}
    if len(dtypes) != 1:
        raise Stop("dtype", f"the projections are in several dtypes: {sorted(map(str, dtypes))}", layer.anchor)
    (dtype,) = dtypes
    if dtype not in _DTYPES:
        raise Stop("dtype", f"experts in {dtype} have no kernel; float16, bfloat16 and float32 have", layer.anchor)
    if layer.view.strict and dtype is not torch.float32:
        why = f"numerics=strict keeps the rounding between projections to {dtype}, which a fused kernel omits"
        raise Stop("numerics", why, layer.anchor)
    result: torch.dtype = dtype
    return result


def _check_uses(layer: Layer) -> set[Node]:
    """The projections must vanish, or they would be computed twice."""
    dead = layer.view.dead_without(layer.anchor)
    for reading in layer.routing.readings:
        for projection, what in ((reading.down, "second"), *((up, "first") for up in reading.up)):
            if projection.node not in dead:
                user = next((x for x in projection.node.users if x not in dead), projection.node)
                why = f"the experts' {what} projection is also used by {describe(user)}"
                raise Stop("uses", why, projection.node)
    return dead


def _axes(layer: Layer) -> Axes:
    tokens = sympy.Mul(*shape_of(layer.anchor)[:-1])
    return Axes(symbols=(T, S), extents=(tokens, layer.routing.slots))


# -------------------------------------------------------------------- weights and biases


def _stored(layer: Layer, projections: Sequence[Projection], column: Term, row: Term, dtype: torch.dtype) -> _Stored:
    """The matrices [E, row, column] of a projection, or a list of [row, column]."""
    first = projections[0]
    read_at = next(i for i in first.term.index if features_of((i,)))
    width = shape_of(first.node)[first.term.index.index(read_at)]
    height = _extent(layer, first, row)
    loads = [_all_columns(p.matrix, read_at, column) for p in projections]
    return _tensors(layer, loads, Axes(symbols=(row, column), extents=(height, width)), dtype, "matrices")


def _extent(layer: Layer, projection: Projection, row: Term) -> Term:
    matrix = projection.matrix
    return shape_of(layer.rows.loaded[matrix.tensor])[matrix.indices.index(row)]


def _all_columns(load: Load, read_at: Term, column: Term) -> Load:
    """A load at the column that is read as one at any column: `column` is then that of the whole product."""
    result = load.func(load.args[0], *(column if i == read_at else i for i in load.indices))
    assert isinstance(result, Load)
    return result


def _tensors(layer: Layer, loads: Sequence[Load], axes: Axes, dtype: torch.dtype, what: str) -> _Stored:
    for load, key in zip(loads, layer.routing.keys, strict=True):
        if any(i != key for i in load.indices if not features_of((i,))):
            raise Stop("weights", f"the experts' {what} are not those of the experts that were chosen", layer.anchor)
    loads = _over_experts(layer.routing, loads)
    operands = []
    experts: Term | None = None
    for load in loads:
        node = layer.rows.loaded[load.tensor]
        if X in load.indices:
            experts = shape_of(node)[load.indices.index(X)]
        own = axes if experts is None else Axes(symbols=(X, *axes.symbols), extents=(experts, *axes.extents))
        operand = as_view(node, load.indices, own, dtype)
        if operand is None or any(a != b for a, b in zip(operand.shape, own.extents, strict=True)):
            raise Stop("weights", f"the experts' {what} are no view of {describe(node)}", node)
        operands.append(operand)
    return _Stored(operands=tuple(operands), experts=experts)


def _over_experts(routing: Routing, loads: Sequence[Load]) -> list[Load]:
    """One load over the experts e, or one for each expert."""

    def at(load: Load, key: Term) -> Load:
        result = load.func(load.args[0], *(X if i == key else i for i in load.indices))
        assert isinstance(result, Load)
        return result

    general = [at(load, key) for load, key in zip(loads, routing.keys, strict=True)]
    if all(x == general[0] for x in general) and X in general[0].indices:
        return general[:1]
    return list(loads)


def _count(layer: Layer, matrices: Sequence[_Stored]) -> Term:
    """How many experts there are.

    Raises:
        Stop: a spelled-out sum is over fewer of them than there are matrices of.
    """
    experts = matrices[-1].experts
    spelled = len(layer.routing.readings)
    if len({m.experts for m in matrices}) != 1:
        raise Stop("weights", "the two projections are of different numbers of experts", layer.anchor)
    if experts is None or (spelled > 1 and experts != spelled):
        if experts is not None:
            raise Stop("weights", f"the sum is over {spelled} of {experts} experts", layer.anchor)
        return sympy.Integer(spelled)
    return experts


def _biases(layer: Layer, activations: Sequence[Activation], dtype: torch.dtype) -> list[_Stored | None]:
    """Those of the first projection, one or a pair, then that of the second."""
    found: list[_Stored | None] = []
    for k, projection in enumerate(activations[0].projections):
        found.append(_bias(layer, [a.biases[k] for a in activations], projection, F, dtype))
    if len({b is None for b in found}) != 1:
        raise Stop("weights", "one of gate and up has a bias and the other none", layer.anchor)
    loads = []
    for reading in layer.routing.readings:
        added = sympy.expand(reading.added / reading.scale) if reading.added != 0 else reading.down.bias
        if added is not None and (not isinstance(added, Load) or (reading.added != 0 and reading.down.bias is not None)):
            raise Stop("weights", "what is added to the second projection is no bias of the expert", layer.anchor)
        loads.append(added)
    found.append(_bias(layer, loads, layer.routing.readings[0].down, C, dtype))
    return found


def _bias(
    layer: Layer, loads: Sequence[Load | None], projection: Projection, column: Term, dtype: torch.dtype
) -> _Stored | None:  # fmt: skip
    given = [x for x in loads if x is not None]
    if not given:
        return None
    if len(given) != len(loads):
        raise Stop("weights", "some experts have a bias and others none", layer.anchor)
    read_at = next(i for i in projection.term.index if features_of((i,)))
    width = shape_of(projection.node)[projection.term.index.index(read_at)]
    return _tensors(
        layer, [_all_columns(x, read_at, column) for x in given], Axes(symbols=(column,), extents=(width,)), dtype, "biases"
    )  # fmt: skip


# -------------------------------------------------------------------- tokens and their weights


def _input(layer: Layer, dtype: torch.dtype) -> tuple[Term, Operand]:
    """What the tokens are multiplied with, and the tokens [T, d]."""
    terms = {up.rows for reading in layer.routing.readings for up in reading.up}
    if len(terms) != 1:
        raise Stop("tokens", "projections are of different tokens", layer.anchor)
    (term,) = terms
    own = [x for x in sympy.Mul.make_args(term) if isinstance(x, Load) and R in x.free_symbols]
    factor = term / own[0] if len(own) == 1 else None
    if factor is None or factor.has(R):
        raise Stop("tokens", "what the experts are given is no row of a tensor", layer.anchor)
    node = layer.rows.loaded[own[0].tensor]
    if own[0].has(S) or own[0].has(IntLoad):
        raise Stop("tokens", "what the experts are given is not the token's own row", node)
    reading = layer.routing.readings[0]
    size = _extent(layer, reading.up[0], R)
    axes = Axes(symbols=(T, R), extents=(_axes(layer).of(T), size))
    operand = as_view(node, own[0].indices, axes, dtype)
    if operand is None or operand.shape != axes.extents:
        raise Stop("tokens", f"{describe(node)} cannot be read as a view [tokens, channels]", node)
    return factor, operand


def _weights(layer: Layer, factor: Term, experts: Term) -> tuple[Literal["output", "input", "none"], Operand | Computed | None]:
    """The weights of assignments, and what they multiply."""
    scale = _general([reading.scale for reading in layer.routing.readings], layer)
    if scale == 1 and factor == 1:
        return "none", None
    if scale != 1 and factor != 1:
        raise Stop("route", "both what experts are given and what they give is weighted", layer.anchor)
    term = factor if scale == 1 else scale
    if not can_emit(term):
        raise Stop("route", "the weights are not known for the experts of each token alone", layer.anchor)
    loads = [layer.rows.loaded[x.tensor].meta["val"].dtype for x in term.atoms(Load) if not isinstance(x, IntLoad)]
    dtype = loads[0] if isinstance(term, Load) else torch.float32
    weights = assignment(layer.rows, term, layer.routing.ids, _axes(layer), experts, dtype, "weights", layer.anchor)
    return ("input" if scale == 1 else "output"), weights


def _general(terms: Sequence[Term], layer: Layer) -> Term:
    """The term of which those of experts 0, 1, ... are instances, for the expert of the slot."""
    routing = layer.routing
    if all(x == terms[0] for x in terms):
        return terms[0]
    key = routing.keys[-1]
    template = terms[-1].replace(
        lambda x: isinstance(x, Load) and key in x.indices,
        lambda x: x.func(x.args[0], *(X if i == key else i for i in x.indices)),
    )
    if any(template.xreplace({X: k}) != x for x, k in zip(terms, routing.keys, strict=True)):
        raise Stop("route", "experts are weighted in different ways", layer.anchor)
    return template.xreplace({X: routing.ids})

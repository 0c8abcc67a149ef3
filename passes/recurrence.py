"""h_t = a_t * h_{t-1} + x_t as one operation, together with the products that write and read the state where it is a matrix.

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T,   o_t = q_t^T S_t       without S_t for every t in memory

Anchored at `linear_scan`, to which loops, scans and closed forms have been brought. The offset is taken apart into what depends on
the dimension that the read-out sums over (k) and what depends on the others (v); the coefficient into a sum of logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.ir import Computed, Match, Operand, Rejected, Result, Rule, Work
from effcompile.ops.recurrence import OPTIONAL, RecurrenceSpec
from effcompile.pattern import GraphView, describe
from effcompile.terms import Term
from effcompile.viewmaps import Index, shape_of

from .closed_forms import SUM
from .decays import Decay, decay_of
from .factors import Factor, Mixed, Product, aligned, product
from .normalisers import leaves, normaliser_of
from .reads import Read
from .single_steps import STEP
from .sites import Axes, B, C, D, H, I, Site
from .specify import Stop

aten = torch.ops.aten
LINEAR_SCAN = torch.ops.effcompile.linear_scan.default

_KEPT_STATES = 4  # times the operands that states of every step may take, if nothing but them is asked for


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the recurrence behind a `linear_scan`, or say why not."""
    try:
        site = Site(anchor, view)
        if _is_normaliser(site):
            return Rejected(step="anchor", why="it is the normaliser of another recurrence", node=anchor)
        match = _matrix(site)
        if STEP in anchor.meta:
            return _checked_step(site, match)
        return match or _elements(site)
    except Stop as stop:
        return stop.rejected


def _checked_step(site: Site, match: Match | None) -> Match:
    """The match of a step by itself, if its kernel can write to the memory of the state."""
    if match is None:
        raise Stop("reads", "one step of a state that no product writes and reads is one pass over it as it is", site.anchor)
    if match.trains:
        raise Stop("uses", "a gradient needs the state that one step of a recurrence overwrites", site.anchor)
    if match.spec.decay == "full":
        raise Stop("decay", "one step with a decay for each element of the state would write a state of its own", site.anchor)
    return match


def _is_normaliser(site: Site) -> bool:
    """Whether another recurrence takes this one along."""
    if len(site.reads.contractions) != 1:
        return False
    rank, read = len(site.shape), site.reads.contractions[0].node
    for node in site.view.graph.nodes:
        if node.target is LINEAR_SCAN and node is not site.anchor and len(shape_of(node)) == rank + 1:
            try:
                match = _matrix(Site(node, site.view))
            except Stop:
                continue
            if match is not None and read in match.further:
                return True
    return False


# -------------------------------------------------------------------- a matrix that is written and read by products


def _matrix(site: Site) -> Match | None:
    """The recurrence of a matrix, if its states are read by one contraction and written by an outer product; else None."""
    if site.reads.whole or len(site.reads.contractions) != 1:
        return None
    read = site.reads.contractions[0]
    if read.index.count(I) != 1 and STEP not in site.anchor.meta:
        return None
    column = _column(site, read)
    if column is None and SUM in site.anchor.meta:
        return None
    own = {read.summed, column} - {None}

    def is_mixed(factor: Factor) -> bool:
        return own <= factor.symbols if len(own) == 2 else False

    written = product(Factor(site.offset, site.index), site.ranges, is_mixed)
    between = _written_before_decay(site, read, written, is_mixed)
    written = between or written
    keys = [f for f in written.factors if read.summed in f.symbols]
    values = [f for f in written.factors if read.summed not in f.symbols]
    if not keys or any(is_mixed(f) for f in keys):
        return None
    batch = [x for x in _in_order(read.index) if x != column and x != I and site.size(x) != 1]
    if set(batch) | own != {x for x in site.symbols[1:] if site.size(x) != 1} | own:
        return None
    axes = Axes(site, batch, read.summed, column)
    total = None if between else normaliser_of(site, read, [f for f in written.factors if column not in f.symbols], column)
    if total is not None:  # what depends on neither is written with the keys
        keys, values = ([f for f in written.factors if (column in f.symbols) == own_column] for own_column in (False, True))
    decay = decay_of(site.coefficient, site.symbols, site.ranges, own)
    inputs: dict[str, Any] = {
        "v": axes.operand(values, axes.roles(B, H, I, D), "value", full=(B, H, I, D)),
        "q": axes.operand([read.query], axes.roles(B, H, I, C), "query", full=(B, I, C), grouped=True),
        "k": axes.operand(keys, axes.roles(B, H, I, C), "key", written.scale, full=(B, I, C), grouped=True),
    }
    inputs |= _decay_operands(decay, axes)
    if between:
        inputs["gate"] = _one_step_late(inputs["gate"], axes)
    if decay.signed:
        inputs |= _with_signs(decay.signed, inputs, axes, site)
    bonus = None if between else _bonus(site, read, written.factors, axes, is_mixed)
    if bonus is not None:
        inputs["bonus"] = bonus
    initial = site.initial_factor()
    if initial is not None:
        inputs["initial"] = axes.operand(
            [initial], axes.roles(B, H, C, D), "initial state", full=(B, H, C, D), dtype=_state_dtype(site)
        )
    spec = _spec(inputs, "before" if read.before and not between else "after", read.node)
    further = {node: Result(name="final", layout=axes.at(index)) for node, index in site.reads.last.items() if node.users}
    if total is not None and not further and spec.can_normalise:
        spec = replace(spec, normaliser=True)
        further = {total.node: Result(name="normaliser", layout=axes.at(total.index))}
    return _match(site, spec, inputs, read.node, axes.at(read.index), further, matrix=True)


def _in_order(index: Index) -> list[Any]:
    """The symbols of an index, dimension by dimension, the most significant first."""
    found: list[Any] = []
    for term in index:
        found += sorted(term.free_symbols, key=lambda s: -int(term.coeff(s)))
    return found


def _symbols_of(index: Index) -> set[Any]:
    return {s for term in index for s in term.free_symbols}


def _column(site: Site, read: Read) -> Any:
    """The dimension of the values: the last that neither queries nor the decay depend on; else the last that queries do not."""
    free = [x for x in site.symbols[1:] if x != read.summed and x not in read.query.symbols and site.size(x) != 1]
    if not free:
        return None
    decays = frozenset() if site.coefficient is None else aligned(site.coefficient, site.symbols).symbols
    quiet = [x for x in free if x not in decays]
    return (quiet or free)[-1]


def _decay_operands(decay: Decay, axes: Axes) -> dict[str, Any]:
    roles = axes.roles(B, H, I, C, D)
    found: dict[str, Any] = {}
    for name, terms in (("gate", decay.gate), ("rate", decay.rate)):
        if terms:
            found[name] = decay.computed([axes.operand(p.factors, roles, "decay", p.scale) for p in terms], terms)
    return found


def _with_signs(signed: Sequence[Factor], inputs: dict[str, Any], axes: Axes, site: Site) -> dict[str, Any]:
    """Queries and keys times the product of the decay's signs up to their step."""
    if any(D in axes.at(f.index) for f in signed) or any(node.users for node in site.reads.last):
        raise Stop(
            "decay", "a decay that may be negative differs from column to column, or the last state is asked for", site.anchor
        )
    if inputs.get("bonus") is not None or site.reads.contractions[0].before:
        raise Stop("decay", "a decay that may be negative is read before the update", site.anchor)
    roles = axes.roles(B, H, I, C)
    factor = axes.operand(signed, roles, "decay", full=(I,))
    found = {}
    for name in ("q", "k"):
        own = inputs[name]
        parts = own.parts if isinstance(own, Computed) else (own,)
        others = factor.parts if isinstance(factor, Computed) else (factor,)

        def compute(builder: Any, nodes: Sequence[Node], own: Any = own, count: int = len(parts)) -> Node:
            value = own.compute(builder, nodes[:count]) if isinstance(own, Computed) else nodes[0]
            decay = factor.compute(builder, nodes[count:]) if isinstance(factor, Computed) else nodes[count]
            negative = builder.call(aten.lt.Scalar, decay, 0)
            flips = builder.call(aten.cumsum.default, negative, 2)
            odd = builder.call(aten.remainder.Scalar, flips, 2)
            sign = builder.call(aten.rsub.Scalar, builder.call(aten.mul.Scalar, odd, 2), 1)
            return builder.call(aten.mul.Tensor, value, sign)

        heads = own.shape[1] if factor.shape[1] == 1 else axes.extents[H]
        if heads != own.shape[1] and own.shape[1] != 1:
            raise Stop("decay", "a decay that may be negative differs within a group of heads", site.anchor)
        found[name] = Computed(
            parts=(*parts, *others), compute=compute, shape=(own.shape[0], heads, *own.shape[2:]), dtype=own.dtype
        )  # fmt: skip
    return found


def _written_before_decay(site: Site, read: Read, written: Product, is_mixed: Mixed) -> Product | None:
    """What is written to R_t = c_t * (R_{t-1} + x_t) that is read as R_{t-1} + x_t: x, for S_t = c_{t-1} * S_{t-1} + x_t."""
    if not read.before or read.beside is None or site.coefficient is None:
        return None
    beside = product(read.beside, site.ranges, is_mixed)
    decay = aligned(site.coefficient, site.symbols)
    scale, factors = leaves([decay, *beside.factors], site)
    if (scale * beside.scale, factors) != leaves([Factor(site.offset, site.index)], site):
        return None
    if any(node.users for node in site.reads.last):
        raise Stop("reads", "the last state is asked for after a decay that the states before it were read without", site.anchor)
    return beside


def _one_step_late(gate: Operand | Computed, axes: Axes) -> Computed:
    """Log-decays [b, h, t, k, v] of the step before; the first is 0."""
    steps = axes.extents[I]
    length = axes.concrete(steps)
    parts = gate.parts if isinstance(gate, Computed) else (gate,)

    def compute(builder: Any, nodes: Sequence[Node]) -> Node:
        node = gate.compute(builder, nodes) if isinstance(gate, Computed) else nodes[0]
        node = builder.call(aten.expand.default, node, [-1, -1, length, -1, -1])
        first, rest = (builder.call(aten.slice.Tensor, node, 2, 0, end) for end in (1, -1))
        return builder.call(aten.cat.default, [builder.call(aten.zeros_like.default, first), rest], 2)

    return Computed(parts=parts, compute=compute, shape=(*gate.shape[:2], steps, *gate.shape[3:]), dtype=gate.dtype)


def _bonus(site: Site, read: Read, written: Sequence[Factor], axes: Axes, is_mixed: Mixed) -> Operand | Computed | None:
    """`u` of q . (S + u * k v^T)."""
    if read.beside is None:
        return None
    if not read.before:
        raise Stop("reads", "something is added to the states before they are read", read.beside.node)
    beside = product(read.beside, site.ranges, is_mixed)
    rest = list(beside.factors)
    for factor in written:
        if factor not in rest:
            raise Stop("reads", "what is added to the states before they are read is not what is written", read.beside.node)
        rest.remove(factor)
    if any(not f.symbols <= {read.summed, *axes.terms} for f in rest):
        raise Stop("reads", "what is added to the states before they are read is not what is written", read.beside.node)
    return axes.operand(rest, axes.roles(B, H, I, C), "bonus", beside.scale, full=(C,))


# -------------------------------------------------------------------- a state of which every element goes by itself


def _elements(site: Site) -> Match:
    """The recurrence of a vector whose states are asked for as they are."""
    if SUM in site.anchor.meta:
        raise _left_as_sum(site)
    _check_kept(site)
    sizes = {x: site.size(x) for x in site.symbols[1:]}
    own = [x for x in site.symbols[1:] if sizes[x] != 1]
    column = own[-1] if own else None
    axes = Axes(site, [x for x in own if x != column], None, column)
    inputs: dict[str, Any] = {
        "v": axes.operand([Factor(site.offset, site.index)], axes.roles(B, H, I, D), "offset", full=(B, H, I, D),
                          dtype=site.anchor.meta["val"].dtype),
    }  # fmt: skip
    kind: Any = "none"
    if site.coefficient is not None:
        gate = aligned(site.coefficient, site.symbols)
        roles = axes.roles(B, H, I, C, D)
        inputs["gate"] = axes.operand([gate], roles, "coefficient")
        kind = "value" if inputs["gate"].shape[4] != 1 else "head"
    initial = site.initial_factor()
    if initial is not None:
        inputs["initial"] = axes.operand(
            [initial], axes.roles(B, H, C, D), "initial state", full=(B, H, C, D), dtype=_state_dtype(site)
        )
    spec = RecurrenceSpec(
        operands=tuple(name for name in OPTIONAL if name in inputs), decay=kind, gate="factor" if kind != "none" else "log",
        out=str(site.anchor.meta["val"].dtype).removeprefix("torch."),
    )  # fmt: skip
    return _match(site, spec, inputs, site.anchor, axes.at(site.symbols), {}, matrix=False)


def _left_as_sum(site: Site) -> Stop:
    """Why a cumulative sum that a contraction reads is none of products of keys and values."""
    user = next(iter(site.reads.whole), None)
    if user is None or not _written_by_columns(site):
        return Stop("anchor", "a cumulative sum of elements stays as it is", site.anchor)
    return Stop("reads", f"its states of all steps are also used by {describe(user)}", user)


def _written_by_columns(site: Site) -> Product | None:
    """What a state is written by, if it is a product of what differs along some of its dimensions and of what does along others."""
    whole = _symbols_of(site.index)
    found = product(Factor(site.offset, site.index), site.ranges, lambda f: f.symbols == whole)
    return found if len(found.factors) > 1 and all(f.symbols != whole for f in found.factors) else None


def _check_kept(site: Site) -> None:
    """Refuse to keep states of every step where a loop would have kept one."""
    whole = _symbols_of(site.index)
    parts = product(Factor(site.offset, site.index), site.ranges, lambda f: f.symbols == whole)
    states = sympy.Mul(*site.shape)
    needed = sum((sympy.Mul(*shape_of(f.node)) for f in parts.factors), sympy.S.Zero)
    if not (states.is_Integer and sympy.sympify(needed).is_Integer) or not parts.factors:
        return
    if len(parts.factors) > 1 and states > _KEPT_STATES * needed and states > 2**20:
        user = next(iter((*site.reads.whole, *(r.node for r in site.reads.contractions))), site.anchor)
        raise Stop(
            "reads", f"its states, {int(states) * 4 // 2**20} MiB over all steps, would have to be kept for {describe(user)}", user
        )  # fmt: skip


# -------------------------------------------------------------------- the match


def _state_dtype(site: Site) -> torch.dtype:
    return torch.promote_types(site.anchor.meta["val"].dtype, torch.float32)


def _spec(inputs: dict[str, Any], read: Any, output: Node) -> RecurrenceSpec:
    return RecurrenceSpec(
        operands=tuple(name for name in OPTIONAL if name in inputs), decay=_decay_kind(inputs), gate="log", read=read,
        out=str(output.meta["val"].dtype).removeprefix("torch."),
    )  # fmt: skip


def _decay_kind(inputs: dict[str, Any]) -> Any:
    """Along which dimensions of the state the decay differs."""
    given = [inputs[name] for name in ("gate", "rate") if name in inputs]
    if not given:
        return "none"
    rows, columns = (any(x.shape[k] != 1 for x in given) for k in (3, 4))
    return {(False, False): "head", (True, False): "key", (False, True): "value", (True, True): "full"}[rows, columns]


def _match(
    site: Site,
    spec: RecurrenceSpec,
    inputs: dict[str, Any],
    output: Node,
    layout: Index,
    last: dict[Node, Result],
    *,
    matrix: bool,
) -> Match:
    view = site.view
    dead = view.dead_without(output, *last)
    if matrix and site.anchor not in dead:
        raise Stop("uses", "the states are also used by something else", site.anchor)
    ordered = {name: inputs[name] for name in ("v", *spec.operands)}
    trains = any(view.needs_gradient(node, site.anchor) for x in ordered.values() for node in x.bases)
    return Match(
        family="recurrence", anchor=site.anchor, output=output, spec=spec, inputs=ordered, interior=frozenset(dead), layout=layout,
        further=last, trains=trains, leaving=_leaving(site),
    )  # fmt: skip


def _leaving(site: Site) -> Work:
    """One step after the other: a few small operations each, which read and write the state.

    A step by itself is one kernel of Inductor's if what is read is a sum along the state's dense dimension. Across it, or by a
    product of matrices, that is a kernel of its own, which reads the state once more.
    """
    if STEP in site.anchor.meta:
        state = sympy.Mul(*site.shape[1:])
        apart = not _is_summed_densely(site)
        return Work(flops=6 * state, bytes=(12 if apart else 8) * state, launches=2 if apart else 1)
    steps, state = site.shape[0], sympy.Mul(*site.shape[1:])
    return Work(flops=4 * steps * state, bytes=12 * steps * state, launches=_count(steps) * 3)


def _is_summed_densely(site: Site) -> bool:
    read = next(iter(site.reads.contractions), None)
    if read is None or read.node.target is not aten.sum.dim_IntList or not isinstance(site.initial, Node):
        return False
    return bool(site.initial.meta["val"].stride(site.symbols.index(read.summed) - 1) == 1)


def _count(steps: Term) -> int:
    return int(steps) if steps.is_Integer else 1024


RECURRENCE = Rule(
    name="recurrence",
    family="recurrence",
    summary="a linear recurrence, as a loop, a scan or in closed form",
    anchors=frozenset({LINEAR_SCAN}),
    recognise=recognise,
)

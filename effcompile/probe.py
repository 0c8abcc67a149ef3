"""Evaluates part of a graph in float64 at a few places: each node at the indices that are needed of each of its dimensions.

    y[b, t, h, p] wanted at b in {0}, t in {0, 15, 16}, h in {0, 7}, p in {1}
    ->  k needed at t in {0, .., 16}, all n;   the mask at rows {0, 15} and all columns;   ...

What is needed is found from the outputs back, each node once; then all are computed, from the inputs on. Every operation has a
derivative. So a recurrence over thousands of steps and dozens of heads is evaluated in milliseconds.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .expr import constant_value
from .rules import wrap_dim

aten = torch.ops.aten

Places = tuple[np.ndarray[Any, Any], ...]
"""The indices that are needed of each dimension, ascending."""

_MOST_ELEMENTS = 1 << 25


class Unsupported(Exception):
    """An operation that is not evaluated here, or too much of one."""


@dataclass(frozen=True)
class Plan:
    """What an operation needs, and how its value comes of that."""

    needs: Sequence[tuple[Node, Places]]
    compute: Callable[..., Tensor]


Planner = Callable[[Node, Places], Plan]
PLANNERS: dict[Any, Planner] = {}


def supports(node: Node) -> bool:
    """Whether a node can be evaluated from its inputs."""
    if node.op != "call_function":
        return constant_value(node) is not None
    if node.target is operator.getitem:
        return node.args[0].target in _PARTS or node.args[0].target in _EXTREMES  # type: ignore[union-attr]
    return node.target in PLANNERS or node.target in _PARTS or node.target in _EXTREMES or _is_pointwise(node)


def shape(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor.

    Raises:
        Unsupported: it is not a tensor of known size.
    """
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
        raise Unsupported(f"{node.name} has no known size")
    return tuple(value.shape)


def everywhere(node: Node) -> Places:
    """All of a node."""
    return tuple(np.arange(n) for n in shape(node))


class Probe:
    """The nodes that `outputs` need at some places, down to `leaves`."""

    def __init__(self, outputs: Mapping[Node, Places], leaves: Sequence[Node], order: Mapping[Node, int]):
        self.places: dict[Node, Places] = {}
        self.plans: list[tuple[Node, Plan]] = []
        self._plan(outputs, set(leaves), order)

    def _plan(self, outputs: Mapping[Node, Places], leaves: set[Node], order: Mapping[Node, int]) -> None:
        pending: dict[Node, list[Places]] = {node: [places] for node, places in outputs.items()}
        queue = [(-order[node], node.name, node) for node in pending]
        heapq.heapify(queue)
        while queue:
            *_, node = heapq.heappop(queue)
            self.places[node] = places = _union(pending.pop(node))
            if np.prod([len(p) for p in places], dtype=np.int64) > _MOST_ELEMENTS:
                raise Unsupported(f"too much of {node.name} is needed")
            if node in leaves:
                continue
            plan = plan_of(node, places)
            self.plans.append((node, plan))
            for source, needed in plan.needs:
                if source not in pending:
                    heapq.heappush(queue, (-order[source], source.name, source))
                pending.setdefault(source, []).append(needed)
        self.plans.reverse()

    def run(self, given: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        """The values of all nodes at their places, from those of the leaves at theirs."""
        values = dict(given)
        for node, plan in self.plans:
            inputs = [_taken(values[source], self.places[source], needed) for source, needed in plan.needs]
            values[node] = plan.compute(*inputs)
        return values

    def value(self, values: Mapping[Node, Tensor], node: Node, places: Places) -> Tensor:
        """A node's value at some of its places."""
        return _taken(values[node], self.places[node], places)


def plan_of(node: Node, places: Places) -> Plan:
    """What a node's value at some places is computed from.

    Raises:
        Unsupported: that is not known.
    """
    planner = PLANNERS.get(node.target)
    if planner is not None and node.op == "call_function":
        return planner(node, places)
    if node.op == "call_function" and _is_pointwise(node):
        return _pointwise(node, places)
    constant = constant_value(node)
    if constant is not None:
        return Plan([], lambda: torch.full(_lengths(places), constant, dtype=_float(node)))
    raise Unsupported(f"{node.target} is not evaluated")


def _union(several: list[Places]) -> Places:
    if len(several) == 1:
        return several[0]
    return tuple(_unique(np.concatenate(dims)) for dims in zip(*several, strict=True))


def _unique(indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.unique(indices)


def _taken(value: Tensor, has: Places, needed: Places) -> Tensor:
    for dim, (mine, wanted) in enumerate(zip(has, needed, strict=True)):
        if len(mine) != len(wanted):
            value = value.index_select(dim, torch.from_numpy(np.searchsorted(mine, wanted)))
    return value


def _lengths(places: Places) -> list[int]:
    return [len(p) for p in places]


def _plans(*targets: Any) -> Callable[[Planner], Planner]:
    def register(planner: Planner) -> Planner:
        PLANNERS.update(dict.fromkeys(targets, planner))
        return planner

    return register


# -------------------------------------------------------------------- element by element

_ELEMENTWISE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_FIRST = np.zeros(1, dtype=np.int64)


def _is_pointwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    pure = torch.Tag.nondeterministic_seeded not in tags and getattr(node.target, "_schema", None) is not None
    return node.target in _ELEMENTWISE or (pure and torch.Tag.pointwise in tags and not node.target._schema.is_mutable)  # type: ignore[union-attr]


def broadcast_places(places: Places, of: Node) -> Places:
    """The places of an operand of an element-wise operation."""
    sizes = shape(of)
    tail = places[len(places) - len(sizes) :]
    return tuple(_FIRST if n == 1 else p for p, n in zip(tail, sizes, strict=True))


def _pointwise(node: Node, places: Places) -> Plan:
    operands = [x for x in node.all_input_nodes]
    if any(not isinstance(x.meta.get("val"), Tensor) for x in operands):
        raise Unsupported(f"{node.name} depends on a size")

    integral = _float(node) is torch.float64 and not any(_float(x) is torch.float64 for x in operands)

    def compute(*values: Tensor) -> Tensor:
        if integral:  # integers of which torch makes numbers of the default dtype
            values = tuple(x if x.dtype is torch.bool else x.double() for x in values)
        named = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: named[x])
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result

    return Plan([(x, broadcast_places(places, x)) for x in operands], compute)


@_plans(aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
        aten._autocast_to_reduced_precision.default, aten._autocast_to_full_precision.default)  # fmt: skip
def _cast(node: Node, places: Places) -> Plan:
    dtype = node.meta["val"].dtype
    kept = torch.float64 if dtype.is_floating_point else dtype
    return Plan([(node.args[0], places)], lambda x: x.to(kept))  # type: ignore[list-item]


@_plans(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default,
        aten.lift_fresh.default)  # fmt: skip
def _same(node: Node, places: Places) -> Plan:
    return Plan([(node.args[0], places)], lambda x: x)  # type: ignore[list-item]


# -------------------------------------------------------------------- constants


def _float(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return torch.float64 if dtype.is_floating_point else dtype


@_plans(aten.full.default, aten.full_like.default, aten.new_full.default, aten.ones.default, aten.ones_like.default,
        aten.new_ones.default, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
        aten.scalar_tensor.default)  # fmt: skip
def _constant(node: Node, places: Places) -> Plan:
    name = node.target.__name__.split(".")[0].removeprefix("new_").removesuffix("_like")  # type: ignore[union-attr]
    at = {"scalar_tensor": 0, "full": 2 if node.target is aten.new_full.default else 1}.get(name)
    value: Any = {"ones": 1, "zeros": 0}.get(name) if at is None else node.args[at]
    if isinstance(value, Node):
        raise Unsupported(f"{node.name} depends on a size")
    return Plan([], lambda: torch.full(_lengths(places), value, dtype=_float(node)))


@_plans(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(node: Node, places: Places) -> Plan:
    start = 0 if node.target is aten.arange.default else node.args[0]
    step = node.args[2] if len(node.args) > 2 else 1
    return Plan([], lambda: (torch.from_numpy(places[0]) * step + start).to(_float(node)))  # type: ignore[operator]


@_plans(aten.eye.default, aten.eye.m)
def _eye(node: Node, places: Places) -> Plan:
    return Plan([], lambda: torch.from_numpy(places[0][:, None] == places[1]).to(_float(node)))


@_plans(aten.tril.default, aten.triu.default)
def _triangle(node: Node, places: Places) -> Plan:
    diagonal: Any = node.args[1] if len(node.args) > 1 else 0
    rows, columns = places[-2][:, None], places[-1]
    kept = columns <= rows + diagonal if node.target is aten.tril.default else columns >= rows + diagonal
    mask = torch.from_numpy(np.asarray(kept))
    return Plan([(node.args[0], places)], lambda x: torch.where(mask, x, torch.zeros((), dtype=x.dtype)))  # type: ignore[list-item]


# -------------------------------------------------------------------- views


def _rearranged(node: Node, places: Places, order: Sequence[int]) -> Plan:
    """Dimension `d` of the result is `order[d]` of the source."""
    there: list[Any] = [None] * len(order)
    for dim, source in enumerate(order):
        there[source] = places[dim]
    return Plan([(node.args[0], tuple(there))], lambda x: x.permute(*order))  # type: ignore[list-item]


@_plans(aten.transpose.int)
def _transpose(node: Node, places: Places) -> Plan:
    order = list(range(len(places)))
    a, b = (wrap_dim(int(d), len(order)) for d in node.args[1:3])  # type: ignore[call-overload]
    order[a], order[b] = order[b], order[a]
    return _rearranged(node, places, order)


@_plans(aten.t.default, aten.mT.default, aten.numpy_T.default)
def _swapped(node: Node, places: Places) -> Plan:
    order = list(range(len(places)))
    return _rearranged(node, places, [*order[:-2], *order[-2:][::-1]])


@_plans(aten.permute.default)
def _permute(node: Node, places: Places) -> Plan:
    return _rearranged(node, places, [wrap_dim(d, len(places)) for d in node.args[1]])  # type: ignore[union-attr, arg-type]


@_plans(aten.unsqueeze.default)
def _unsqueeze(node: Node, places: Places) -> Plan:
    dim = wrap_dim(int(node.args[1]), len(places))  # type: ignore[call-overload]
    return Plan([(node.args[0], places[:dim] + places[dim + 1 :])], lambda x: x.unsqueeze(dim))  # type: ignore[list-item]


@_plans(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    return Plan([(source, broadcast_places(places, source))], lambda x: x.expand(_lengths(places)))


@_plans(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view_as.default)  # fmt: skip
def _reshape(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    mine, its = shape(node), shape(source)
    there: list[np.ndarray[Any, Any]] = []
    picks: list[Tensor] = []
    for own, other in groups(mine, its):
        linear = np.zeros(1, dtype=np.int64)
        for d in own:
            linear = (linear[:, None] * mine[d] + places[d]).ravel()
        digits = np.unravel_index(linear, [its[d] for d in other]) if other else ()
        needed = [_unique(x) for x in digits]
        there += needed
        position = np.zeros(len(linear), dtype=np.int64)
        for x, needs in zip(digits, needed, strict=True):
            position = position * len(needs) + np.searchsorted(needs, x)
        picks.append(torch.from_numpy(position))
    counts = [int(np.prod([len(there[d]) for d in other], dtype=np.int64)) for _, other in groups(mine, its)]

    def compute(x: Tensor) -> Tensor:
        x = x.reshape(counts)
        for dim, pick in enumerate(picks):
            if len(pick) != x.shape[dim] or not torch.equal(pick, torch.arange(len(pick))):
                x = x.index_select(dim, pick)
        return x.reshape(_lengths(places))

    return Plan([(source, tuple(there))], compute)


def groups(outer: Sequence[int], inner: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of two shapes that hold equally many elements."""
    found: list[tuple[list[int], list[int]]] = []
    o = n = 0
    while o < len(outer) or n < len(inner):
        own, other = list[int](), list[int]()
        a = b = 1
        while (not own and not other) or a != b:
            if (a <= b and o < len(outer)) or n == len(inner):
                own.append(o)
                a, o = a * outer[o], o + 1
            else:
                other.append(n)
                b, n = b * inner[n], n + 1
        found.append((own, other))
    return found


@_plans(aten.select.int)
def _select(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    dim, size = _dim(node, 1, source), shape(source)
    position = np.array([wrap_dim(int(node.args[2]), size[dim])])  # type: ignore[call-overload]
    return Plan([(source, (*places[:dim], position, *places[dim:]))], lambda x: x.squeeze(dim))


@_plans(aten.slice.Tensor)
def _slice(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    dim = _dim(node, 1, source)
    taken = span(node, 2, shape(source)[dim])
    there = np.arange(taken.start, taken.stop, taken.step)[places[dim]]
    return Plan([(source, (*places[:dim], there, *places[dim + 1 :]))], lambda x: x)


def span(node: Node, first: int, size: int) -> range:
    """The positions that the arguments start, end, step of a slice name."""
    given = [*node.args[first:], *[None] * 3][:3]
    if any(isinstance(x, Node) for x in given):
        raise Unsupported(f"{node.name} depends on a size")
    return range(*slice(*given).indices(size))


def _dim(node: Node, at: int, source: Node) -> int:
    return wrap_dim(int(node.args[at]) if len(node.args) > at else 0, len(shape(source)))  # type: ignore[call-overload]


_PARTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.unbind.int)
_EXTREMES = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default, aten.cummax.default: aten.cummax.default}


@_plans(operator.getitem)
def _part(node: Node, places: Places) -> Plan:
    whole, position = node.args
    assert isinstance(whole, Node) and isinstance(position, int)
    source = whole.args[0]
    if whole.target in _EXTREMES and position == 0:
        return _extreme(whole, places)
    if whole.target not in _PARTS or not isinstance(source, Node):
        raise Unsupported(f"a part of {whole.target} is not evaluated")
    dim = wrap_dim(int(whole.args[_at(whole)]) if len(whole.args) > _at(whole) else 0, len(shape(source)))  # type: ignore[call-overload]
    if whole.target is aten.unbind.int:
        there = np.array([range(shape(source)[dim])[position]])
        return Plan([(source, (*places[:dim], there, *places[dim:]))], lambda x: x.squeeze(dim))
    pieces = whole.meta["val"]
    start = sum(int(piece.shape[dim]) for piece in pieces[: range(len(pieces))[position]])
    return Plan([(source, (*places[:dim], places[dim] + start, *places[dim + 1 :]))], lambda x: x)


def _at(whole: Node) -> int:
    return 1 if whole.target is aten.unbind.int else 2


@_plans(aten.flip.default)
def _flip(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    dims = [wrap_dim(d, len(places)) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    sizes = shape(source)
    there = tuple((sizes[d] - 1 - p)[::-1].copy() if d in dims else p for d, p in enumerate(places))
    return Plan([(source, there)], lambda x: x.flip(dims))


@_plans(aten.repeat_interleave.self_int)
def _repeat_interleave(node: Node, places: Places) -> Plan:
    source, repeats = node.args[:2]
    if len(node.args) < 3 or node.args[2] is None or not isinstance(repeats, int) or not isinstance(source, Node):
        raise Unsupported("repeat_interleave of all dimensions is not evaluated")
    dim = _dim(node, 2, source)
    digits = places[dim] // repeats
    needed = _unique(digits)
    pick = torch.from_numpy(np.searchsorted(needed, digits))
    return Plan([(source, (*places[:dim], needed, *places[dim + 1 :]))], lambda x: x.index_select(dim, pick))


# -------------------------------------------------------------------- several tensors into one


@_plans(aten.cat.default)
def _cat(node: Node, places: Places) -> Plan:
    parts = [part for part in node.args[0] if len(shape(part)) == len(places)]  # type: ignore[union-attr, arg-type]
    dim = wrap_dim(int(node.args[1]) if len(node.args) > 1 else 0, len(places))  # type: ignore[call-overload]
    needs: list[tuple[Node, Places]] = []
    start = 0
    for part in parts:
        end = start + shape(part)[dim]  # type: ignore[arg-type]
        here = places[dim][(places[dim] >= start) & (places[dim] < end)] - start
        if len(here):
            needs.append((part, (*places[:dim], here, *places[dim + 1 :])))  # type: ignore[arg-type]
        start = end
    return Plan(needs, lambda *xs: torch.cat(xs, dim))


@_plans(aten.stack.default)
def _stack(node: Node, places: Places) -> Plan:
    dim = wrap_dim(int(node.args[1]) if len(node.args) > 1 else 0, len(places))  # type: ignore[call-overload]
    rest = places[:dim] + places[dim + 1 :]
    return Plan([(node.args[0][k], rest) for k in places[dim]], lambda *xs: torch.stack(xs, dim))  # type: ignore[index, misc]


@_plans(aten.pad.default, aten.constant_pad_nd.default)
def _pad(node: Node, places: Places) -> Plan:
    source, pads = node.args[:2]
    rest = node.args[3:] if node.target is aten.pad.default else node.args[2:]
    if node.target is aten.pad.default and len(node.args) > 2 and node.args[2] != "constant":
        raise Unsupported("padding other than with a constant is not evaluated")
    fill: Any = (rest[0] if rest else 0) or 0
    sizes = shape(source)  # type: ignore[arg-type]
    kept, there = [], []
    for dim, p in enumerate(places):
        before = int(pads[2 * (len(places) - 1 - dim)]) if 2 * (len(places) - 1 - dim) < len(pads) else 0  # type: ignore[index, arg-type, call-overload]
        inside = (p >= before) & (p < before + sizes[dim])
        kept.append(torch.from_numpy(np.flatnonzero(inside)))
        there.append(p[inside] - before)

    def compute(*xs: Tensor) -> Tensor:
        if not xs:
            return torch.full(_lengths(places), fill, dtype=_float(node))
        value = xs[0]
        for dim, positions in enumerate(kept):
            if len(positions) != len(places[dim]):
                size = [*value.shape[:dim], len(places[dim]), *value.shape[dim + 1 :]]
                value = torch.full(size, fill, dtype=value.dtype).index_copy(dim, positions, value)
        return value

    empty = any(len(p) == 0 for p in there)
    return Plan([] if empty else [(source, tuple(there))], compute)  # type: ignore[list-item]


@_plans(aten.select_scatter.default, aten.slice_scatter.default)
def _scatter(node: Node, places: Places) -> Plan:
    """The buffer, with what was written in its place."""
    buffer, written = node.args[:2]
    assert isinstance(buffer, Node) and isinstance(written, Node)
    dim = _dim(node, 2, buffer)
    size = shape(buffer)[dim]
    is_select = node.target is aten.select_scatter.default
    there = [wrap_dim(int(node.args[3]), size)] if is_select else list(span(node, 3, size))  # type: ignore[call-overload]
    inside = np.isin(places[dim], there)
    old, new = np.flatnonzero(~inside), np.flatnonzero(inside)
    needs: list[tuple[Node, Places]] = []
    if len(old):
        needs.append((buffer, (*places[:dim], places[dim][old], *places[dim + 1 :])))
    if len(new) and is_select:
        needs.append((written, places[:dim] + places[dim + 1 :]))
    elif len(new):
        needs.append((written, (*places[:dim], np.searchsorted(there, places[dim][new]), *places[dim + 1 :])))
    back = torch.from_numpy(np.argsort(np.concatenate([old, new]), kind="stable"))

    def compute(*xs: Tensor) -> Tensor:
        parts = list(xs)
        if len(new) and is_select:
            parts[-1] = parts[-1].unsqueeze(dim)
        return torch.cat(parts, dim).index_select(dim, back) if len(parts) > 1 else parts[0]

    return Plan(needs, compute)


# -------------------------------------------------------------------- sums


@_plans(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
def _reduce(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    sizes = shape(source)
    dims = [wrap_dim(d, len(sizes)) for d in (node.args[1] or range(len(sizes)))]  # type: ignore[union-attr, arg-type]
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    kept = iter(places)
    there = []
    for d, n in enumerate(sizes):
        own = next(kept) if keep or d not in dims else None
        there.append(np.arange(n) if d in dims else own)
    operation: Any = {aten.sum.dim_IntList: torch.sum, aten.mean.dim: torch.mean, aten.amax.default: torch.amax}.get(
        node.target, torch.amin
    )
    return Plan([(source, tuple(there))], lambda x: operation(x, dim=dims, keepdim=keep))  # type: ignore[arg-type]


def _extreme(whole: Node, places: Places) -> Plan:
    source: Node = whole.args[0]  # type: ignore[assignment]
    dim = _dim(whole, 1, source)
    if whole.target is aten.cummax.default:
        return _accumulated(source, dim, places, lambda x: torch.cummax(x, dim)[0])
    keep = len(whole.args) > 2 and bool(whole.args[2])
    rest = places[dim + 1 :] if keep else places[dim:]
    there = (*places[:dim], np.arange(shape(source)[dim]), *rest)
    operation = torch.amax if whole.target is aten.max.dim else torch.amin
    return Plan([(source, there)], lambda x: operation(x, dim=dim, keepdim=keep))


@_plans(aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default)
def _cumulative(node: Node, places: Places) -> Plan:
    source: Node = node.args[0]  # type: ignore[assignment]
    dim = _dim(node, 1, source)
    operation: Any = {aten.cumsum.default: torch.cumsum, aten.cumprod.default: torch.cumprod}.get(node.target, torch.logcumsumexp)
    return _accumulated(source, dim, places, lambda x: operation(x, dim))


def _accumulated(source: Node, dim: int, places: Places, operation: Callable[[Tensor], Tensor]) -> Plan:
    up_to = np.arange(int(places[dim].max()) + 1)
    pick = torch.from_numpy(places[dim])
    there = (*places[:dim], up_to, *places[dim + 1 :])
    return Plan([(source, there)], lambda x: operation(x).index_select(dim, pick))


@_plans(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _product(node: Node, places: Places) -> Plan:
    left, right = node.args
    assert isinstance(left, Node) and isinstance(right, Node)
    ranks = [len(shape(x)) for x in (left, right)]
    if min(ranks) < 2:
        raise Unsupported("a product with a vector is not evaluated")
    inner = np.arange(shape(left)[-1])
    batch = places[:-2]
    needs = []
    for operand, rank, own in ((left, ranks[0], (places[-2], inner)), (right, ranks[1], (inner, places[-1]))):
        sizes = shape(operand)
        lead = batch[len(batch) - (rank - 2) :]
        needs.append((operand, (*(_FIRST if n == 1 else p for p, n in zip(lead, sizes[:-2], strict=True)), *own)))
    return Plan(needs, torch.matmul)


@_plans(aten.einsum.default)
def _einsum(node: Node, places: Places) -> Plan:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    if "->" not in equation or "." in equation:
        raise Unsupported("an einsum without an explicit result is not evaluated")
    inputs, out = equation.replace(" ", "").split("->")
    at = dict(zip(out, places, strict=True))
    needs: list[tuple[Node, Places]] = []
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        assert isinstance(operand, Node)
        sizes = shape(operand)
        needs.append((operand, tuple(_FIRST if n == 1 else at.get(x, np.arange(n)) for x, n in zip(letters, sizes, strict=True))))
    return Plan(needs, lambda *xs: torch.einsum(equation, *xs))
